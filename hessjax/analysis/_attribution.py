"""What `influence` is made of: examples read from a source, an inverse applied, products of gradients."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import shown
from hessjax._core._types import BatchMatvec, Block, LossFn, Params, Vector
from hessjax._fisher._inverse_fisher import InverseFisher
from hessjax.curvature._data import Batches
from hessjax.curvature._gradients import per_example_grads
from hessjax.curvature._product import at_precision, explained, scalar
from hessjax.curvature._weights import (
    Weights,
    batch_weight,
    by_example,
    check_total,
    num_examples,
    of_each,
    of_examples,
)
from hessjax.layers._gradients import whole_batch
from hessjax.layers._kronecker import Kronecker
from hessjax.solvers._system import Solution

AT_ONCE = 2**26
"""Numbers that gradients differentiated at once may take where nobody says how many: 256 MB in float32."""


class Part(NamedTuple):
    """Some examples of a batch.

    Attributes:
        args: of the loss, the whole batch first.
        start: the first of them.
        size: how many there are.
        weights: how much each counts; fewer than `size` where a batch is filled up.
        last: whether no others of the batch follow.
    """

    args: tuple[Any, ...]
    start: int
    size: int
    weights: Float[np.ndarray, " n"]
    last: bool


def parts_of(
    source: Any, argument: str, rest: tuple[Any, ...], weights: Weights | None, at_once: int
) -> Iterator[Part]:
    """One pass over a source, at most so many examples at a time, in their order."""
    data = source if isinstance(source, Batches) else Batches(source)
    if data.sharding is not None and jax.process_count() > 1:
        raise ValueError(
            f"`{argument}` must lie in one process, got batches of {jax.process_count()}: call it in each on "
            "the examples that are its own."
        )
    index, total = -1, 0.0
    for index, (batch, count) in enumerate(data.filled(argument)):
        with _renamed(argument):
            args, found = _weighed(weights, (whole_batch(data.placed(batch)), *rest), index, count)
        total += found.sum()
        for start in range(0, len(found), at_once):
            size = min(at_once, num_examples((batch,)) - start)
            yield Part(args, start, size, found[start : start + size], start + at_once >= len(found))
    with _renamed(argument):
        check_total(total, index)


def _weighed(
    weights: Weights | None, args: tuple[Any, ...], index: int, count: int | None
) -> tuple[tuple[Any, ...], np.ndarray]:
    """The arguments with other examples in the place of absent ones, and the weights of those there."""
    if weights is None:
        return args, np.ones(num_examples(args[:1]) if count is None else count)
    total = batch_weight(weights, args[0], index, count)
    if not total:  # nothing but padding
        return args, np.zeros(num_examples(args[:1]) if count is None else count)
    args, shares, _ = of_examples(weights, args)
    assert shares is not None
    return args, total * np.asarray(by_example(shares), float)[:count]


@contextlib.contextmanager
def _renamed(argument: str) -> Iterator[None]:
    """Errors of a batch, which name it as `over_batches` and `per_example_grads` do, by this argument."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace("`batches`", f"`{argument}`").replace("`args[0]`", f"`{argument}`")
        if "`weights`" not in text and f"`{argument}`" not in text:
            text = f"`{argument}` must hold batches of examples: {text}"
        raise ValueError(text) from error


# -- the inverse -----------------------------------------------------------------------------------


class Applied(NamedTuple):
    """Vectors times the inverse.

    Attributes:
        block: the products.
        residuals: of each, relative; None where the inverse does not say.
    """

    block: Block
    residuals: Float[np.ndarray, " k"] | None


def checked_inverse(inverse: Any, params: Params) -> Callable[[Vector], Any]:
    """The inverse as a function of vectors like the params.

    Raises:
        TypeError: it is no function, or a matrix itself.
        ValueError: it is that of other params.
    """
    if inverse is None:
        return _itself
    if isinstance(inverse, InverseFisher):
        _tree.check_like(inverse.blocking.like, params, "inverse", "params")
        return inverse.apply
    if not callable(inverse) or isinstance(inverse, type):
        raise TypeError(
            "`inverse` must be a function `(vector) -> vector`, what `hessjax.inverse_fisher` or `.inverse("
            f"damping)` of a K-FAC matrix gives, or None, got {shown(inverse)}."
        )
    if isinstance(inverse, Kronecker):
        _tree.check_like(inverse.func.like, params, "inverse", "params")
        if not inverse.is_inverse:
            _refuse(f"K-FAC's or EKFAC's, {inverse}: pass its `.inverse(damping)`")
    if _is_matvec(inverse):
        _refuse("a matvec: `functools.partial(hessjax.solve, matvec, damping=...)` solves with it")
    return inverse


def _refuse(what: str) -> NoReturn:
    text = "`inverse` must multiply by the inverse of a matrix, got the matrix itself,"
    raise TypeError(f"{text} {what}.")


def _itself(vector: Vector) -> Vector:
    return vector


def _is_matvec(inverse: Any) -> bool:
    """Whether this is surely a curvature matrix, by who made it."""
    if isinstance(inverse, BatchMatvec):
        return True
    return isinstance(inverse, Partial) and type(inverse.func).__module__.startswith("hessjax.curvature.")


def applied(
    inverse: Callable[[Vector], Any],
    block: Block,
    params: Params,
    advance: Callable[[Any], Any] = _itself,
) -> Applied:
    """Every row times the inverse, `advance` told of each; the first tells whether it is one of such vectors.

    Rows that are not finite, of examples whose loss is not, have no product: NaN.
    """
    finite = np.asarray(finite_rows(block))
    found, residuals = _nan(block), np.full(len(finite), np.nan)
    says, first = False, True
    for index in np.flatnonzero(finite).tolist():
        row = _row(block, index)
        product = advance(_first(inverse, row, params) if first else inverse(row))
        if says := isinstance(product, Solution):
            residuals[index] = product.residual / _tree.norm(row)
            product = product.x
        found, first = _put(found, index, product), False
    return Applied(found, residuals if says else None)


# Row by row in one program each, into the memory of what is there: a stack of a thousand compiles for long.
_row = jax.jit(_tree.row)
_nan = jax.jit(lambda block: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), _tree.wide(block)))


@functools.partial(jax.jit, donate_argnums=0)
def _put(block: Block, index: Any, row: Vector) -> Block:
    return jax.tree.map(lambda x, y: x.at[index].set(y.astype(x.dtype)), block, row)


@jax.jit
def finite_rows(block: Block) -> Bool[Array, " k"]:
    """Which rows hold neither NaN nor infinity."""
    leaves = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(block)]
    return jnp.all(jnp.stack(leaves), axis=0)


def _first(inverse: Callable[[Vector], Any], row: Vector, params: Params) -> Any:
    try:
        found = inverse(row)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"`inverse` must take vectors like `params`, but it raised: {error}") from error
    product = found.x if isinstance(found, Solution) else found
    _tree.check_vector(product, params, "inverse(vector)")
    bad = [
        path
        for path, x in zip(_tree.leaf_paths(params), jax.tree.leaves(product), strict=True)
        if not np.all(np.isfinite(jax.device_get(x)))
    ]
    if bad:
        raise ValueError(
            f"`inverse` must give finite vectors, got NaN or infinity in {', '.join(bad)}: a damping too "
            "small for the precision?"
        )
    return found


# -- gradients -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rules:
    """How parts are worked on; equal ones share compiled code.

    Attributes:
        precision: of matrix products and convolutions.
        by_leaf: whether products are kept leaf by leaf.
    """

    precision: str | None
    by_leaf: bool = False


def losses_and_grads(rules: Rules, loss_fn: LossFn, params: Params, part: Part) -> tuple[Array, Block]:
    """Of every example of a part its loss and its gradient."""
    with explained("loss_fn"):
        return _losses_and_grads(rules, part.size, loss_fn, params, part.args, jnp.int32(part.start))


@compiled(static_argnums=(0, 1))
def _losses_and_grads(
    rules: Rules, size: int, loss_fn: LossFn, params: Params, args: tuple[Any, ...], start: Int[Array, ""]
) -> tuple[Float[Array, " n"], Block]:
    args = _cut(args, start, size)
    with at_precision(rules.precision):
        losses = of_each(lambda example: scalar(loss_fn, example)(params), args)
    return losses, per_example_grads(loss_fn, params, *args, precision=rules.precision)


def products(rules: Rules, loss_fn: LossFn, params: Params, part: Part, vectors: Block) -> Array:
    """Of every example's gradient the inner products with these vectors, (leaves or 1, vectors, n)."""
    with explained("loss_fn"):
        start = jnp.int32(part.start)
        return _products(rules, part.size, loss_fn, params, part.args, start, vectors)


@compiled(static_argnums=(0, 1))
def _products(
    rules: Rules,
    size: int,
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    start: Int[Array, ""],
    vectors: Block,
) -> Float[Array, "leaves k n"]:
    grads = per_example_grads(loss_fn, params, *_cut(args, start, size), precision=rules.precision)
    if not rules.by_leaf:
        return _tree.gram(vectors, _tree.wide(grads))[None]
    pairs = zip(jax.tree.leaves(vectors), jax.tree.leaves(grads), strict=True)
    dtype = _tree.accumulator_dtype(grads)
    return jnp.stack([_tree.gram(v, g.astype(dtype)).astype(dtype) for v, g in pairs])


def _cut(args: tuple[Any, ...], start: Int[Array, ""], size: int) -> tuple[Any, ...]:
    # The start is traced, the size is not: one program for all full parts, one for a short last.
    batch = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, size) if jnp.ndim(x) else x, args[0]
    )
    return batch, *args[1:]
