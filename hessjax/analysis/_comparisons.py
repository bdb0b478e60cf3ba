"""The rows of `check`: how far two ways to the same numbers differ, and by how much is too much."""

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from hessjax._core import _numbers, _tree
from hessjax._core._compiled import compiled
from hessjax._core._sources import Source
from hessjax._core._tables import Column, Row, Table, printable
from hessjax._core._types import Key, LossFn, Matvec, Params, Scalar, Vector
from hessjax.curvature._data import unweighed
from hessjax.curvature._product import at_precision, scalar
from hessjax.estimators.probes import gaussian, rademacher


class CheckRow(NamedTuple):
    """One property that was tested.

    Attributes:
        name: what should hold.
        passed: whether it does.
        measured: how far it is from holding; `check` says in which unit.
        limit: the most that may be; infinite for a note, which cannot fail; NaN for what could not be tested,
            which has not passed.
        detail: what was seen, with the paths of the leaves at fault, and what may be the cause.
    """

    name: str
    passed: bool
    measured: float
    limit: float
    detail: str


@printable
class Check(NamedTuple):
    """What `check` returns: rows to compute with, and a table when printed.

    Attributes:
        rows: one for each property tested.
    """

    rows: tuple[CheckRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def to_text(self, width: int | None = None) -> str:
        """The table, at most `width` columns wide; by default as wide as the terminal, 80 without one."""
        return self._table().to_text(width)

    def _table(self) -> Table:
        heads = (Column("Check", "word"), Column("Result", "word"), Column("Measured", rank=1),
                 Column("Limit", rank=2), Column("Detail", "text"))  # fmt: skip
        rows = [Row(_cells(row), "" if row.passed else "bold red") for row in self.rows]
        return Table(heads, tuple(rows))


def _cells(row: CheckRow) -> tuple[str, ...]:
    note, untested = math.isinf(row.limit), math.isnan(row.limit)
    result = "untested" if untested else "FAILED" if not row.passed else "note" if note else "ok"
    measured, limit = "" if untested else f"{row.measured:.3g}", f"{row.limit:.3g}"
    return row.name, result, measured, "" if note or untested else limit, row.detail


def named(params: Params, flags: Iterable[Any]) -> str:
    """The paths of the leaves that are flagged."""
    return ", ".join(path for path, flag in zip(_tree.leaf_paths(params), flags, strict=True) if flag)


def dtypes(params: Params) -> str:
    """The dtypes of the leaves, and whether there may be float64."""
    counts = Counter(str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params))
    shown = ", ".join(
        f"{dtype} ({number} {'leaf' if number == 1 else 'leaves'})" for dtype, number in counts.items()
    )
    return f"{shown}; x64 is {'on' if jnp.result_type(float) == jnp.float64 else 'off'}"


STEPS = (1.0, 2**0.5, 2.0)
"""Multiples of the basic step: what a difference changes by between them is its uncertainty."""

MOST_GROUPS = 16
"""Leaves are tested on their own up to this number, and beyond it in groups, to spare evaluations."""


class Comparison(NamedTuple):
    """A derivative against differences, one entry for each leaf or group of leaves.

    Attributes:
        leaves: which leaves, by index.
        error: the disagreement, relative to what is compared plus a hundredth of the whole, so that a leaf
            of mere rounding is not held against its own size.
        uncertainty: how much the disagreement changes with the step (truncation, kinks, rounding), likewise.
    """

    leaves: list[list[int]]
    error: np.ndarray
    uncertainty: np.ndarray


def compare_gradient(
    loss_fn: LossFn, params: Params, args: tuple[Any, ...], key: Key, eps: float
) -> Comparison:
    """The gradient against (f(p + hv) − f(p − hv)) / 2h, with h near eps^⅓ of the weights.

    v is half along the gradient, for a strong signal, and half random, so that a gradient which is zero
    by mistake has a signal at all.
    """
    value, grads = loss_and_gradient(loss_fn, params, args)
    # Truncation grows as h², rounding as eps/h: the two balance at h near eps^⅓ of the scale of the weights.
    direction, sizes = _toward(grads, gaussian(key, params), params)
    steps = eps ** (1 / 3) * np.asarray(sizes, float)

    def slopes(leaves: list[int]) -> tuple[float, float, float]:
        here = steps * np.isin(np.arange(len(steps)), leaves)
        pairs = [_slopes(loss_fn, params, args, grads, direction, here * factor) for factor in STEPS]
        measured, expected = np.array(jax.device_get(pairs), float).T
        # Each of the two losses is off by about eps·|f|; the ends at which they are taken round too.
        rounding = 4 * eps * abs(float(value)) / (np.linalg.norm(here) or np.inf)
        wrong = measured - expected
        return abs(wrong[0]), np.ptp(wrong) + rounding, max(abs(measured[0]), abs(expected[0]))

    groups = [g.tolist() for g in np.array_split(np.arange(len(steps)), min(len(steps), MOST_GROUPS))]
    return _relative(groups, np.array([slopes(group) for group in groups]))


def compare_product(
    matvec: Matvec, loss_fn: LossFn, params: Params, args: tuple[Any, ...], key: Key, eps: float
) -> Comparison:
    """The product Hv against (∇f(p + hv) − ∇f(p − hv)) / 2h, v being signs in the scale of each leaf."""
    # Signs, so that every weight moves by a like share of its leaf's scale.
    direction = _in_scale(rademacher(key, params), params)
    disagreements, sizes = [], []
    for factor in STEPS:
        h = eps ** (1 / 3) * factor
        there, back = (_moved(params, direction, np.full(_count(params), t)) for t in (h, -h))
        # The product with the step as the params' dtype took it, not with v: rounding of p ± hv is no error.
        product = matvec(_tree.cast_like(_difference(there, back, h), params))
        ends = [loss_and_gradient(loss_fn, point, args)[1] for point in (there, back)]
        # Kept as a vector: between two steps it may change in direction and not in length.
        disagreement, size = _residual(*ends, h, product)
        disagreements.append(disagreement)
        sizes.append(size)
    spread = [norms(_tree.add_scaled(disagreements[0], -1.0, other)) for other in disagreements[1:]]
    columns = jax.device_get((norms(disagreements[0]), jnp.maximum(*spread), sizes[0]))
    return _relative([[i] for i in range(len(sizes[0]))], np.array(columns, float).T)


def _relative(leaves: list[list[int]], columns: np.ndarray) -> Comparison:
    error, uncertainty, size = columns.T
    scale = size + 0.01 * size.max()
    scale = np.where(scale > 0, scale, 1)
    return Comparison(leaves, error / scale, uncertainty / scale)


def _count(params: Params) -> int:
    return len(jax.tree.leaves(params))


@compiled()
def loss_and_gradient(loss_fn: LossFn, params: Params, args: tuple[Any, ...]) -> tuple[Scalar, Vector]:
    """The loss and its gradient, in full float32."""
    with at_precision("highest"):
        return jax.value_and_grad(scalar(loss_fn, args))(params)


@compiled()
def _slopes(
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    grads: Vector,
    direction: Vector,
    t: Float[Array, " l"],
) -> tuple[Scalar, Scalar]:
    """What the loss changes by per unit of length, measured and according to its gradient."""
    there, back = _moved(params, direction, t), _moved(params, direction, -t)
    step = _difference(there, back, 0.5)  # the step as it came out in the dtypes of the params
    loss = scalar(loss_fn, args)
    # Subtracted on the device, in the losses' own dtype: only the difference comes to the host.
    with at_precision("highest"):
        change = loss(there) - loss(back)
    length = _tree.norm(step)
    length = jnp.where(length > 0, length, 1)
    return jnp.divide(*_numbers.promoted(change, length)), _tree.inner(step, _tree.wide(grads)) / length


@jax.jit
def _moved(params: Params, direction: Vector, t: Float[Array, " l"]) -> Params:
    """The point params + t·direction, with a distance of its own for every leaf."""
    leaves, structure = jax.tree.flatten(direction)
    step = jax.tree.unflatten(structure, [x * t[i].astype(x.dtype) for i, x in enumerate(leaves)])
    return _tree.cast_like(_tree.add_scaled(_tree.wide(params), 1.0, step), params)


@jax.jit
def _difference(there: Params, back: Params, h: ArrayLike) -> Vector:
    """(there − back) / 2h."""
    return jax.tree.map(
        lambda x, y: (x - y) / jnp.asarray(2 * h, x.dtype), _tree.wide(there), _tree.wide(back)
    )


@jax.jit
def _residual(
    there: Vector, back: Vector, h: ArrayLike, product: Vector
) -> tuple[Vector, Float[Array, " l"]]:
    """Difference of gradients less the product, and the size of the two, leaf by leaf."""
    measured, product = _difference(there, back, h), _tree.wide(product)
    return _tree.add_scaled(measured, -1.0, product), jnp.maximum(norms(measured), norms(product))


@jax.jit
def norms(vector: Vector) -> Float[Array, " l"]:
    """‖·‖ of every leaf."""
    return jnp.stack(_numbers.promoted(*(_tree.norm(leaf) for leaf in jax.tree.leaves(_tree.wide(vector)))))


@jax.jit
def _toward(grads: Vector, random: Vector, params: Params) -> tuple[Vector, Float[Array, " l"]]:
    """Directions of norm 1 in every leaf, and the length of the weights in it."""
    unit = functools.partial(jax.tree.map, lambda x: x / jnp.where(_tree.norm(x) > 0, _tree.norm(x), 1))
    direction = unit(_tree.add_scaled(unit(_tree.wide(grads)), 1.0, unit(random)))
    scales = _scales(params)
    return direction, scales * jnp.sqrt(
        jnp.array([jnp.size(x) for x in jax.tree.leaves(params)], scales.dtype)
    )


@jax.jit
def _in_scale(signs: Vector, params: Params) -> Vector:
    leaves, structure = jax.tree.flatten(signs)
    scales = _scales(params)
    return jax.tree.unflatten(structure, [x * scales[i].astype(x.dtype) for i, x in enumerate(leaves)])


def _scales(params: Params) -> Float[Array, " l"]:
    """The root mean square of every leaf; that of all weights where a leaf's is smaller."""
    lengths = norms(params)
    sizes = jnp.array([max(jnp.size(leaf), 1) for leaf in jax.tree.leaves(params)], lengths.dtype)
    # A leaf of zeros (fresh biases) has no scale of its own, and a step of zero would test nothing.
    everywhere = jnp.sqrt(jnp.sum(lengths**2) / jnp.sum(sizes))
    return jnp.maximum(lengths / jnp.sqrt(sizes), jnp.where(everywhere > 0, everywhere, 1.0))


def compare_passes(batches: Source) -> tuple[int, str]:
    """How many batches of a second pass differ from the first, and what is to be said about it."""
    changed, first = 0, ""
    passes = [list(_digests(batches)) for _ in range(2)]
    for index, (one, other) in enumerate(itertools.zip_longest(*passes)):
        if one == other:
            continue
        changed += 1
        first = first or f"batch {index} is the first to change: {_what_differs(one, other)}"
    if not changed:
        return 0, f"{len(passes[0])} batches, twice the same"
    return changed, f"{changed} of {max(map(len, passes))} batches change in a second pass; {first}"


def first_batch(batches: Source) -> Any:
    """The first of a pass."""
    for batch in unweighed(batches):
        return batch
    raise ValueError("`batches` must hold at least one batch when iterated anew, got none.")


def _digests(batches: Source) -> Iterator[dict[str, bytes]]:
    """Of every batch, a fingerprint of each leaf."""
    for batch in unweighed(batches):
        yield dict(zip(_tree.leaf_paths(batch), map(_digest, jax.tree.leaves(batch)), strict=True))


def _digest(leaf: Any) -> bytes:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # NumPy knows no keys
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf)
    # Shape and dtype too: the same bytes may be other numbers. Digests, so that no batch has to be kept.
    head = f"{array.dtype}{np.shape(leaf)}".encode()
    return hashlib.blake2b(head + array.tobytes(), digest_size=16).digest()


def _what_differs(one: dict[str, bytes] | None, other: dict[str, bytes] | None) -> str:
    if one is None or other is None:
        return f"the {'second' if other is None else 'first'} pass has ended before it"
    paths = [path for path in {**one, **other} if one.get(path) != other.get(path)]
    return f"its leaves {', '.join(paths)} differ" if paths != ["."] else "its numbers differ"
