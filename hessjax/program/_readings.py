"""Every operation, read: how its axes hang together, and where its result is zero for certain."""

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jax.extend.core import Literal

from hessjax.program._axes import Axes, Constraints, Nodes, axes_of, staying, unknown
from hessjax.program._contractions import conv_general_dilated, dot_general, full, reduced
from hessjax.program._elementwise import ELEMENTWISE, common_nodes, elementwise
from hessjax.program._program import literal_value

Reading: TypeAlias = Callable[[Constraints, Any, list[Axes]], list[Axes]]


def read(constraints: Constraints, eqn: Any, inputs: list[Any]) -> list[Axes]:
    """What is known of an operation's results; what it asks of its inputs enters the constraints."""
    known = [_literal(x) if isinstance(x, Literal) else x for x in inputs]
    reading = READINGS.get(eqn.primitive.name, _any_operation)
    return reading(constraints, eqn, known)


def _literal(literal: Any) -> Axes:
    value = literal_value(literal)
    return axes_of(staying(*value.shape), np.asarray(value != 0), np.zeros((), bool))


def _any_operation(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """One that nothing is known of: nothing that it touches may go."""
    for x in inputs:
        constraints.keep(*x.nodes)
    return [unknown(getattr(v.aval, "shape", ())) for v in eqn.outvars]


def _broadcast_in_dim(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    x, shape, places = inputs[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    nodes, flat = [constraints.fresh(n) for n in shape], [1] * len(shape)
    for axis, place in enumerate(places):
        if len(x.nodes[axis]) == shape[place]:
            nodes[place], flat[place] = x.nodes[axis], x.nonzero.shape[axis]
    return [Axes(tuple(nodes), x.nonzero.reshape(flat), x.varies.reshape(flat))]


def _transpose(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    x, order = inputs[0], eqn.params["permutation"]
    return [Axes(tuple(x.nodes[a] for a in order), x.nonzero.transpose(order), x.varies.transpose(order))]


def _squeeze(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    x, gone = inputs[0], eqn.params["dimensions"]
    nodes = tuple(nodes for axis, nodes in enumerate(x.nodes) if axis not in gone)
    return [Axes(nodes, x.nonzero.squeeze(gone), x.varies.squeeze(gone))]


def _reshape(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Axes merge and split in groups: (batch, height, width, channels) -> (batch, everything else)."""
    x, shape = inputs[0], eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return _any_operation(constraints, eqn, inputs)
    nodes, flat, wide = list(staying(*shape)), [1] * len(shape), set[int]()
    for olds, news in _groups(x.shape, shape):
        factors = tuple(x.nodes[a] for a in olds)
        for axis, new in zip(news, _regrouped(constraints, factors, [shape[a] for a in news]), strict=True):
            nodes[axis] = new
        if any(x.nonzero.shape[a] > 1 for a in olds):
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
    if not any(nodes.any() for nodes in factors):
        return list(staying(*lengths))
    merged = factors[0] if len(factors) == 1 else constraints.fresh(int(np.prod(lengths)))
    if len(factors) > 1:
        constraints.product(merged, factors)
    if len(lengths) == 1:
        return [merged]
    split = tuple(constraints.fresh(n) for n in lengths)
    constraints.product(merged, split)
    return list(split)


def _reduction(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """A sum or maximum over whole axes. They stay: a mean divides by their length, whatever else it is."""
    x, axes = inputs[0], tuple(map(int, eqn.params["axes"]))
    constraints.keep(*(x.nodes[a] for a in axes))
    x = reduced(x, axes)
    nodes = tuple(nodes for axis, nodes in enumerate(x.nodes) if axis not in axes)
    return [Axes(nodes, x.nonzero.squeeze(axes), x.varies.squeeze(axes))]


def _along(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Something done along one axis: cumulative sums. The other axes pass."""
    x, axis = inputs[0], eqn.params["axis"]
    constraints.keep(x.nodes[axis])
    return [reduced(x, (axis,))]


def _window(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Pooling: axes with a window of one entry pass."""
    x, shape = inputs[0], eqn.outvars[0].aval.shape
    windows = zip(
        eqn.params["window_dimensions"], eqn.params["window_strides"], eqn.params["padding"], strict=True
    )
    pooled = tuple(
        a for a, (n, stride, pad) in enumerate(windows) if (n, stride, tuple(pad)) != (1, 1, (0, 0))
    )
    constraints.keep(*(x.nodes[a] for a in pooled))
    nodes = (staying(n)[0] if a in pooled else x.nodes[a] for a, n in enumerate(shape))
    return [reduced(x, pooled)._replace(nodes=tuple(nodes))]


def _concatenate(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    nodes = [
        np.concatenate([x.nodes[axis] for x in inputs])
        if a == axis
        else common_nodes(constraints, a, n, inputs)
        for a, n in enumerate(shape)
    ]
    axes = {axis} | {a for x in inputs for a in range(len(shape)) if x.nonzero.shape[a] > 1}
    wide = [full(x, axes) for x in inputs]
    flags = (np.concatenate([getattr(x, kind) for x in wide], axis) for kind in ("nonzero", "varies"))
    return [Axes(tuple(nodes), *flags)]


def _pad(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    (x, value), config = inputs, eqn.params["padding_config"]
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return _any_operation(constraints, eqn, inputs)
    widths = [(int(low), int(high)) for low, high, _ in config]
    nodes = tuple(
        np.concatenate([constraints.fresh(low), n, constraints.fresh(high)])
        for n, (low, high) in zip(x.nodes, widths, strict=True)
    )
    wide = full(x, {a for a, width in enumerate(widths) if any(width)})
    around = (bool(value.nonzero.any()), bool(value.varies.any()))
    flags = (np.pad(f, widths, constant_values=c) for f, c in zip(wide[1:], around, strict=True))
    return [Axes(nodes, *flags)]


def _slice(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    x, steps = inputs[0], eqn.params["strides"] or (1,) * len(inputs[0].nodes)
    cuts = tuple(map(slice, eqn.params["start_indices"], eqn.params["limit_indices"], steps))
    return [_cut(x, cuts)]


def _split(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    ends = np.cumsum([0, *eqn.params["sizes"]])
    whole = (slice(None),) * eqn.params["axis"]
    return [_cut(inputs[0], (*whole, slice(a, b))) for a, b in itertools.pairwise(ends)]


def _rev(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    x, axes = inputs[0], eqn.params["dimensions"]
    return [_cut(x, tuple(slice(None, None, -1 if a in axes else 1) for a in range(len(x.nodes))))]


def _cut(x: Axes, cuts: tuple[slice, ...]) -> Axes:
    cuts += (slice(None),) * (len(x.nodes) - len(cuts))
    nodes = tuple(nodes[cut] for nodes, cut in zip(x.nodes, cuts, strict=True))
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
