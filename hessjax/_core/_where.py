"""Which leaves: by globs over paths, by functions, or by booleans as a tree."""

import fnmatch
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from hessjax._core import _tree
from hessjax._core._messages import shown
from hessjax._core._types import Where


def match(tree: Any, where: Where, argument: str = "where") -> Any:
    """A tree of bools like `tree`: True for the leaves that `where` selects.

    Raises:
        TypeError: if `where` is nothing that selects leaves.
        ValueError: if `where`, or any one of several globs, selects no leaf at all, or a tree of bools does
            not cover the leaves.
    """
    if isinstance(where, str) or (callable(where) and not _is_tree_of_bools(where)):
        return _matched(tree, [where], argument)
    if _is_tree_of_bools(where):
        return _as_flagged(tree, where, argument)
    patterns = list(where) if isinstance(where, Collection) and not isinstance(where, Mapping) else None
    if patterns is None or not all(isinstance(x, str) or callable(x) for x in patterns):
        raise TypeError(
            f"`{argument}` must be a glob over paths, several, a function `(path, leaf) -> bool` or "
            f"`params -> tree`, or a tree of booleans, got {shown(where)}."
        )
    if not patterns:
        raise ValueError(f"`{argument}` must name at least one pattern, got an empty {type(where).__name__}.")
    return _matched(tree, patterns, argument)


def _matched(tree: Any, patterns: list[Any], argument: str) -> Any:
    """By globs and functions, of which every one must select something."""
    hits = [_hits(tree, pattern, argument) for pattern in patterns]
    for pattern, hit in zip(patterns, hits, strict=True):
        if not any(jax.tree.leaves(hit)):
            name = f"`{pattern}`" if isinstance(pattern, str) else "its predicate"
            raise ValueError(
                f"`{argument}` must match at least one leaf, but {name} matches none of: "
                f"{', '.join(_tree.leaf_paths(tree)) or '(no leaves)'}."
            )
    return jax.tree.map(lambda *flags: any(flags), *hits)


def _hits(tree: Any, pattern: str | Callable[..., Any], argument: str) -> Any:
    if isinstance(pattern, str):
        # A path itself matches, even one that reads otherwise as a glob: `w[a]`.
        names = _tree.leaf_paths(tree)
        flags = [name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names]
        return jax.tree.unflatten(jax.tree.structure(tree), flags)
    if not _takes(pattern, 2) and _takes(pattern, 1):  # as masks of optax may be
        return match(tree, pattern(tree), f"{argument}(params)")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: bool(pattern(_tree.path_name(path), leaf)), tree
    )


def _takes(function: Callable[..., Any], number: int) -> bool:
    """Whether it can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*range(number))
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return number == 2
    return True


def _is_tree_of_bools(where: Any) -> bool:
    leaves = jax.tree.leaves(where)
    return bool(leaves) and all(_is_bool(leaf) for leaf in leaves)


def _is_bool(leaf: Any) -> bool:
    return isinstance(leaf, bool | np.bool_) or (
        isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim == 0 and leaf.dtype == bool
    )


def _as_flagged(tree: Any, where: Any, argument: str) -> Any:
    """By a tree of bools, or one of which a flag stands for all that is below it, as `optax.masked` takes.

    By paths rather than containers: a dict says it for a `FrozenDict` and an `nnx.State`.
    """
    flags = {_tree.path_name(path): bool(flag) for path, flag in jax.tree_util.tree_leaves_with_path(where)}
    names = _tree.leaf_paths(tree)
    chosen = [next((flags[place] for place in _places_above(name) if place in flags), None) for name in names]
    used = {place for name in names for place in _places_above(name)}
    lost = [place for place in flags if place not in used]
    missing = [name for name, flag in zip(names, chosen, strict=True) if flag is None]
    if lost or missing:
        what = f"no entry for {', '.join(missing)}" if missing else f"entries for no leaf: {', '.join(lost)}"
        raise ValueError(
            f"`{argument}` as a tree of booleans must have the structure of the params, or of their upper "
            f"part, but has {what}."
        )
    if not any(chosen):
        raise ValueError(
            f"`{argument}` must match at least one leaf, got a tree of booleans that are all False."
        )
    return jax.tree.unflatten(jax.tree.structure(tree), chosen)


def _places_above(path: str) -> list[str]:
    """The path, and those of all that holds it; `.` is the whole tree."""
    parts = [] if path == "." else path.split("/")
    return ["/".join(parts[:i]) for i in range(len(parts), 0, -1)] + ["."]
