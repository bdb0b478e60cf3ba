"""Loss and model functions from Flax models, linen and nnx: pure, hashable, equal when of equal parts.

What a model mutates or draws (batch statistics, dropout keys) enters the loss through its arguments, so
the loss is one fixed function of the weights. Two losses made of equal parts compare equal: building one
again for the next checkpoint hits the compiled code of the last.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import errors, nnx

from hessjax._typing import LossFn, ModelFn, Params

OutputLoss: TypeAlias = Callable[[Any, Any], Any]
"""`loss(outputs, batch) -> scalar`, the mean over the batch."""

Inputs: TypeAlias = int | str | tuple[int | str, ...] | Callable[[Any], Any]
"""Which part of a batch the model takes: a key, several keys (positional arguments), or a function."""


class NnxModel(NamedTuple):
    """A model as a function, and the point it was taken at.

    Attributes:
        model_fn: `model_fn(params, batch, state) -> outputs`.
        params: the model's `nnx.Param`s, a nested dict of arrays.
        state: everything else the model holds, a nested dict of arrays.
    """

    model_fn: ModelFn
    params: Params
    state: Any


class NnxLoss(NamedTuple):
    """A loss and the point it was taken at.

    Attributes:
        loss_fn: `loss_fn(params, batch, state) -> scalar`.
        params: the model's `nnx.Param`s, a nested dict of arrays.
        state: everything else the model holds (batch statistics, dropout keys), a nested dict of arrays.
    """

    loss_fn: LossFn
    params: Params
    state: Any


def linen_loss(module: Any, loss: OutputLoss, *, inputs: Inputs = 0, **apply_kwargs: Any) -> LossFn:
    """The loss of a linen module, as a pure function of its params.

    Returns f(params, batch, state, rngs) = loss(module(inputs of batch), batch). BatchNorm uses the running
    statistics in `state` or the batch's own, as `apply_kwargs` tell the module; updates of the collections
    in `state` are computed and dropped.

    Args:
        module: a `flax.linen.Module`. Its fields must be hashable, or lists and dicts of what is.
        loss: `(outputs, batch) -> scalar`, the mean over the batch. Give a function of your module's top
            level: a lambda written anew is a new function, and retraces.
        inputs: what the module takes from a batch: an index or key, several of them in a tuple (positional
            arguments), or a function of the batch. The default is the first element of a tuple; a batch
            that is a bare array is taken whole.
        **apply_kwargs: static arguments of `module.apply`, such as `train=False` or `method="encode"`.

    Returns:
        `loss_fn(params, batch, state=None, rngs=None) -> scalar`, hashable, in the units of `loss`. `state`
        holds the other collections, `{"batch_stats": ...}`; `rngs` fixed keys, `{"dropout": key}`.

    Raises:
        TypeError: if the module, `loss`, `inputs` or an argument is not hashable.
        ValueError: on a call, if the module reads a collection that `state` lacks, draws from a stream that
            `rngs` lacks, or the batch has no such inputs.

    Cost:
        That of `module.apply`; nothing is compiled or copied here.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import linen as nn
        >>> from hessjax.flax import linen_loss
        >>> def loss(logits, batch):
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        >>> module, batch = nn.Dense(3), (jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]))
        >>> params = module.init(jax.random.key(0), batch[0])["params"]
        >>> loss_fn = linen_loss(module, loss)
        >>> jax.tree.map(jnp.shape, jax.grad(loss_fn)(params, batch))
        {'bias': (3,), 'kernel': (2, 3)}
        >>> loss_fn == linen_loss(nn.Dense(3), loss)
        True
    """
    _check_hashable(loss=loss)
    return _Loss(linen_model(module, inputs=inputs, **apply_kwargs), loss)


def linen_model(module: Any, *, inputs: Inputs = 0, **apply_kwargs: Any) -> ModelFn:
    """A linen module as a pure function of its params, for `hessjax.ggn` and `hessjax.fisher`.

    Args:
        module: a `flax.linen.Module`, as in `linen_loss`.
        inputs: what the module takes from a batch, as in `linen_loss`.
        **apply_kwargs: static arguments of `module.apply`.

    Returns:
        `model_fn(params, batch, state=None, rngs=None) -> outputs`, hashable, equal when made of equal parts.
        `ggn` hands all these arguments to its loss too: with a state, write `def loss(outputs, batch, *_)`.

    Raises:
        TypeError: if the module, `inputs` or an argument is not hashable.
        ValueError: on a call, as for `linen_loss`.

    Cost:
        That of `module.apply`; nothing is compiled or copied here.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import linen as nn
        >>> import hessjax as hj
        >>> from hessjax.flax import linen_model
        >>> def loss(outputs, batch):
        ...     return optax.l2_loss(outputs, batch[1]).mean()
        >>> module, batch = nn.Dense(1), (jnp.ones((4, 2)), jnp.zeros((4, 1)))
        >>> params = module.init(jax.random.key(0), batch[0])["params"]
        >>> A = hj.ggn(linen_model(module), loss, params, batch)
        >>> A({"bias": jnp.ones(1), "kernel": jnp.zeros((2, 1))})["kernel"].tolist()
        [[1.0], [1.0]]
    """
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    identity = _frozen(module)
    _check_hashable(module=identity, inputs=inputs, **apply_kwargs)
    return _LinenModel(module, identity, inputs, tuple(sorted(apply_kwargs.items())))


def nnx_loss(
    model: Any,
    loss: OutputLoss,
    *,
    inputs: Inputs = 0,
    mode: str = "eval",
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
        `loss`, hashable, equal for models of equal architecture; `params` and `state` nested dicts of arrays.
        `nnx.update(model, params)` puts changed params back into the model. For other dropout keys,
        `nnx.reseed(model, dropout=1)` and call this again.

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
        >>> jax.tree.map(jnp.shape, grads)
        {'bias': (1,), 'kernel': (2, 1)}
        >>> nnx.update(model, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads))
        >>> bool(loss(model(batch[0]), batch) < loss_fn(params, batch, state))
        True
    """
    _check_hashable(loss=loss)
    model_fn, params, state = nnx_model(model, inputs=inputs, mode=mode, **call_kwargs)
    return NnxLoss(_Loss(model_fn, loss), params, state)


def nnx_model(model: Any, *, inputs: Inputs = 0, mode: str = "eval", **call_kwargs: Any) -> NnxModel:
    """An nnx model as a pure function of its params, for `hessjax.ggn` and `hessjax.fisher`.

    Args:
        model: an `nnx.Module`; it is left as it is.
        inputs: what the model takes from a batch, as in `linen_loss`.
        mode: `"eval"` or `"train"`, as in `nnx_loss`.
        **call_kwargs: further static arguments of the model's call.

    Returns:
        `NnxModel(model_fn, params, state)`: `model_fn(params, batch, state=None) -> outputs`, hashable, equal
        for models of equal architecture. `ggn` hands all these arguments to its loss too: with a state, write
        `def loss(outputs, batch, *_)`.

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
        >>> A = hj.fisher(model_fn, params, jnp.ones((4, 2)), state, likelihood=hj.gaussian_likelihood)
        >>> A({"bias": jnp.ones(3), "kernel": jnp.zeros((2, 3))})["kernel"].tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    _check_hashable(inputs=inputs, **call_kwargs)
    if mode not in ("eval", "train"):
        raise ValueError(f'`mode` must be "eval" or "train", got {mode!r}.')
    copy = nnx.merge(*nnx.split(model))
    copy.eval() if mode == "eval" else copy.train()
    graphdef, params, state = nnx.split(copy, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"`model` must hold at least one nnx.Param, but {type(model).__name__} has none.")
    model_fn = _NnxModel(graphdef, inputs, tuple(sorted(call_kwargs.items())))
    return NnxModel(model_fn, nnx.to_pure_dict(params), nnx.to_pure_dict(state))


@dataclass(frozen=True)
class _Loss:
    model_fn: ModelFn
    loss: OutputLoss

    def __call__(self, params: Params, batch: Any, *state: Any, **named_state: Any) -> Any:
        return self.loss(self.model_fn(params, batch, *state, **named_state), batch)


@dataclass(frozen=True)
class _LinenModel:
    module: Any = field(compare=False)  # `nn.Sequential([...])` has no hash of its own
    identity: Hashable
    inputs: Inputs
    kwargs: tuple[tuple[str, Hashable], ...]

    def __call__(self, params: Params, batch: Any, state: Any = None, rngs: Any = None) -> Any:
        state = dict(state or {})
        try:
            outputs, _ = self.module.apply(
                {**state, "params": params},
                *_arguments(batch, self.inputs),
                rngs=rngs,
                mutable=list(state),
                **dict(self.kwargs),
            )
        except errors.ScopeCollectionNotFound as error:
            raise ValueError(
                "`state` must hold every collection that the module reads, as `module.init` made them, e.g. "
                f'`{{"batch_stats": variables["batch_stats"]}}`; got {sorted(state) or "none"}. {error}'
            ) from error
        except errors.InvalidRngError as error:
            raise ValueError(
                "`rngs` must hold a fixed key for every stream that the module draws from, e.g. "
                f'`{{"dropout": jax.random.key(0)}}`. {error}'
            ) from error
        return outputs


@dataclass(frozen=True)
class _NnxModel:
    graphdef: Any
    inputs: Inputs
    kwargs: tuple[tuple[str, Hashable], ...]

    def __call__(self, params: Params, batch: Any, state: Any = None) -> Any:
        try:
            model = nnx.merge(self.graphdef, params, state or {}, copy=True)
        except ValueError as error:
            raise ValueError(
                "`params` and `state` must be those of `nnx_loss` or `nnx_model`, with no more than other "
                f"values. {error}"
            ) from error
        return model(*_arguments(batch, self.inputs), **dict(self.kwargs))


def _arguments(batch: Any, inputs: Inputs) -> tuple[Any, ...]:
    """The positional arguments of the model."""
    if callable(inputs):
        return (inputs(batch),)
    if isinstance(batch, (jax.Array, np.ndarray)) and inputs == 0:
        return (batch,)
    keys = inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        return tuple(batch[key] for key in keys)
    except (KeyError, IndexError, TypeError) as error:
        has = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
        raise ValueError(
            f"`inputs` must say what the model takes from a batch ({has}): a key, several or a function, "
            f"got {inputs!r}."
        ) from error


def _frozen(value: Any) -> Any:
    """What tells a module from another, in hashable containers: its type and its fields."""
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_frozen, value))
    if isinstance(value, Mapping):
        return type(value), tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    if is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, _frozen(getattr(value, f.name))) for f in fields(value) if f.name != "parent")
        return type(value), tuple(items)
    return value


def _check_hashable(**arguments: Any) -> None:
    for name, value in arguments.items():
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"`{name}` must be hashable, so that the loss or model can be told from another without "
                f"retracing, got {value!r}. Tuples are, lists and arrays are not."
            ) from error
