"""How a ranking ranks: how many zeros, the order of scores, and which are the smallest."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from hessjax._core import _numbers, _sharding
from hessjax._core._messages import checked_number

Sparsity: TypeAlias = float | int | Float[Array, ""]
"""The fraction of zeros, in [0, 1): a number, checked, or a traced scalar, which cannot be."""

Schedule: TypeAlias = Callable[[Any], Any]
"""`T -> sparsity`, as optax writes schedules."""


def check_sparsity(sparsity: Any, note: str = "", argument: str = "sparsity") -> None:
    """Raise a TypeError for no number, a ValueError for one outside [0, 1); traced values pass."""
    if isinstance(checked_number(argument, sparsity), jax.core.Tracer) or 0 <= sparsity < 1:
        return
    hint = f" For {sparsity:g} % write {sparsity / 100:g}." if 2 <= sparsity < 100 else ""
    raise ValueError(f"`{argument}` must be in [0, 1), the fraction of zeros, got {sparsity}{note}.{hint}")


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


def ordered_keys(scores: Sequence[Float[Array, "..."]]) -> list[UInt[Array, "..."]]:
    """Unsigned integers that compare as the scores do, across all arrays.

    `-0.0` equals `0.0`, NaN lies below everything, and the largest integer of the type stays unused.
    """
    dtype = _numbers.common_dtype(*scores)
    width = jnp.dtype(dtype).itemsize * 8
    uint = jnp.dtype(f"uint{width}")
    sign = jnp.asarray(1 << (width - 1), uint)

    def key(x: Array) -> Array:
        bits = lax.bitcast_convert_type(x.astype(dtype), uint)
        # IEEE floats are sign and magnitude: shift the positive above the negative, reverse the negative.
        shifted = jnp.where(bits > sign, ~bits, bits | sign)
        return jnp.where(jnp.isnan(x), jnp.zeros((), uint), shifted)

    return [key(x) for x in scores]


@jax.jit
def smallest(
    keys: Sequence[UInt[Array, "..."]],
    n: int | Int[Array, ""] | Int[Array, " arrays"],
    sizes: Int[Array, " arrays"] | None = None,
) -> list[Bool[Array, "..."]]:
    """Marks exactly `n` entries: the smallest over all arrays; of equal ones, those that come first.

    With `sizes`, entries count for more than one, and it marks the longest run of the smallest that counts
    for `n` at most.

    Args:
        keys: unsigned integers of one type (`ordered_keys`), any shapes, under 2³¹ entries in all.
        n: how many to mark, between 0 and the number of entries; may be traced. A vector, one number per
            array, ranks every array on its own.
        sizes: what an entry of each array counts for; None for one each. With a scalar n only.

    Returns:
        Booleans in the shapes of the keys; the same as the first `n` of a stable argsort of them all.

    Cost:
        One pass over the keys per bit (32 for float32) and no memory beyond keys and result; when equal
        keys straddle the cut, one more pass per bit of the number of entries. Two loops to compile, however
        many arrays.
    """
    total, n = sum(k.size for k in keys), jnp.asarray(n, jnp.int32)

    def below(cut: Array) -> Array:
        return _count([k < c for k, c in zip(keys, _each(cut, keys), strict=True)], n, sizes)

    # The n-th smallest key by bisection over its bits: counting passes need no memory, a sort needs twice
    # the keys and, across leaves, a copy of all of them.
    cut = _largest(below, n, keys[0].dtype.itemsize * 8, keys[0].dtype)
    missing = n - below(cut)
    cuts = _each(cut, keys)

    def ties_before(last: Array) -> list[Array]:
        # Made anew at every count, so that places and ties fuse into it and take no memory of their own.
        columns = zip(keys, cuts, _places(keys), _each(last, keys), strict=True)
        return [(k == c) & (i < x) for k, c, i, x in columns]

    # No equal keys straddle the cut: then there is nothing to search for, and the loop runs no times.
    bits = jnp.where(jnp.any(missing > 0), total.bit_length(), 0)
    last = _largest(lambda t: _count(ties_before(t), n, sizes), missing, bits, jnp.dtype("uint32"))
    return [(k < c) | tie for k, c, tie in zip(keys, cuts, ties_before(last), strict=True)]


def _largest(count_below: Callable[[Array], Array], n: Array, bits: Any, dtype: Any) -> Array:
    """The largest integer t of `bits` bits with `count_below(t) <= n`, its bits found from the top."""

    def body(i: Any, t: Array) -> Array:
        # A bit stays set while no more than n lie below: t ends as the largest such integer.
        candidate = t | (jnp.ones((), dtype) << jnp.asarray(bits - 1 - i, dtype))
        return jnp.where(count_below(candidate) <= n, candidate, t)

    return lax.fori_loop(0, bits, body, jnp.zeros(n.shape, dtype))


def _count(flags: Sequence[Array], n: Array, sizes: Array | None) -> Array:
    """What the set flags count for: over all arrays for a scalar n, in each for a vector."""
    counts = jnp.stack([num_set(flag) for flag in flags])
    counts = counts if sizes is None else counts * sizes
    return counts if n.ndim else jnp.sum(counts, dtype=jnp.int32)


def num_set(flags: Array) -> Array:
    """How many are set; along one axis in 16 bits first.

    On a CPU, XLA writes out what it is going to sum: in 32 bits two fifths of a ranking's time go there.
    """
    short = next((axis for axis, length in enumerate(flags.shape) if length < 2**16), None)
    partial = flags if short is None else jnp.sum(flags, axis=short, dtype=jnp.uint16)
    return jnp.sum(partial, dtype=jnp.int32)


def _each(values: Array, keys: Sequence[Array]) -> Array:
    """One value per array."""
    return jnp.broadcast_to(values, (len(keys),))


def _places(keys: Sequence[Array]) -> list[Array]:
    """The position of every entry in the concatenation of all arrays."""
    starts = [sum(k.size for k in keys[:i]) for i in range(len(keys))]
    return [_sharding.places(k, start) for k, start in zip(keys, starts, strict=True)]
