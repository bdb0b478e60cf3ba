"""How many entries of large arrays are such and such: by pieces that stay in the cache, beyond 2³¹ too."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

PIECE, ROWS, LARGE = 2**16, 16, 2**18
"""Entries of a piece, the rows it is summed over, and from how many entries on an array is cut."""

Test: TypeAlias = Callable[..., Sequence[Bool[Array, "..."]]]
"""`(place, *entries) -> flags`: of the array in this place, or of a piece of it, which entries count."""


def count_where(test: Test, *columns: Sequence[Array]) -> Int[Array, "flags arrays"]:
    """How many entries of each array set each flag; fewer than 2³¹ in each.

    Args:
        test: entrywise.
        *columns: arrays; those in the same place have one shape, and are tested together.
    """
    rows = list(zip(*columns, strict=True))
    large = [place for place, row in enumerate(rows) if _is_cut(row[0].size)]
    found = _by_pieces(test, {place: rows[place] for place in large}) if large else {}
    for place, row in enumerate(rows):
        if place not in found:
            found[place] = jnp.stack([num_set(flags) for flags in test(place, *row)])
    return jnp.stack([found[place] for place in range(len(rows))], axis=1)


def counts_together(arrays: Sequence[Array]) -> bool:
    """Whether several flags of an entry are counted in nearly the time of one."""
    return jax.default_backend() != "cpu" or any(_is_cut(x.size) for x in arrays)


def num_set(flags: Array) -> Int[Array, ""]:
    """How many are set, or 2³¹ − 1 if they are more."""
    if flags.size >= 2**31:
        return num_set_in_all(flags).clipped()
    # On a CPU, XLA writes out what it is going to sum: in 32 bits two fifths of the time would go there.
    # Accelerators sum as they read, and take all sums over one array together.
    on_cpu = jax.default_backend() == "cpu"
    short = next((axis for axis, length in enumerate(flags.shape) if on_cpu and length < 2**16), None)
    partial = flags if short is None else jnp.sum(flags, axis=short, dtype=jnp.uint16)
    return jnp.sum(partial, dtype=jnp.int32)


def num_set_in_all(flags: Array) -> "Total":
    """How many are set, however many that are."""
    lengths = [n if n <= 2**16 else 0 for n in flags.shape]  # so that sums of the lower words fit
    axis = max(range(flags.ndim), key=lengths.__getitem__, default=0)
    others = tuple(i for i in range(flags.ndim) if i != axis)
    lines = jnp.sum(flags, axis=others, dtype=jnp.int32)
    low = jnp.sum(lines & 0xFFFF, dtype=jnp.uint32)
    carry = (low >> 16).astype(jnp.int32)
    return Total(jnp.sum(lines >> 16, dtype=jnp.int32) + carry, (low & 0xFFFF).astype(jnp.int32))


def _is_cut(size: int) -> bool:
    """Whether an array of so many entries is counted piece by piece."""
    # On an accelerator whole arrays are summed as fast as they are read; of several devices each has a part
    # of the array, which a loop over pieces would gather.
    return size >= LARGE and jax.default_backend() == "cpu" and jax.device_count() == 1


def _by_pieces(test: Test, rows: dict[int, tuple[Array, ...]]) -> dict[int, Array]:
    """By place, the numbers of `count_where`; what is written out to be summed never leaves the cache."""
    # One loop however many arrays there are: each is cut into as many pieces.
    pieces = max(row[0].size for row in rows.values()) // PIECE
    flat = {place: [x.reshape(-1) for x in row] for place, row in rows.items()}
    length = {place: row[0].size // pieces // ROWS * ROWS for place, row in flat.items()}

    def at(place: int, start: Array) -> Array:
        cut = [lax.dynamic_slice(x, (start,), (length[place],)) for x in flat[place]]
        flags = test(place, *(x.reshape(ROWS, -1) for x in cut))
        return jnp.stack([num_set(each) for each in flags])

    def add(i: Array, numbers: dict[int, Array]) -> dict[int, Array]:
        return {place: number + at(place, i * length[place]) for place, number in numbers.items()}

    # The last few, of which there are too few for a piece, come first.
    rests = {place: [x[pieces * length[place] :] for x in row] for place, row in flat.items()}
    ends = {p: jnp.stack([num_set(each) for each in test(p, *rest)]) for p, rest in rests.items()}
    return lax.fori_loop(0, pieces, add, ends)


# -- numbers beyond 2³¹ ----------------------------------------------------------------------------


class Total(NamedTuple):
    """The number `high · 2¹⁶ + low` in two words, up to 2⁴⁷: JAX has no 64-bit integers unless x64 is on.

    Attributes:
        high: may be negative, as a difference may.
        low: from 0 up to 2¹⁶ − 1.
    """

    high: Int[Array, "..."]
    low: Int[Array, "..."]

    @classmethod
    def of(cls, number: int | Int[Array, "..."]) -> "Total":
        """A Python integer of any size, or integers below 2³¹."""
        high, low = number >> 16, number & 0xFFFF
        return cls(jnp.asarray(high, jnp.int32), jnp.asarray(low, jnp.int32))

    @classmethod
    def of_words(cls, high: UInt[Array, ""], low: UInt[Array, ""]) -> "Total":
        """A number of 47 bits in words of 32."""
        return cls(((high << 16) | (low >> 16)).astype(jnp.int32), (low & 0xFFFF).astype(jnp.int32))

    def exactly(self) -> int:
        """As a Python integer, outside `jit`."""
        return int(self.high) * 2**16 + int(self.low)

    def plus(self, other: "Total") -> "Total":
        """The sum."""
        return _carried(self.high + other.high, self.low + other.low)

    def minus(self, other: "Total") -> "Total":
        """The difference."""
        return _carried(self.high - other.high, self.low - other.low)

    def at_most(self, other: "Total") -> Bool[Array, "..."]:
        """Whether it is no larger than another."""
        return (self.high < other.high) | ((self.high == other.high) & (self.low <= other.low))

    def least(self, other: "Total") -> "Total":
        """The smaller of both."""
        mine = self.at_most(other)
        return Total(jnp.where(mine, self.high, other.high), jnp.where(mine, self.low, other.low))

    def clipped(self) -> Int[Array, "..."]:
        """As an integer, or the nearest that 32 bits hold."""
        inside = jnp.clip(self.high, -(2**15), 2**15 - 1)
        low = jnp.where(self.high > inside, 0xFFFF, jnp.where(self.high < inside, 0, self.low))
        return (inside << 16) + low

    def rounded(self) -> Float[Array, "..."]:
        """In float32."""
        return self.high.astype(jnp.float32) * 2.0**16 + self.low.astype(jnp.float32)


def total(numbers: Int[Array, "... n"]) -> Total:
    """The sum along the last axis, of at most 2¹⁵ numbers."""
    return _carried(
        jnp.sum(numbers >> 16, axis=-1, dtype=jnp.int32), jnp.sum(numbers & 0xFFFF, axis=-1, dtype=jnp.int32)
    )


def totals_before(numbers: Int[Array, " n"]) -> Total:
    """For each the sum of those before it."""
    high, low = numbers >> 16, numbers & 0xFFFF
    return _carried(jnp.cumsum(high, dtype=jnp.int32) - high, jnp.cumsum(low, dtype=jnp.int32) - low)


def _carried(high: Array, low: Array) -> Total:
    return Total(high + (low >> 16), low & 0xFFFF)
