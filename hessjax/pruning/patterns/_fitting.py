"""Which pattern every leaf of a tree has: by globs and rules, along its axes, layer by layer."""

import fnmatch
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from hessjax._core import _tree
from hessjax._core._axes import Axes, layers_of, stacked
from hessjax._core._messages import shown
from hessjax._core._types import Params, settings
from hessjax.pruning.patterns._heads import check_heads
from hessjax.pruning.patterns._pattern import (
    Kept,
    Laid,
    Pattern,
    PatternRule,
    Patterns,
    Unstructured,
    check_pattern,
)


class Fit(NamedTuple):
    """The axes of a leaf, and the pattern of each of its layers."""

    axes: Axes
    pattern: Pattern


def fits_of(pattern: Patterns, tree: Params) -> list[Fit]:
    """The axes and the pattern of every leaf, which fit each other.

    Raises:
        TypeError: if a pattern is none.
        ValueError: if a glob matches no leaf, a leaf matches none, or a pattern does not fit its leaf.
    """
    named = [(_tree.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    laid = pattern if isinstance(pattern, Laid) else Laid(pattern, tree)
    chosen = chosen_patterns(laid.pattern, named)
    found = [Fit(laid.axes[path], fitted(chosen[path], laid.axes[path], x.dtype)) for path, x in named]
    check_heads([(fit.axes, fit.pattern) for fit in found])
    return found


def patterns_of(pattern: Patterns, tree: Params) -> list[Pattern]:
    """The pattern of every leaf as a whole, each fitting it; errors as `fits_of`."""
    return [_of_layers(fit) for fit in fits_of(pattern, tree)]


def chosen_patterns(pattern: Patterns, named: list[tuple[str, Any]]) -> dict[str, Pattern]:
    """By path, the pattern of every leaf, before it is laid along the leaf's axes.

    Raises:
        TypeError: if a pattern is none.
        ValueError: if a glob matches no leaf, or a leaf matches none.
    """
    check_pattern(pattern)
    rule = _rule(pattern, [path for path, _ in named])
    return {path: rule(path, leaf) for path, leaf in named}


def _rule(pattern: Any, paths: list[str]) -> PatternRule:
    if isinstance(pattern, Mapping):
        _check_globs(pattern, paths)
        return functools.partial(_look_up, pattern, paths)
    if isinstance(pattern, Pattern):
        return functools.partial(_same, pattern)
    return functools.partial(_ruled, pattern, paths)


def _same(pattern: Pattern, path: str, leaf: Any) -> Pattern:
    return pattern


def _ruled(rule: PatternRule, paths: list[str], path: str, leaf: Any) -> Pattern:
    found = rule(path, leaf)
    if not isinstance(found, Pattern):
        raise TypeError(f"`pattern` must give a `Pattern` for every leaf, got {shown(found)} for {path}.")
    return found


def _check_globs(patterns: Mapping[str, Any], paths: list[str]) -> None:
    # A glob that matches nothing is a typo, and its leaves would go by another pattern in silence.
    for glob in patterns:
        if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
            raise ValueError(
                f"`pattern` must match by every path, but `{glob}` matches none of: {', '.join(paths)}."
            )


def _look_up(patterns: Mapping[str, Any], paths: list[str], path: str, leaf: Any) -> Pattern:
    for glob, found in patterns.items():
        # Not `fnmatch`, which folds case and turns slashes on Windows.
        if fnmatch.fnmatchcase(path, glob):
            return _rule(found, paths)(path, leaf)
    raise ValueError(f"`pattern` must have an entry for every leaf that is pruned, but none matches {path}.")


def fitted(pattern: Pattern, axes: Axes, dtype: Any) -> Pattern:
    """The pattern of one layer, or a ValueError that names the leaf."""
    name = pattern.name
    try:
        found = pattern.along(axes)
        name = found.name
        # By shapes alone: what does not fit shows before anything is computed, inside `jit` too.
        jax.eval_shape(found.group, jax.ShapeDtypeStruct(axes.layer, dtype))
    except ValueError as error:
        layers = f" (layers of {axes.layer})" if axes.stack else ""
        raise ValueError(
            f"`pattern` must fit every leaf that is pruned, but {name} does not fit {axes.path} of shape "
            f"{axes.shape}{layers}: {error}. Choose the leaves by `where`, or give one pattern per path: "
            '`{"conv/*": filters(), "*": unstructured()}`.'
        ) from None
    return found


# -- layers -----------------------------------------------------------------------------------------


@settings()
class Layered(Pattern):
    """A pattern in every layer of a leaf: the groups of the first, those of the second, and so on."""

    axes: Axes
    each: Pattern

    @property
    def at_most(self) -> int | None:
        """That of each."""
        return self.each.at_most

    @property
    def tie(self) -> str | None:
        """That of each: leaves that are tied stack as many layers."""
        return self.each.tie

    @property
    def name(self) -> str:
        """That of each."""
        return self.each.name

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """Layer after layer."""
        return jnp.concatenate([self.each.group(layer) for layer in layers_of(leaf, self.axes)])

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Each back into its layer."""
        each = rows.reshape(self.axes.num_layers, -1, rows.shape[-1])
        return stacked([self.each.ungroup(part, self.axes.layer) for part in each], self.axes)


def _of_layers(fit: Fit) -> Pattern:
    # Weights on their own, and those that stay, are so whatever the axes are.
    if not fit.axes.stack or isinstance(fit.pattern, Unstructured | Kept):
        return fit.pattern
    return Layered(fit.axes, fit.pattern)
