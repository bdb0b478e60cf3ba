"""The diagonal of a matvec and its Frobenius norm, from random probes."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hessjax._core import _tree
from hessjax._core._messages import checked_count
from hessjax._core._types import Block, Estimate, Estimator, Key, Matvec, Params, Scalar, Tolerance
from hessjax._run._drivers import Callback
from hessjax._run._estimator import run
from hessjax.estimators import _samples
from hessjax.estimators.probes import Probe, rademacher


class DiagonalState(NamedTuple):
    """The probe under way, and the regression of (Av)_i on v_i in every entry i.

    Attributes:
        key: random key; probe n uses `fold_in(key, n)`.
        probe: the vector to be multiplied next.
        slope: Σ v⊙Av / Σ v⊙v, the estimate of the diagonal.
        weight: Σ v⊙v.
        residual: Σ (Av − slope⊙v)².
        num_samples: number of samples.
    """

    key: Key
    probe: Any
    slope: Any
    weight: Any
    residual: Any
    num_samples: Int[Array, ""]


@functools.lru_cache(maxsize=64)
def hutchinson_diagonal(probe: Probe = rademacher) -> Estimator:
    """The diagonal as Σ v⊙Av / Σ v⊙v over random v.

    (Av)_i = a_ii·v_i + noise from the row's other entries, so this is the slope of a regression through the
    origin, and its standard error is √(Σ (Av − slope⊙v)² / ((n − 1)·Σ v⊙v)). With signs v⊙v = 1: a mean
    and its standard error, and the variance of one sample of entry i is Σ_{j≠i} a_ij².

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate`, `mean` and `stderr` trees like the params (at least float32).
        Its error is the 2-norm of `stderr` over all entries (infinite before 20 samples), the scale of a
        relative tolerance the 2-norm of `mean`.

    Cost:
        One product a sample; memory 5·d: probe, product, and three numbers for every parameter.

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

    def init(key: Key, like: Params) -> DiagonalState:
        zeros = jax.tree.map(jnp.zeros_like, _tree.wide(like))
        return DiagonalState(key, probe(jax.random.fold_in(key, 0), like), zeros, zeros, zeros, jnp.int32(0))

    def query(state: DiagonalState) -> Block:
        return jax.tree.map(lambda x: x[None], state.probe)

    def update(state: DiagonalState, products: Block) -> DiagonalState:
        count = state.num_samples + 1
        following = probe(jax.random.fold_in(state.key, count), state.probe)
        weight = jax.tree.map(lambda w, v: w + v**2, state.weight, state.probe)
        # The share of the weight that is new; an entry that no probe has touched has none.
        gain = jax.tree.map(lambda w, v: v / jnp.where(w > 0, w, 1), weight, state.probe)
        surprise = jax.tree.map(lambda y, s, v: y - s * v, _tree.row(products, 0), state.slope, state.probe)
        slope = jax.tree.map(lambda s, g, e: s + g * e, state.slope, gain, surprise)
        residual = jax.tree.map(
            lambda r, e, g, v: r + e**2 * (1 - g * v), state.residual, surprise, gain, state.probe
        )
        return DiagonalState(state.key, following, slope, weight, residual, count)

    def result(state: DiagonalState) -> Estimate:
        n = state.num_samples
        mean = jax.tree.map(lambda s: jnp.where(n > 0, s, jnp.nan), state.slope)
        stderr = jax.tree.map(
            lambda r, w: jnp.where(
                n > 1, jnp.sqrt(r / (jnp.maximum(n - 1, 1) * jnp.where(w > 0, w, 1))), jnp.inf
            ),
            state.residual,
            state.weight,
        )
        return Estimate(mean, stderr, n)

    def error(state: DiagonalState) -> Scalar:
        return _samples.stopping_error(_tree.norm(result(state).stderr), state.num_samples)

    def scale(state: DiagonalState) -> Scalar:
        return _tree.norm(state.slope)

    return Estimator(init, query, update, result, error, scale)


def diagonal(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
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
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        `Estimate(mean, stderr, num_samples)`: two trees like the params, in loss per squared parameter.

    Raises:
        ValueError: `num_probes` below 1.
        NonFiniteProductError: see `run`.

    Cost:
        At most `num_probes` products; memory 5·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "scale": -v["scale"]})
        >>> like = {"bias": jnp.zeros(2), "scale": jnp.zeros(())}
        >>> jax.tree.map(lambda x: x.tolist(), hj.diagonal(A, jax.random.key(0), like, num_probes=2).mean)
        {'bias': [2.0, 2.0], 'scale': -1.0}
    """
    num_probes = checked_count("num_probes", num_probes)
    return run(
        hutchinson_diagonal(probe),
        matvec,
        key,
        like,
        max_matvecs=num_probes,
        tol=tol,
        callbacks=callbacks,
        on_device=on_device,
    )[0]


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
    samples: _samples.Moments


@functools.lru_cache(maxsize=64)
def hutchinson_frobenius(probe: Probe = rademacher) -> Estimator:
    """The Frobenius norm: E‖Av‖² = ‖A‖²_F = Σ λᵢ² over random v, and the root of the mean.

    The standard error of the norm is that of the square over twice the norm (the delta method). The root of
    a mean is low by about stderr²/(2·norm), far less than the standard error.

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate` (units of A's entries) and error its `stderr` (infinite before
        20 samples).

    Cost:
        One product a sample; memory 2·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 4.0]))
        >>> norm, _ = hj.run(hj.estimators.hutchinson_frobenius(), A, jax.random.key(0), jnp.zeros(2),
        ...     max_matvecs=2)
        >>> float(norm.mean)
        5.0
    """

    def init(key: Key, like: Params) -> FrobeniusState:
        zero = jnp.zeros((), _tree.accumulator_dtype(like))
        return FrobeniusState(key, probe(jax.random.fold_in(key, 0), like), zero, _samples.no_samples(zero))

    def query(state: FrobeniusState) -> Block:
        return jax.tree.map(lambda x: x[None], state.probe)

    def update(state: FrobeniusState, products: Block) -> FrobeniusState:
        norm = _tree.norm(_tree.row(products, 0))
        unit = jnp.where(state.unit > 0, state.unit, norm)
        samples = _samples.push(state.samples, (norm / jnp.where(unit > 0, unit, 1)) ** 2)
        following = probe(jax.random.fold_in(state.key, samples.num_samples), state.probe)
        return FrobeniusState(state.key, following, unit, samples)

    def result(state: FrobeniusState) -> Estimate:
        square = _samples.estimate(state.samples)
        norm = jnp.sqrt(square.mean)
        stderr = square.stderr / jnp.where(norm > 0, 2 * norm, 1)
        return square._replace(mean=_in(state.unit, norm), stderr=_in(state.unit, stderr))

    def error(state: FrobeniusState) -> Scalar:
        return _samples.stopping_error(result(state).stderr, state.samples.num_samples)

    def scale(state: FrobeniusState) -> Scalar:
        return state.unit * jnp.sqrt(state.samples.mean)

    return Estimator(init, query, update, result, error, scale)


def _in(unit: Scalar, number: Scalar) -> Scalar:
    """The number in units that are 0 only while every product was: infinities stay what they are."""
    return jnp.where(jnp.isfinite(number), unit * number, number)


def frobenius_norm(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
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
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        `Estimate(mean, stderr, num_samples)` of the norm (not of its square), in loss per squared
        parameter.

    Raises:
        ValueError: `num_probes` below 1.
        NonFiniteProductError: see `run`.

    Cost:
        At most `num_probes` products; memory 2·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 4.0]))
        >>> float(hj.frobenius_norm(A, jax.random.key(0), jnp.zeros(2), num_probes=2).mean)
        5.0
    """
    num_probes = checked_count("num_probes", num_probes)
    return run(
        hutchinson_frobenius(probe),
        matvec,
        key,
        like,
        max_matvecs=num_probes,
        tol=tol,
        callbacks=callbacks,
        on_device=on_device,
    )[0]
