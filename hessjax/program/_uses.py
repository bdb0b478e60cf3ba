"""What every leaf of the params takes part in, and along which axes."""

from hessjax.program._axes import Axes, Constraints, unknown, unread
from hessjax.program._program import Body, Operation, Program, Use, Value
from hessjax.program._readings import read_operation


def uses(program: Program) -> tuple[tuple[Use, ...], ...]:
    """For every leaf of the params, the operations that it takes part in, and along which axes.

    What was transposed, cast, cut, reshaped or masked on the way is followed axis by axis, into the steps of
    loops and into branches.

    Args:
        program: what `read` made of a function.

    Returns:
        One tuple for each leaf, in the order of the program; empty for one that meets no data.
    """
    constraints, found = Constraints(), tuple(list[Use]() for _ in program.leaves)
    known = {v: unknown(v.shape) for v in program.body.inputs}
    known |= {leaf: _leaf(constraints, leaf, i) for i, leaf in enumerate(program.leaves)}
    _follow_uses(constraints, program.body, known, set(), (), found)
    return tuple(map(tuple, found))


def _leaf(constraints: Constraints, value: Value, index: int) -> Axes:
    nodes = (constraints.fresh(n, frozenset(((index, axis),))) for axis, n in enumerate(value.shape))
    return unknown(value.shape)._replace(nodes=tuple(nodes))


def _follow_uses(
    constraints: Constraints,
    body: Body,
    known: dict[Value, Axes],
    lost: set[Value],
    loops: tuple[Operation, ...],
    found: tuple[list[Use], ...],
) -> None:
    known.update({v: unknown(v.shape) for v in body.consts})
    for operation in body.operations:
        # Loops and branches as a whole here: what is inside is read where the leaf goes in.
        read_operation(constraints, operation, known, unread if operation.bodies else None)
        for inner in operation.bodies:
            known.update(_enter(inner, known))
            lost.update(v for v, source in zip(inner.inputs, inner.sources, strict=True) if source in lost)
            _follow_uses(constraints, inner, known, lost, (*loops, operation), found)
        if operation in constraints.unread or not lost.isdisjoint(operation.inputs):
            lost.update(v for v in operation.outputs if v.leaves)  # a mask's iota loses nothing
        for i, value in _meeting(operation):
            for leaf in sorted(value.leaves or ()):
                axes = None if value in lost else _axes_of_leaf(constraints, known[value], leaf)
                found[leaf].append(Use(operation, i, axes, loops))


def _meeting(operation: Operation) -> list[tuple[int, Value]]:
    """The operands made of leaves that meet data here, not only further inside."""
    if all(v.leaves is not None for v in operation.outputs):
        return []
    inputs = range(len(operation.inputs))
    if operation.bodies:  # what a body sees meets data in there
        inputs = range(1) if operation.name == "cond" else operation.carried
    return [(i, operation.inputs[i]) for i in inputs if operation.inputs[i].leaves]


def _axes_of_leaf(constraints: Constraints, axes: Axes, leaf: int) -> tuple[tuple[int, ...], ...]:
    stems = (constraints.stems_of(nodes) for nodes in axes.nodes)
    return tuple(tuple(sorted(axis for other, axis in each if other == leaf)) for each in stems)


def _enter(body: Body, known: dict[Value, Axes]) -> dict[Value, Axes]:
    """What is known of a body's inputs: all axes of what it sees, but the first of what it scans over."""
    return {
        v: unknown(v.shape)
        if source is None or source.literal is not None
        else unknown(v.shape)._replace(nodes=known[source].nodes[len(source.shape) - len(v.shape) :])
        for v, source in zip(body.inputs, body.sources, strict=True)
    }
