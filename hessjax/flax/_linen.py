"""Loss and model functions from linen modules, and what they share with those from nnx models."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import errors

from hessjax._core._messages import checked_function, shown
from hessjax._core._types import LossFn, ModelFn, Params

OutputLoss: TypeAlias = Callable[[Any, Any], Any]
"""`loss(outputs, batch) -> scalar`, the mean over the batch."""

Inputs: TypeAlias = int | str | tuple[int | str, ...] | Callable[[Any], Any]
"""Which part of a batch the model takes: a key, several keys (positional arguments), or a function."""


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
    check_hashable(loss=loss)
    checked_function("loss", loss, "(outputs, batch) -> scalar")
    return Loss(linen_model(module, inputs=inputs, **apply_kwargs), loss)


def linen_model(module: Any, *, inputs: Inputs = 0, **apply_kwargs: Any) -> ModelFn:
    """A linen module as a pure function of its params, for `hessjax.ggn` and `hessjax.fisher`.

    Args:
        module: a `flax.linen.Module`, as in `linen_loss`.
        inputs: what the module takes from a batch, as in `linen_loss`.
        **apply_kwargs: static arguments of `module.apply`.

    Returns:
        `model_fn(params, batch, state=None, rngs=None) -> outputs`, hashable, equal when made of equal parts.
        `ggn` passes all these arguments to its loss too: with a state, write `def loss(outputs, batch, *_)`.

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
    check_module(module)
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    identity = frozen(module)
    check_hashable(module=identity, inputs=inputs, **apply_kwargs)
    return LinenModel(module, identity, inputs, tuple(sorted(apply_kwargs.items())))


@dataclass(frozen=True)
class LinenModel:
    """A module with the arguments of its call, equal to any other of equal parts."""

    module: Any = field(compare=False)  # `nn.Sequential([...])` has no hash of its own
    identity: Hashable
    inputs: Inputs
    kwargs: tuple[tuple[str, Hashable], ...]

    def __call__(self, params: Params, batch: Any, state: Any = None, rngs: Any = None) -> Any:
        """Outputs for a batch."""
        state = dict(state or {})
        with _explained(state):
            # All but the params may be written to, and what is written is dropped: the loss stays pure.
            outputs, _ = self.module.apply(
                {**state, "params": params},
                *arguments(batch, self.inputs),
                rngs=rngs,
                mutable=list(state),
                **dict(self.kwargs),
            )
        return outputs


_OTHER_PARAMS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
)


@contextlib.contextmanager
def _explained(state: Mapping[str, Any]) -> Iterator[None]:
    """Turns Flax's errors about what is missing into ones that name the argument."""
    try:
        yield
    except _OTHER_PARAMS as error:
        raise ValueError(
            f'`params` must be the module\'s own, `variables["params"]` as `module.init` made them. {error}'
        ) from error
    except (errors.ScopeCollectionNotFound, errors.ScopeVariableNotFoundError) as error:
        raise ValueError(
            "`state` must hold every collection that the module reads, as `module.init` made them, e.g. "
            f'`{{"batch_stats": variables["batch_stats"]}}`; got {sorted(state) or "none"}. {error}'
        ) from error
    except errors.InvalidRngError as error:
        raise ValueError(
            "`rngs` must hold a fixed key for every stream that the module draws from, e.g. "
            f'`{{"dropout": jax.random.key(0)}}`. {error}'
        ) from error


# -- what losses of linen and of nnx models are made of ---------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A loss of a model, equal to any other of equal parts."""

    model_fn: ModelFn
    loss: OutputLoss

    def __call__(self, params: Params, batch: Any, *state: Any, **named_state: Any) -> Any:
        """The mean over the batch."""
        return self.loss(self.model_fn(params, batch, *state, **named_state), batch)


def arguments(batch: Any, inputs: Inputs) -> tuple[Any, ...]:
    """The positional arguments of the model."""
    if callable(inputs):
        return (inputs(batch),)
    if isinstance(batch, (jax.Array, np.ndarray)) and inputs == 0:
        return (batch,)  # `batch[0]` would be its first example
    keys = inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        return tuple(_part(batch, key) for key in keys)
    except (KeyError, IndexError, TypeError) as error:
        has = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
        raise ValueError(
            f"`inputs` must say what the model takes from a batch ({has}): a key, several or a function, "
            f"got {inputs!r}."
        ) from error


def _part(batch: Any, key: Any) -> Any:
    if isinstance(batch, jax.Array) and isinstance(key, int) and not -len(batch) <= key < len(batch):
        raise IndexError(key)  # jax would take the last one instead
    return batch[key]


def frozen(value: Any) -> Any:
    """What tells a module from another, in hashable containers: its type and its fields."""
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, Mapping):
        return type(value), tuple((key, frozen(item)) for key, item in sorted(value.items()))
    if is_dataclass(value) and not isinstance(value, type):
        # Without the parent: a module that is bound in another's scope would never equal one that is not.
        items = ((f.name, frozen(getattr(value, f.name))) for f in fields(value) if f.name != "parent")
        return type(value), tuple(items)
    return value


def check_module(module: Any) -> None:
    """Raise a TypeError for what is no linen module: the class of one, or a module of another kind."""
    if isinstance(module, type) or not callable(getattr(module, "apply", None)):
        hint = ": make one, with its settings" if isinstance(module, type) else ""
        raise TypeError(f"`module` must be a `flax.linen.Module`, got {shown(module)}{hint}.")


def check_hashable(**arguments: Any) -> None:
    """Raise a TypeError for an argument that cannot be told from another."""
    for name, value in arguments.items():
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"`{name}` must be hashable, so that the loss or model can be told from another without "
                f"retracing, got {value!r}. Tuples are, lists and arrays are not."
            ) from error
