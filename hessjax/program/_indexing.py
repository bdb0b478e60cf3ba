"""Operations that find entries by number or by rank: what they leave whole passes, the rest stays."""

from collections.abc import Sequence

import numpy as np

from hessjax.program._axes import Axes, Constraints, Flags, Nodes, axes_of, staying
from hessjax.program._entrywise import either
from hessjax.program._products import reduced
from hessjax.program._program import Operation


def gather(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Windows of an array, each at its own place: axes that every window has whole pass."""
    (x, places), numbers = inputs, operation.params["dimension_numbers"]
    sizes = operation.params["slice_sizes"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windowed = [a for a in range(len(sizes)) if a not in gone]
    passing = [a for a in windowed if sizes[a] == x.shape[a] and a not in numbers.start_index_map]
    constraints.keep(*places.nodes, why="index", by=operation.name)
    shape, rest = operation.outputs[0].shape, tuple(a for a in range(len(sizes)) if a not in passing)
    nodes = [_part(constraints, operation, x, gone, n) for n in shape]
    x, flat = reduced(x, rest), [1] * len(shape)
    for place, axis in zip(numbers.offset_dims, windowed, strict=True):
        whole = axis in passing
        nodes[place] = x.nodes[axis] if whole else _part(constraints, operation, x, (axis,), shape[place])
        flat[place] = x.nonzero.shape[axis]
    fill = operation.params["fill_value"]
    nonzero = x.nonzero | (fill is not None and fill != 0)  # without one: what lies outside is NaN
    varies = either([x.varies, nonzero & places.varies.any()])
    chosen = not x.varies.any()
    return [axes_of(tuple(nodes), nonzero.reshape(flat), varies.reshape(flat), chosen=chosen)]


def dynamic_slice(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """One window, at a place that is known when it runs."""
    x, sizes = inputs[0], operation.params["slice_sizes"]
    cut = tuple(a for a, n in enumerate(sizes) if n != x.shape[a])
    nodes = tuple(
        _part(constraints, operation, x, (a,), n) if a in cut else x.nodes[a] for a, n in enumerate(sizes)
    )
    x = reduced(x, cut)
    moves = any(start.varies.any() for start in inputs[1:])
    varies = either([x.varies, x.nonzero & moves])
    return [axes_of(nodes, x.nonzero, varies, chosen=not x.varies.any())]


def dynamic_update_slice(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """One window written over."""
    x, new, *starts = inputs
    pairs = {a: a for a in range(len(x.nodes))}
    return [_written(constraints, operation, x, new, pairs, any(s.varies.any() for s in starts))]


def scatter(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Windows written over or added to, each at its own place."""
    (x, places, new), numbers = inputs, operation.params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windowed = [a for a in range(len(x.nodes)) if a not in gone]
    pairs = dict(zip(windowed, numbers.update_window_dims, strict=True))
    pairs = {a: int(b) for a, b in pairs.items() if a not in numbers.scatter_dims_to_operand_dims}
    constraints.keep(*places.nodes, why="index", by=operation.name)
    return [_written(constraints, operation, x, new, pairs, bool(places.varies.any()))]


def _written(
    constraints: Constraints, operation: Operation, x: Axes, new: Axes, pairs: dict[int, int], moves: bool
) -> Axes:
    """An array with parts of it new: axes that are written whole, `{axis: axis of the new}`, are one."""
    pairs = {a: b for a, b in pairs.items() if x.shape[a] == new.shape[b]}
    nodes = list(x.nodes)
    for a, b in pairs.items():
        nodes[a] = constraints.share(x.nodes[a], new.nodes[b])
    rest = tuple(a for a in range(len(nodes)) if a not in pairs)
    others = tuple(b for b in range(len(new.nodes)) if b not in pairs.values())
    constraints.keep(*(x.nodes[a] for a in rest), why="index", by=operation.name)
    constraints.keep(*(new.nodes[b] for b in others), why="index", by=operation.name)
    for a in rest:
        nodes[a] = staying(x.shape[a])[0]
    x, new = reduced(x, rest), reduced(new, others)
    order = [pairs.get(a) for a in range(len(nodes))]
    flags = [_placed(f, order) for f in (new.nonzero, new.varies)]
    nonzero = either([x.nonzero, flags[0]])
    return axes_of(tuple(nodes), nonzero, either([x.varies, flags[1], nonzero & moves]))


def _placed(flags: Flags, order: list[int | None]) -> Flags:
    """Flags with their axes in this order, None for one of length 1; all others have length 1."""
    places = [b for b in order if b is not None]
    others = [b for b in range(flags.ndim) if b not in places]
    lengths = [1 if b is None else flags.shape[b] for b in order]
    return flags.transpose([*places, *others]).reshape(lengths)


def sort(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Entries of several arrays in the order of the first ones: along the other axes each by itself."""
    constraints.unread.append(operation)  # along its axis, which entry comes from which index is not known
    axis = operation.params["dimension"]
    constraints.keep(*(x.nodes[axis] for x in inputs), why="index", by=operation.name)
    nodes = list(inputs[0].nodes)
    for x in inputs[1:]:
        nodes = [constraints.share(a, b) for a, b in zip(nodes, x.nodes, strict=True)]
    nodes[axis] = staying(len(nodes[axis]))[0]
    alike = [reduced(x, (axis,)) for x in inputs]
    moves = either([x.varies for x in alike])
    return [axes_of(tuple(nodes), x.nonzero, x.nonzero & moves) for x in alike]


def top_k(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """The largest entries along an axis, and where they lie."""
    constraints.unread.append(operation)
    axis = operation.params.get("axis", len(inputs[0].nodes) - 1)
    return [_found(constraints, operation, inputs[0], axis, index=i == 1) for i in (0, 1)]


def _found(constraints: Constraints, operation: Operation, x: Axes, axis: int, *, index: bool) -> Axes:
    constraints.keep(x.nodes[axis], why="index", by=operation.name)
    x = reduced(x, (axis,))
    nodes = list(x.nodes)
    nodes[axis] = staying(operation.outputs[0].shape[axis])[0]
    return axes_of(tuple(nodes), x.nonzero | index, x.varies)


def argmax(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Where the largest or smallest entry along an axis lies: a number, which zeros have too."""
    x, axes = inputs[0], tuple(map(int, operation.params["axes"]))
    constraints.keep(*(x.nodes[a] for a in axes), why="index", by=operation.name)
    x = reduced(x, axes)
    nodes = tuple(nodes for a, nodes in enumerate(x.nodes) if a not in axes)
    varies = x.varies.squeeze(axes)
    return [axes_of(nodes, np.ones_like(varies), varies)]


def iota(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Numbers in order, as many as the code says."""
    shape = operation.outputs[0].shape
    ones = np.ones((1,) * len(shape), bool)
    return [axes_of(constraints.given(shape, "array", operation.name), ones, ~ones)]


def _part(constraints: Constraints, operation: Operation, x: Axes, axes: Sequence[int], length: int) -> Nodes:
    """Some of the indices of these axes, which ones is not known: all of them stay."""
    constraints.keep(*(x.nodes[a] for a in axes), why="index", by=operation.name)
    stems = constraints.stems_of(*(x.nodes[a] for a in axes))
    nodes = constraints.fresh(length, stems) if stems else staying(length)[0]
    constraints.keep(nodes)
    return nodes
