"""Which indices of which axes belong together, and which of them must stay: constraints and their solution.

Every index of every axis of every array in a program is a node. Equal operations tie nodes to each other; a
node must stay if the output, an operation that counts its operands, or a term of a sum that stays needs it.
All rules have the form "if these stay, those stay", so that a smallest solution exists: the least that can
be kept. What nothing needs goes.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

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


class Axes(NamedTuple):
    """What is known of one array, whatever the values of the inputs that are not params.

    Attributes:
        nodes: those of its axes.
        nonzero: bools that broadcast against the array (most axes have length 1): False where it is exactly
            0.0 for every input.
        varies: the same, in the same shape: False where it does not depend on the input.
    """

    nodes: tuple[Nodes, ...]
    nonzero: Flags
    varies: Flags

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


def constant(value: Any) -> Axes:
    """A constant of the program: a rebuilt model may make another, so that nothing of it goes."""
    return axes_of(staying(*np.shape(value)), nonzero_of(value), np.zeros((), bool))


def nonzero_of(value: Any) -> Flags:
    """Where an array is not exactly zero; everywhere, if it is no array of numbers."""
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
        return np.ones((1,) * np.ndim(value), bool)
    return np.asarray(np.asarray(value) != 0)


def axes_of(nodes: tuple[Nodes, ...], nonzero: Flags, varies: Flags) -> Axes:
    """An `Axes`, its flags brought to one shape: what is zero does not vary."""
    nonzero, varies = np.broadcast_arrays(np.reshape(nonzero, nonzero.shape or (1,) * len(nodes)), varies)
    return Axes(nodes, nonzero, np.asarray(varies & nonzero))


@dataclass
class Constraints:
    """What ties the nodes of one program: grows while the program is read, then is solved.

    Attributes:
        drop_constants: whether a term of a sum that does not depend on the input may go.
        num_nodes: how many there are; node 0 stands for all that stays whatever happens.
        kept: nodes that stay.
        rules: what else stays once some do; each marks it in place.
        starts: the first node of every axis that got nodes of its own.
        stems: where each of these axes comes from.
        unread: the operations that no reading understands: nothing that they touch may go.
    """

    drop_constants: bool = False
    num_nodes: int = 1
    kept: list[Nodes] = field(default_factory=list)
    rules: list[Callable[[Kept], None]] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    stems: list[Stems] = field(default_factory=lambda: [frozenset()])
    unread: list[Operation] = field(default_factory=list)

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

    def share(self, nodes: Nodes, other: Nodes) -> None:
        """Two arrays meet entry by entry: their axes are one, and what stands for both stems from both."""
        if np.array_equal(nodes, other):
            return
        self.tie(nodes, other)
        if more := self.stems_of(other):
            for run in {int(run) for run in np.searchsorted(self.starts, nodes, "right") - 1 if run}:
                self.stems[run] |= more

    def keep(self, *axes: Nodes) -> None:
        """Every index of these axes stays."""
        self.kept += [nodes for nodes in axes if nodes.any()]

    def tie(self, a: Nodes, b: Nodes) -> None:
        """An index of one axis stays if it stays on the other."""
        if np.array_equal(a, b):
            return
        self.rules.append(functools.partial(_tied, a, b))

    def product(self, merged: Nodes, factors: tuple[Nodes, ...]) -> None:
        """An axis that is several in one, the last running fastest: it stays where all of them stay."""
        if not merged.any() and not any(nodes.any() for nodes in factors):
            return
        self.rules.append(functools.partial(_merged, merged, factors))

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


# -- entry by entry --------------------------------------------------------------------------------

# fmt: off
ZERO_AT_ZERO = frozenset((
    "neg", "abs", "sign", "sqrt", "cbrt", "sin", "tan", "tanh", "asin", "atan", "sinh", "asinh",
    "atanh", "expm1", "log1p", "floor", "ceil", "round", "erf", "erf_inv", "real", "imag", "conj",
    "convert_element_type", "copy", "copy_p", "stop_gradient", "square", "reduce_precision",
    "device_put", "sharding_constraint", "name", "optimization_barrier",
))
"""f(0) = 0."""
ZERO_AT_ZEROS = frozenset(("add", "sub", "add_any", "max", "min", "select_n", "clamp"))
"""f(0, 0, ...) = 0."""
ELEMENTWISE = ZERO_AT_ZERO | ZERO_AT_ZEROS | frozenset((
    "mul", "div", "pow", "integer_pow", "exp", "exp2", "log", "logistic", "rsqrt", "cos", "acos",
    "cosh", "acosh", "lgamma", "digamma", "erfc", "rem", "atan2", "nextafter", "eq", "ne", "lt", "le",
    "gt", "ge", "and", "or", "xor", "not", "is_finite",
))
# fmt: on


def elementwise(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Entry by entry."""
    if len(operation.outputs) > 1:  # an optimization barrier
        return inputs
    nodes = tuple(
        common_nodes(constraints, axis, n, inputs) for axis, n in enumerate(operation.outputs[0].shape)
    )
    nonzero = _can_be_nonzero(operation, inputs)
    varies = _either([x.varies for x in inputs])
    if operation.name == "mul":  # what is exactly zero makes the other factor harmless
        a, b = inputs
        varies = _either([a.varies & b.nonzero, a.nonzero & b.varies])
    return [axes_of(nodes, nonzero, varies)]


def common_nodes(constraints: Constraints, axis: int, length: int, inputs: list[Axes]) -> Nodes:
    """The nodes of an axis that several arrays share; scalars and axes of length 1 fit any."""
    shared = [x.nodes[axis] for x in inputs if len(x.nodes) > axis and len(x.nodes[axis]) == length]
    # The first that has nodes of its own stands for all (a mask's have none), so that a leaf is recognised.
    chosen = next((nodes for nodes in shared if nodes.any()), staying(length)[0])
    for nodes in shared:
        constraints.share(chosen, nodes)
    return chosen


def _can_be_nonzero(operation: Operation, inputs: list[Axes]) -> Flags:
    """Where an elementwise operation can give anything but zero."""
    name, first = operation.name, inputs[0].nonzero
    numbers = [None if v.literal is None else np.asarray(v.literal) for v in operation.inputs]
    if name == "mul":
        return np.asarray(first & inputs[1].nonzero)
    if name == "div" or (name == "integer_pow" and operation.params["y"] > 0) or name in ZERO_AT_ZERO:
        return first
    if name == "pow" and numbers[1] is not None and numbers[1] > 0:
        return first
    if name in ("max", "min"):
        # max(x, c) with c ≤ 0 is zero at zero whatever c is: a leaky clip. The other way round for min.
        harmless = (lambda c: c <= 0) if name == "max" else (lambda c: c >= 0)
        inputs = [x for x, c in zip(inputs, numbers, strict=True) if c is None or not harmless(c)] or inputs
    if name == "clamp" and None not in (numbers[0], numbers[2]) and numbers[0] <= 0 <= numbers[2]:  # type: ignore[operator]
        return inputs[1].nonzero
    if name in ZERO_AT_ZEROS:
        cases = inputs[1:] if name == "select_n" else inputs  # what selects is no part of the result
        return _either([x.nonzero for x in cases])
    return _either([np.ones_like(x.nonzero) for x in inputs])


def _either(flags: list[Flags | np.bool_]) -> Flags:
    return np.asarray(functools.reduce(np.logical_or, flags))
