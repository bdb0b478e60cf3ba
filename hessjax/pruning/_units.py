"""What a ranking ranks: the scores of single weights, or of groups that go together, layer by layer."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped, UInt

from hessjax._core import _reshaping, _sharding, _tree
from hessjax._core._axes import Axes, layers_of, stacked
from hessjax._core._types import Params
from hessjax.pruning._ranking import ordered_keys
from hessjax.pruning.patterns._fitting import Fit, fits_of
from hessjax.pruning.patterns._pattern import Grid, Gridded, Kept, Pattern, Patterns


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
        kept: by place, the leaves that lose nothing whatever their scores.
        layouts: of the leaves over several devices, where they are known; None for all others.
        treedef: of the tree.
    """

    scores: list[Float[Array, "..."]]
    free: list[Bool[Array, "..."] | None]
    sizes: list[int]
    most: list[int]
    members: list[list[Member]]
    kept: dict[int, Array]
    layouts: list[Any]
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
        out = {i: _sharding.born_like(jnp.ones(x.shape, dtype), x) for i, x in self.kept.items()}
        out |= {place: stacked(each, axes[place]) for place, each in layers.items()}
        laid = [_sharding.laid_out(out[place], layout) for place, layout in enumerate(self.layouts)]
        return jax.tree.unflatten(self.treedef, laid)


def units_of(scores: Params, pattern: Patterns) -> Units:
    """The units that a pattern makes of a tree of scores."""
    _tree.check_floating(scores, "scores")
    leaves, treedef = jax.tree.flatten(scores)
    fits = fits_of(pattern, scores)
    kept = {i: leaves[i] for i, fit in enumerate(fits) if isinstance(fit.pattern, Kept)}
    if len(kept) == len(leaves):
        raise ValueError(
            "`pattern` must let something go, but every leaf that `where` selects stays as it is: "
            f"{', '.join(fit.axes.path for fit in fits)}."
        )
    layers = [
        _layers(i, leaf, fit) for i, (leaf, fit) in enumerate(zip(leaves, fits, strict=True)) if i not in kept
    ]
    singles = [single for leaf in layers for single in leaf]
    _check_each(singles)
    # Heads are tied within a layer: the first of one leaf to the first of another.
    ties = [(index, member.pattern.tie) for leaf in layers for index, (member, _) in enumerate(leaf)]
    sets = tied(ties)
    made = [_set([singles[i][1] for i in same], [singles[i][0] for i in same]) for same in sets]
    unit_scores, free, sizes, most = (list(column) for column in zip(*made, strict=True))
    members = [[singles[i][0] for i in same] for same in sets]
    layouts = list(map(_sharding.layout, leaves))
    return Units(unit_scores, free, sizes, most, members, kept, layouts, treedef)


def _layers(place: int, leaf: Array, fit: Fit) -> list[tuple[Member, Array]]:
    """The layers of a leaf."""
    names = fit.axes.layer_names()
    members = [Member(place, name, fit.axes, fit.pattern) for name in names]
    return list(zip(members, layers_of(leaf, fit.axes), strict=True))


def _check_each(singles: list[tuple[Member, Array]]) -> None:
    """Raise a ValueError for a layer of more weights than an int32 counts."""
    for member, layer in singles:
        if layer.size >= 2**31:
            raise ValueError(
                f"Every layer that is ranked must hold fewer than 2**31 weights, got {layer.size} in "
                f"{member.path}: leave it out by `where`."
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
        free, groups = _free(leaf, pattern, pattern.at_most)
        return leaf, free, 1, groups * pattern.at_most
    # Of the shapes alone: groups of a sharded leaf are not made where only their number is asked for.
    shapes = [_grouped(p, x).shape for p, x in zip(patterns, leaves, strict=True)]
    if len({rows for rows, _ in shapes}) > 1:
        counts = ", ".join(f"{m.path} has {rows}" for m, (rows, _) in zip(members, shapes, strict=True))
        raise ValueError(f"Leaves tied as {pattern.tie} must have as many groups each, but {counts}.")
    size = sum(width for _, width in shapes)
    if size == 1:
        return leaf, None, 1, leaf.size
    return (
        _means([_sums(*pair) for pair in zip(leaves, patterns, strict=True)], size),
        None,
        size,
        shapes[0][0],
    )


def _means(parts: list[tuple[Array, Array]], size: int) -> Array:
    """Of each group of so many, the mean of what is left: weights that are gone do not drag it along."""
    if len(parts) > 1:  # in one shape, however each leaf counts its groups
        parts = [(_sharding.gathered(x).reshape(-1), _sharding.gathered(g).reshape(-1)) for x, g in parts]
    sums, gone = ([pair[i] for pair in parts] for i in (0, 1))
    left = size - sum(gone[1:], gone[0])
    mean = sum(sums[1:], sums[0]) / jnp.maximum(left, 1).astype(sums[0].dtype)
    return jnp.where(left == 0, -jnp.inf, mean)


def _sums(leaf: Array, pattern: Pattern) -> tuple[Array, Array]:
    """Of each group the sum of what is not gone, and how many are."""
    grid = _grid(pattern, leaf.shape)
    within: tuple[int, ...] = (1,) if grid is None else grid.within
    # Cut where they lie, along the leaf's own axes: shards that hold whole groups stay where they are.
    fine = (
        pattern.group(_sharding.gathered(leaf)) if grid is None else _reshaping.split_axes(leaf, grid.parts)
    )
    gone = jnp.isneginf(fine)
    return jnp.sum(jnp.where(gone, 0, fine), axis=within), jnp.sum(gone, axis=within, dtype=jnp.int32)


def _free(leaf: Array, pattern: Pattern, number: int) -> tuple[Array, int]:
    """The weights of a leaf that are among the lowest so many of their group, and how many groups it has."""
    grid = _grid(pattern, leaf.shape)
    if grid is None or len(grid.within) > 1:
        rows = pattern.group(_sharding.gathered(leaf))
        return pattern.ungroup(_lowest(rows, 1, number), leaf.shape), rows.shape[0]
    lowest = _lowest(_reshaping.split_axes(leaf, grid.parts), grid.within[0], number)
    return _reshaping.merge_axes(lowest, grid.parts), math.prod(grid.groups)


def _grid(pattern: Pattern, shape: tuple[int, ...]) -> Grid | None:
    return pattern.grid(shape) if isinstance(pattern, Gridded) else None


def _grouped(pattern: Pattern, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(pattern.group, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def _spread(units: Array, pattern: Pattern, shape: tuple[int, ...]) -> Array:
    """The flags of a leaf's weights from those of its units."""
    rows, width = _grouped(pattern, jax.ShapeDtypeStruct(shape, units.dtype)).shape
    if pattern.at_most is not None or (width == 1 and units.shape == shape):
        return units
    grid = _grid(pattern, shape)
    if grid is None:
        return pattern.ungroup(jnp.broadcast_to(units[:, None], (rows, width)), shape)
    wide = jnp.expand_dims(units.reshape(grid.groups), grid.within)
    return _reshaping.merge_axes(jnp.broadcast_to(wide, grid.fine), grid.parts)


def _lowest(fine: Float[Array, "..."], axis: int, number: int) -> Bool[Array, "..."]:
    """The lowest so many along an axis; NaN below all, of equal ones those that come first."""
    (keys,) = ordered_keys([fine])
    # Each weight's rank by m comparisons with its group: m is small, and they fuse into one pass; a sort
    # would not.
    place, length = jnp.zeros(fine.shape, jnp.int32), fine.shape[axis]
    index = jnp.arange(length).reshape([length if i == axis else 1 for i in range(fine.ndim)])
    for j in range(length):
        other = jax.lax.slice_in_dim(keys, j, j + 1, axis=axis)
        before = index > j  # of equal ones the earlier goes first
        place += jnp.int32((other < keys) | ((other == keys) & before))
    return place < number
