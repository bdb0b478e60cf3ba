"""Loss and model functions from nnx models."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from flax import nnx

from hessjax._core._messages import checked_choice, checked_function, shown
from hessjax._core._types import LossFn, ModelFn, Params
from hessjax.flax._linen import Inputs, Loss, OutputLoss, arguments, check_hashable

Mode: TypeAlias = Literal["eval", "train"]
"""How BatchNorm and dropout are set."""


class NnxModel(NamedTuple):
    """A model as a function, and the point it was taken at.

    Attributes:
        model_fn: `model_fn(params, batch, state) -> outputs`.
        params: the model's `nnx.Param`s as arrays, `nnx.as_pure(nnx.state(model, nnx.Param))`.
        state: everything else the model holds, an `nnx.State` of arrays.
    """

    model_fn: ModelFn
    params: Params
    state: Any


class NnxLoss(NamedTuple):
    """A loss and the point it was taken at.

    Attributes:
        loss_fn: `loss_fn(params, batch, state) -> scalar`.
        params: the model's `nnx.Param`s as arrays, `nnx.as_pure(nnx.state(model, nnx.Param))`.
        state: everything else the model holds (batch statistics, dropout keys), an `nnx.State` of arrays.
    """

    loss_fn: LossFn
    params: Params
    state: Any


def nnx_loss(
    model: Any,
    loss: OutputLoss,
    *,
    inputs: Inputs = 0,
    mode: Mode = "eval",
    **call_kwargs: Any,
) -> NnxLoss:
    """The loss of an nnx model, as a pure function of its params, with those params and the rest.

    The model itself is left as it is. In `mode="eval"` BatchNorm uses its running statistics and dropout is
    off; in `mode="train"` BatchNorm uses the batch's statistics and dropout the keys in `state`, the same at
    every call, and what the model updates on the way is dropped.

    Args:
        model: an `nnx.Module`.
        loss: `(outputs, batch) -> scalar`, the mean over the batch. Give a function of your module's top
            level: a lambda written anew is a new function, and retraces.
        inputs: what the model takes from a batch, as in `linen_loss`.
        mode: whether the copy that the loss calls is set by `model.eval()` or by `model.train()`.
        **call_kwargs: further static arguments of the model's call.

    Returns:
        `NnxLoss(loss_fn, params, state)`: `loss_fn(params, batch, state=None) -> scalar` in the units of
        `loss`, hashable, equal for models of equal architecture. `params` and `state` are `nnx.State`s of
        arrays, which `nnx.as_pure(nnx.grad(...)(model))`, `nnx.as_pure(optimizer.opt_state)` and
        `adam_preconditioner(optimizer)` agree with; a Param that is shared is one leaf. `loss_fn` takes
        them as States of Variables and as nested dicts too. `nnx.update(model, params)` puts changed params
        back into the model. For other dropout keys, `nnx.reseed(model, dropout=1)` and call this again.

    Raises:
        TypeError: if `loss`, `inputs` or an argument is not hashable.
        ValueError: if the model has no `nnx.Param`; on a call, if `params` or `state` do not fit the model,
            a dropout layer has no key, or the batch has no such inputs.

    Cost:
        One `nnx.split`; the arrays are not copied. A call costs the model's.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from hessjax.flax import nnx_loss
        >>> def loss(outputs, batch):
        ...     return optax.l2_loss(outputs, batch[1]).mean()
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> loss_fn, params, state = nnx_loss(model, loss)
        >>> batch = (jnp.ones((4, 2)), jnp.zeros((4, 1)))
        >>> grads = jax.grad(loss_fn)(params, batch, state)
        >>> grads["kernel"].shape
        (2, 1)
        >>> nnx.update(model, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads))
        >>> bool(loss(model(batch[0]), batch) < loss_fn(params, batch, state))
        True
    """
    check_hashable(loss=loss)
    checked_function("loss", loss, "(outputs, batch) -> scalar")
    model_fn, params, state = nnx_model(model, inputs=inputs, mode=mode, **call_kwargs)
    return NnxLoss(Loss(model_fn, loss), params, state)


def nnx_model(model: Any, *, inputs: Inputs = 0, mode: Mode = "eval", **call_kwargs: Any) -> NnxModel:
    """An nnx model as a pure function of its params, for `hessjax.ggn` and `hessjax.fisher`.

    Args:
        model: an `nnx.Module`; it is left as it is.
        inputs: what the model takes from a batch, as in `linen_loss`.
        mode: `"eval"` or `"train"`, as in `nnx_loss`.
        **call_kwargs: further static arguments of the model's call.

    Returns:
        `NnxModel(model_fn, params, state)`: `model_fn(params, batch, state=None) -> outputs`, hashable, equal
        for models of equal architecture. `ggn` passes all these arguments to its loss too: with a state,
        write `def loss(outputs, batch, *_)`.

    Raises:
        TypeError: if `inputs` or an argument is not hashable.
        ValueError: as `nnx_loss`.

    Cost:
        One `nnx.split`; the arrays are not copied. A call costs the model's.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import hessjax as hj
        >>> from hessjax.flax import nnx_model
        >>> model_fn, params, state = nnx_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> A = hj.fisher(model_fn, params, jnp.ones((4, 2)), state, likelihood=hj.likelihoods.gaussian)
        >>> A(nnx.State({"bias": jnp.ones(3), "kernel": jnp.zeros((2, 3))}))["kernel"].tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    check_hashable(inputs=inputs, **call_kwargs)
    checked_choice("mode", mode, ("eval", "train"))
    check_model(model)
    # As a graph whatever flax's setting: in its tree mode a shared Param is refused.
    with nnx.set_graph_mode(True):
        copy = nnx.merge(*nnx.split(model))  # `eval` and `train` change a model in place
        copy.eval() if mode == "eval" else copy.train()
        graphdef, params, state = nnx.split(copy, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"`model` must hold at least one nnx.Param, but {type(model).__name__} has none.")
    model_fn = _NnxModel(graphdef, inputs, tuple(sorted(call_kwargs.items())))
    return NnxModel(model_fn, nnx.as_pure(params), nnx.as_pure(state))


def check_model(model: Any) -> None:
    """Raise a TypeError for what is no nnx model, such as the class of one."""
    if isinstance(model, type) or not isinstance(model, nnx.Module) or not callable(model):
        raise TypeError(f"`model` must be an `nnx.Module`, made with its `rngs`, got {shown(model)}.")


@dataclass(frozen=True)
class _NnxModel:
    graphdef: Any
    inputs: Inputs
    kwargs: tuple[tuple[str, Hashable], ...]

    def __call__(self, params: Params, batch: Any, state: Any = None) -> Any:
        try:
            # A fresh copy at every call: what the model updates on the way is dropped with it.
            model = nnx.merge(self.graphdef, params, state or {}, copy=True)
        except ValueError as error:
            raise ValueError(
                "`params` and `state` must be those of `nnx_loss` or `nnx_model`, with no more than other "
                f"values. {error}"
            ) from error
        return model(*arguments(batch, self.inputs), **dict(self.kwargs))
