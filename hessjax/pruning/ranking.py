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
def smallest(keys: Sequence[UInt[Array, "..."]], n: int | Int[Array, ""]) -> list[Bool[Array, "..."]]:
    """Marks exactly `n` entries: the smallest over all arrays; of equal ones, those that come first.

    Args:
        keys: unsigned integers of one type (`ordered_keys`), any shapes, under 2³¹ entries in all.
        n: how many to mark, between 0 and the number of entries; may be traced.

    Returns:
        Booleans in the shapes of the keys; the same as the first `n` of a stable argsort of them all.

    Cost:
        One pass over the keys per bit (32 for float32) and no memory beyond keys and result; when equal keys
        straddle the cut, one more pass per bit of the number of entries.
    """
    total = sum(k.size for k in keys)
    if total >= 2**31:
        raise ValueError(f"One ranking must hold fewer than 2**31 scores, got {total}: use `uniform()`.")
    dtype = keys[0].dtype
    cut = _largest(lambda c: _count(k < c for k in keys), n, dtype.itemsize * 8, dtype)
    missing = n - _count(k < cut for k in keys)
    places = _places(keys)
    ties = [k == cut for k in keys]
    last = _largest(
        lambda c: _count(t & (i < c) for t, i in zip(ties, places, strict=True)),
        missing,
        jnp.where(missing > 0, total.bit_length(), 0),
        jnp.dtype("uint32"),
    )
    return [(k < cut) | (t & (i < last)) for k, t, i in zip(keys, ties, places, strict=True)]


def _largest(count_below: Callable[[Array], Any], n: Any, bits: Any, dtype: Any) -> Array:
    """The largest integer t of `bits` bits with `count_below(t) <= n`, its bits found from the top."""

    def body(i: Any, t: Array) -> Array:
        candidate = t | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
        return jnp.where(count_below(candidate) <= n, candidate, t)

    return lax.fori_loop(0, bits, body, jnp.zeros((), dtype))


def _count(flags: Any) -> Any:
    return sum(jnp.sum(flag, dtype=jnp.int32) for flag in flags)


def _places(keys: Sequence[Array]) -> list[Array]:
    """The position of every entry in the concatenation of all arrays."""
    starts = [sum(k.size for k in keys[:i]) for i in range(len(keys))]
    return [
        (jnp.arange(k.size, dtype=jnp.uint32) + jnp.uint32(start)).reshape(k.shape)
        for k, start in zip(keys, starts, strict=True)
    ]
