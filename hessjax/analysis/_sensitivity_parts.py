"""What a sensitivity prunes at a time, and what becomes of the network: leaves, or those that go together."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._layout import selected
from hessjax._core._types import Block, Params, Scalar, Where
from hessjax._core._words import AxisWords
from hessjax._run._identity import Identity, describe, fingerprint
from hessjax.pruning._once import prune_once
from hessjax.pruning._units import tied
from hessjax.pruning.allocations._allocation import uniform
from hessjax.pruning.patterns._fitting import Fit, chosen_patterns, fits_of
from hessjax.pruning.patterns._pattern import Kept, Laid, Pattern, Patterns
from hessjax.pruning.saliencies._saliency import Saliency


class Part(NamedTuple):
    """A leaf, the leaves that a pattern ties to each other, or one layer of each.

    Attributes:
        name: the path of the leaf, or what the paths of several have in common; of a layer, with its index.
        patterns: by the path of every leaf, what it was given.
        at: by the same, the index of the layer; the whole leaf where it is empty.
    """

    name: str
    patterns: dict[str, Pattern]
    at: dict[str, tuple[Any, ...]]

    def pattern_of(self, path: str, leaf: Any) -> Pattern:
        """As `prune` takes one that depends on the leaf."""
        return self.patterns[path]

    def holds(self, path: str, leaf: Any) -> bool:
        """As `prune` takes it for `where`."""
        return path in self.patterns

    @property
    def text(self) -> str:
        """What a record says of it."""
        names = ", ".join(dict.fromkeys(map(repr, self.patterns.values())))
        return names if len(self.patterns) == 1 else f"{names} of {', '.join(self.patterns)}"


def parts_of(
    params: Params, where: Where, pattern: Patterns, axes: AxisWords | None, by_layer: bool
) -> dict[str, Part]:
    """By name, in the order of the tree.

    Raises:
        TypeError, ValueError: as `prune` does; if `where` selects only leaves that are empty, or stay.
    """
    _tree.unique_paths(params, "params")
    hits = selected(params, where, axes)
    # Holes (None) in place of the others, and of what is empty, which has nothing to lose.
    chosen = jax.tree.map(lambda x, hit: x if hit and jnp.size(x) else None, params, hits)
    if not jax.tree.leaves(chosen):
        pairs = zip(_tree.leaf_paths(params), jax.tree.leaves(hits), strict=True)
        empty = ", ".join(path for path, hit in pairs if hit)
        raise ValueError(f"`where` must match at least one leaf with weights, got only empty ones: {empty}.")
    _tree.check_floating(chosen, "params[where]")
    leaves = list(zip(_tree.leaf_paths(chosen), jax.tree.leaves(chosen), strict=True))
    given = chosen_patterns(pattern, leaves)
    fits = [fit for fit in fits_of(Laid(pattern, params, axes), chosen) if not isinstance(fit.pattern, Kept)]
    if not fits:
        raise ValueError(
            f"`pattern` must let something go, but {', '.join(given)} stay as they are: select others by "
            "`where`."
        )
    return _named(_sets(fits, by_layer), given)


_Layer = tuple[Fit, tuple[int, ...]]
"""A leaf, and the index of one of its layers; no index for all of it."""


def _sets(fits: Sequence[Fit], by_layer: bool) -> list[list[_Layer]]:
    """What goes together: the leaves of one tie, or their first layers, their second ones, ..."""
    layers: list[_Layer] = []
    ties: list[tuple[int, str | None]] = []
    for fit in fits:
        for number, index in enumerate(fit.axes.layer_indices() if by_layer else [()]):
            layers.append((fit, index))
            ties.append((number, fit.pattern.tie))
    return [[layers[i] for i in same] for same in tied(ties)]


def _named(sets: Sequence[Sequence[_Layer]], given: dict[str, Pattern]) -> dict[str, Part]:
    common = [_common([fit.axes.path for fit, _ in layers]) + _suffix(layers) for layers in sets]
    parts = {}
    for layers, short in zip(sets, common, strict=True):
        paths = [fit.axes.path for fit, _ in layers]
        # Two ties in one module: only all their paths tell them apart.
        name = short if common.count(short) == 1 else " + ".join(paths) + _suffix(layers)
        at = {path: _at(fit, index) for path, (fit, index) in zip(paths, layers, strict=True)}
        parts[name] = Part(name, {path: given[path] for path in paths}, at)
    if len(parts) < len(sets):
        raise ValueError(f"`params` must have a path of its own for every layer, got {', '.join(common)}.")
    return parts


def _common(paths: Sequence[str]) -> str:
    """The module that holds all of them; the path itself of one."""
    if len(paths) == 1:
        return paths[0]
    split = [path.split("/") for path in paths]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*split, strict=False))
    return "/".join(names[0] for names in same) or "."


def _suffix(layers: Sequence[_Layer]) -> str:
    """`[0]`, as the layers of a leaf are called."""
    index = layers[0][1]
    return f"[{','.join(map(str, index))}]" if index else ""


def _at(fit: Fit, index: tuple[int, ...]) -> tuple[Any, ...]:
    """Where the layer lies in its leaf."""
    if not index:
        return ()
    places = dict(zip(fit.axes.stack, index, strict=True))
    return tuple(places.get(axis, slice(None)) for axis in range(len(fit.axes.shape)))


# -- pruning one -----------------------------------------------------------------------------------


class Network(NamedTuple):
    """What is asked about, and what its loss is predicted from."""

    params: Params
    saliency: Saliency
    parts: dict[str, Part]
    axes: AxisWords | None
    grads: Block | None
    diagonal: Params | None
    has_model: bool


def record_of(network: Network) -> Identity:
    """What the numbers depend on, as far as it can be told apart."""
    found: Identity = {"saliency": describe(network.saliency)}
    trees = {"saliency": network.saliency, "params": network.params, "diagonal": network.diagonal}
    for name, tree in trees.items():
        found |= fingerprint(tree, name)
    found |= {f"pattern {part.name}": part.text for part in network.parts.values()}
    return found | {f"axes {glob}": words for glob, words in (network.axes or {}).items()}


def pruned(network: Network, part: Part, level: float) -> tuple[Params, float | None]:
    """The params with one part pruned, and the rise of the loss that is expected of it."""
    if level == 0:  # even for a saliency that would move the weights without pruning any
        return network.params, 0.0 if network.has_model else None
    found = prune_once(
        network.params,
        network.saliency,
        level,
        grads_fn=None if network.grads is None else lambda _: network.grads,
        allocation=uniform(),
        pattern=part.pattern_of,
        where=part.holds,
        axes=network.axes,
    )
    after = jax.tree_util.tree_map_with_path(
        functools.partial(_only_layer, part), network.params, found.params
    )
    if not network.has_model:
        return after, None
    if network.diagonal is None:
        return after, float(found.predicted_increase)
    # Compared with the weights as they came out: a saliency may have moved the kept ones too.
    changed = [_chosen(tree, part) for tree in (network.diagonal, network.params, after)]
    return after, sum(float(_diagonal_increase(*leaves)) for leaves in zip(*changed, strict=True))


def _only_layer(part: Part, path: tuple[Any, ...], before: Any, after: Any) -> Any:
    """The leaf with its one layer pruned: layers stand alone, so that all of them were pruned alike."""
    at = part.at.get(_tree.path_name(path))
    return jnp.asarray(before).at[at].set(after[at]) if at else after


def _chosen(tree: Params, part: Part) -> list[Array]:
    pairs = zip(_tree.leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    return [leaf for path, leaf in pairs if path in part.patterns]


@jax.jit
def _diagonal_increase(
    diagonal: Float[Array, "*n"], before: Float[Array, "*n"], after: Float[Array, "*n"]
) -> Scalar:
    """½ Σ hᵢ δᵢ² of a leaf that changes."""
    return jnp.sum(_tree.wide(diagonal) * (_tree.wide(after) - _tree.wide(before)) ** 2) / 2
