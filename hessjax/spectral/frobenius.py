"""The Frobenius norm of a matvec: how large all eigenvalues are together."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._numbers import checked_count
from hessjax._typing import Block, Estimate, Estimator, Key, Matvec, Params, Scalar, Tolerance
from hessjax.estimator import run
from hessjax.spectral import moments
from hessjax.spectral.probes import Probe, rademacher


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
    samples: moments.Moments


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
        >>> norm, _ = hj.run(hj.hutchinson_frobenius(), A, jax.random.key(0), jnp.zeros(2), max_matvecs=2)
        >>> float(norm.mean)
        5.0
    """

    def init(key: Key, like: Params) -> FrobeniusState:
        zero = jnp.zeros((), _tree.accumulator_dtype(like))
        return FrobeniusState(key, probe(jax.random.fold_in(key, 0), like), zero, moments.no_samples(zero))

    def query(state: FrobeniusState) -> Block:
        return jax.tree.map(lambda x: x[None], state.probe)

    def update(state: FrobeniusState, products: Block) -> FrobeniusState:
        norm = _tree.norm(_tree.row(products, 0))
        unit = jnp.where(state.unit > 0, state.unit, norm)
        samples = moments.push(state.samples, (norm / jnp.where(unit > 0, unit, 1)) ** 2)
        following = probe(jax.random.fold_in(state.key, samples.num_samples), state.probe)
        return FrobeniusState(state.key, following, unit, samples)

    def result(state: FrobeniusState) -> Estimate:
        square = moments.estimate(state.samples)
        norm = jnp.sqrt(square.mean)
        stderr = square.stderr / jnp.where(norm > 0, 2 * norm, 1)
        return square._replace(mean=_in(state.unit, norm), stderr=_in(state.unit, stderr))

    def error(state: FrobeniusState) -> Scalar:
        return moments.stopping_error(result(state).stderr, state.samples.num_samples)

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
