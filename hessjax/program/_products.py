"""Sums of products: which channels must a matrix product or a convolution have, and what does it cost?"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool

from hessjax.program._axes import Axes, Constraints, Flags, Kept, Nodes, axes_of, mark, outer, staying, unread
from hessjax.program._program import Body, Operation, Program, Value

Stack: TypeAlias = Bool[np.ndarray, "_batch _free _summed"]
"""What holds of the entries of an operand as a stack of matrices."""


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
        chosen: as in `Axes`.
    """

    nonzero: Stack
    varies: Stack
    batch: tuple[Nodes, ...]
    free: tuple[Nodes, ...]
    summed: tuple[Nodes, ...]
    batch_shape: tuple[int, ...]
    free_shape: tuple[int, ...]
    chosen: bool


def dot_general(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Σ over the contracted axes of left · right."""
    summed, batch = operation.params["dimension_numbers"]
    pairs = zip(inputs, batch, summed, strict=True)
    return [_dot(constraints, operation, *(matrices(x, tuple(b), tuple(s)) for x, b, s in pairs))]


def _dot(constraints: Constraints, operation: Operation, left: Matrices, right: Matrices) -> Axes:
    for a, b in zip(left.batch + left.summed, right.batch + right.summed, strict=True):
        constraints.tie(a, b)
    nonzero, varies = contract(constraints, operation, left, right)
    return Axes((*left.batch, *left.free, *right.free), nonzero, varies)


def ragged_dot_general(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Rows in groups, each multiplied with the matrix of its group: an index goes if it may go in all."""
    (left, right, *sizes), numbers = inputs, operation.params["ragged_dot_dimension_numbers"]
    (summed, batch), rows = numbers.dot_dimension_numbers, tuple(numbers.lhs_ragged_dimensions)
    groups = tuple(numbers.rhs_group_dimensions)
    if not groups or {*summed[0], *batch[0]} & {*rows}:  # a sum, or a batch, in groups
        return unread(constraints, operation, inputs)
    axes = [left.nodes[a] for a in rows] + [right.nodes[a] for a in groups]
    constraints.keep(*axes, *(n for x in sizes for n in x.nodes), why="index", by=operation.name)
    right, rest = reduced(right, groups), [a for a in range(len(right.nodes)) if a not in groups]
    nodes = tuple(right.nodes[a] for a in rest)
    any_group = axes_of(nodes, right.nonzero.squeeze(groups), right.varies.squeeze(groups))
    places = (tuple(rest.index(a) for a in part[1]) for part in (batch, summed))
    matrix = matrices(any_group, *places)
    return [_dot(constraints, operation, matrices(left, tuple(batch[0]), tuple(summed[0])), matrix)]


def conv_general_dilated(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """A convolution: at every offset a product over the input channels, those of its own group each."""
    (x, kernel), layout = inputs, operation.params["dimension_numbers"]
    (batch, features, *space), (outs, ins, *offsets) = layout.lhs_spec, layout.rhs_spec
    if operation.params["batch_group_count"] > 1:
        return unread(constraints, operation, inputs)
    # Positions in space stay: padding and strides refer to them by number.
    places = (*(x.nodes[a] for a in space), *(kernel.nodes[a] for a in offsets))
    constraints.keep(*places, why="index", by=operation.name)
    groups = operation.params["feature_group_count"]
    # Of an image only the channels differ in what is zero: one row stands for all places.
    signal = _in_groups(constraints, x, (features,), groups)
    weights = _in_groups(constraints, kernel, (outs, ins), groups)
    both = matrices(signal, (0,), (1,)), matrices(weights, (0,), (2,))
    made = full(_dot(constraints, operation, *both), (0, 1))
    nodes, flat = list(staying(*operation.outputs[0].shape)), [1] * (2 + len(space))
    nodes[layout.out_spec[0]], nodes[layout.out_spec[1]] = x.nodes[batch], kernel.nodes[outs]
    flat[layout.out_spec[1]] = -1
    return [Axes(tuple(nodes), made.nonzero.reshape(flat), made.varies.reshape(flat))]


def _in_groups(constraints: Constraints, x: Axes, axes: tuple[int, ...], groups: int) -> Axes:
    """These axes of an array, the first cut into groups; of the others, whether anything there holds."""
    nodes = tuple(x.nodes[a] for a in axes)
    each = len(nodes[0]) // groups
    # Without groups, or with one channel in each, there is nothing to cut.
    cut = {1: (staying(1)[0], nodes[0]), len(nodes[0]): (nodes[0], staying(1)[0])}
    first = cut.get(groups) or constraints.split(nodes[0], (groups, each))
    wide = full(reduced(x, tuple(a for a in range(len(x.nodes)) if a not in axes)), axes)
    shape = (groups, each, *(len(n) for n in nodes[1:]))
    order = [*axes, *(a for a in range(len(x.nodes)) if a not in axes)]
    nonzero, varies = (f.transpose(order).reshape(shape) for f in (wide.nonzero, wide.varies))
    return Axes((*first, *nodes[1:]), nonzero, varies)


def contract(
    constraints: Constraints, operation: Operation, left: Matrices, right: Matrices
) -> tuple[Flags, Flags]:
    """Where the product is nonzero and where it varies; the terms that stay enter the constraints."""
    terms = [(left.varies, right.nonzero), (left.nonzero, right.varies)]
    terms = [(a, b) for a, b in terms if a.any() and b.any()]
    if left.varies.any() and right.varies.any() and left.chosen == right.chosen:
        # Such as queries times keys: modules scale by the number of terms, a constant that nobody can see.
        constraints.keep(*left.summed, *right.summed, why="width", by=operation.name)
    # A sum needs its terms that are not zero; its terms that vary, if constants may go.
    needed = terms if constraints.drop_constants and terms else [(left.nonzero, right.nonzero)]
    constraints.rules += [functools.partial(_terms, left, right, a, b) for a, b in needed]
    nonzero = _product(left, right, left.nonzero, right.nonzero)
    varies = [_product(left, right, a, b) for a, b in terms]
    return nonzero, np.any(varies, axis=0) if varies else np.zeros_like(nonzero)


def matrices(x: Axes, batch: tuple[int, ...], summed: tuple[int, ...]) -> Matrices:
    """An array as a stack of matrices, the batch axes in full only where they differ."""
    free = tuple(a for a in range(len(x.nodes)) if a not in batch + summed)
    # Batch axes are most often alike throughout (a batch of examples): one matrix then stands for all.
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
    return Matrices(nonzero, varies, ahead, between, last, tuple(lengths), tuple(others), x.chosen)


def full(x: Axes, axes: Collection[int]) -> Axes:
    """The same, its flags written out along these axes."""
    shape = [n if a in axes else x.nonzero.shape[a] for a, n in enumerate(x.shape)]
    return x._replace(nonzero=np.broadcast_to(x.nonzero, shape), varies=np.broadcast_to(x.varies, shape))


def reduced(x: Axes, axes: tuple[int, ...]) -> Axes:
    """The same without these axes' detail: True where any entry along them is."""
    nonzero, varies = (np.asarray(f.any(axis=axes, keepdims=True)) for f in (x.nonzero, x.varies))
    return x._replace(nonzero=nonzero, varies=varies)


def _terms(left: Matrices, right: Matrices, a: Stack, b: Stack, kept: Kept) -> None:
    """Keep the terms that an entry of the product which stays is made of."""
    rows, columns = (
        (flags & _staying(kept, m.free, m.free_shape)[:, None]).any(axis=1)
        for m, flags in ((left, a), (right, b))
    )
    batch = _staying(kept, left.batch, tuple(map(len, left.batch)))[:, None]
    # A term of the sum stays if a row and a column that stay have it, in a matrix of the stack that stays.
    needed = (rows & columns & (batch if len(rows | columns) > 1 else batch.any())).any(axis=0)
    mark(kept, needed.reshape(tuple(map(len, left.summed))), left.summed)


def _staying(kept: Kept, axes: tuple[Nodes, ...], shape: tuple[int, ...]) -> Bool[np.ndarray, " _places"]:
    """Which places on these axes, as one, stay; where all are alike, whether any does."""
    each = [kept[nodes] for nodes in axes]
    return outer(
        [f if len(f) == n else f.any(keepdims=True) for f, n in zip(each, shape, strict=True)]
    ).reshape(-1)


def _product(left: Matrices, right: Matrices, a: Stack, b: Stack) -> Flags:
    # Counts of nonzero terms: numpy multiplies floats with BLAS, and booleans with a loop, 100 times slower.
    hits = np.matmul(a.astype(np.float32), b.astype(np.float32).swapaxes(-1, -2)) > 0
    batch = left.batch_shape if len(a) > 1 else right.batch_shape
    return hits.reshape(*batch, *left.free_shape, *right.free_shape)


# -- what they cost --------------------------------------------------------------------------------

NO_LEAF = -1
"""Stands for the leaf where data are multiplied with data."""


class Work(NamedTuple):
    """How many multiply-adds a program spends.

    Attributes:
        by_leaf: for every leaf of the params by its index, those with it, or with what is made of leaves
            alone (it then counts for the largest among them); under `NO_LEAF` those of data with data.
        notes: what these numbers do not know: loops of unknown length, branches, operations that hide theirs.
    """

    by_leaf: Counter[int]
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_leaf.values())


def multiply_adds(
    program: Program, shape: Callable[[Value], tuple[int, ...]] = lambda value: value.shape
) -> Work:
    """The multiply-adds of one call, in matrix products and convolutions.

    A product counts its outputs times the terms of a sum, a convolution with its padding. The step of a
    `scan` counts as often as it runs, a `while` loop as one step, a `cond` as its most expensive branch; the
    last two are noted. Entrywise operations are not counted.

    Args:
        program: what `read` made of the model.
        shape: what to take for the shape of a value, where that is not the one it was traced with.

    Returns:
        The numbers, and what they leave open.
    """
    sizes = [math.prod(leaf.shape) for leaf in program.leaves]
    notes = dict[str, None]()  # in order, each once
    return Work(_work(program.body, sizes, shape, notes), tuple(notes))


_Shape: TypeAlias = Callable[[Value], tuple[int, ...]]


def _work(body: Body, sizes: list[int], shape: _Shape, notes: dict[str, None]) -> Counter[int]:
    counts = Counter[int]()
    for operation in body.operations:
        counts.update(_work_of(operation, sizes, shape, notes))
    return counts


def _work_of(operation: Operation, sizes: list[int], shape: _Shape, notes: dict[str, None]) -> Counter[int]:
    inside = [_work(body, sizes, shape, notes) for body in operation.bodies]
    if operation.name == "cond":
        if len({frozenset(each.items()) for each in inside}) > 1:
            notes["a `cond` counts as its most expensive branch"] = None
        return max(inside, key=lambda counts: sum(counts.values()))
    if operation.name in ("scan", "while"):
        once = sum(inside, Counter[int]())
        if operation.trips is None and once:
            notes["a `while` loop counts as one step: how many there are is known only when it runs"] = None
        trips = 1 if operation.trips is None else operation.trips
        return Counter({leaf: trips * number for leaf, number in once.items()})
    if operation.name in PRODUCTS:
        return Counter({_owner(operation.inputs[:2], sizes): PRODUCTS[operation.name](operation, shape)})
    if operation.name in _FOREIGN or any(_products_inside(operation.params)):
        notes[f"what `{operation.name}` does inside is not counted"] = None
    return Counter()


def _owner(operands: tuple[Value, ...], sizes: list[int]) -> int:
    """The largest leaf that a product is with."""
    leaves = (leaf for value in operands for leaf in sorted(value.leaves or ()))
    return max(leaves, key=sizes.__getitem__, default=NO_LEAF)


def _dot_work(operation: Operation, shape: _Shape) -> int:
    (contracted, _), _ = operation.params["dimension_numbers"]
    left = shape(operation.inputs[0])
    return math.prod(shape(operation.outputs[0])) * math.prod(left[axis] for axis in contracted)


def _ragged_dot_work(operation: Operation, shape: _Shape) -> int:
    """Rows in groups, each multiplied with the matrix of its group; or a sum cut into groups."""
    numbers = operation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left = shape(operation.inputs[0])
    counted = math.prod(shape(operation.outputs[0])) * math.prod(left[axis] for axis in contracted)
    # Groups of a contracted axis share its terms among them: the outputs have one more axis, the groups.
    cut = set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return counted // max(1, shape(operation.inputs[2])[-1]) if cut else counted


def _conv_work(operation: Operation, shape: _Shape) -> int:
    _, *summed = operation.params["dimension_numbers"].rhs_spec
    kernel = shape(operation.inputs[1])
    counted = math.prod(shape(operation.outputs[0])) * math.prod(kernel[axis] for axis in summed)
    return counted // math.prod(operation.params["lhs_dilation"])  # zeros between the inputs are no work


PRODUCTS: dict[str, Callable[[Operation, _Shape], int]] = {
    "dot_general": _dot_work,
    "ragged_dot_general": _ragged_dot_work,
    "conv_general_dilated": _conv_work,
}
_FOREIGN = frozenset(("ffi_call", "custom_call", "pure_callback", "io_callback"))


def _products_inside(params: dict[str, Any]) -> Iterator[str]:
    """The products in jaxprs that are parameters: a kernel, a shard, a linear solve."""
    for value in params.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            for eqn in getattr(jaxpr, "eqns", ()):
                yield from (
                    [eqn.primitive.name] if eqn.primitive.name in PRODUCTS else _products_inside(eqn.params)
                )
