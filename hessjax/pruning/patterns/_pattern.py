"""What a pattern is, and the ones that leave weights alone: each by itself, and all as they are."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Shaped

from hessjax._core._axes import Axes
from hessjax._core._layout import tree_axes
from hessjax._core._messages import shown, uncalled
from hessjax._core._types import Params, settings
from hessjax._core._words import AxisWords


class Pattern:
    """A way to cut a leaf into groups of equal size, and what may happen to a group.

    A pattern of your own is a frozen dataclass, whose fields are its settings, that inherits from this class
    and has `group` and `ungroup`. Of a leaf that stacks layers it sees one layer at a time.
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

    def along(self, axes: Axes) -> "Pattern":
        """The pattern of one leaf: this one, unless the axes that it is about depend on the leaf.

        Raises:
            ValueError: if the leaf has no such axes.
        """
        return self

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """The weights of each group in a row.

        It only moves numbers, and raises a ValueError for a shape it does not fit.
        """
        raise NotImplementedError(f"{self.name} must have a method `group(leaf)`.")

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """The inverse of `group`: a leaf of this shape."""
        raise NotImplementedError(f"{self.name} must have a method `ungroup(rows, shape)`.")


class Grid(NamedTuple):
    """A leaf whose axes are cut in place, so that every group is what some of the parts run over.

    Attributes:
        parts: of each axis of the leaf, the lengths of its parts; most have one.
        within: the axes, of those that are cut, that a group extends over.
    """

    parts: tuple[tuple[int, ...], ...]
    within: tuple[int, ...]

    @property
    def fine(self) -> tuple[int, ...]:
        """The shape of the leaf after the cuts."""
        return tuple(itertools.chain(*self.parts))

    @property
    def across(self) -> tuple[int, ...]:
        """The axes that count groups."""
        return tuple(axis for axis in range(len(self.fine)) if axis not in self.within)

    @property
    def groups(self) -> tuple[int, ...]:
        """How many groups there are, along the axes that count them."""
        return tuple(self.fine[axis] for axis in self.across)

    @property
    def size(self) -> int:
        """How many weights a group has."""
        return math.prod(self.fine[axis] for axis in self.within)


class Gridded(Pattern):
    """A pattern whose groups are cut out of a leaf axis by axis, so that shards stay where they are."""

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """The cuts; None if there are none that will do."""
        raise NotImplementedError(f"{self.name} must have a method `grid(shape)`.")

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """The weights of each group in a row."""
        grid = self._grid(leaf.shape)
        rows = leaf.reshape(grid.fine).transpose(*grid.across, *grid.within)
        return rows.reshape(math.prod(grid.groups), grid.size)

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Each back in its place."""
        grid = self._grid(shape)
        order = (*grid.across, *grid.within)
        moved = rows.reshape([grid.fine[axis] for axis in order])
        # The inverse permutation: where each axis came from.
        return moved.transpose([order.index(axis) for axis in range(len(order))]).reshape(shape)

    def _grid(self, shape: tuple[int, ...]) -> Grid:
        found = self.grid(shape)
        assert found is not None
        return found


PatternRule: TypeAlias = Callable[[str, Any], Pattern]
"""`(path, leaf) -> pattern`: one that depends on the leaf."""


@dataclasses.dataclass(frozen=True, eq=False)
class Laid:
    """One or several patterns, and the tree that says what the axes of all leaves mean.

    A ranking sees only the leaves that are pruned, of which a bias beside a kernel is none: what their axes
    mean is decided by the whole tree, and handed down with the pattern.
    """

    pattern: Any
    params: Params
    words: AxisWords | None = None

    @functools.cached_property
    def axes(self) -> dict[str, Axes]:
        """Those of every leaf, by path."""
        return {found.path: found for found in tree_axes(self.params, self.words)}


Patterns: TypeAlias = Pattern | Mapping[str, Any] | PatternRule | Laid
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
    elif not isinstance(pattern, Pattern) and (not callable(pattern) or _is_another_setting(pattern)):
        hint = uncalled(pattern)
        if isinstance(pattern, str):
            numbers = pattern.split(":")
            hint = f": write `n_of_m({numbers[0]}, {numbers[-1]})`" if len(numbers) == 2 else ""
        raise TypeError(
            f"`{argument}` must be a `Pattern`, such as `n_of_m(2, 4)`, a mapping `glob -> pattern` or a "
            f"function `(path, leaf) -> pattern`, got {shown(pattern)}{hint}."
        )


def _is_another_setting(value: Any) -> bool:
    """A class, or an allocation, which can be called too."""
    return isinstance(value, type) or type(value).__module__.startswith("hessjax.")


@settings()
class Kept(Pattern):
    """Every weight stays: of a leaf that has none of what goes, such as the bias of an attention's output."""

    @property
    def at_most(self) -> int:
        """None."""
        return 0

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "size 1"]:
        """Every weight in a row of its own."""
        return leaf.reshape(-1, 1)

    def ungroup(self, rows: Shaped[Array, "size 1"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """As they were."""
        return rows.reshape(shape)


def place_of(axis: int, shape: tuple[int, ...]) -> int:
    """The axis counted from the front, or a ValueError."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"there is no axis {axis}")
    return axis % len(shape)


def cut_axes(shape: tuple[int, ...], cuts: Mapping[int, tuple[int, ...]], inner: Sequence[int]) -> Grid:
    """The grid of a leaf some of whose axes are cut; of those in `inner` a group has the last part."""
    parts = tuple(cuts.get(axis, (n,)) for axis, n in enumerate(shape))
    ends = list(itertools.accumulate(map(len, parts)))
    return Grid(parts, tuple(ends[axis] - 1 for axis in inner))


def check_divides(size: int, length: int, name: str) -> None:
    """Raise a ValueError for a length that is no multiple of the size."""
    if length % size:
        raise ValueError(f"{size} does not divide {name}, which has {length}")


unstructured = Unstructured
