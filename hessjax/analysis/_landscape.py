"""The loss along one direction or across the plane of two, on one batch or exactly over a data set."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from hessjax._core import _digests, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import check_flags, checked_count, shown
from hessjax._core._results import by_shapes, counted, is_known, with_error
from hessjax._core._sources import Source, check_source, length_of
from hessjax._core._tables import Column, Row, Table, number, printable
from hessjax._core._types import Block, LossFn, Params, Scalar, Vector
from hessjax._run._bar import bar_of
from hessjax.curvature._data import weighed
from hessjax.curvature._product import (
    as_pytree,
    at_precision,
    check_call,
    check_precision,
    explained,
    scalar,
)
from hessjax.curvature._weights import Weights, check_weights
from hessjax.estimators._samples import sampling_error


@printable
class Landscape(NamedTuple):
    """The loss on a grid around the params, with its standard error.

    Attributes:
        distances: for each direction, how far to go: an array in units of that direction's length.
        losses: (n,) or (n₁, n₂), the loss at params + Σ tᵢ·dᵢ, first axis for the first direction. What is
            not finite stays as it came.
        stderr: like `losses`, the standard error of the mean as an estimate over more such data, from the
            scatter between batches; infinite with a single batch. All points saw the same data, so
            their errors go together, and differences between points are known better than this.
        norms: (1,) or (2,) lengths ‖dᵢ‖: multiply distances by them for distances in weight space.
        num_batches: how many batches were averaged.
    """

    distances: tuple[Float[Array, " n"], ...]
    losses: Float[Array, "..."]
    stderr: Float[Array, "..."]
    norms: Float[Array, " k"]
    num_batches: int

    def _table(self) -> Table | str:
        if not is_known(self) or np.ndim(self.norms) != 1:
            return by_shapes(self)
        heads = Column("Direction"), Column("Points"), Column("From"), Column("To"), Column("Length")
        axes = enumerate(zip(self.distances, self.norms, strict=True), 1)
        rows = [(str(i), str(len(t)), f"{t[0]:.4g}", f"{t[-1]:.4g}", number(norm)) for i, (t, norm) in axes]
        return Table(heads, tuple(map(Row, rows)), notes=self._least())

    def _least(self) -> tuple[str, ...]:
        losses, batches = np.asarray(self.losses), counted(self.num_batches, "batch").replace("chs", "ches")
        if not np.isfinite(losses).any():
            return (f"No loss is finite, of {batches}.",)
        place = np.unravel_index(np.nanargmin(losses), losses.shape)
        at = ", ".join(f"{float(t[i]):.4g}" for t, i in zip(self.distances, place, strict=True))
        return (
            f"Least loss {with_error(losses[place], self.stderr[place])} at {at}; "
            f"largest {np.nanmax(losses):.5g}; {batches}.",
        )


def landscape(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    directions: Vector | Sequence[Vector] | Block,
    distances: ArrayLike | Sequence[Any] | None = None,
    batches: Source | None = None,
    weights: Weights | None = None,
    points_at_once: int = 1,
    precision: str | None = "highest",
    progress: bool = False,
) -> Landscape:
    """The loss at params + Σ tᵢ·dᵢ, on a grid of distances t along one direction d₁ or two.

    Without `batches` it is `loss_fn(params, *args)` that is drawn. With them it is the mean of
    `loss_fn(params, batch, *args)` over the data set, every example counting once, or by its weight; the
    data are passed over once, each batch being evaluated at every point of the grid.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the examples of its batch. Whatever is
            random or mutable enters through the arguments, as in `hessjax.flax.linen_loss` and `nnx_loss`:
            BatchNorm statistics and dropout keys are then the same at every point.
        params: the centre, a pytree of real floating-point arrays.
        *args: what else the loss takes; with `batches`, what it takes after the batch.
        directions: one vector like `params` for a curve, two in a list for a plane; or a block of one or
            two, such as the eigenvectors of `eigenpairs(..., k=1)`: largest first, then smallest.
            `hj.directions` makes others.
        distances: an increasing array for all directions, or one for each. By default 51 points from -1
            to 1 on a curve, 25 in each direction of a plane.
        batches: a source of data, as for `over_batches`; gone through once, so a generator will do.
        weights: `weights(batch) -> array`, how much each batch counts, as for `over_batches`. None: the
            common length of its leading axes.
        points_at_once: how many points one call evaluates side by side. More than 1 fills an accelerator;
            on a CPU it only costs (convolutions with weights of their own for every point run about ten
            times slower).
        precision: of matrix products and convolutions, as in `hessian`.
        progress: show a progress bar; the host then waits for each call.

    Returns:
        A `Landscape(distances, losses, stderr, norms, num_batches)`, in units of the loss.

    Raises:
        TypeError: `params` or a direction have leaves that are not floating point, `batches` cannot be
            iterated, or `loss_fn` does not return one real number.
        ValueError: a direction is not like `params` (every leaf is listed), there are more than two,
            distances do not increase or do not fit the directions, a batch has no examples; weights without
            `batches`, or negative, not finite, or zero for all of them.

    Cost:
        One forward pass for every point and batch; `points_at_once` times the memory of one, and the
        directions. Compiles once for each shape of batch; other params, directions, distances and grids
        compile nothing anew.

    References:
        Goodfellow, Vinyals and Saxe (2015), Qualitatively characterizing neural network optimization
        problems. Li, Xu, Taylor, Studer and Goldstein (2018), Visualizing the loss landscape of neural
        nets, §4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, x):
        ...     return jnp.mean(x) * jnp.sum(w**2)
        >>> w, x = jnp.array([1.0, 0.0]), jnp.array([1.0, 3.0])
        >>> curve = hj.landscape(loss_fn, w, x, directions=w, distances=[-1.0, 0.0, 1.0])
        >>> curve.losses.tolist()
        [0.0, 2.0, 8.0]
        >>> plane = hj.landscape(loss_fn, w, batches=[x, 2 * x], directions=jnp.eye(2))
        >>> plane.losses.shape, float(plane.losses[12, 12])
        ((25, 25), 3.0)
    """
    _tree.check_floating(params)
    if batches is not None:
        check_source(batches)
    check_call("loss_fn", loss_fn, args if batches is None else (0, *args))
    _digests.check_alike(params, args)
    points_at_once = checked_count("points_at_once", points_at_once)
    check_precision(precision)
    check_flags(progress=progress)
    rows = _rows(directions, params)
    axes = _axes(distances, len(rows))
    dtype = _tree.accumulator_dtype(params)
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(dtype)
    chunks = _chunks(points.reshape(-1, len(axes)), points_at_once)
    evaluate = functools.partial(_losses, precision, as_pytree(loss_fn), params, rows)
    sources = _sources(args, batches, weights)
    number = 1 if batches is None else length_of(batches)
    with bar_of(progress, "landscape", number and number * len(chunks), "evaluations") as advance:
        of_batches, losses = _evaluated(evaluate, chunks, sources, advance)
    moments = _mean_and_stderr(of_batches, losses[:, : points[..., 0].size])
    mean, stderr = (jax.device_put(x.reshape(points.shape[:-1]).astype(dtype)) for x in moments)
    norms = jnp.stack([_norm(row) for row in rows])
    distances = tuple(jax.device_put(axis.astype(dtype)) for axis in axes)
    return Landscape(distances, mean, stderr, norms, len(of_batches))


# -- what is asked for -----------------------------------------------------------------------------


def _rows(directions: Any, params: Params) -> tuple[Vector, ...]:
    """The directions one by one, from a vector, a block, or a list of vectors."""
    _tree.check_arrays(directions, "directions")
    # The structure tells them apart: params that are a list look like a list of directions, by type.
    same: bool = jax.tree.structure(directions) == jax.tree.structure(params)  # type: ignore[operator]
    rows = [directions]
    if same and (length := _block_length(directions, params)) is not None:
        rows = [_tree.row(directions, i) for i in range(length)]
    elif not same and type(directions) in (list, tuple):
        rows = list(directions)
    if not 1 <= len(rows) <= 2:
        raise ValueError(
            f"`directions` must be one or two, got {len(rows)}. Of a block keep two rows: "
            "`jax.tree.map(lambda rows: rows[:2], block)`."
        )
    for i, row in enumerate(rows):
        name = "directions" if len(rows) == 1 else f"directions[{i}]"
        _tree.check_like(row, params, name, "params")
        _tree.check_floating(row, name)
    return tuple(rows)


def _block_length(block: Block, params: Params) -> int | None:
    """How many vectors like `params` the block holds; None if it is no block of them."""
    pairs = zip(jax.tree.leaves(block), jax.tree.leaves(params), strict=True)
    lengths = {jnp.shape(x)[0] if jnp.shape(x)[1:] == jnp.shape(y) and jnp.ndim(x) > jnp.ndim(y) else None
               for x, y in pairs}  # fmt: skip
    return lengths.pop() if len(lengths) == 1 else None


def _axes(distances: Any, number: int) -> list[np.ndarray]:
    """The grid's distances, one array for each direction."""
    if distances is None:
        distances = np.linspace(-1, 1, 51 if number == 1 else 25)
    if isinstance(distances, (str, bytes, dict)) or not np.iterable(distances):
        raise TypeError(
            f"`distances` must be numbers, or numbers for each direction, got {shown(distances)}."
        )
    shared = all(np.ndim(distance) == 0 for distance in distances)
    try:
        axes = [np.asarray(axis, float) for axis in ([distances] * number if shared else distances)]
    except (TypeError, ValueError):
        raise TypeError(f"`distances` must be real numbers, got {shown(distances)}.") from None
    if len(axes) != number:
        raise ValueError(
            f"`distances` must be one array, or one for each of the {number} directions, got {len(axes)}."
        )
    for axis in axes:
        if axis.ndim != 1 or not len(axis) or not np.all(np.isfinite(axis)) or np.any(np.diff(axis) <= 0):
            raise ValueError(f"`distances` must be increasing, finite numbers, at least one, got {axis}.")
    return axes


def _chunks(points: np.ndarray, at_once: int) -> list[np.ndarray]:
    """The points, `at_once` at a time; the last chunk is filled up with its last point."""
    at_once = min(at_once, len(points))
    # All of one shape, so that the last chunk compiles nothing of its own.
    short = -len(points) % at_once
    points = np.concatenate([points, np.repeat(points[-1:], short, axis=0)])
    return list(points.reshape(-1, at_once, points.shape[1]))


def _sources(
    args: tuple[Any, ...], batches: Any, weights: Weights | None
) -> Iterator[tuple[float, tuple[Any, ...]]]:
    """Each batch's weight, and the arguments of the loss."""
    check_weights(weights)
    if batches is None:
        if weights is not None:
            raise ValueError("`weights` must come with `batches`: without them there is no mean to take.")
        yield 1.0, args
        return
    for weight, batch in weighed(batches, weights):
        yield weight, (batch, *args)


# -- computing it ----------------------------------------------------------------------------------


def _evaluated(
    evaluate: Callable[..., Array],
    chunks: list[np.ndarray],
    sources: Iterable[tuple[float, tuple[Any, ...]]],
    advance: Callable[[Array], Array],
) -> tuple[np.ndarray, np.ndarray]:
    """The weight of every batch (b,), and its losses at all points (b, n)."""
    weights, losses = [], list[Any]()
    for weight, arguments in sources:
        weights.append(weight)
        losses.append([advance(evaluate(chunk, arguments)) for chunk in chunks])
        # A batch is fetched when all points of the next are under way, and this one is while that is read.
        losses[-2:-1] = map(_fetched, losses[-2:-1])
    losses[-1:] = map(_fetched, losses[-1:])
    return np.array(weights), np.array(losses)


def _fetched(parts: list[Array]) -> np.ndarray:
    return np.concatenate(jax.device_get(parts))


@explained("loss_fn")
@compiled(static_argnums=0)
def _losses(
    precision: str | None,
    loss_fn: LossFn,
    params: Params,
    directions: tuple[Vector, ...],
    points: Float[Array, "n k"],
    args: tuple[Any, ...],
) -> Float[Array, " n"]:
    loss = scalar(loss_fn, args)

    def at(point: Float[Array, " k"]) -> Scalar:
        there = _tree.wide(params)  # in bfloat16 a small step from the weights would be no step at all
        for t, direction in zip(point, directions, strict=True):
            there = _tree.add_scaled(there, t, direction)
        return loss(_tree.cast_like(there, params))

    with at_precision(precision):
        # No vmap around one point: it would turn convolutions into grouped ones, ten times slower on a CPU.
        return at(points[0])[None] if len(points) == 1 else jax.vmap(at)(points)


def _mean_and_stderr(weights: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over batches (first axis) by weight, and its standard error."""
    weights, losses = weights.astype(float), losses.astype(float)  # float64: NumPy sums over batches
    with np.errstate(invalid="ignore", over="ignore"):  # infinite losses are data
        return weights @ losses / weights.sum(), sampling_error(losses, weights)


_norm = jax.jit(_tree.norm)
