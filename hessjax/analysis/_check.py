"""A self-test of a loss and its matvec: what is wrong, by how much, and in which leaves."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from hessjax._core import _tree
from hessjax._core._messages import checked_any_key, checked_function
from hessjax._core._sources import Source, check_reiterable
from hessjax._core._types import Key, LossFn, Matvec, Params, Scalar, Vector
from hessjax.analysis._comparisons import (
    Check,
    CheckRow,
    Comparison,
    compare_gradient,
    compare_passes,
    compare_product,
    dtypes,
    first_batch,
    loss_and_gradient,
    named,
)
from hessjax.analysis._examples import example_rows, padding_rows
from hessjax.analysis._finite import cheapest_mode, finite_products, not_finite, untested
from hessjax.curvature._hessian import hessian
from hessjax.curvature._product import at_precision, check_call, explained, scalar
from hessjax.curvature._weights import Weights, check_weights
from hessjax.estimators.probes import gaussian

CAUTION = 5
"""An error counts beyond this many times its uncertainty: the two can differ by chance."""


def check(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    batches: Source | None = None,
    weights: Weights | None = None,
    matvec: Matvec | None = None,
    key: Key | None = None,
) -> Check:
    """A self-test of a loss and its matvec, to be run before its curvature is believed.

    With eps the spacing of the coarsest dtype among params and loss, the rows are:

    - *finite params*, *finite loss*: numbers that are NaN or infinite. If there are any, nothing else runs.
    - *finite products*: likewise in the gradient and in two products; what depends on these is not tested.
    - *same data* (with `batches`): batches that differ between two passes.
    - *padding* (with `hj.batches`, where it fills batches up): by how much that changes the loss, relative.
    - *same loss*, *same loss retraced*, *same products*: relative change when computed a second time,
      from the same compiled program or from a fresh trace. Fails for randomness that does not enter
      through the arguments.
    - *symmetric*: |uᵀAv − vᵀAu| / max(‖Au‖, ‖Av‖) for random u and v.
    - *linear*: ‖A(2u − 3v) − 2Au + 3Av‖, relative, in the worst leaf.
    - *gradient*, *Hessian*: relative disagreement with central differences of the loss and of the gradient
      in the worst leaf. The limit is √eps and five times the uncertainty of the differences themselves,
      which three steps show: at kinks (ReLU), and where rounding drowns them, they cannot tell much.
    - *examples*: the mean of the examples' gradients against the gradient, each by its weight; *halves*: that
      of the gradients of the batch's two halves. The limit is √eps and ten times what the gradient changes
      by when the examples change places. Both are notes where `args[0]` is no batch.
    - *precision*, *unused leaves*: notes. What the device's default precision changes in a product;
      leaves whose gradient and product are exactly zero.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`.
        params: pytree of real floating-point arrays.
        *args: what else the loss takes; with `batches`, what it takes after the batch.
        batches: a source of data that starts afresh each time, as for `over_batches`. It is compared in full,
            everything else runs on the first batch, `loss_fn(params, batch, *args)`.
        weights: `weights(batch) -> array`, how much each example counts in the loss's own mean, as
            `per_example_grads` and `over_batches` take it. None: all alike.
        matvec: the matvec to test for repetition, symmetry and linearity; by default the Hessian.
        key: random key for the test vectors; `jax.random.key(0)` by default.

    Returns:
        A `Check`: `.passed` for all, `.rows` with the numbers; `print` shows the table.

    Raises:
        TypeError: `params` has leaves that are not floating point, or `loss_fn` does not return one real
            number.
        ValueError: `batches` is empty; `weights` do not fit, are negative, not finite or all zero.

    Cost:
        About 25 gradients, and six losses for each leaf (or each of 16 groups); two passes over `batches`.
        Compiles the loss three times on purpose, the product once, the gradient also for half a batch and for
        single examples.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.tanh(x * params["scale"]) ** 2)
        >>> params = {"scale": jnp.array(0.5), "spare": jnp.ones(3)}
        >>> result = hj.check(loss_fn, params, jnp.linspace(-1.0, 2.0, 7))
        >>> result.passed
        True
        >>> result.rows[-1].detail
        'gradient and product are exactly zero in: spare'
    """
    _tree.check_floating(params)
    if matvec is not None:
        checked_function("matvec", matvec, "(vector) -> vector")
    key = jax.random.key(0) if key is None else checked_any_key(key)
    rows, rest = [], args
    if batches is not None:
        check_reiterable(batches)
        changed, detail = compare_passes(batches)
        rows.append(CheckRow("same data", changed == 0, changed, 0, detail))
        args = (first_batch(batches), *args)
    check_call("loss_fn", loss_fn, args)
    check_weights(weights)
    rows += _finite(loss_fn, params, args)
    if all(row.passed for row in rows if row.name.startswith("finite")):
        rows += padding_rows(loss_fn, params, batches, rest)
        rows += _derivatives(loss_fn, params, args, weights, matvec, key)
    return Check(tuple(rows))


def _finite(loss_fn: LossFn, params: Params, args: tuple[Any, ...]) -> list[CheckRow]:
    counts = list(map(not_finite, jax.tree.leaves(params)))
    at_fault = named(params, [number > 0 for number in counts])
    detail = f"NaN or infinite in: {at_fault}" if at_fault else dtypes(params)
    rows = [CheckRow("finite params", not at_fault, sum(counts), 0, detail)]
    if at_fault:
        return rows
    with explained("loss_fn"):  # the first to call it
        value = float(_fresh(loss_fn)(params, args))
    finite = math.isfinite(value)
    return [*rows, CheckRow("finite loss", finite, float(not finite), 0, f"the loss is {value:.6g}")]


def _derivatives(
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    weights: Weights | None,
    matvec: Matvec | None,
    key: Key,
) -> Iterator[CheckRow]:
    loss, keys = Partial(loss_fn), jax.random.split(key, 4)
    with explained("loss_fn"):
        value, grads = loss_and_gradient(loss, params, args)
    # The coarsest dtype decides what can agree: with one bfloat16 leaf everything is known to 2⁻⁸ at best.
    eps = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in [*jax.tree.leaves(params), value])
    own = hessian(loss_fn, params, *args, mode=cheapest_mode(loss_fn, params, args))
    A = own if matvec is None else matvec
    u, v = (_tree.cast_like(gaussian(k, params), params) for k in keys[:2])
    Au, Av = A(u), A(v)
    _tree.check_like(Au, u, "matvec(vector)", "params")
    finite, bad = finite_products(loss_fn, params, args, grads, (Au, Av), matvec)
    yield finite
    yield from _repeated_losses(loss_fn, params, args, eps)
    if "product" in bad:
        yield from (untested(name, bad["product"]) for name in ("same products", "symmetric", "linear"))
    else:
        yield _same_products(A, u, Au, eps)
        yield _symmetric(A, params, (u, v), (Au, Av), eps)
        yield _linear(A, params, (u, v), (Au, Av), eps)
    if "gradient" in bad:
        names = ("gradient", "Hessian", "examples", "halves")
        yield from (untested(name, bad["gradient"]) for name in names)
    else:
        yield _agreement("gradient", compare_gradient(loss, params, args, keys[2], eps), params, eps)
        # Always the Hessian, whatever `matvec` is: a GGN does not agree with differences of the gradient.
        if matvec is None and "product" in bad:
            yield untested("Hessian", bad["product"])
        else:
            yield _agreement("Hessian", compare_product(own, loss, params, args, keys[3], eps), params, eps)
        yield from example_rows(loss, params, args, weights, grads, eps)
    yield _device_precision(loss_fn, params, args, u, Au if matvec is None else own(u))
    yield untested("unused leaves", next(iter(bad.values()))) if bad else _unused(params, grads, Au)


def _unused(params: Params, grads: Vector, product: Vector) -> CheckRow:
    pairs = zip(*map(jax.tree.leaves, (grads, product)), strict=True)
    # Both: at a stationary point a gradient may be zero where the curvature is not.
    dead = [not (jnp.any(g) or jnp.any(x)) for g, x in pairs]
    unused = named(params, dead)
    detail = f"gradient and product are exactly zero in: {unused}" if unused else "every leaf matters"
    return CheckRow("unused leaves", True, sum(dead), math.inf, detail)


# -- repetition ------------------------------------------------------------------------------------


def _fresh(loss_fn: LossFn) -> Callable[[Params, tuple[Any, ...]], Scalar]:
    """The loss compiled anew at every call of this: what a trace freezes (`np.random`, a clock) shows."""

    # A function of its own at every call, and on purpose: jax would find the trace of an equal one.
    def loss(loss_fn: LossFn, params: Params, args: tuple[Any, ...]) -> Scalar:
        with at_precision("highest"):
            return scalar(loss_fn, args)(params)

    return functools.partial(jax.jit(loss), Partial(loss_fn))


def _repeated_losses(
    loss_fn: LossFn, params: Params, args: tuple[Any, ...], eps: float
) -> Iterator[CheckRow]:
    one, other = _fresh(loss_fn), _fresh(loss_fn)
    first, again, retraced = (float(f(params, args)) for f in (one, one, other))
    cause = "pass keys as arguments; on a GPU, additions in any order change the last digits"
    yield _same("same loss", abs(first - again) / (abs(first) or 1), eps, cause)
    cause = "tracing freezes Python's randomness, clocks and counters: pass such values as arguments"
    yield _same("same loss retraced", abs(first - retraced) / (abs(first) or 1), eps, cause)


def _same_products(A: Matvec, u: Vector, Au: Vector, eps: float) -> CheckRow:
    change = _relative(_tree.add_scaled(A(u), -1.0, Au), [Au])
    cause = f"changes in: {named(u, change > 16 * eps)}; data, keys or the order of additions change"
    return _same("same products", float(change.max()), eps, cause)


def _same(name: str, change: float, eps: float, cause: str) -> CheckRow:
    limit = 16 * eps  # a GPU adds in any order: the last few bits may change, no more
    detail = "to the last bit" if change == 0 else "up to rounding" if change <= limit else cause
    return CheckRow(name, change <= limit, change, limit, detail)


# -- a symmetric linear map ------------------------------------------------------------------------


def _symmetric(
    A: Matvec, params: Params, vectors: tuple[Vector, Vector], products: tuple[Vector, Vector], eps: float
) -> CheckRow:
    (u, v), (Au, Av) = vectors, products
    # u and v are of norm √n, and uᵀAv of two random vectors is about ‖A‖_F: ‖Au‖ is its size.
    size = max(float(_tree.norm(Au)), float(_tree.norm(Av))) or 1.0
    measured, limit = abs(float(_tree.inner(u, Av)) - float(_tree.inner(v, Au))) / size, eps**0.5
    if measured <= limit:
        return CheckRow("symmetric", True, measured, limit, "uᵀAv = vᵀAu up to rounding")
    structure: Any = jax.tree.structure(params)
    errors = []
    for i in range(structure.num_leaves):  # only now, for one more product each: whose rows are not columns
        part = jax.tree.unflatten(structure, [x * float(i == j) for j, x in enumerate(jax.tree.leaves(u))])
        errors.append(abs(float(_tree.inner(part, Av)) - float(_tree.inner(v, A(part)))) / size)
    at_fault = named(params, np.array(errors) > limit)
    return CheckRow(
        "symmetric", False, measured, limit, f"rows differ from columns in: {at_fault or 'no one leaf'}"
    )


def _linear(
    A: Matvec, params: Params, vectors: tuple[Vector, Vector], products: tuple[Vector, Vector], eps: float
) -> CheckRow:
    # 2 and 3: powers of two alone scale floating-point numbers exactly, and would hide rounding.
    together = _combined(*vectors)
    change = _relative(_tree.add_scaled(A(together), -1.0, _combined(*products)), products)
    limit = eps**0.5
    at_fault = named(params, change > limit)
    detail = f"not linear in: {at_fault}" if at_fault else "A(2u − 3v) = 2Au − 3Av up to rounding"
    return CheckRow("linear", not at_fault, float(change.max()), limit, detail)


def _combined(u: Vector, v: Vector) -> Vector:
    return jax.tree.map(lambda x, y: (2 * x - 3 * y).astype(x.dtype), u, v)


def _relative(change: Vector, products: Sequence[Vector]) -> np.ndarray:
    """‖change‖ of every leaf, relative to that of the products plus a hundredth of the whole."""
    norms = np.array(
        [[float(_tree.norm(x)) for x in jax.tree.leaves(_tree.wide(t))] for t in (change, *products)]
    )
    size = norms[1:].max(axis=0)
    # A hundredth of the whole: else a leaf whose product is mere rounding would fail against its own size.
    scale = size + 0.01 * np.linalg.norm(size)
    return norms[0] / np.where(scale > 0, scale, 1)


# -- derivatives -----------------------------------------------------------------------------------


def _agreement(name: str, comparison: Comparison, params: Params, eps: float) -> CheckRow:
    error, uncertainty = comparison.error, CAUTION * comparison.uncertainty
    limits = eps**0.5 + uncertainty
    wrong, unclear = ~(error <= limits), uncertainty > 0.5  # written so that NaN is wrong
    worst = int(np.argmax(np.where(np.isfinite(error), error / limits, np.inf)))
    detail = "agrees with finite differences"
    if wrong.any():
        detail = f"disagrees with finite differences in: {_leaves_of(comparison, wrong, params)}"
    elif unclear.any():
        at_fault = _leaves_of(comparison, unclear, params)
        detail = f"agrees, but the differences cannot tell (rounding or kinks) in: {at_fault}"
    return CheckRow(name, not wrong.any(), float(error[worst]), float(limits[worst]), detail)


def _leaves_of(comparison: Comparison, flags: np.ndarray, params: Params) -> str:
    chosen = np.isin(np.arange(len(jax.tree.leaves(params))), _flagged(comparison.leaves, flags))
    return named(params, chosen)


def _flagged(groups: list[list[int]], flags: np.ndarray) -> list[int]:
    return [i for group, flag in zip(groups, flags, strict=True) if flag for i in group]


def _device_precision(
    loss_fn: LossFn, params: Params, args: tuple[Any, ...], u: Vector, product: Vector
) -> CheckRow:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return CheckRow(
            "precision", True, 0.0, math.inf, "a CPU computes in the full precision of the dtypes"
        )
    lower = hessian(loss_fn, params, *args, mode=cheapest_mode(loss_fn, params, args), precision=None)(u)
    change = float(_relative(_tree.add_scaled(lower, -1.0, product), [product]).max())
    detail = f"change of a product under the default precision of {device.device_kind}; hessjax asks for full"
    return CheckRow("precision", True, change, math.inf, detail)
