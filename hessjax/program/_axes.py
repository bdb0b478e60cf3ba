"""Which indices of which axes belong together, and which of them must stay: constraints and their solution.

Every index of every axis of every array in a program is a node. Equal operations tie nodes to each other; a
node must stay if the output, an operation that counts its operands, or a term of a sum that stays needs it.
All rules have the form "if these stay, those stay", so that a smallest solution exists: the least that can
be kept. What nothing needs goes.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Int

from hessjax.program._program import Operation

Nodes: TypeAlias = Int[np.ndarray, " _length"]
"""(n,) the node of every index of one axis of length n; node 0 stays always."""

Kept: TypeAlias = Bool[np.ndarray, " _nodes"]
"""(nodes,) of bool: what has to stay, as far as is known."""

Stems: TypeAlias = frozenset[tuple[int, int]]
"""Where an axis comes from: (leaf, axis) of the params."""

Flags: TypeAlias = Bool[np.ndarray, "..."]
"""What holds of every entry of an array; length 1 along the axes where all entries are alike."""


Cause: TypeAlias = Literal["constant", "argument", "where", "array", "counted", "width", "index", "unread"]
"""Why an index stays that no weight needs.

`"constant"`: it is the same for every input, and constants may not go. `"argument"`: it meets an argument,
whose shape is fixed. `"where"`: its leaf may not shrink. `"array"`: it meets an array that the model makes
itself, of a width that the code names. `"counted"`: a mean, a maximum or a normalisation runs over its axis.
`"width"`: data are multiplied with data along its axis, as queries with keys, and modules scale by its width.
`"index"`: its axis is taken apart by number, as layers by a loop. `"unread"`: an operation on it is not
understood.
"""


class Axes(NamedTuple):
    """What is known of one array, whatever the values of the inputs that are not params.

    Attributes:
        nodes: those of its axes.
        nonzero: bools that broadcast against the array (most axes have length 1): False where it is exactly
            0.0 for every input.
        varies: the same, in the same shape: False where it does not depend on the input.
        chosen: whether it is made of weights alone, and depends on the input only in which of them it takes.
    """

    nodes: tuple[Nodes, ...]
    nonzero: Flags
    varies: Flags
    chosen: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array itself."""
        return tuple(map(len, self.nodes))


def staying(*lengths: int) -> tuple[Nodes, ...]:
    """Axes of which every index stays."""
    return tuple(np.zeros(n, np.int64) for n in lengths)


def unknown(shape: Iterable[int]) -> Axes:
    """An array of which nothing is known, and nothing goes."""
    nodes = staying(*shape)
    return axes_of(nodes, np.ones((1,) * len(nodes), bool), np.ones((), bool))


def nonzero_of(value: Any) -> Flags:
    """Where an array is not exactly zero; everywhere, if it is no array of numbers."""
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
        return np.ones((1,) * np.ndim(value), bool)
    return np.asarray(np.asarray(value) != 0)


def axes_of(
    nodes: tuple[Nodes, ...], nonzero: Flags | np.bool_, varies: Flags | np.bool_, *, chosen: bool = False
) -> Axes:
    """An `Axes`, its flags brought to one shape: what is zero does not vary."""
    scalar = (1,) * len(nodes)
    nonzero, varies = np.broadcast_arrays(np.reshape(nonzero, np.shape(nonzero) or scalar), varies)
    return Axes(nodes, nonzero, np.asarray(varies & nonzero), chosen)


@dataclass
class Constraints:
    """What ties the nodes of one program: grows while the program is read, then is solved.

    Attributes:
        drop_constants: whether a term of a sum that does not depend on the input may go.
        relaxed: causes that are left out of account, to find out what they hold.
        causes: those that something stays for, each with the operations that brought it in.
        num_nodes: how many there are; node 0 stands for all that stays whatever happens.
        kept: nodes that stay.
        rules: what else stays once some do; each marks it in place.
        starts: the first node of every axis that got nodes of its own.
        stems: where each of these axes comes from.
        unread: the operations that no reading understands: nothing that they touch may go.
        factors: what every axis that is several in one is made of, by its nodes.
        merged: the other way round.
    """

    drop_constants: bool = False
    relaxed: frozenset[Cause] = frozenset()
    causes: dict[Cause, dict[str, None]] = field(default_factory=dict)
    num_nodes: int = 1
    kept: list[Nodes] = field(default_factory=list)
    rules: list[Callable[[Kept], None]] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    stems: list[Stems] = field(default_factory=lambda: [frozenset()])
    unread: list[Operation] = field(default_factory=list)
    factors: dict[bytes, tuple[Nodes, ...]] = field(default_factory=dict)
    merged: dict[tuple[bytes, ...], Nodes] = field(default_factory=dict)

    def fresh(self, length: int, stems: Stems = frozenset()) -> Nodes:
        """New nodes for an axis; an axis of length 1 stays, as it may stand for any number."""
        nodes = np.arange(self.num_nodes, self.num_nodes + length)
        self.starts.append(self.num_nodes)
        self.stems.append(stems)
        self.num_nodes += length
        if length == 1:
            self.keep(nodes)
        return nodes

    def stems_of(self, *axes: Nodes) -> Stems:
        """The axes of leaves that these were cut, merged, split or copied from."""
        # Nodes come in runs, one for each new axis: the run that a node lies in says where it is from.
        runs = {int(run) for nodes in axes for run in np.searchsorted(self.starts, nodes, "right") - 1}
        return frozenset[tuple[int, int]]().union(*(self.stems[run] for run in runs))

    def share(self, nodes: Nodes, other: Nodes) -> Nodes:
        """Two axes meet entry by entry: they are one, and what stands for both stems from both."""
        if np.array_equal(nodes, other):
            return nodes
        self.tie(nodes, other)
        if not (self.stems_of(other) - self.stems_of(nodes)):
            return nodes
        # New nodes: the axes before they met stem from what they did, and a part of one axis from its own.
        runs = [np.searchsorted(self.starts, each, "right") for each in (nodes, other)]
        ends = np.flatnonzero(np.any([np.diff(each) for each in runs], axis=0)) + 1
        parts = zip(np.split(nodes, ends), np.split(other, ends), strict=True)
        both = np.concatenate([self.fresh(len(a), self.stems_of(a, b)) for a, b in parts])
        self.tie(nodes, both)
        return both

    def given(self, shape: Iterable[int], why: Cause, by: str = "") -> tuple[Nodes, ...]:
        """Axes that the program finds as they are, of which every index stays for this cause."""
        if any(n > 1 for n in shape):
            self.causes.setdefault(why, {})[by] = None
        return tuple(self.fresh(n) for n in shape) if why in self.relaxed else staying(*shape)

    def array(self, value: Any) -> Axes:
        """A constant of the program: a rebuilt model may make another, so that nothing of it goes."""
        return axes_of(self.given(np.shape(value), "array"), nonzero_of(value), np.zeros((), bool))

    def keep(self, *axes: Nodes, why: Cause | None = None, by: str = "") -> None:
        """Every index of these axes stays."""
        found = [nodes for nodes in axes if nodes.any()]
        if found and why is not None:
            self.causes.setdefault(why, {})[by] = None
        if why is None or why not in self.relaxed:
            self.kept += found

    def tie(self, a: Nodes, b: Nodes) -> None:
        """An index of one axis stays if it stays on the other."""
        if np.array_equal(a, b):
            return
        self.rules.append(functools.partial(_tied, a, b))

    def parts(self, axes: Iterable[Nodes]) -> tuple[Nodes, ...]:
        """These axes, the ones that are several in one taken apart again as far as they were put together."""
        found = list[Nodes]()
        for nodes in axes:
            known = self.factors.get(nodes.tobytes())
            found += self.parts(known) if known else [nodes]
        return tuple(found)

    def merge(self, factors: tuple[Nodes, ...]) -> Nodes:
        """The axis that is these in one, the last running fastest: it stays where all of them stay."""
        key = tuple(nodes.tobytes() for nodes in factors)
        if key not in self.merged:
            whole = self.fresh(int(np.prod([len(nodes) for nodes in factors])), self.stems_of(*factors))
            self._product(whole, factors)
        return self.merged[key]

    def split(self, whole: Nodes, lengths: Iterable[int]) -> tuple[Nodes, ...]:
        """The axes of these lengths that this one is, the last running fastest."""
        known, stems, lengths = self.factors.get(whole.tobytes()), self.stems_of(whole), tuple(lengths)
        if known and tuple(map(len, known)) == lengths:
            return known
        factors = tuple(self.fresh(n, stems) for n in lengths)
        self._product(whole, factors)
        return factors

    def _product(self, whole: Nodes, factors: tuple[Nodes, ...]) -> None:
        self.rules.append(functools.partial(_merged, whole, factors))
        self.factors[whole.tobytes()] = factors
        self.merged[tuple(nodes.tobytes() for nodes in factors)] = whole

    def solve(self, whole: Iterable[Nodes] = ()) -> Kept:
        """The least that can stay, at least one index of every axis in `whole`."""
        kept = np.zeros(self.num_nodes, bool)
        kept[0] = True
        for nodes in self.kept:
            kept[nodes] = True
        axes = [nodes for nodes in whole if len(nodes)]
        # The rules only ever add, so that a fixed point exists and the first one reached is the least.
        while True:
            self._propagate(kept)
            emptied = next((nodes for nodes in axes if not kept[nodes].any()), None)
            if emptied is None:
                return kept
            kept[emptied[0]] = True

    def _propagate(self, kept: Kept) -> None:
        """Apply the rules, backwards and forwards through the program, until they change nothing."""
        before = -1
        # Needs run from outputs to inputs, ties both ways: alternating, a chain of layers takes one round.
        while before != (before := int(kept.sum())):
            for rule in reversed(self.rules):
                rule(kept)
            for rule in self.rules:
                rule(kept)


def unread(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """One that nothing is known of: nothing that it touches may go."""
    constraints.unread.append(operation)
    for x in inputs:
        constraints.keep(*x.nodes, why="unread", by=operation.name)
    # What takes nothing in, such as random numbers, is of a width that the code names.
    why: Cause = "unread" if inputs else "array"
    return [
        unknown(v.shape)._replace(nodes=constraints.given(v.shape, why, operation.name))
        for v in operation.outputs
    ]


def _tied(a: Nodes, b: Nodes, kept: Kept) -> None:
    kept[b[kept[a]]] = True
    kept[a[kept[b]]] = True


def _merged(merged: Nodes, factors: tuple[Nodes, ...], kept: Kept) -> None:
    mark(kept, kept[merged].reshape(tuple(map(len, factors))), factors)
    kept[merged[outer([kept[nodes] for nodes in factors]).ravel()]] = True


def outer(flags: list[Bool[np.ndarray, " _length"]]) -> Flags:
    """The array of all conjunctions, an axis for each list of flags."""
    return functools.reduce(np.logical_and.outer, flags, np.ones((), bool))


def mark(kept: Kept, needed: Flags, axes: tuple[Nodes, ...]) -> None:
    """Keep every index of every axis that some entry of `needed` lies at."""
    for axis, nodes in enumerate(axes):
        others = tuple(a for a in range(needed.ndim) if a != axis)
        kept[nodes[needed.any(axis=others)]] = True
