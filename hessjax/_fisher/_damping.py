"""The damping λ asked for, and κ = mλ, which follows from it and from what was summed over the gradients."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hessjax._core._types import Relative, Scalar


class Damping(NamedTuple):
    """λ = absolute + factor · mean diag F; one of the two is zero."""

    absolute: Scalar
    factor: Scalar

    @classmethod
    def of(cls, damping: Any, dtype: Any) -> "Damping":
        """Checked, as arrays."""
        is_relative = isinstance(damping, Relative)
        value = damping.factor if is_relative else damping
        if value is None or jnp.ndim(value) or not (_is_traced(value) or 0 < value < math.inf):
            raise ValueError(
                f"`damping` must be a positive finite number or `relative(r)`, got {damping}: without it the "
                f"Fisher of fewer gradients than weights has no inverse."
            )
        value, zero = jnp.asarray(value, dtype), jnp.zeros((), dtype)
        return cls(zero, value) if is_relative else cls(value, zero)


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


class Totals(NamedTuple):
    """What was summed over the gradients: their number, and their squared entries times `batch_size`."""

    num_grads: Int[Array, ""]
    squares: Scalar

    def shift(self, damping: Damping, num_params: int) -> Scalar:
        """κ = mλ."""
        return self.num_grads * damping.absolute + damping.factor * self.squares / num_params
