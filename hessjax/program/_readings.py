"""Every operation, read: how its axes hang together, where its result is zero, and what every leaf enters."""

import itertools
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from hessjax.program._axes import (
    ELEMENTWISE,
    Axes,
    Constraints,
    Nodes,
    common_nodes,
    constant,
    elementwise,
    staying,
    unknown,
)
from hessjax.program._products import conv_general_dilated, dot_general, full, reduced
from hessjax.program._program import Body, Operation, Program, Use, Value

Reading: TypeAlias = Callable[[Constraints, Operation, list[Axes]], list[Axes]]


def follow(constraints: Constraints, body: Body, known: dict[Value, Axes]) -> None:
    """Read a body in order, loops and branches as a whole.

    Args:
        constraints: what the operations ask of their inputs is added to it.
        body: the operations.
        known: what is known of the inputs and constants; of every other value it is added.
    """
    for operation in body.operations:
        known.update({v: constant(v.literal) for v in operation.inputs if v.literal is not None})
        reading = READINGS.get(operation.name, _any_operation)
        outputs = reading(constraints, operation, [known[v] for v in operation.inputs])
        known.update(zip(operation.outputs, outputs, strict=True))


def _any_operation(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """One that nothing is known of: nothing that it touches may go."""
    # A gather or a sort takes indices for values, a loop mixes what it carries: no axis of theirs is safe.
    constraints.unread.append(operation)
    for x in inputs:
        constraints.keep(*x.nodes)
    return [unknown(v.shape) for v in operation.outputs]


def _broadcast_in_dim(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, shape, places = inputs[0], operation.params["shape"], operation.params["broadcast_dimensions"]
    # A new axis may become as short as what it meets is: free nodes, tied by whoever reads them.
    nodes, flat = [constraints.fresh(n) for n in shape], [1] * len(shape)
    for axis, place in enumerate(places):
        if len(x.nodes[axis]) == shape[place]:
            nodes[place], flat[place] = x.nodes[axis], x.nonzero.shape[axis]
    return [Axes(tuple(nodes), x.nonzero.reshape(flat), x.varies.reshape(flat))]


def _transpose(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, order = inputs[0], operation.params["permutation"]
    return [Axes(tuple(x.nodes[a] for a in order), x.nonzero.transpose(order), x.varies.transpose(order))]


def _squeeze(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, gone = inputs[0], operation.params["dimensions"]
    nodes = tuple(nodes for axis, nodes in enumerate(x.nodes) if axis not in gone)
    return [Axes(nodes, x.nonzero.squeeze(gone), x.varies.squeeze(gone))]


def _reshape(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Axes merge and split in groups: (batch, height, width, channels) -> (batch, everything else)."""
    x, shape = inputs[0], operation.params["new_sizes"]
    if operation.params.get("dimensions") is not None or 0 in shape:
        return _any_operation(constraints, operation, inputs)
    nodes, flat, wide = list(staying(*shape)), [1] * len(shape), set[int]()
    for olds, news in _groups(x.shape, shape):
        factors = tuple(x.nodes[a] for a in olds)
        for axis, new in zip(news, _regrouped(constraints, factors, [shape[a] for a in news]), strict=True):
            nodes[axis] = new
        if any(x.nonzero.shape[a] > 1 for a in olds):  # flags merge only where they are written out
            wide |= set(olds)
            for axis in news:
                flat[axis] = shape[axis]
    x = full(x, wide)
    return [Axes(tuple(nodes), x.nonzero.reshape(flat), x.varies.reshape(flat))]


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Which axes of length above 1 turn into which: the smallest groups with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    olds, news = ([a for a, n in enumerate(shape) if n != 1][::-1] for shape in (old, new))
    while olds:
        left, right = [olds.pop()], [news.pop()]
        while (size := np.prod([old[a] for a in left])) != (other := np.prod([new[a] for a in right])):
            left.append(olds.pop()) if size < other else right.append(news.pop())
        groups.append((left, right))
    return groups


def _regrouped(constraints: Constraints, factors: tuple[Nodes, ...], lengths: list[int]) -> list[Nodes]:
    if len(factors) == len(lengths) == 1:
        return [factors[0]]
    if not any(nodes.any() for nodes in factors):  # nothing that could go: such as a batch of examples
        return list(staying(*lengths))
    # An axis cut up and merged anew goes through the one long axis that both are: (c, 4) -> 4c -> (2, 2c).
    stems = constraints.stems_of(*factors)
    merged = factors[0] if len(factors) == 1 else constraints.fresh(int(np.prod(lengths)), stems)
    if len(factors) > 1:
        constraints.product(merged, factors)
    if len(lengths) == 1:
        return [merged]
    split = tuple(constraints.fresh(n, stems) for n in lengths)
    constraints.product(merged, split)
    return list(split)


def _reduction(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """A sum or maximum over whole axes. They stay: a mean divides by their length, whatever else it is."""
    x, axes = inputs[0], tuple(map(int, operation.params["axes"]))
    constraints.keep(*(x.nodes[a] for a in axes))
    x = reduced(x, axes)
    nodes = tuple(nodes for axis, nodes in enumerate(x.nodes) if axis not in axes)
    return [Axes(nodes, x.nonzero.squeeze(axes), x.varies.squeeze(axes))]


def _along(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Something done along one axis: cumulative sums. The other axes pass."""
    x, axis = inputs[0], operation.params["axis"]
    constraints.keep(x.nodes[axis])
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
    constraints.keep(*(x.nodes[a] for a in pooled))
    nodes = (staying(n)[0] if a in pooled else x.nodes[a] for a, n in enumerate(shape))
    return [reduced(x, pooled)._replace(nodes=tuple(nodes))]


def _concatenate(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    axis, shape = operation.params["dimension"], operation.outputs[0].shape
    nodes = [
        np.concatenate([x.nodes[axis] for x in inputs])
        if a == axis
        else common_nodes(constraints, a, n, inputs)
        for a, n in enumerate(shape)
    ]
    # Along the joined axis the parts differ; elsewhere flags are written out where any part has them so.
    axes = {axis} | {a for x in inputs for a in range(len(shape)) if x.nonzero.shape[a] > 1}
    wide = [full(x, axes) for x in inputs]
    flags = (np.concatenate([getattr(x, kind) for x in wide], axis) for kind in ("nonzero", "varies"))
    return [Axes(tuple(nodes), *flags)]


def _pad(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    (x, value), config = inputs, operation.params["padding_config"]
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return _any_operation(constraints, operation, inputs)
    widths = [(int(low), int(high)) for low, high, _ in config]
    # Padded channels are free to go, as those of a residual stream that grows by zeros (He et al., option A).
    nodes = tuple(
        np.concatenate([constraints.fresh(low), n, constraints.fresh(high)])
        for n, (low, high) in zip(x.nodes, widths, strict=True)
    )
    wide = full(x, {a for a, width in enumerate(widths) if any(width)})
    around = (bool(value.nonzero.any()), bool(value.varies.any()))
    flags = (np.pad(f, widths, constant_values=c) for f, c in zip(wide[1:], around, strict=True))
    return [Axes(nodes, *flags)]


def _slice(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, steps = inputs[0], operation.params["strides"] or (1,) * len(inputs[0].nodes)
    cuts = tuple(map(slice, operation.params["start_indices"], operation.params["limit_indices"], steps))
    return [_cut(constraints, x, cuts)]


def _split(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    ends = np.cumsum([0, *operation.params["sizes"]])
    whole = (slice(None),) * operation.params["axis"]
    return [_cut(constraints, inputs[0], (*whole, slice(a, b))) for a, b in itertools.pairwise(ends)]


def _rev(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, axes = inputs[0], operation.params["dimensions"]
    return [
        _cut(constraints, x, tuple(slice(None, None, -1 if a in axes else 1) for a in range(len(x.nodes))))
    ]


def _cut(constraints: Constraints, x: Axes, cuts: tuple[slice, ...]) -> Axes:
    cuts += (slice(None),) * (len(x.nodes) - len(cuts))
    nodes = tuple(nodes[cut] for nodes, cut in zip(x.nodes, cuts, strict=True))
    # One index of many stays: an axis of length 1 is squeezed, reshaped and broadcast away, and nothing else
    # would remember that it is needed.
    constraints.keep(*(n for n, whole in zip(nodes, x.nodes, strict=True) if len(n) == 1 < len(whole)))
    inner = tuple(cut if n > 1 else slice(None) for cut, n in zip(cuts, x.nonzero.shape, strict=True))
    return Axes(nodes, x.nonzero[inner], x.varies[inner])


READINGS: dict[str, Reading] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(["reduce_sum", "reduce_max", "reduce_min", "reduce_or", "reduce_and"], _reduction),
    **dict.fromkeys(["cumsum", "cummax", "cummin"], _along),
    **dict.fromkeys(["reduce_window_max", "reduce_window_min", "reduce_window_sum"], _window),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": conv_general_dilated,
    "dot_general": dot_general,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}


# -- what every leaf takes part in -----------------------------------------------------------------


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
    follow(constraints, body, known)
    for operation in body.operations:
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
