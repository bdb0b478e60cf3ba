"""Sums of products, read: which channels must a matrix product or a convolution have?"""

import functools
from typing import Any, NamedTuple

import numpy as np

from hessjax.program._axes import Axes, Constraints, Kept, Nodes, mark, outer, staying, unknown


class Matrices(NamedTuple):
    """An operand as a stack of matrices: (batch, free, summed), each of them several axes in one.

    Attributes:
        nonzero: as in `Axes`; length 1 on the batch and free axes where all entries are alike.
        varies: the same.
        batch: the nodes of the batch axes.
        free: the nodes of the free axes.
        summed: the nodes of the axes that the sum runs over.
        batch_shape: the lengths of the batch axes in `nonzero`.
        free_shape: the lengths of the free axes in `nonzero`.
    """

    nonzero: np.ndarray
    varies: np.ndarray
    batch: tuple[Nodes, ...]
    free: tuple[Nodes, ...]
    summed: tuple[Nodes, ...]
    batch_shape: tuple[int, ...]
    free_shape: tuple[int, ...]


def dot_general(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Σ over the contracted axes of left · right."""
    summed, batch = eqn.params["dimension_numbers"]
    left, right = (matrices(x, tuple(b), tuple(s)) for x, b, s in zip(inputs, batch, summed, strict=True))
    for a, b in zip(left.batch + left.summed, right.batch + right.summed, strict=True):
        constraints.tie(a, b)
    nonzero, varies = contract(constraints, left, right)
    return [Axes((*left.batch, *left.free, *right.free), nonzero, varies)]


def conv_general_dilated(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """A convolution: a product over the input channels at every offset; depthwise, one channel each."""
    (x, kernel), groups, layout = inputs, eqn.params["feature_group_count"], eqn.params["dimension_numbers"]
    (batch, features, *space), (outs, ins, *offsets) = layout.lhs_spec, layout.rhs_spec
    constraints.keep(*(x.nodes[a] for a in space), *(kernel.nodes[a] for a in offsets))
    signal = matrices(reduced(x, (batch, *space)), (), (features,))
    signal = signal._replace(free=(), free_shape=())
    weights = matrices(reduced(kernel, tuple(offsets)), (), (ins,))
    weights = weights._replace(free=(kernel.nodes[outs],), free_shape=weights.nonzero.shape[1:2])
    shape, depthwise = eqn.outvars[0].aval.shape, len(kernel.nodes[ins]) == 1
    if eqn.params["batch_group_count"] == 1 == groups:
        constraints.tie(x.nodes[features], kernel.nodes[ins])
        found = contract(constraints, signal, weights)
    elif depthwise and eqn.params["batch_group_count"] == 1 and len(kernel.nodes[outs]) == groups:
        constraints.tie(x.nodes[features], kernel.nodes[outs])
        pair = [(m.nonzero.reshape(-1), m.varies.reshape(-1)) for m in (signal, weights)]
        (nonzero, varies), (nonzero_, varies_) = pair
        found = nonzero & nonzero_, (varies & nonzero_) | (nonzero & varies_)
    else:
        constraints.keep(x.nodes[batch], x.nodes[features], kernel.nodes[ins], kernel.nodes[outs])
        return [unknown(shape)]
    nodes, flat = list(staying(*shape)), [1] * len(shape)
    nodes[layout.out_spec[0]], nodes[layout.out_spec[1]] = x.nodes[batch], kernel.nodes[outs]
    flat[layout.out_spec[1]] = -1
    return [Axes(tuple(nodes), *(flags.reshape(flat) for flags in found))]


def contract(constraints: Constraints, left: Matrices, right: Matrices) -> tuple[np.ndarray, np.ndarray]:
    """Where the product is nonzero and where it varies; the terms that stay enter the constraints."""
    terms = [(left.varies, right.nonzero), (left.nonzero, right.varies)]
    terms = [(a, b) for a, b in terms if a.any() and b.any()]
    if left.varies.any() and right.varies.any():
        # Such as queries times keys: modules scale by the number of terms, a constant that nobody can see.
        constraints.keep(*left.summed, *right.summed)
    needed = terms if constraints.drop_constants and terms else [(left.nonzero, right.nonzero)]
    constraints.rules += [functools.partial(_terms, left, right, a, b) for a, b in needed]
    nonzero = _product(left, right, left.nonzero, right.nonzero)
    varies = [_product(left, right, a, b) for a, b in terms]
    return nonzero, np.logical_or.reduce(varies) if varies else np.zeros_like(nonzero)


def matrices(x: Axes, batch: tuple[int, ...], summed: tuple[int, ...]) -> Matrices:
    """An array as a stack of matrices, the batch axes in full only where they differ."""
    free = tuple(a for a in range(len(x.nodes)) if a not in batch + summed)
    whole = [*summed, *(batch if any(x.nonzero.shape[a] > 1 for a in batch) else ())]
    wide = full(x, whole)
    order = (*batch, *free, *summed)
    shape = [wide.nonzero.shape[a] for a in order]
    sizes = [
        int(np.prod(part, initial=1))
        for part in np.split(np.array(shape, int), [len(batch), len(batch + free)])
    ]
    nonzero, varies = (f.transpose(order).reshape(sizes) for f in (wide.nonzero, wide.varies))
    ahead, between, last = (tuple(x.nodes[a] for a in part) for part in (batch, free, summed))
    lengths, others = shape[: len(batch)], shape[len(batch) : len(batch + free)]
    return Matrices(nonzero, varies, ahead, between, last, tuple(lengths), tuple(others))


def full(x: Axes, axes: Any) -> Axes:
    """The same, its flags written out along these axes."""
    shape = [n if a in axes else x.nonzero.shape[a] for a, n in enumerate(x.shape)]
    return x._replace(nonzero=np.broadcast_to(x.nonzero, shape), varies=np.broadcast_to(x.varies, shape))


def reduced(x: Axes, axes: tuple[int, ...]) -> Axes:
    """The same without these axes' detail: True where any entry along them is."""
    nonzero, varies = (np.asarray(f.any(axis=axes, keepdims=True)) for f in (x.nonzero, x.varies))
    return x._replace(nonzero=nonzero, varies=varies)


def _terms(left: Matrices, right: Matrices, a: np.ndarray, b: np.ndarray, kept: Kept) -> None:
    """Keep the terms that an entry of the product which stays is made of."""
    rows, columns = (
        (flags & _staying(kept, m.free, m.free_shape)[:, None]).any(axis=1)
        for m, flags in ((left, a), (right, b))
    )
    batch = _staying(kept, left.batch, tuple(map(len, left.batch)))[:, None]
    needed = (rows & columns & (batch if len(rows | columns) > 1 else batch.any())).any(axis=0)
    mark(kept, needed.reshape(tuple(map(len, left.summed))), left.summed)


def _staying(kept: Kept, axes: tuple[Nodes, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Which places on these axes, as one, stay; where all are alike, whether any does."""
    each = [kept[nodes] for nodes in axes]
    return outer(
        [f if len(f) == n else f.any(keepdims=True) for f, n in zip(each, shape, strict=True)]
    ).reshape(-1)


def _product(left: Matrices, right: Matrices, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    hits = np.matmul(a.astype(np.float32), b.astype(np.float32).swapaxes(-1, -2)) > 0
    batch = left.batch_shape if len(a) > 1 else right.batch_shape
    return hits.reshape(*batch, *left.free_shape, *right.free_shape)
