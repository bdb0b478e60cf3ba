"""In what order a program uses the leaves of its params: those that know nothing of each other together."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.tree_util import Partial

from hessjax._core._compiled import Known, compiled
from hessjax._core._types import Params
from hessjax.layers._coverage import first_of
from hessjax.layers._gradients import Gradients
from hessjax.layers._taps import read_uses
from hessjax.layers._uses import LeafUses
from hessjax.program._program import Body, Operation, Value

Slice: TypeAlias = tuple[int, int]
"""The first, and the one behind the last."""


class Depth(NamedTuple):
    """Leaves whose inputs do not depend on one another's outputs.

    Attributes:
        leaves: their numbers.
        parts: slices of the stack of matrices of each, one after the other: steps of the loop that they are
            in, if it hands each step matrices of its own.
        returns: whether what runs before it depends on them too, as on leaves that are used twice.
    """

    leaves: tuple[int, ...]
    parts: tuple[tuple[Slice, ...], ...]
    returns: bool


@compiled(static_argnums=(0, 1))
def depths_of(
    gradients: Gradients, wanted: tuple[int, ...], fn: Partial, params: Params, args: tuple[Any, ...]
) -> Known:
    """The leaves that are wanted, each where it is used last: to be traced only.

    Args:
        gradients: whose.
        wanted: numbers of leaves that are covered.
        fn: `fn(params, *args)`.
        params: the params.
        args: first the batch.

    Returns:
        The `Depth`s.
    """
    example = jax.tree.map(first_of, args[0])
    program, leaves = read_uses(gradients.of(fn), params, (example, *args[1:]))
    levels = levels_of(program.body, leaves, wanted)
    return Known(tuple(_depth(program.body, leaves, level) for level in levels))


def _depth(body: Body, leaves: Sequence[LeafUses], level: Sequence[int]) -> Depth:
    returns = any(len(_outermost(body, leaves[leaf])) > 1 for leaf in level)
    return Depth(tuple(level), _parts(leaves, level), returns)


def levels_of(body: Body, leaves: Sequence[LeafUses], wanted: Sequence[int]) -> list[list[int]]:
    """The leaves of every depth, by where they are used last."""
    last = {leaf: _outermost(body, leaves[leaf])[-1] for leaf in wanted}
    found = [[leaf for leaf in wanted if last[leaf] in level] for level in _levels(body, set(last.values()))]
    return [level for level in found if level]


def _outermost(body: Body, leaf: LeafUses) -> list[Operation]:
    """The operations of the program itself that a leaf is used in, or within, in their order."""
    own = [use.loops[0] if use.loops else use.operation for use in leaf.uses]
    return [operation for operation in body.operations if operation in own]


def _levels(body: Body, wanted: set[Operation]) -> list[set[Operation]]:
    """These operations, cut where one depends on another before it."""
    levels: list[set[Operation]] = [set()]
    reached: set[Value] = set()
    for operation in body.operations:
        depends = not reached.isdisjoint(operation.inputs)
        if operation in wanted:
            if depends:
                levels.append(set())
                reached = set()
            levels[-1].add(operation)
        if operation in wanted or depends:
            reached |= set(operation.outputs)
    return levels


def _parts(leaves: Sequence[LeafUses], found: Iterable[int]) -> tuple[tuple[Slice, ...], ...]:
    """For every step of a loop a slice of every leaf's stack; leaves that all steps share come last."""
    lengths = [_own_steps(leaves[leaf]) for leaf in found]
    stacks = [leaves[leaf].uses[0].moves.end[0] for leaf in found]
    steps = max(length for length, _ in lengths)
    order = range(steps)[::-1] if any(backwards for _, backwards in lengths) else range(steps)
    last = order[-1]
    return tuple(
        tuple(_slice(stack, length, step, last) for stack, (length, _) in zip(stacks, lengths, strict=True))
        for step in order
    )


def _slice(stack: int, length: int, step: int, last: int) -> Slice:
    if length == 1:
        return (0, stack) if step == last else (0, 0)
    size = stack // length
    return step * size, (step + 1) * size


def _own_steps(leaf: LeafUses) -> tuple[int, bool]:
    """How many steps of the outermost loop have matrices of their own, and whether it runs backwards."""
    use = leaf.uses[0]
    if len(leaf.uses) > 1 or not use.loops or not use.scanned[0]:
        return 1, False
    return use.loops[0].trips or 1, bool(use.loops[0].params.get("reverse"))
