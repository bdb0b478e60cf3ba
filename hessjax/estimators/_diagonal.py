"""The diagonal of a matvec and its Frobenius norm, from random probes."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._messages import checked_count
from hessjax._core._results import Estimate
from hessjax._core._types import Block, Key, Matvec, Params, Scalar, Tolerance, readable_defaults, settings
from hessjax._run._arguments import RunOptions, checked_options
from hessjax._run._drivers import run
from hessjax.estimators._moments import (
    Moments,
    estimate,
    longer,
    no_samples,
    push,
    stopping_error,
    students_factor,
)
from hessjax.estimators._samples import Sampling
from hessjax.estimators.probes import Probe, rademacher


class DiagonalState(NamedTuple):
    """The probe under way, and the regression of (Av)_i on v_i in every entry i.

    Attributes:
        key: random key; probe n uses `fold_in(key, n)`.
        probe: the vector to be multiplied next.
        slope: Σ v⊙Av / Σ v⊙v, the estimate of the diagonal.
        weight: Σ v⊙v.
        residual: √Σ (Av − slope⊙v)²; the sum itself may leave float32.
        num_samples: number of samples.
    """

    key: Key
    probe: Any
    slope: Any
    weight: Any
    residual: Any
    num_samples: Int[Array, ""]


@settings()
class HutchinsonDiagonal(Sampling):
    """The diagonal as Σ v⊙Av / Σ v⊙v over random v.

    (Av)_i = a_ii·v_i + noise from the row's other entries, so this is the slope of a regression through the
    origin, and its standard error is √(Σ (Av − slope⊙v)² / ((n − 1)·Σ v⊙v)), times Student's factor where
    samples are few (see `hutchinson`). With signs v⊙v = 1: a mean and its standard error, and the variance of
    one sample of entry i is Σ_{j≠i} a_ij².
    Few samples of few parameters are often all equal, with an error of 0: see `hutchinson`.

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate`, `mean` and `stderr` trees like the params (at least float32).
        Its error is the 2-norm of `stderr` over all entries (infinite before 20 samples), the scale of a
        relative tolerance the 2-norm of `mean`.

    Cost:
        One product a sample; memory 7·d: three numbers for every parameter, old and new, and the probe.

    References:
        Bekas, Kokiopoulou & Saad (2007), An estimator for the diagonal of a matrix.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: jnp.arange(3.0) * v)
        >>> estimator = hj.estimators.hutchinson_diagonal()
        >>> hj.run(estimator, A, jax.random.key(0), jnp.zeros(3), max_matvecs=2)[0].mean.tolist()
        [0.0, 1.0, 2.0]
    """

    def init(self, key: Key, like: Params) -> DiagonalState:
        """The first probe, and an empty regression."""
        zeros = _tree.zeros_like(_tree.wide(like))
        return DiagonalState(key, self.draw(key, 0, like), zeros, zeros, zeros, jnp.int32(0))

    def update(self, state: DiagonalState, products: Block) -> DiagonalState:
        """One observation more in the regression of every entry, and the next probe."""
        # Recursive least squares with one regressor: as Welford's update, no large squares are subtracted.
        count = state.num_samples + 1
        weight = jax.tree.map(lambda w, v: w + v**2, state.weight, state.probe)
        # The share of the weight that is new; an entry that no probe has touched has none.
        gain = jax.tree.map(lambda w, v: v / jnp.where(w > 0, w, 1), weight, state.probe)
        # How far the product is from what the slope so far predicts.
        surprise = jax.tree.map(lambda y, s, v: y - s * v, _tree.row(products, 0), state.slope, state.probe)
        slope = jax.tree.map(lambda s, g, e: s + g * e, state.slope, gain, surprise)
        residual = jax.tree.map(_longer, state.residual, surprise, gain, state.probe)
        following = self.draw(state.key, count, state.probe)
        return DiagonalState(state.key, following, slope, weight, residual, count)

    def result(self, state: DiagonalState) -> Estimate:
        """The slopes and their standard errors."""
        n = state.num_samples
        mean = jax.tree.map(lambda s: _numbers.or_nan(n > 0, s), state.slope)
        stderr = jax.tree.map(lambda r, w: _slope_error(r, w, n), state.residual, state.weight)
        return Estimate(mean, stderr, n)

    def error(self, state: DiagonalState) -> Scalar:
        """The 2-norm of the standard errors."""
        return stopping_error(_tree.norm(self.result(state).stderr), state.num_samples)

    def scale(self, state: DiagonalState) -> Scalar:
        """The 2-norm of the diagonal."""
        return _tree.norm(state.slope)


def _longer(
    residual: Float[Array, "..."],
    surprise: Float[Array, "..."],
    gain: Float[Array, "..."],
    probe: Float[Array, "..."],
) -> Float[Array, "..."]:
    """With what the slope's own move leaves of a surprise."""
    # 1 − v²/Σv² is 0 at the first probe that touches an entry, up to rounding of either sign.
    return longer(residual, surprise * jnp.sqrt(jnp.maximum(1 - gain * probe, 0)))


def _slope_error(
    residual: Float[Array, "..."], weight: Float[Array, "..."], n: Int[Array, ""]
) -> Float[Array, "..."]:
    """√(Σ (Av − slope⊙v)² / ((n − 1)·Σ v⊙v)) by Student's factor, infinite with fewer than two samples."""
    lengths = jnp.sqrt(jnp.maximum(n - 1, 1).astype(weight.dtype) * jnp.where(weight > 0, weight, 1))
    # Not widened for skewness: an entry's samples are sums of products of signs, which have none.
    return jnp.where(n > 1, students_factor(n, weight.dtype) * residual / lengths, jnp.inf)


hutchinson_diagonal = HutchinsonDiagonal


@readable_defaults
def diagonal(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    **options: Unpack[RunOptions],
) -> Estimate:
    """The diagonal of a matvec, with a standard error for every entry.

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: the most samples to take, one product each.
        tol: stop when the 2-norm of all standard errors is at most this: absolute, or `relative` to the
            2-norm of the diagonal. A run takes 20 samples before it stops.
        probe: see `hutchinson_diagonal`.
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        `Estimate(mean, stderr, num_samples)`: two trees like the params, in loss per squared parameter.

    Raises:
        ValueError: `num_probes` below 1.
        NonFiniteProductError: see `run`.

    Cost:
        At most `num_probes` products; memory 7·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "scale": -v["scale"]})
        >>> like = {"bias": jnp.zeros(2), "scale": jnp.zeros(())}
        >>> jax.tree.map(lambda x: x.tolist(), hj.diagonal(A, jax.random.key(0), like, num_probes=2).mean)
        {'bias': [2.0, 2.0], 'scale': -1.0}
    """
    checked = checked_options("diagonal", options)
    num_probes = checked_count("num_probes", num_probes)
    return run(hutchinson_diagonal(probe), matvec, key, like, max_matvecs=num_probes, tol=tol, **checked)[0]


class FrobeniusState(NamedTuple):
    """The probe under way, and the moments of the samples ‖Av‖².

    Attributes:
        key: random key; sample i uses `fold_in(key, i)`.
        probe: the vector to be multiplied next.
        unit: the first ‖Av‖; squares of their squares would leave float32.
        samples: moments of ‖Av‖² in that unit.
    """

    key: Key
    probe: Any
    unit: Scalar
    samples: Moments


@settings()
class HutchinsonFrobenius(Sampling):
    """The Frobenius norm: E‖Av‖² = ‖A‖²_F = Σ λᵢ² over random v, and the root of the mean.

    The standard error of the norm is that of the square over twice the norm (the delta method), widened as
    `hutchinson` says. The root of a mean is low by about stderr²/(2·norm), far less than the standard error.
    Few samples of few parameters are often all equal, with an error of 0: see `hutchinson`.

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate` (units of A's entries) and error its `stderr` (infinite before
        20 samples).

    Cost:
        One product a sample; memory 3·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 4.0]))
        >>> norm, _ = hj.run(hj.estimators.hutchinson_frobenius(), A, jax.random.key(0), jnp.zeros(2),
        ...     max_matvecs=2)
        >>> float(norm.mean)
        5.0
    """

    def init(self, key: Key, like: Params) -> FrobeniusState:
        """The first probe, and no samples."""
        zero = jnp.zeros((), _tree.accumulator_dtype(like))
        return FrobeniusState(key, self.draw(key, 0, like), zero, no_samples(zero))

    def update(self, state: FrobeniusState, products: Block) -> FrobeniusState:
        """One sample ‖Av‖² more, and the next probe."""
        norm = _tree.norm(_tree.row(products, 0))
        # In units of the first norm: the moments are fourth powers of A's entries, which leave float32.
        unit = jnp.where(state.unit > 0, state.unit, norm)
        samples = push(state.samples, (norm / jnp.where(unit > 0, unit, 1)) ** 2)
        following = self.draw(state.key, samples.num_samples, state.probe)
        return FrobeniusState(state.key, following, unit, samples)

    def result(self, state: FrobeniusState) -> Estimate:
        """The norm and its standard error."""
        square = estimate(state.samples)
        norm = jnp.sqrt(square.mean)
        # Delta method: d√x = dx / (2√x).
        stderr = square.stderr / jnp.where(norm > 0, 2 * norm, 1)
        return square._replace(mean=_in(state.unit, norm), stderr=_in(state.unit, stderr))

    def error(self, state: FrobeniusState) -> Scalar:
        """The standard error of the norm."""
        return stopping_error(self.result(state).stderr, state.samples.num_samples)

    def scale(self, state: FrobeniusState) -> Scalar:
        """The norm."""
        return state.unit * jnp.sqrt(state.samples.mean)


hutchinson_frobenius = HutchinsonFrobenius


def _in(unit: Scalar, number: Scalar) -> Scalar:
    """The number in units that are 0 only while every product was: infinities stay what they are."""
    return jnp.where(jnp.isfinite(number), unit * number, number)


@readable_defaults
def frobenius_norm(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    **options: Unpack[RunOptions],
) -> Estimate:
    """The Frobenius norm ‖A‖_F = √(Σ λᵢ²) of a matvec, with its standard error.

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: the most samples to take, one product each.
        tol: stop when the standard error is at most this: absolute, or `relative` to the norm. A run takes
            20 samples before it stops.
        probe: see `hutchinson_frobenius`.
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        `Estimate(mean, stderr, num_samples)` of the norm (not of its square), in loss per squared
        parameter.

    Raises:
        ValueError: `num_probes` below 1.
        NonFiniteProductError: see `run`.

    Cost:
        At most `num_probes` products; memory 3·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 4.0]))
        >>> float(hj.frobenius_norm(A, jax.random.key(0), jnp.zeros(2), num_probes=2).mean)
        5.0
    """
    checked = checked_options("frobenius_norm", options)
    num_probes = checked_count("num_probes", num_probes)
    return run(hutchinson_frobenius(probe), matvec, key, like, max_matvecs=num_probes, tol=tol, **checked)[0]
