"""For every leaf of the params the operations it takes part in, or the reason why they are not understood."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax.layers._operations import Bias, Embedding, Kind, Scale, kind_of
from hessjax.program._origins import Moves, Origin, origins
from hessjax.program._program import Operation, Program, Value, reached
from hessjax.program._program import Use as Meeting
from hessjax.program._uses import uses


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One operation that a leaf takes part in, with the loops around it.

    Loops that hand every step a matrix of its own stack matrices; in others, as in a recurrent network, the
    steps are positions that share one.

    Attributes:
        leaf: which.
        kind: what the operation does with it.
        moves: from the leaf to (stack, inputs, outputs).
        loops: the scans around it, outermost first.
        scanned: of each, whether every step has a matrix of its own.
        factor: what the leaf is multiplied with before.
        swapped: whether the leaf's first use has inputs where this one has outputs: a tied embedding.
    """

    leaf: int
    kind: Kind
    moves: Moves
    loops: tuple[Operation, ...]
    scanned: tuple[bool, ...]
    factor: float
    swapped: bool = False

    @property
    def operation(self) -> Operation:
        """The operation."""
        return self.kind.operation

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of the positions that share a matrix: steps of loops, then those of the operation."""
        if isinstance(self.kind, Scale):
            return ()
        return (*self._lengths(False), *self.kind.positions)

    def _lengths(self, scanned: bool) -> list[int]:
        pairs = zip(self.loops, self.scanned, strict=True)
        return [loop.trips or 0 for loop, own in pairs if own is scanned]

    @property
    def data(self) -> int | None:
        """Which operand the data are, if they matter."""
        return None if type(self.kind) is Bias else 1 - self.kind.operand

    @property
    def is_lookup(self) -> bool:
        """Whether its inputs are numbers of rows."""
        return isinstance(self.kind, Embedding)

    def inputs(self, data: Array | None) -> Array:
        """a: (positions, stack, inputs), of what all steps recorded; of an embedding without inputs."""
        if isinstance(self.kind, Bias):  # 1, at every position
            return jnp.ones((math.prod(self.positions), self.moves.end[0], 1))
        return self._gathered(_over(self.kind.inputs, len(self.loops))(data), 1 if self.is_lookup else 2)

    def gradients(self, output: Array, data: Array | None) -> Array:
        """g: (positions, stack, outputs), of the gradients in the results of all steps."""
        data = output if data is None else data  # to be passed along
        found = self.factor * self._gathered(_over(self.kind.gradients, len(self.loops))(output, data), 2)
        # A scale has as many products as positions, and one gradient: their sum, which is exact.
        return found.sum(axis=0, keepdims=True) if isinstance(self.kind, Scale) else found

    def _gathered(self, x: Array, rest: int) -> Array:
        """(steps..., positions..., stack[, width]), the steps put where they belong, each group one axis."""
        steps = range(len(self.loops))
        own = [axis for axis in steps if self.scanned[axis]]
        shared = [axis for axis in steps if not self.scanned[axis]]
        positions = range(len(self.loops), x.ndim - rest)
        x = x.transpose(*shared, *positions, *own, *range(x.ndim - rest, x.ndim))
        front, width = x.shape[: x.ndim - rest - len(own)], x.shape[-1:] if rest == 2 else ()
        return x.reshape(math.prod(front), self.moves.end[0], *width)

    def words(self) -> str:
        """What it does, in a line."""
        return self.kind.words()


def _over(function: Any, loops: int) -> Any:
    """The function for all steps of so many loops."""
    return functools.reduce(lambda f, _: jax.vmap(f), range(loops), function)


class LeafUses(NamedTuple):
    """What is known of one leaf.

    Attributes:
        uses: all operations it takes part in, as far as they are understood.
        reason: why it is not covered; empty if it is.
    """

    uses: tuple[Use, ...]
    reason: str

    @property
    def is_covered(self) -> bool:
        """Whether its gradients are made up of inputs and output gradients of these uses."""
        return not self.reason


def uses_of(program: Program, batch: Sequence[Value]) -> tuple[LeafUses, ...]:
    """The operations that every leaf takes part in, in the order of the leaves.

    Args:
        program: what `read` made of a function, to be differentiated.
        batch: the inputs of the program that examples are.
    """
    places, examples = origins(program), reached(program.body, batch)
    kept = {v for v in program.body.outputs if v.leaves}
    found = []
    for leaf, entered in enumerate(uses(program)):
        read = [_read(leaf, use, places, examples) for use in entered]
        reasons = [x for x in read if isinstance(x, str)]
        reasons += (
            ["is an output, or a part of one, by itself"]
            if any(leaf in (v.leaves or ()) for v in kept)
            else []
        )
        known = [x for x in read if isinstance(x, Use)]
        reasons += [] if known or reasons else ["takes no part in the outputs"]
        aligned = _aligned(known)
        reasons += [] if aligned or not known else ["is used with its axes paired in different ways"]
        found.append(LeafUses(tuple(aligned or known), "; ".join(dict.fromkeys(reasons))))
    return tuple(found)


def _read(leaf: int, use: Meeting, places: dict[Value, Origin | str], examples: set[Value]) -> Use | str:
    origin = places.get(use.operation.inputs[use.operand], "a loop or a branch")
    if use.operation.bodies:
        return f"is carried by a loop or chooses a branch (`{use.operation.name}`)"
    blocked = [loop.name for loop in use.loops if loop.name != "scan"]
    if blocked:
        return f"is used inside `{blocked[0]}`"
    if isinstance(origin, str) or origin.leaf != leaf:
        return f"goes through `{origin}` first" if isinstance(origin, str) else "is mixed with other leaves"
    kind = kind_of(use.operation, use.operand, origin.shape)
    if isinstance(kind, str):
        return kind
    if isinstance(kind, Bias) and _is_matrix(origin.shape):
        others = [v for i, v in enumerate(use.operation.inputs) if i != use.operand]
        if examples.isdisjoint(others):  # masked weights, adapters: as large as the leaf for every example
            return f"is joined with what is the same for all examples by `{use.operation.name}`"
    moves = kind.matrix(origin).moves
    *_, inputs, outputs = moves.end
    moves = moves.then("reshape", (math.prod(moves.end[:-2]), inputs, outputs))
    own = tuple(any(loop is scan for scan in origin.scans) for loop in use.loops)
    return Use(leaf, kind, moves, use.loops, own, origin.factor)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return sum(n > 1 for n in shape) > 1


def _aligned(uses: list[Use]) -> list[Use]:
    """The uses of one leaf, its sides as the first has them, or swapped; none if one has them otherwise."""
    if len(uses) < 2:
        return uses
    entries = np.arange(math.prod(uses[0].moves.shape)).reshape(uses[0].moves.shape)
    first, aligned = uses[0].moves.apply(entries), uses[:1]
    for use in uses[1:]:
        here = use.moves.apply(entries)
        if np.array_equal(here, first):
            aligned.append(use)
        elif np.array_equal(here.swapaxes(1, 2), first):
            aligned.append(dataclasses.replace(use, swapped=True))
        else:
            return []
    return aligned
