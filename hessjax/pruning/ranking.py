"""The n smallest of many scores, exactly and without a sort.

Floats become unsigned integers in the same order; the value with n keys below it is found bit by bit, one
counting pass per bit; ties at that value are cut by index with the same search. Only sums over all scores are
needed, so traced counts, sharded arrays and tens of millions of scores are all the same to it (a sort of 25
million float32 takes 20 times longer on a CPU).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt


def ordered_keys(scores: Sequence[Float[Array, "..."]]) -> list[UInt[Array, "..."]]:
    """Unsigned integers that compare as the scores do, across all arrays.

    `-0.0` equals `0.0`, NaN lies below everything, and the largest integer of the type stays unused.
    """
    dtype = jnp.result_type(*scores)
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

    cut = _largest(below, n, keys[0].dtype.itemsize * 8, keys[0].dtype)
    missing = n - below(cut)
    cuts = _each(cut, keys)

    def ties_before(last: Array) -> list[Array]:
        # Made anew at every count, so that places and ties fuse into it and take no memory of their own.
        columns = zip(keys, cuts, _places(keys), _each(last, keys), strict=True)
        return [(k == c) & (i < x) for k, c, i, x in columns]

    bits = jnp.where(jnp.any(missing > 0), total.bit_length(), 0)
    last = _largest(lambda t: _count(ties_before(t), n, sizes), missing, bits, jnp.dtype("uint32"))
    return [(k < c) | tie for k, c, tie in zip(keys, cuts, ties_before(last), strict=True)]


def _largest(count_below: Callable[[Array], Array], n: Array, bits: Any, dtype: Any) -> Array:
    """The largest integer t of `bits` bits with `count_below(t) <= n`, its bits found from the top."""

    def body(i: Any, t: Array) -> Array:
        candidate = t | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
        return jnp.where(count_below(candidate) <= n, candidate, t)

    return lax.fori_loop(0, bits, body, jnp.zeros(n.shape, dtype))


def _count(flags: Sequence[Array], n: Array, sizes: Array | None) -> Array:
    """What the set flags count for: over all arrays for a scalar n, in each for a vector."""
    counts = jnp.stack([_num_set(flag) for flag in flags])
    counts = counts if sizes is None else counts * sizes
    return counts if n.ndim else jnp.sum(counts, dtype=jnp.int32)


def _num_set(flags: Array) -> Array:
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
    return [
        (jnp.arange(k.size, dtype=jnp.uint32) + jnp.uint32(start)).reshape(k.shape)
        for k, start in zip(keys, starts, strict=True)
    ]
