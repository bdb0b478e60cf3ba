"""How a ranking ranks: how many zeros, the order of scores, and which are the smallest."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from hessjax._core import _numbers, _sharding
from hessjax._core._counting import Total, count_where, counts_together, total, totals_before
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
    """`round(sparsity · size)` of fewer than 2³¹, halves to even: a Python integer, or a traced one."""
    if not isinstance(sparsity, jax.Array):
        return round(float(sparsity) * size)
    return num_zeros_in_all(sparsity, size).clipped()


def num_zeros_in_all(sparsity: Sparsity, size: int) -> Total:
    """`round(sparsity · size)` of up to 2⁴⁷, without the rounding of a float32 product.

    In float32 0.9 · 25,000,001 is off by more than one weight, so that a traced sparsity is written as a
    multiple of 2⁻³¹ (exact from 2⁻⁷ up, and within half a weight of every 2³¹ below) and multiplied in
    integers.
    """
    if not isinstance(sparsity, jax.Array):
        return Total.of(num_zeros(sparsity, size))
    # What cannot raise inside `jit` is taken to the nearest end; NaN fails the comparison and becomes 0.
    inside = jnp.where(sparsity > 0, jnp.minimum(sparsity, 1), 0)
    if inside.dtype == jnp.float64:
        number = jnp.round(inside * size)
        high = jnp.floor(number / 2**16)
        return Total(high.astype(jnp.int32), (number - high * 2**16).astype(jnp.int32))
    units = (inside.astype(jnp.float32) * 2.0**31).astype(jnp.uint32)
    high, low = _product(units, size % 2**31)
    quotient, rest = Total.of((high * 2 + (low >> 31)).astype(jnp.int32)), low & jnp.uint32(2**31 - 1)
    if size >= 2**31:  # of every 2³¹ weights a whole number goes
        quotient = quotient.plus(Total.of_words(*_product(units, size >> 31)))
    # Halves to even, as Python's `round` for numbers that are not traced.
    up = (rest > 2**30) | ((rest == 2**30) & (quotient.low % 2 == 1))
    return quotient.plus(Total.of(up.astype(jnp.int32)))


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
    n: int | Total | Int[Array, ""] | Int[Array, " arrays"],
    sizes: Int[Array, " arrays"] | None = None,
) -> tuple[list[Bool[Array, "..."]], Int[Array, " arrays"]]:
    """Marks exactly `n` entries: the smallest over all arrays; of equal ones, those that come first.

    With `sizes`, entries count for more than one, and it marks the longest run of the smallest that counts
    for `n` at most.

    Args:
        keys: unsigned integers of one type (`ordered_keys`), any shapes, under 2³¹ entries in each (and such
            as count for fewer than 2³¹).
        n: how many to mark, between 0 and the number of entries; may be traced. A vector, one number per
            array, ranks every array on its own.
        sizes: what an entry of each array counts for; None for one each. With a number for all arrays only.

    Returns:
        Booleans in the shapes of the keys, the same as the first `n` of a stable argsort of them all, and how
        many are set in each.

    Cost:
        A pass over the keys for every bit (32 for float32) or, of large arrays and on accelerators, for every
        two, and no memory beyond keys and result; when equal keys straddle the cut, one more pass per axis.
        On one CPU large arrays are read piece by piece, so that a pass takes as long as reading them.
    """
    shapes, keys = [k.shape for k in keys], [jnp.atleast_1d(k) for k in keys]
    if not isinstance(n, Total) and jnp.ndim(n) == 1:
        cut = _cut_in_each(keys, jnp.asarray(n))
    else:
        cut = _cut_over_all(keys, n if isinstance(n, Total) else Total.of(n), sizes)
    depth = max(k.ndim for k in keys)
    # Where all ties or none go there is nothing to search for.
    stops = lax.cond(
        jnp.any((cut.taken > 0) & (cut.taken < cut.ties)),
        lambda: _stops(keys, cut, depth),
        lambda: jnp.broadcast_to(_END * (cut.taken > 0).astype(jnp.int32)[:, None], (len(keys), depth)),
    )
    gone = [
        (k < key) | ((k == key) & _comes_before(k.shape, stop))
        for k, key, stop in zip(keys, cut.keys, stops, strict=True)
    ]
    return [flags.reshape(shape) for flags, shape in zip(gone, shapes, strict=True)], cut.below + cut.taken


class _Cut(NamedTuple):
    """Where arrays are cut: the key below which all go, and of how many equal ones how many are taken."""

    keys: UInt[Array, " arrays"]
    below: Int[Array, " arrays"]
    ties: Int[Array, " arrays"]
    taken: Int[Array, " arrays"]


def _cut_in_each(keys: Sequence[Array], n: Int[Array, " arrays"]) -> _Cut:
    """After so many in every array."""
    cuts = _last_that_fits(keys, lambda counts: counts <= n[None], (len(keys),))
    below, ties = _around(keys, cuts)
    return _Cut(cuts, below, ties, n - below)


def _cut_over_all(keys: Sequence[Array], n: Total, sizes: Array | None) -> _Cut:
    """After what counts for so many, or as many as fit, over all arrays."""
    weights = jnp.ones(len(keys), jnp.int32) if sizes is None else sizes

    def fits(counts: Int[Array, "cuts arrays"]) -> Array:
        return total(counts * weights[None]).at_most(n)

    cuts = jnp.broadcast_to(_last_that_fits(keys, fits, ()), (len(keys),))
    below, ties = _around(keys, cuts)
    # Of equal ones those in the first arrays go first, as far as whole ones fit.
    left = n.minus(total(below * weights))
    rest = Total(left.high[None], left.low[None]).minus(totals_before(ties * weights))
    return _Cut(cuts, below, ties, jnp.clip(rest.clipped() // weights, 0, ties))


def _around(keys: Sequence[Array], cuts: Array) -> tuple[Array, Array]:
    """How many lie below the cut of each array, and how many are equal to it."""
    below, up_to = count_where(lambda i, k: [k < cuts[i], k <= cuts[i]], keys)
    return below, up_to - below


def _last_that_fits(keys: Sequence[Array], fits: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """The largest integers that no more keys lie below of than fit, found from the top.

    Counting passes need no memory; a sort needs twice the keys and, over several arrays, a copy of them all.
    """
    bits, dtype = keys[0].dtype.itemsize * 8, keys[0].dtype
    # Two bits at a time, by three counts, only where these take no longer: they take longer to compile.
    width = 2 if counts_together(keys) else 1
    number = 2**width - 1
    digits = jnp.arange(1, number + 1, dtype=dtype).reshape(number, *(1 for _ in shape))

    def body(i: Any, t: Array) -> Array:
        shift = jnp.asarray(bits - width * (i + 1), dtype)
        candidates = t[None] | (digits << shift)
        each = jnp.broadcast_to(candidates.reshape(number, -1), (number, len(keys)))
        counts = count_where(lambda place, k: [k < each[j, place] for j in range(number)], keys)
        # What fits below a larger digit fits below all smaller ones.
        return t | (jnp.sum(fits(counts), axis=0).astype(dtype) << shift)

    return lax.fori_loop(0, bits // width, body, jnp.zeros(shape, dtype))


_END = 2**31 - 1
"""Beyond every index."""


def _stops(keys: Sequence[Array], cut: _Cut, depth: int) -> Int[Array, "arrays axes"]:
    """The index in each array, axis by axis, before which those lie that are taken of equal ones."""
    stops: list[Array] = []
    taken = cut.taken
    for axis in range(depth):
        # Along one axis at a time: no places of single entries have to be counted, or sent between devices.
        lines = [_line(k, cut.keys[i], [s[i] for s in stops], axis) for i, k in enumerate(keys)]
        stop = _last_index(lines, taken)
        taken = taken - _before(lines, stop)
        stops.append(stop)
    return jnp.stack(stops, axis=1)


def _line(keys: Array, cut: Array, start: Sequence[Array], axis: int) -> Int[Array, " length"]:
    """How many are equal to the cut at each index along an axis, after these along those before it."""
    if axis >= keys.ndim:
        return jnp.zeros(1, jnp.int32)
    flags = (keys == cut) & _is_at(keys.shape, start)
    others = [i for i in range(flags.ndim) if i != axis]
    # As in `num_set`, one axis in 16 bits first; and on every device whole.
    short = next((i for i in others if flags.shape[i] < 2**16), None)
    partial = flags if short is None else jnp.sum(flags, axis=short, keepdims=True, dtype=jnp.uint16)
    return _sharding.gathered(jnp.sum(partial, axis=tuple(others), dtype=jnp.int32))


def _last_index(lines: Sequence[Array], n: Array) -> Int[Array, " arrays"]:
    """In each the largest index that no more than n are set before."""
    bits = max(line.size for line in lines).bit_length()

    def body(i: Any, t: Array) -> Array:
        candidate = t | (jnp.ones((), jnp.int32) << jnp.asarray(bits - 1 - i, jnp.int32))
        return jnp.where(_before(lines, candidate) <= n, candidate, t)

    return lax.fori_loop(0, bits, body, jnp.zeros(len(lines), jnp.int32))


def _before(lines: Sequence[Array], stops: Array) -> Int[Array, " arrays"]:
    return jnp.stack(
        [
            jnp.sum(jnp.where(jnp.arange(line.size, dtype=jnp.int32) < stop, line, 0), dtype=jnp.int32)
            for line, stop in zip(lines, stops, strict=True)
        ]
    )


def _is_at(shape: tuple[int, ...], start: Sequence[Array]) -> Array:
    """Which entries have these first indices."""
    there = jnp.ones((1,) * len(shape), bool)
    for axis, index in enumerate(start[: len(shape)]):
        there &= _index(shape, axis) == index
    return there


def _comes_before(shape: tuple[int, ...], stop: Array) -> Array:
    """Which entries come before this index, in row-major order."""
    before = jnp.zeros((1,) * len(shape), bool)
    for axis in reversed(range(len(shape))):
        index = _index(shape, axis)
        before = (index < stop[axis]) | ((index == stop[axis]) & before)
    return before


def _index(shape: tuple[int, ...], axis: int) -> Array:
    """Of every entry along an axis."""
    return lax.broadcasted_iota(jnp.int32, tuple(n if i == axis else 1 for i, n in enumerate(shape)), axis)
