"""Which indices of which axes belong together, and which of them must stay: constraints and their solution.

Every index of every axis of every array in a program is a node. Equal operations tie nodes to each other; a
node must stay if the output, an operation that counts its operands, or a term of a sum that stays needs it.
All rules have the form "if these stay, those stay", so that a smallest solution exists: the least that can
be kept. What nothing needs goes.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

Nodes: TypeAlias = np.ndarray
"""(n,) the node of every index of one axis of length n; node 0 stays always."""

Kept: TypeAlias = np.ndarray
"""(nodes,) of bool: what has to stay, as far as is known."""


class Axes(NamedTuple):
    """What is known of one array, whatever the values of the inputs that are not params.

    Attributes:
        nodes: those of its axes.
        nonzero: bools that broadcast against the array (most axes have length 1): False where it is exactly
            0.0 for every input.
        varies: the same, in the same shape: False where it does not depend on the input.
    """

    nodes: tuple[Nodes, ...]
    nonzero: np.ndarray
    varies: np.ndarray

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


def axes_of(nodes: tuple[Nodes, ...], nonzero: np.ndarray, varies: np.ndarray) -> Axes:
    """An `Axes`, its flags brought to one shape: what is zero does not vary."""
    nonzero, varies = np.broadcast_arrays(np.reshape(nonzero, nonzero.shape or (1,) * len(nodes)), varies)
    return Axes(nodes, nonzero, np.asarray(varies & nonzero))


@dataclass
class Constraints:
    """What ties the nodes of one program: grows while the program is read, then is solved.

    Attributes:
        drop_constants: whether a term of a sum that does not depend on the input may go.
    """

    drop_constants: bool = False
    num_nodes: int = 1
    kept: list[Nodes] = field(default_factory=list)
    rules: list[Callable[[Kept], None]] = field(default_factory=list)

    def fresh(self, length: int) -> Nodes:
        """New nodes for an axis; an axis of length 1 stays, as it may stand for any number."""
        if length == 1:
            return staying(1)[0]
        self.num_nodes += length
        return np.arange(self.num_nodes - length, self.num_nodes)

    def keep(self, *axes: Nodes) -> None:
        """Every index of these axes stays."""
        self.kept += [nodes for nodes in axes if nodes.any()]

    def tie(self, a: Nodes, b: Nodes) -> None:
        """An index of one axis stays if it stays on the other."""
        if np.array_equal(a, b):
            return

        def rule(kept: Kept) -> None:
            kept[b[kept[a]]] = True
            kept[a[kept[b]]] = True

        self.rules.append(rule)

    def product(self, merged: Nodes, factors: tuple[Nodes, ...]) -> None:
        """An axis that is several in one, the last running fastest: it stays where all of them stay."""
        if not merged.any() and not any(nodes.any() for nodes in factors):
            return
        shape = tuple(map(len, factors))

        def rule(kept: Kept) -> None:
            mark(kept, kept[merged].reshape(shape), factors)
            kept[merged[outer([kept[nodes] for nodes in factors]).ravel()]] = True

        self.rules.append(rule)

    def solve(self, whole: Iterable[Nodes] = ()) -> Kept:
        """The least that can stay, at least one index of every axis in `whole`."""
        kept = np.zeros(self.num_nodes, bool)
        kept[0] = True
        for nodes in self.kept:
            kept[nodes] = True
        axes = [nodes for nodes in whole if len(nodes)]
        while True:
            self._propagate(kept)
            emptied = next((nodes for nodes in axes if not kept[nodes].any()), None)
            if emptied is None:
                return kept
            kept[emptied[0]] = True

    def _propagate(self, kept: Kept) -> None:
        """Apply the rules, backwards and forwards through the program, until they change nothing."""
        before = -1
        while before != (before := int(kept.sum())):
            for rule in reversed(self.rules):
                rule(kept)
            for rule in self.rules:
                rule(kept)


def outer(flags: list[np.ndarray]) -> np.ndarray:
    """The array of all conjunctions, an axis for each list of flags."""
    return functools.reduce(np.logical_and.outer, flags, np.ones((), bool))


def mark(kept: Kept, needed: np.ndarray, axes: tuple[Nodes, ...]) -> None:
    """Keep every index of every axis that some entry of `needed` lies at."""
    for axis, nodes in enumerate(axes):
        others = tuple(a for a in range(needed.ndim) if a != axis)
        kept[nodes[needed.any(axis=others)]] = True
