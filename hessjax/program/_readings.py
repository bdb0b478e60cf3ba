"""Every operation, read: how its axes hang together, and where its result is zero or does not vary."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from hessjax.program import _indexing, _shapes
from hessjax.program._axes import Axes, Constraints, Nodes, axes_of, staying, unread
from hessjax.program._entrywise import ELEMENTWISE, common_nodes, either, elementwise
from hessjax.program._products import conv_general_dilated, dot_general, ragged_dot_general, reduced
from hessjax.program._program import Body, Operation, Value

Reading: TypeAlias = Callable[[Constraints, Operation, list[Axes]], list[Axes]]


def follow(constraints: Constraints, body: Body, known: dict[Value, Axes]) -> None:
    """Read a body in order, with the bodies of its loops and branches.

    Args:
        constraints: what the operations ask of their inputs is added to it.
        body: the operations.
        known: what is known of the inputs; of every other value it is added, constants among them.
    """
    known.update({v: constraints.array(value) for v, value in body.consts.items()})
    for operation in body.operations:
        if operation.bodies:
            _look_up(constraints, operation, known)
            LOOPS[operation.name](constraints, operation, known)
        else:
            read_operation(constraints, operation, known)


def read_operation(
    constraints: Constraints, operation: Operation, known: dict[Value, Axes], reading: Reading | None = None
) -> None:
    """Add what is known of the results of one operation, that of its inputs being known."""
    reading = reading or READINGS.get(operation.name, unread)
    outputs = reading(constraints, operation, _look_up(constraints, operation, known))
    known.update(zip(operation.outputs, outputs, strict=True))


def _look_up(constraints: Constraints, operation: Operation, known: dict[Value, Axes]) -> list[Axes]:
    known.update({v: constraints.array(v.literal) for v in operation.inputs if v.literal is not None})
    return [known[v] for v in operation.inputs]


def _reduction(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """A sum or maximum over whole axes. They stay: a mean divides by their length, whatever else it is."""
    x, axes = inputs[0], tuple(map(int, operation.params["axes"]))
    constraints.keep(*(x.nodes[a] for a in axes), why="counted", by=operation.name)
    x = reduced(x, axes)
    nodes = tuple(nodes for axis, nodes in enumerate(x.nodes) if axis not in axes)
    return [Axes(nodes, x.nonzero.squeeze(axes), x.varies.squeeze(axes))]


def _along(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Something done along one axis: cumulative sums. The other axes pass."""
    x, axis = inputs[0], operation.params["axis"]
    constraints.keep(x.nodes[axis], why="counted", by=operation.name)
    return [reduced(x, (axis,))]


def _window(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Pooling: axes with a window of one entry pass."""
    x, shape = inputs[0], operation.outputs[0].shape
    windows = zip(
        operation.params["window_dimensions"],
        operation.params["window_strides"],
        operation.params["padding"],
        strict=True,
    )
    pooled = tuple(
        a for a, (n, stride, pad) in enumerate(windows) if (n, stride, tuple(pad)) != (1, 1, (0, 0))
    )
    constraints.keep(*(x.nodes[a] for a in pooled), why="counted", by=operation.name)
    nodes = (staying(n)[0] if a in pooled else x.nodes[a] for a, n in enumerate(shape))
    return [reduced(x, pooled)._replace(nodes=tuple(nodes))]


# -- loops and branches ----------------------------------------------------------------------------


def _scan(constraints: Constraints, operation: Operation, known: dict[Value, Axes]) -> None:
    """What is scanned over loses its first axis inside: an index goes if it may go in every step."""
    (body,), carried = operation.bodies, operation.carried
    inputs = [known[v] for v in operation.inputs]
    constraints.keep(*(x.nodes[0] for x in inputs[carried.stop :]), why="index", by="scan")
    fixed = [*inputs[: carried.start], *(_any_step(x) for x in inputs[carried.stop :])]
    values = [*body.inputs[: carried.start], *body.inputs[carried.stop :]]
    known.update(zip(values, fixed, strict=True))
    state = list(body.inputs[carried.start : carried.stop])
    ends = list(body.outputs[: len(carried)])
    start = [inputs[i] for i in carried]
    results = _loop(constraints, _Step(body, state, ends), known, start)
    stacked = [_every_step(known[v], operation.trips or 0) for v in body.outputs[len(carried) :]]
    known.update(zip(operation.outputs, [*results, *stacked], strict=True))


def _any_step(x: Axes) -> Axes:
    x = reduced(x, (0,))
    return Axes(x.nodes[1:], x.nonzero[0], x.varies[0])


def _every_step(x: Axes, trips: int) -> Axes:
    return Axes((staying(trips)[0], *x.nodes), x.nonzero[None], x.varies[None])


def _while(constraints: Constraints, operation: Operation, known: dict[Value, Axes]) -> None:
    """How often it runs is part of what comes out: everything varies if that does."""
    (test, body), carried = operation.bodies, operation.carried
    inputs = [known[v] for v in operation.inputs]
    num_state = len(carried)
    seen = len(test.inputs) - num_state
    known.update(zip(test.inputs[:seen], inputs[:seen], strict=True))
    known.update(zip(body.inputs, inputs[seen : carried.start], strict=False))
    step = _Step(body, list(body.inputs[len(body.inputs) - num_state :]), list(body.outputs), test)
    results = _loop(constraints, step, known, [inputs[i] for i in carried])
    known.update(zip(operation.outputs, results, strict=True))


class _Step(NamedTuple):
    """One round of a loop.

    Attributes:
        body: what it does.
        state: the inputs that the loop carries.
        ends: what they are afterwards.
        test: what says whether there is a next round, if that is not known beforehand.
    """

    body: Body
    state: list[Value]
    ends: list[Value]
    test: Body | None = None


def _loop(constraints: Constraints, step: _Step, known: dict[Value, Axes], start: list[Axes]) -> list[Axes]:
    """What a loop carries: its axes are those of the start and of every step's end at once."""
    state = _settled(constraints, step, known, start)
    nodes = [_carried(constraints, x) for x in start]
    state = [x._replace(nodes=each) for x, each in zip(state, nodes, strict=True)]
    for x, end in zip(state, _round(constraints, step, known, state), strict=True):
        _tied(constraints, x, end)
    return state


def _carried(constraints: Constraints, start: Axes) -> tuple[Nodes, ...]:
    nodes = tuple(constraints.fresh(len(n)) if n.any() else n for n in start.nodes)
    _tied(constraints, start, start._replace(nodes=nodes))
    return nodes


def _tied(constraints: Constraints, x: Axes, other: Axes) -> None:
    for a, b in zip(x.nodes, other.nodes, strict=True):
        constraints.tie(a, b)


def _settled(
    constraints: Constraints, step: _Step, known: dict[Value, Axes], state: list[Axes]
) -> list[Axes]:
    """The state with everything in it marked that can be nonzero, or vary, after any number of rounds."""
    for _ in range(_ROUNDS):
        trial = Constraints(constraints.drop_constants, constraints.relaxed)
        ends = _round(trial, step, dict(known), state)
        more = [_joined(x, end) for x, end in zip(state, ends, strict=True)]
        if all(_same(x, y) for x, y in zip(state, more, strict=True)):
            return state
        state = more
    # Still spreading, index by index: all of it then counts as nonzero and as varying, which is safe.
    return [axes_of(x.nodes, np.ones_like(x.nonzero), np.ones((), bool)) for x in state]


_ROUNDS = 8
"""Zeros of a state that are found are zeros for ever; most loops show which in two or three rounds."""


def _round(constraints: Constraints, step: _Step, known: dict[Value, Axes], state: list[Axes]) -> list[Axes]:
    known.update(zip(step.state, state, strict=True))
    follow(constraints, step.body, known)
    ends = [_known(constraints, known, v) for v in step.ends]
    if step.test is None:
        return ends
    known.update(zip(step.test.inputs[len(step.test.inputs) - len(state) :], state, strict=True))
    follow(constraints, step.test, known)
    moves = bool(_known(constraints, known, step.test.outputs[0]).varies.any())
    return [axes_of(x.nodes, x.nonzero, x.varies | moves) for x in ends]


def _joined(x: Axes, other: Axes) -> Axes:
    return axes_of(x.nodes, either([x.nonzero, other.nonzero]), either([x.varies, other.varies]))


def _same(x: Axes, other: Axes) -> bool:
    return bool((x.nonzero == other.nonzero).all() and (x.varies == other.varies).all())


def _known(constraints: Constraints, known: dict[Value, Axes], value: Value) -> Axes:
    return known[value] if value.literal is None else constraints.array(value.literal)


def _cond(constraints: Constraints, operation: Operation, known: dict[Value, Axes]) -> None:
    """Each result is one of the branches': what stays in one of them stays in all."""
    index, *inputs = (known[v] for v in operation.inputs)
    ends = []
    for body in operation.bodies:
        known.update(zip(body.inputs, inputs, strict=True))
        follow(constraints, body, known)
        ends.append([_known(constraints, known, v) for v in body.outputs])
    for value, each in zip(operation.outputs, zip(*ends, strict=True), strict=True):
        nodes = tuple(common_nodes(constraints, a, n, list(each)) for a, n in enumerate(value.shape))
        nonzero = either([x.nonzero for x in each])
        varies = either([nonzero & index.varies.any(), *(x.varies for x in each)])
        known[value] = axes_of(nodes, nonzero, varies)


LOOPS: dict[str, Callable[[Constraints, Operation, dict[Value, Axes]], None]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}

READINGS: dict[str, Reading] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(["reduce_sum", "reduce_max", "reduce_min", "reduce_or", "reduce_and"], _reduction),
    **dict.fromkeys(["reduce_prod", "reduce_xor"], _reduction),
    **dict.fromkeys(["cumsum", "cummax", "cummin", "cumprod"], _along),
    **dict.fromkeys(["reduce_window_max", "reduce_window_min", "reduce_window_sum"], _window),
    **dict.fromkeys(["argmax", "argmin"], _indexing.argmax),
    **dict.fromkeys(["scatter", "scatter-add", "scatter-sub", "scatter-mul"], _indexing.scatter),
    **dict.fromkeys(["scatter-min", "scatter-max"], _indexing.scatter),
    "broadcast_in_dim": _shapes.broadcast_in_dim,
    "concatenate": _shapes.concatenate,
    "conv_general_dilated": conv_general_dilated,
    "dot_general": dot_general,
    "dynamic_slice": _indexing.dynamic_slice,
    "dynamic_update_slice": _indexing.dynamic_update_slice,
    "gather": _indexing.gather,
    "iota": _indexing.iota,
    "pad": _shapes.pad,
    "ragged_dot_general": ragged_dot_general,
    "reshape": _shapes.reshape,
    "rev": _shapes.rev,
    "slice": _shapes.strided,
    "sort": _indexing.sort,
    "split": _shapes.split,
    "squeeze": _shapes.squeeze,
    "stack": _shapes.stack,
    "tile": _shapes.tile,
    "top_k": _indexing.top_k,
    "transpose": _shapes.transpose,
    "unstack": _shapes.unstack,
}
"""What is known of every operation but loops and branches; of any other, nothing is."""
