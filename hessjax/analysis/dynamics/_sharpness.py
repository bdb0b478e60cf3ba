"""How sharp the loss is along an update: its curvature there, and the step at which the loss would rise."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _digests, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_count
from hessjax._core._numbers import or_nan
from hessjax._core._results import Estimate, by_shapes, counted, is_known, is_single, with_error
from hessjax._core._tables import Table, printable
from hessjax._core._types import LossFn, Params, Scalar, Vector
from hessjax.analysis.dynamics._moments import Deviating, ratio_of
from hessjax.analysis.dynamics._noise import check_positive
from hessjax.curvature._product import (
    as_pytree,
    at_precision,
    check_call,
    check_precision,
    explained,
    scalar,
)
from hessjax.curvature._weights import Weights, by_example, of_each, of_examples, weighed

_WAY_OUT = (
    "`loss_fn` must have no `custom_vjp` inside, which cannot be differentiated forwards: of "
    "`hessjax.hvp(loss_fn, params, update, batch, mode='reverse-over-reverse')` take the inner product with "
    "the update."
)


def directional_sharpness(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    update: Vector,
    weights: Weights | None = None,
    precision: str | None = "highest",
) -> Estimate:
    """The curvature along the update that is made, vᵀHv / ‖v‖², with its standard error over the examples.

    The sharpness that training feels: only updates along its eigenvector reach the largest eigenvalue. Every
    example has its own, vᵀHᵢv / ‖v‖²; the result is their mean.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the leading axis of `args[0]`.
        params: pytree of real floating-point arrays.
        *args: first the batch, which alone is cut into examples: see `per_example_grads`.
        update: v, like the params: what the optimizer adds, or any direction. Its length does not matter.
        weights: `weights(batch) -> array`, as in `per_example_grads`. None: all alike.
        precision: of matrix products and convolutions, as in `hessian`.

    Returns:
        `Estimate(mean, stderr, num_samples)`, in loss per squared parameter; NaN for an update of zeros. It
        works inside `jit`.

    Raises:
        TypeError: `params` or `update` are not floating point; `loss_fn` does not return one real number, or
            has a `custom_vjp` inside.
        ValueError: `update` is not like `params`; as `per_example_grads`.

    Cost:
        Two to three forward passes, no gradient: memory of a forward pass of one layer at a time, and three
        vectors.

    References:
        Pan & Li (2023), Toward understanding why Adam converges faster than SGD for transformers, arXiv
        2306.00204.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, x):
        ...     return jnp.mean(x @ w**2) / 2
        >>> x = jnp.array([[1.0, 4.0], [3.0, 4.0]])  # two examples
        >>> found = hj.dynamics.directional_sharpness(loss_fn, jnp.ones(2), x, update=jnp.array([-0.1, 0.0]))
        >>> print(found)
        2.0 ± 1.0 (2 samples)
    """
    _check(loss_fn, params, args, update, precision)
    args, shares, count = of_examples(weights, args)
    shares = jnp.full(count, 1 / count) if shares is None else by_example(shares)
    with explained("loss_fn", _WAY_OUT):
        return _directional(precision, as_pytree(loss_fn), params, args, update, shares)


@printable
class CriticalSharpness(NamedTuple):
    """How large a step along an update may be, and the sharpness that says so.

    Attributes:
        sharpness: λ_c = 2/η_c, with its standard error over the examples; NaN where η_c was not found.
        learning_rate: η_c, the least learning rate at which the loss would rise.
        bracket: (2,) the largest rate tried below η_c, 0 if the loss rose in all, and the least above it,
            infinity if in none; twice 0 where the update leads uphill, NaN where the slope is none.
        converged: whether η_c was found, to the tolerance asked for.
        num_evaluations: how many times the loss was evaluated.
    """

    sharpness: Estimate
    learning_rate: Estimate
    bracket: Float[Array, "2"]
    converged: Bool[Array, ""]
    num_evaluations: Int[Array, ""]

    def _table(self) -> Table | str:
        if not (is_known(self) and is_single(self.converged)):
            return by_shapes(self)
        low, high = map(float, self.bracket)
        evaluations = counted(self.num_evaluations, "evaluation")
        if not self.converged:
            return f"critical learning rate not found, between {low:.4g} and {high:.4g} ({evaluations})"
        values = with_error(*self.sharpness[:2]), with_error(*self.learning_rate[:2])
        return "critical sharpness {}, learning rate {} ({})".format(*values, evaluations)


def critical_sharpness(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    update: Vector,
    learning_rate: Any = 1.0,
    weights: Weights | None = None,
    tol: Any = 0.1,
    max_evaluations: int = 40,
    precision: str | None = "highest",
) -> CriticalSharpness:
    """The critical sharpness λ_c = 2/η_c, η_c the least learning rate at which this update raises the loss.

    A line search over steps t along the update from the actual one, t = 1: doubled or halved until the loss
    rises on one side, L(θ + t·u) > L(θ), and not on the other, then halved between; at the end one Newton
    step. With gradient descent on a quadratic loss it is the directional sharpness of the gradient, and at
    most the largest eigenvalue; for other optimizers it is in units of their own rate, and training is at its
    edge where λ_c = 2/η. A rise that comes and goes within a factor of two is not seen.

    Args:
        loss_fn: as in `directional_sharpness`. Another loss than the one trained on tells how far training
            may go before that one rises (relative critical sharpness).
        params: as in `directional_sharpness`.
        *args: as in `directional_sharpness`.
        update: u, like the params: what the optimizer adds to them.
        learning_rate: η that the update was made with: η_c = η·t_c.
        weights: as in `directional_sharpness`.
        tol: the relative width at which the search ends.
        max_evaluations: the most steps to try.
        precision: as in `hessian`.

    Returns:
        A `CriticalSharpness`. It works inside `jit`.

    Raises:
        TypeError, ValueError: as `directional_sharpness`; `tol` is not between 0 and 1, `learning_rate` not
            positive.

    Cost:
        A forward pass for each step tried, five to ten of them, and two or three more; no gradient.

    References:
        Kalra, Gagnon-Audet, Gromov et al. (2026), A scalable measure of loss landscape curvature for
        analyzing the training dynamics of LLMs, arXiv 2601.16979.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, x):
        ...     return jnp.mean(x @ w**2) / 2
        >>> w, x = jnp.ones(2), jnp.array([[1.0, 4.0], [3.0, 4.0]])
        >>> update = -0.1 * jnp.array([2.0, 4.0])  # of gradient descent
        >>> found = hj.dynamics.critical_sharpness(loss_fn, w, x, update=update, learning_rate=0.1)
        >>> print(found)  # gᵀHg / gᵀg = 72/20
        critical sharpness 3.60 ± 0.20, learning rate 0.556 ± 0.028 (8 evaluations)
    """
    _check(loss_fn, params, args, update, precision)
    check_positive("learning_rate", learning_rate)
    check_positive("tol", tol)
    if not isinstance(tol, jax.core.Tracer) and tol >= 1:
        raise ValueError(f"`tol` must be below 1, a relative width, got {tol}.")
    rules = _Search(precision, checked_count("max_evaluations", max_evaluations, 2))
    args, shares, count = of_examples(weights, args)
    shares = jnp.full(count, 1 / count) if shares is None else by_example(shares)
    with explained("loss_fn", _WAY_OUT):
        return _critical(rules, as_pytree(loss_fn), params, args, update, shares, learning_rate, tol)


def _check(loss_fn: Any, params: Any, args: tuple[Any, ...], update: Any, precision: Any) -> None:
    _tree.check_floating(params)
    check_call("loss_fn", loss_fn, args)
    _digests.check_alike(params, args)
    _tree.check_vector(update, params, "update")
    check_precision(precision)


# -- along a line ----------------------------------------------------------------------------------


@compiled(static_argnums=0)
def _directional(
    precision: str | None,
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    update: Vector,
    shares: Float[Array, " n"],
) -> Estimate:
    update = _tree.wide(update)
    direction = _tree.cast_like(_tree.scale(1 / _tree.norm(update), update), params)

    def second(example: tuple[Any, ...]) -> Scalar:
        first = lambda p: jax.jvp(scalar(loss_fn, example), (p,), (direction,))[1]  # noqa: E731
        return jax.jvp(first, (params,), (direction,))[1]

    with at_precision(precision):
        return _mean(shares, _tree.wide(of_each(second, args)))


def _mean(shares: Float[Array, " n"], values: Float[Array, " n"]) -> Estimate:
    """Their mean by shares, with its standard error."""
    found, count = _deviating(shares, values), jnp.sum(shares > 0)
    return Estimate(found.mean, jnp.where(count > 1, _tree.norm(found.deviations), jnp.inf), count)


def _deviating(shares: Float[Array, " n"], values: Float[Array, " n"]) -> Deviating:
    shares = shares.astype(values.dtype)
    mean, n = jnp.sum(weighed(shares, values)), jnp.sum(shares > 0).astype(values.dtype)
    # Σ s²(x − x̄)² is the variance of a weighted mean; with equal shares the factor makes it s²/n.
    return Deviating(mean, weighed(shares, values - mean) * jnp.sqrt(n / jnp.maximum(n - 1, 1)))


@dataclasses.dataclass(frozen=True)
class _Search:
    """The settings of a line search; equal ones share compiled code."""

    precision: str | None
    most: int


class _Bracket(NamedTuple):
    """Steps between which the loss begins to rise.

    Attributes:
        low: the largest step at which it did not rise; 0: none.
        high: the least at which it did; infinite: none.
        step: to be tried next.
        tried: how many were.
    """

    low: Scalar
    high: Scalar
    step: Scalar
    tried: Int[Array, ""]

    def with_rise(self, rises: Bool[Array, ""]) -> "_Bracket":
        """After it was tried whether the loss rises at `step`."""
        low, high = jnp.where(rises, self.low, self.step), jnp.where(rises, self.step, self.high)
        step = jnp.where(high == jnp.inf, 2 * low, (low + high) / 2)
        return _Bracket(low, high, step, self.tried + 1)

    def is_within(self, tol: Scalar) -> Bool[Array, ""]:
        """Whether both ends are known, and near each other."""
        return (self.low > 0) & (self.high < jnp.inf) & (self.high - self.low <= tol * self.high)


@compiled(static_argnums=0)
def _critical(
    rules: _Search,
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    update: Vector,
    shares: Float[Array, " n"],
    learning_rate: Any,
    tol: Any,
) -> CriticalSharpness:
    def losses(step: Scalar) -> Float[Array, " n"]:
        there = _tree.add_scaled(_tree.wide(params), step, update)  # in bfloat16 a small step would be none
        there = _tree.cast_like(there, params)
        return _tree.wide(of_each(lambda example: scalar(loss_fn, example)(there), args))

    with at_precision(rules.precision):
        zero = jnp.zeros((), _tree.accumulator_dtype(params))
        first, falls = jax.jvp(losses, (zero,), (zero + 1,))
        # Uphill no step is short enough, but of a very short one rounding errors may say otherwise.
        downhill = (slope := _mean(shares, falls).mean) < 0
        # Example by example before the mean: the difference of two means would lose its digits.
        rise = lambda step: _mean(shares, losses(step) - first)  # noqa: E731
        one = jnp.ones((), first.dtype)
        tol = jnp.asarray(tol, first.dtype)
        found = jax.lax.while_loop(
            lambda x: downhill & ~x.is_within(tol) & (x.tried < rules.most),
            lambda x: x.with_rise(~(rise(x.step).mean <= 0)),  # NaN is a rise
            _Bracket(0 * one, jnp.inf * one, one, jnp.int32(0)),
        )
        at, slopes = jax.jvp(lambda step: losses(step) - first, (found.step,), (one,))
    inverse, step = _root(found, at, slopes, shares)
    rate, converged = jnp.asarray(learning_rate, one.dtype), downhill & found.is_within(tol)

    def known(estimate: Estimate, unit: Scalar) -> Estimate:
        mean, stderr = (or_nan(converged, unit * x) for x in estimate[:2])
        return Estimate(mean, stderr, estimate.num_samples)

    ends = jnp.where(downhill, rate * jnp.stack([found.low, found.high]), 0 * slope)
    return CriticalSharpness(known(inverse, 2 / rate), known(step, rate), ends, converged, found.tried + 1)


def _root(
    found: _Bracket, rises: Float[Array, " n"], slopes: Float[Array, " n"], shares: Float[Array, " n"]
) -> tuple[Estimate, Estimate]:
    """The inverse of the step at which the mean rise is 0, and the step.

    A rise of −sᵢt + cᵢt²/2 has its root at 2s/c, and the rise and slope of each example at the step that the
    search ended with tell its s and c: a Newton step, and errors that know how well s is known.
    """
    step = found.step
    fall, curve = (_deviating(shares, x) for x in (slopes - 2 * rises / step, (slopes - rises / step) / step))
    count = jnp.sum(shares > 0)
    return ratio_of(curve, fall, count), ratio_of(fall, curve, count)
