"""What a ranking ranks: the scores of single weights, or of groups that go together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt

from hessjax import _tree
from hessjax._typing import Params
from hessjax.pruning.pattern import Pattern
from hessjax.pruning.pattern_by_path import Patterns, patterns_of
from hessjax.pruning.ranking import ordered_keys


class Units(NamedTuple):
    """Sets of units, one for every leaf, or for leaves that are tied.

    Attributes:
        scores: one for every unit: the mean over those of its weights that are not gone already (-inf); a
            unit of nothing else is gone itself.
        free: units that may go whatever the others do; None where all may.
        sizes: how many weights a unit has.
        most: how many units may go.
        paths: the leaves of each set.
        shapes: their shapes.
        spread: `(units' flags) -> weights' flags`, as a tree.
    """

    scores: list[Float[Array, "..."]]
    free: list[Bool[Array, "..."] | None]
    sizes: list[int]
    most: list[int]
    paths: list[list[str]]
    shapes: list[list[tuple[int, ...]]]
    spread: Callable[[list[Array]], Params]

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


def units_of(scores: Params, pattern: Patterns) -> Units:
    """The units that a pattern makes of a tree of scores."""
    leaves, treedef = jax.tree.flatten(scores)
    patterns, paths = patterns_of(pattern, scores), _tree.leaf_paths(scores)
    sets = together(patterns)
    made = [_set([leaves[i] for i in members], [patterns[i] for i in members]) for members in sets]
    unit_scores, free, sizes, most = (list(column) for column in zip(*made, strict=True))

    def spread(flags: list[Array]) -> Params:
        out: list[Array] = list(leaves)
        for members, units in zip(sets, flags, strict=True):
            for i in members:
                out[i] = _spread(units, patterns[i], leaves[i].shape)
        return jax.tree.unflatten(treedef, out)

    _check_total(leaves)
    set_paths = [[paths[i] for i in members] for members in sets]
    shapes = [[leaves[i].shape for i in members] for members in sets]
    return Units(unit_scores, free, sizes, most, set_paths, shapes, spread)


def _check_total(leaves: list[Array]) -> None:
    total = sum(leaf.size for leaf in leaves)
    if total >= 2**31:
        raise ValueError(
            f"One ranking must hold fewer than 2**31 weights, got {total}: split by `optax.partition`, or by "
            "one `prune` inside another."
        )


def together(patterns: Sequence[Pattern]) -> list[list[int]]:
    """Leaves by their tie, in the order of the tree."""
    sets: dict[object, list[int]] = {}
    for i, pattern in enumerate(patterns):
        sets.setdefault(i if pattern.tie is None else pattern.tie, []).append(i)
    return list(sets.values())


def _set(leaves: list[Array], patterns: list[Pattern]) -> tuple[Array, Array | None, int, int]:
    """Scores, free, size and most of the units of one set."""
    pattern, leaf = patterns[0], leaves[0]
    if pattern.at_most is not None:
        rows = pattern.group(leaf)
        free = pattern.ungroup(_lowest(rows, pattern.at_most), leaf.shape)
        return leaf, free, 1, rows.shape[0] * pattern.at_most
    shapes = [jax.eval_shape(p.group, x).shape for p, x in zip(patterns, leaves, strict=True)]
    if len({rows for rows, _ in shapes}) > 1:
        raise ValueError(f"Leaves tied as {pattern.tie} must have as many groups each, got {shapes}.")
    size = sum(width for _, width in shapes)
    if size == 1:
        return leaf, None, 1, leaf.size
    grouped = [p.group(x) for p, x in zip(patterns, leaves, strict=True)]
    gone = [jnp.isneginf(rows) for rows in grouped]
    total = sum(jnp.sum(jnp.where(g, 0, rows), axis=1) for g, rows in zip(gone, grouped, strict=True))
    left = size - sum(jnp.sum(g, axis=1) for g in gone)
    return jnp.where(left == 0, -jnp.inf, total / jnp.maximum(left, 1)), None, size, shapes[0][0]


def _spread(units: Array, pattern: Pattern, shape: tuple[int, ...]) -> Array:
    """The flags of a leaf's weights from those of its units."""
    rows, width = jax.eval_shape(pattern.group, jax.ShapeDtypeStruct(shape, units.dtype)).shape
    if pattern.at_most is not None or (width == 1 and units.shape == shape):
        return units
    return pattern.ungroup(jnp.broadcast_to(units[:, None], (rows, width)), shape)


def _lowest(rows: Float[Array, "groups m"], number: int) -> Bool[Array, "groups m"]:
    """The lowest so many of every row; NaN below all, of equal ones those that come first."""
    (keys,) = ordered_keys([rows])
    place = jnp.zeros(rows.shape, jnp.int32)
    for j in range(rows.shape[1]):
        other = keys[:, j : j + 1]
        before = jnp.arange(rows.shape[1]) > j
        place += (other < keys) | ((other == keys) & before)
    return place < number
