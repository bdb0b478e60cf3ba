"""What a loss of a Flax model is made of: the model as a function, an output loss, a part of the batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import jax
import numpy as np

from hessjax._core._types import ModelFn, Params

OutputLoss: TypeAlias = Callable[[Any, Any], Any]
"""`loss(outputs, batch) -> scalar`, the mean over the batch."""

Inputs: TypeAlias = int | str | tuple[int | str, ...] | Callable[[Any], Any]
"""Which part of a batch the model takes: a key, several keys (positional arguments), or a function."""


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


def frozen(value: Any) -> Any:
    """What tells a module from another, in hashable containers: its type and its fields."""
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, Mapping):
        return type(value), tuple((key, frozen(item)) for key, item in sorted(value.items()))
    if is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, frozen(getattr(value, f.name))) for f in fields(value) if f.name != "parent")
        return type(value), tuple(items)
    return value


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
