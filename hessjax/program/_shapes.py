"""Operations that change shapes: what becomes of every axis where arrays are cut, joined, merged, copied."""

import itertools

import numpy as np

from hessjax.program._axes import Axes, Constraints, Nodes, staying, unread
from hessjax.program._entrywise import common_nodes
from hessjax.program._products import full, reduced
from hessjax.program._program import Operation


def broadcast_in_dim(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, shape, places = inputs[0], operation.params["shape"], operation.params["broadcast_dimensions"]
    # A new axis may become as short as what it meets is: free nodes, tied by whoever reads them.
    nodes, flat = [constraints.fresh(n) for n in shape], [1] * len(shape)
    for axis, place in enumerate(places):
        if len(x.nodes[axis]) == shape[place]:
            nodes[place], flat[place] = x.nodes[axis], x.nonzero.shape[axis]
    return [x._replace(nodes=tuple(nodes), nonzero=x.nonzero.reshape(flat), varies=x.varies.reshape(flat))]


def transpose(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, order = inputs[0], operation.params["permutation"]
    nodes = tuple(x.nodes[a] for a in order)
    return [x._replace(nodes=nodes, nonzero=x.nonzero.transpose(order), varies=x.varies.transpose(order))]


def squeeze(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, gone = inputs[0], operation.params["dimensions"]
    nodes = tuple(nodes for axis, nodes in enumerate(x.nodes) if axis not in gone)
    return [x._replace(nodes=nodes, nonzero=x.nonzero.squeeze(gone), varies=x.varies.squeeze(gone))]


def reshape(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Axes merge and split in groups: (batch, height, width, channels) -> (batch, everything else)."""
    x, shape = inputs[0], operation.params["new_sizes"]
    if operation.params.get("dimensions") is not None or 0 in shape:
        return unread(constraints, operation, inputs)
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
    return [x._replace(nodes=tuple(nodes), nonzero=x.nonzero.reshape(flat), varies=x.varies.reshape(flat))]


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
    parts, found = constraints.parts(factors), list[Nodes]()
    for olds, news in _groups(tuple(map(len, parts)), tuple(lengths)):
        whole = parts[olds[0]] if len(olds) == 1 else constraints.merge(tuple(parts[a] for a in olds))
        found += [whole] if len(news) == 1 else constraints.split(whole, [lengths[a] for a in news])
    return found


def concatenate(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
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
    nonzero, varies = (np.concatenate([x[i] for x in wide], axis) for i in (1, 2))
    return [Axes(tuple(nodes), nonzero, varies)]


def stack(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Arrays side by side along a new axis, of which every index stays."""
    axis, shape = operation.params["axis"], inputs[0].shape
    nodes = [common_nodes(constraints, a, n, inputs) for a, n in enumerate(shape)]
    nodes.insert(axis, staying(len(inputs))[0])
    axes = {a for x in inputs for a in range(len(shape)) if x.nonzero.shape[a] > 1}
    wide = [full(x, axes) for x in inputs]
    nonzero, varies = (np.stack([x[i] for x in wide], axis) for i in (1, 2))
    return [Axes(tuple(nodes), nonzero, varies)]


def unstack(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Every index of an axis by itself."""
    x, axis = inputs[0], operation.params["axis"]
    constraints.keep(x.nodes[axis], why="index", by=operation.name)
    nodes, wide = x.nodes[:axis] + x.nodes[axis + 1 :], full(x, {axis})
    each = range(len(operation.outputs))
    return [Axes(nodes, wide.nonzero.take(i, axis), wide.varies.take(i, axis)) for i in each]


def tile(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Copies of an axis end to end: what goes, goes from all of them."""
    x, repeats = inputs[0], operation.params["reps"]
    nodes = tuple(np.tile(n, times) for n, times in zip(x.nodes, repeats, strict=True))
    along = [times if n > 1 else 1 for times, n in zip(repeats, x.nonzero.shape, strict=True)]
    return [Axes(nodes, np.tile(x.nonzero, along), np.tile(x.varies, along))]


def pad(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    (x, value), config = inputs, operation.params["padding_config"]
    odd = tuple(a for a, (low, high, inside) in enumerate(config) if low < 0 or high < 0 or inside)
    constraints.keep(*(x.nodes[a] for a in odd), why="index", by=operation.name)
    x = reduced(x, odd)
    widths = [(0, 0) if a in odd else (int(low), int(high)) for a, (low, high, _) in enumerate(config)]
    # Padded channels are free to go, as those of a residual stream that grows by zeros (He et al., option A).
    nodes = tuple(
        staying(length)[0]
        if a in odd
        else np.concatenate([constraints.fresh(widths[a][0]), x.nodes[a], constraints.fresh(widths[a][1])])
        for a, length in enumerate(operation.outputs[0].shape)
    )
    wide = full(x, {a for a, width in enumerate(widths) if any(width)})
    around = (bool(value.nonzero.any()), bool(value.varies.any()))
    # Between the entries of an odd axis lies what is padded with too.
    nonzero, varies = (
        np.pad(f, widths, constant_values=c) | (c and bool(odd))
        for f, c in zip((wide.nonzero, wide.varies), around, strict=True)
    )
    return [Axes(nodes, nonzero, varies)]


def strided(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, steps = inputs[0], operation.params["strides"] or (1,) * len(inputs[0].nodes)
    cuts = tuple(map(slice, operation.params["start_indices"], operation.params["limit_indices"], steps))
    return [_cut(constraints, operation, x, cuts)]


def split(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    ends = np.cumsum([0, *operation.params["sizes"]])
    whole = (slice(None),) * operation.params["axis"]
    return [
        _cut(constraints, operation, inputs[0], (*whole, slice(a, b))) for a, b in itertools.pairwise(ends)
    ]


def rev(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    x, axes = inputs[0], operation.params["dimensions"]
    cuts = tuple(slice(None, None, -1 if a in axes else 1) for a in range(len(x.nodes)))
    return [_cut(constraints, operation, x, cuts)]


def _cut(constraints: Constraints, operation: Operation, x: Axes, cuts: tuple[slice, ...]) -> Axes:
    cuts += (slice(None),) * (len(x.nodes) - len(cuts))
    nodes = tuple(nodes[cut] for nodes, cut in zip(x.nodes, cuts, strict=True))
    # One index of many stays: an axis of length 1 is squeezed, reshaped and broadcast away, and nothing else
    # would remember that it is needed.
    single = (n for n, whole in zip(nodes, x.nodes, strict=True) if len(n) == 1 < len(whole))
    constraints.keep(*single, why="index", by=operation.name)
    inner = tuple(cut if n > 1 else slice(None) for cut, n in zip(cuts, x.nonzero.shape, strict=True))
    return x._replace(nodes=nodes, nonzero=x.nonzero[inner], varies=x.varies[inner])
