"""Why zeros stay: which rule holds them, found by leaving each out of account in turn."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import numpy as np
from jaxtyping import Bool

from hessjax.compaction._narrow import Asked, Narrowing, analyse
from hessjax.program._axes import Cause, Flags

Reason: TypeAlias = Cause | Literal["scattered", "shared"]
"""Why zeros stay: one of the rules; or they fill no whole index of any axis; or other weights share it."""


class Obstacle(NamedTuple):
    """Zeros that could not be removed, and why.

    Attributes:
        reasons: what holds them: any one of these is enough, so that several have to be overcome together.
        leaves: the params that they lie in.
        indices: how many indices of these params' axes hold nothing but zeros, and stay.
        by: the operations, or the arguments, that brought it in.
    """

    reasons: tuple[Reason, ...]
    leaves: tuple[str, ...]
    indices: int
    by: tuple[str, ...] = ()

    def __str__(self) -> str:
        number = "1 index" if self.indices == 1 else f"{self.indices} indices"
        what = f"{number} ({_some(self.leaves)})" if self.indices else _some(self.leaves)
        by = f" [{_some(self.by)}]" if self.by else ""
        return f"zeros stay in {what}: " + "; and ".join(_TEXTS[reason] for reason in self.reasons) + by


_TEXTS: dict[Reason, str] = {
    "constant": (
        "what they give is not zero but the same for every input, such as a bias. `drop_constants=True` lets "
        "it go, and changes the function by it"
    ),
    "argument": (
        "they meet an argument, whose shape is fixed. Pass what is the model's own, such as batch "
        "statistics, in `params`"
    ),
    "where": "they lie in, or belong to, a leaf that `where` leaves out. Widen `where`",
    "array": "they meet an array of a width that the code names. Make it a part of `params`",
    "counted": (
        "a mean, a maximum or a normalisation runs over them and counts them. Prune what lies between: "
        "hidden units, heads"
    ),
    "width": "data are multiplied with data along them, and modules scale by their number. Prune whole heads",
    "index": "their axis is taken apart by number, as by an index, a window or the steps of a loop",
    "unread": "an operation on them is not understood",
    "scattered": (
        "they fill no whole index of any axis. Prune by a pattern that does: `hj.patterns.filters()`, "
        "`channels()`, `rows()`, `heads()`"
    ),
    "shared": (
        "other weights along the same indices are not zero, or a normalisation shifts them: what several "
        "layers share shrinks where all of them agree"
    ),
}


def _some(names: Iterable[str]) -> str:
    first, rest = list(names)[:3], list(names)[3:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


Places: TypeAlias = dict[tuple[int, int], Bool[np.ndarray, " _length"]]
"""`{(leaf, axis): which indices}`"""


def obstacles(
    narrowing: Narrowing, nonzero: list[Flags], asked: Asked, paths: list[str], args: Any
) -> tuple[Obstacle, ...]:
    """Explain what a narrowing left.

    Args:
        narrowing: what `analyse` found.
        nonzero: what it was asked of.
        asked: the same.
        paths: the names of the params.
        args: the other arguments.

    Returns:
        One for every reason that holds by itself; if there is none, one for those that hold together.

    Cost:
        None without zeros that stay; otherwise one analysis for each rule that the program meets.
    """
    left = _left(narrowing, nonzero)
    nothing_went = not any(narrowing.indices())
    if not left:
        each = zip(paths, nonzero, narrowing.program.used, strict=True)
        holed = [path for path, flags, used in each if used and _holed(flags)]
        return (Obstacle(("scattered",), tuple(holed), 0),) if holed and nothing_went else ()
    inquiry = _Inquiry(narrowing, nonzero, asked, left)
    met = [
        c for c in get_args(Cause) if c in narrowing.causes or (c == "constant" and not asked.drop_constants)
    ]
    together = inquiry.freed(met)
    if not together:
        leaves = dict.fromkeys(paths[leaf] for leaf, _ in left)
        return (Obstacle(("shared",), tuple(leaves), _count(left)),) if nothing_went else ()
    found: list[tuple[tuple[Cause, ...], Places]]
    found = [((cause,), freed) for cause in met if (freed := inquiry.freed([cause]))]
    found = found or [inquiry.fewest(met, together)]
    return tuple(_obstacle(inquiry, causes, freed, paths, args) for causes, freed in found)


def _holed(flags: Flags) -> bool:
    return flags.ndim > 1 and not flags.all()


def _left(narrowing: Narrowing, nonzero: list[Flags]) -> Places:
    """The indices of matrices and kernels that hold zeros only, and stay."""
    found = {}
    for leaf, (value, flags, used) in enumerate(
        zip(narrowing.program.leaves, nonzero, narrowing.program.used, strict=True)
    ):
        for axis in range(flags.ndim) if flags.ndim > 1 and used else ():
            others = tuple(a for a in range(flags.ndim) if a != axis)
            zeros = ~flags.any(axis=others) & narrowing.kept[narrowing.axes[value].nodes[axis]]
            if zeros.any() and not zeros.all():
                found[leaf, axis] = zeros
    return found


class _Inquiry(NamedTuple):
    """What is asked again and again."""

    narrowing: Narrowing
    nonzero: list[Flags]
    asked: Asked
    left: Places

    def without(self, causes: Iterable[Cause]) -> Narrowing:
        """The narrowing if these rules were not."""
        relaxed = self.asked._replace(relaxed=frozenset(causes))
        return analyse(self.narrowing.program, self.nonzero, relaxed)

    def freed(self, causes: Iterable[Cause]) -> Places:
        """Those of the zeros that would go without these rules."""
        new, leaves = self.without(causes), self.narrowing.program.leaves
        gone = {
            (leaf, axis): zeros & ~new.kept[new.axes[leaves[leaf]].nodes[axis]]
            for (leaf, axis), zeros in self.left.items()
        }
        return {place: zeros for place, zeros in gone.items() if zeros.any()}

    def fewest(self, causes: list[Cause], freed: Places) -> tuple[tuple[Cause, ...], Places]:
        """The smallest part of these that frees as much, found by leaving out one after the other."""
        for cause in list(causes):
            rest = [c for c in causes if c != cause]
            if _count(self.freed(rest)) == _count(freed):
                causes = rest
        return tuple(causes), freed


def _count(places: Places) -> int:
    return sum(int(zeros.sum()) for zeros in places.values())


def _obstacle(
    inquiry: _Inquiry, causes: tuple[Cause, ...], freed: Places, paths: list[str], args: Any
) -> Obstacle:
    narrowing, new = inquiry.narrowing, inquiry.without(causes)
    shrinking = [new.shape(v) != v.shape for v in new.program.body.inputs[new.program.num_params :]]
    by = [name for cause in causes for name in narrowing.causes.get(cause, ()) if name]
    if "argument" in causes:
        names = [f"args{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(args)]
        by += [name for name, shrinks in zip(names, shrinking, strict=True) if shrinks]
    leaves = dict.fromkeys(paths[leaf] for leaf, _ in freed)
    return Obstacle(causes, tuple(leaves), _count(freed), tuple(dict.fromkeys(by)))
