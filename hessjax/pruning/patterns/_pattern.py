"""What a pattern is, the one that is none, and which pattern every leaf has."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from hessjax._core import _tree
from hessjax._core._messages import shown, uncalled
from hessjax._core._types import Params, settings


class Pattern:
    """A way to cut a leaf into groups of equal size, and what may happen to a group.

    A pattern of your own is a frozen dataclass, whose fields are its settings, that inherits from this class
    and has `group` and `ungroup`.
    """

    @property
    def at_most(self) -> int | None:
        """How many weights of a group may go. None: a group goes as a whole, or stays."""
        return None

    @property
    def tie(self) -> str | None:
        """Leaves of the same name (not None) have as many groups, and lose the same ones."""
        return None

    @property
    def name(self) -> str:
        """What messages call it."""
        return repr(self)

    def __call__(self, path: str, leaf: Any) -> "Pattern":
        """The pattern of one leaf: this one, unless the axes that it is about depend on the leaf."""
        return self

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """The weights of each group in a row.

        It only moves numbers, and raises a ValueError for a shape it does not fit.
        """
        raise NotImplementedError(f"{self.name} must have a method `group(leaf)`.")

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """The inverse of `group`: a leaf of this shape."""
        raise NotImplementedError(f"{self.name} must have a method `ungroup(rows, shape)`.")


PatternRule: TypeAlias = Callable[[str, Any], Pattern]
"""`(path, leaf) -> pattern`: one that depends on the leaf."""

Patterns: TypeAlias = Pattern | Mapping[str, Any] | PatternRule
"""A pattern for all leaves; by glob over paths, the first that matches; or by a function of path and leaf."""


@settings()
class Unstructured(Pattern):
    """Every weight on its own.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> hj.patterns.unstructured().group(jnp.ones((2, 3))).shape
        (6, 1)
    """

    def __repr__(self) -> str:
        return "unstructured()"

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "size 1"]:
        """Every weight in a row of its own."""
        return leaf.reshape(-1, 1)

    def ungroup(self, rows: Shaped[Array, "size 1"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """As they were."""
        return rows.reshape(shape)


def check_pattern(pattern: Any, argument: str = "pattern") -> None:
    """Raise a TypeError for what is no pattern, nor several, nor a function that gives one."""
    if isinstance(pattern, Mapping):
        for glob, found in pattern.items():
            check_pattern(found, f"{argument}[{glob!r}]")
    elif not callable(pattern) or isinstance(pattern, type):
        hint = uncalled(pattern)
        if isinstance(pattern, str):
            numbers = pattern.split(":")
            hint = f": write `n_of_m({numbers[0]}, {numbers[-1]})`" if len(numbers) == 2 else ""
        raise TypeError(
            f"`{argument}` must be a `Pattern`, such as `n_of_m(2, 4)`, a mapping `glob -> pattern` or a "
            f"function `(path, leaf) -> pattern`, got {shown(pattern)}{hint}."
        )


def patterns_of(pattern: Patterns, tree: Params) -> list[Pattern]:
    """The pattern of every leaf, each fitting it.

    Raises:
        ValueError: if a glob matches no leaf, a leaf matches none, or a pattern does not fit its leaf.
    """
    named = [(_tree.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    check_pattern(pattern)
    rule = _rule(pattern, [path for path, _ in named])
    found = [rule(path, leaf) for path, leaf in named]
    for (path, leaf), each in zip(named, found, strict=True):
        if not isinstance(each, Pattern):
            raise TypeError(f"`pattern` must give a `Pattern` for every leaf, got {shown(each)} for {path}.")
        try:
            # By shapes alone: what does not fit shows before anything is computed, inside `jit` too.
            jax.eval_shape(each.group, leaf)
        except ValueError as error:
            raise ValueError(
                f"`pattern` must fit every leaf that is pruned, but {each.name} does not fit {path} of shape "
                f"{jnp.shape(leaf)}: {error}. Choose the leaves by `where`, or give one pattern per path: "
                '`{"conv/*": filters(), "*": unstructured()}`.'
            ) from None
    return found


def _rule(pattern: Patterns, paths: list[str]) -> PatternRule:
    if not isinstance(pattern, Mapping):
        return pattern
    # A glob that matches nothing is a typo, and its leaves would go by another pattern in silence.
    for glob in pattern:
        if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
            raise ValueError(
                f"`pattern` must match by every path, but `{glob}` matches none of: {', '.join(paths)}."
            )

    def look_up(path: str, leaf: Any) -> Pattern:
        for glob, found in pattern.items():
            # Not `fnmatch`, which folds case and turns slashes on Windows.
            if fnmatch.fnmatchcase(path, glob):
                return _rule(found, paths)(path, leaf)
        raise ValueError(
            f"`pattern` must have an entry for every leaf that is pruned, but none matches {path}."
        )

    return look_up


def place_of(axis: int, shape: tuple[int, ...]) -> int:
    """The axis counted from the front, or a ValueError."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"there is no axis {axis}")
    return axis % len(shape)


def check_divides(size: int, length: int, name: str) -> None:
    """Raise a ValueError for a length that is no multiple of the size."""
    if length % size:
        raise ValueError(f"{size} does not divide {name}, which has {length}")


unstructured = Unstructured
