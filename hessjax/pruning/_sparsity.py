"""How many weights a sparsity means, exactly."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Sparsity: TypeAlias = float | int | Float[Array, ""]
"""The fraction of zeros, in [0, 1): a number, checked, or a traced scalar, which cannot be."""

Schedule: TypeAlias = Callable[[Any], Any]
"""`T -> sparsity`, as optax writes schedules."""


def check_sparsity(sparsity: Any, note: str = "") -> None:
    """Raise a ValueError for a number outside [0, 1); traced values pass."""
    if isinstance(sparsity, jax.core.Tracer) or 0 <= sparsity < 1:
        return
    hint = f" For {sparsity:g} % write {sparsity / 100:g}." if 2 <= sparsity < 100 else ""
    raise ValueError(f"`sparsity` must be in [0, 1), the fraction of zeros, got {sparsity}{note}.{hint}")


def num_zeros(sparsity: Sparsity, size: int) -> Any:
    """`round(sparsity · size)`, halves to even, without the rounding of a float32 product.

    In float32 0.9 · 25,000,001 is off by more than one weight, so that a traced sparsity is written as a
    multiple of 2⁻³¹ (exact from 2⁻⁷ up, and within half a weight below) and multiplied in integers.
    """
    if not isinstance(sparsity, jax.Array):
        return round(float(sparsity) * size)
    # What cannot raise inside `jit` is taken to the nearest end; NaN fails the comparison and becomes 0.
    inside = jnp.where(sparsity > 0, jnp.minimum(sparsity, 1), 0)
    if inside.dtype == jnp.float64:
        return jnp.round(inside * size).astype(jnp.int32)
    high, low = _product((inside.astype(jnp.float32) * 2.0**31).astype(jnp.uint32), size)
    quotient, rest = high * 2 + (low >> 31), low & jnp.uint32(2**31 - 1)
    # Halves to even, as Python's `round` for numbers that are not traced.
    up = (rest > 2**30) | ((rest == 2**30) & (quotient % 2 == 1))
    return quotient.astype(jnp.int32) + up.astype(jnp.int32)


def _product(a: Array, b: int) -> tuple[Array, Array]:
    """The 64 bits of a · b as two words, by the four products of 16-bit halves; a, b up to 2³¹."""
    a1, a0 = a >> 16, a & jnp.uint32(0xFFFF)
    b1, b0 = jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    # JAX has no 64-bit integers unless x64 is on; none of these sums leaves 32 bits, as a1, b1 ≤ 2¹⁵.
    middle = a1 * b0 + a0 * b1 + (a0 * b0 >> 16)
    return a1 * b1 + (middle >> 16), (middle << 16) | (a0 * b0 & jnp.uint32(0xFFFF))


def cond_now(predicate: Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """`lax.cond`; outside `jit`, where it would compile both branches at every call, a plain `if`."""
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, yes, no)
    return yes() if predicate else no()
