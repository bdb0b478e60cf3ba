"""What a ranking ranks, and how: counts, the scores of single weights or of groups that go together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from hessjax._core import _numbers, _sharding, _tree
from hessjax._core._axes import Axes, layers_of, stacked
from hessjax._core._messages import checked_number
from hessjax._core._types import Params
from hessjax.pruning.patterns._fitting import Fit, fits_of
from hessjax.pruning.patterns._pattern import Kept, Pattern, Patterns

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


class Member(NamedTuple):
    """One layer of a leaf, or a whole leaf that stacks none, as a ranking sees it.

    Attributes:
        place: which leaf of the tree it belongs to.
        path: its own: `blocks/Dense_0/kernel[2]`.
        axes: of the leaf.
        pattern: of the layer.
    """

    place: int
    path: str
    axes: Axes
    pattern: Pattern


class Units(NamedTuple):
    """Sets of units, one for every layer of every leaf, or for those that are tied.

    Layers that one leaf stacks are sets of their own, each as if it stood alone.

    Attributes:
        scores: one for every unit: the mean over those of its weights that are not gone already (-inf); a
            unit of nothing else is gone itself.
        free: units that may go whatever the others do; None where all may.
        sizes: how many weights a unit has.
        most: how many units may go.
        members: the layers of each set.
        kept: by place, the shapes of the leaves that lose nothing whatever their scores.
        treedef: of the tree.
    """

    scores: list[Float[Array, "..."]]
    free: list[Bool[Array, "..."] | None]
    sizes: list[int]
    most: list[int]
    members: list[list[Member]]
    kept: dict[int, tuple[int, ...]]
    treedef: Any

    @property
    def paths(self) -> list[list[str]]:
        """The paths of the layers of each set."""
        return [[member.path for member in members] for members in self.members]

    @property
    def counts(self) -> list[int]:
        """How many units there are."""
        return [scores.size for scores in self.scores]

    @property
    def num_weights(self) -> list[int]:
        """How many weights they hold."""
        return [count * size for count, size in zip(self.counts, self.sizes, strict=True)]

    def keys(self) -> list[UInt[Array, "..."]]:
        """Unsigned integers that compare as the scores do; above all others for units that may not go."""
        keys = ordered_keys(self.scores)
        top = ~jnp.zeros((), keys[0].dtype)
        return [k if f is None else jnp.where(f, k, top) for k, f in zip(keys, self.free, strict=True)]

    def spread(self, flags: Sequence[Shaped[Array, "..."]]) -> Params:
        """Flags (or other values) of all weights, as a tree, from those of the units."""
        layers: dict[int, list[Array]] = {}
        axes: dict[int, Axes] = {}
        # In the order of the layers, as sets are made of them in that order.
        for units, members in zip(flags, self.members, strict=True):
            for member in members:
                layers.setdefault(member.place, []).append(_spread(units, member.pattern, member.axes.layer))
                axes[member.place] = member.axes
        dtype = flags[0].dtype
        out = {place: jnp.ones(shape, dtype) for place, shape in self.kept.items()}
        out |= {place: stacked(each, axes[place]) for place, each in layers.items()}
        return jax.tree.unflatten(self.treedef, [out[place] for place in range(len(out))])


def units_of(scores: Params, pattern: Patterns) -> Units:
    """The units that a pattern makes of a tree of scores."""
    _tree.check_floating(scores, "scores")
    leaves, treedef = jax.tree.flatten(scores)
    _check_total(leaves)
    fits = fits_of(pattern, scores)
    kept = {i: leaves[i].shape for i, fit in enumerate(fits) if isinstance(fit.pattern, Kept)}
    if len(kept) == len(leaves):
        raise ValueError(
            "`pattern` must let something go, but every leaf that `where` selects stays as it is: "
            f"{', '.join(fit.axes.path for fit in fits)}."
        )
    layers = [
        _layers(i, leaf, fit) for i, (leaf, fit) in enumerate(zip(leaves, fits, strict=True)) if i not in kept
    ]
    singles = [single for leaf in layers for single in leaf]
    # Heads are tied within a layer: the first of one leaf to the first of another.
    ties = [(index, member.pattern.tie) for leaf in layers for index, (member, _) in enumerate(leaf)]
    sets = tied(ties)
    made = [_set([singles[i][1] for i in same], [singles[i][0] for i in same]) for same in sets]
    unit_scores, free, sizes, most = (list(column) for column in zip(*made, strict=True))
    return Units(
        unit_scores, free, sizes, most, [[singles[i][0] for i in same] for same in sets], kept, treedef
    )


def _layers(place: int, leaf: Array, fit: Fit) -> list[tuple[Member, Array]]:
    """The layers of a leaf."""
    names = fit.axes.layer_names()
    members = [Member(place, name, fit.axes, fit.pattern) for name in names]
    return list(zip(members, layers_of(leaf, fit.axes), strict=True))


def _check_total(leaves: list[Array]) -> None:
    """Raise a ValueError for more weights than an int32 counts."""
    total = sum(leaf.size for leaf in leaves)
    if total >= 2**31:
        raise ValueError(
            f"One ranking must hold fewer than 2**31 weights, got {total}: split by `optax.partition`, or by "
            "one `prune` inside another."
        )


def together(patterns: Sequence[Pattern]) -> list[list[int]]:
    """Leaves by their tie, in the order of the tree."""
    return tied([(0, pattern.tie) for pattern in patterns])


def tied(ties: Sequence[tuple[int, str | None]]) -> list[list[int]]:
    """The places of what is tied, in order; None is tied to nothing."""
    sets: dict[object, list[int]] = {}
    for i, tie in enumerate(ties):
        sets.setdefault(i if tie[1] is None else tie, []).append(i)
    return list(sets.values())


def _set(leaves: list[Array], members: list[Member]) -> tuple[Array, Array | None, int, int]:
    """Scores, free, size and most of the units of one set."""
    patterns = [member.pattern for member in members]
    pattern, leaf = patterns[0], leaves[0]
    if pattern.at_most is not None:
        # n of m: weights are ranked one by one, but only the lowest m − n of each group may go at all.
        rows = pattern.group(leaf)
        free = pattern.ungroup(_lowest(rows, pattern.at_most), leaf.shape)
        return leaf, free, 1, rows.shape[0] * pattern.at_most
    # Of the shapes alone: groups of a sharded leaf are not made where only their number is asked for.
    shapes = [_grouped(p, x).shape for p, x in zip(patterns, leaves, strict=True)]
    if len({rows for rows, _ in shapes}) > 1:
        groups = ", ".join(f"{m.path} has {rows}" for m, (rows, _) in zip(members, shapes, strict=True))
        raise ValueError(f"Leaves tied as {pattern.tie} must have as many groups each, but {groups}.")
    size = sum(width for _, width in shapes)
    if size == 1:
        return leaf, None, 1, leaf.size
    grouped = [p.group(x) for p, x in zip(patterns, leaves, strict=True)]
    # A group by the mean of what is left of it: weights that are gone already do not drag it along.
    gone = [jnp.isneginf(rows) for rows in grouped]
    total = sum(jnp.sum(jnp.where(g, 0, rows), axis=1) for g, rows in zip(gone, grouped, strict=True))
    left = size - sum(jnp.sum(g, axis=1) for g in gone)
    return (
        jnp.where(left == 0, -jnp.inf, total / jnp.asarray(jnp.maximum(left, 1), leaf.dtype)),
        None,
        size,
        shapes[0][0],
    )


def _grouped(pattern: Pattern, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(pattern.group, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def _spread(units: Array, pattern: Pattern, shape: tuple[int, ...]) -> Array:
    """The flags of a leaf's weights from those of its units."""
    rows, width = _grouped(pattern, jax.ShapeDtypeStruct(shape, units.dtype)).shape
    if pattern.at_most is not None or (width == 1 and units.shape == shape):
        return units
    return pattern.ungroup(jnp.broadcast_to(units[:, None], (rows, width)), shape)


def _lowest(rows: Float[Array, "groups m"], number: int) -> Bool[Array, "groups m"]:
    """The lowest so many of every row; NaN below all, of equal ones those that come first."""
    (keys,) = ordered_keys([rows])
    # Each weight's rank by m comparisons with its group: m is small, and they fuse into one pass; a sort
    # would not.
    place = jnp.zeros(rows.shape, jnp.int32)
    for j in range(rows.shape[1]):
        other = keys[:, j : j + 1]
        before = (jnp.arange(rows.shape[1]) > j)[None]  # of equal ones the earlier goes first
        place += jnp.int32((other < keys) | ((other == keys) & before))
    return place < number
