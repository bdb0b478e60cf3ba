import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats

import hessjax as hj
from hessjax.estimators import _moments

KEY = jax.random.key(0)
RUNS = 1000

SPECTRA = {
    "flat": np.linspace(1, 3, 60),
    "power law": np.arange(1.0, 61) ** -2,
    "geometric": 0.7 ** np.arange(60),
    "step": np.where(np.arange(60) < 10, 1, 1e-3),
}
"""Multiplied by Gaussian probes, which see no axes: the eigenvectors are immaterial."""


def gaussian(make, budget):
    return functools.partial(make, probe=hj.probes.gaussian)(budget)


MADE = {
    "Hutchinson": lambda budget: hj.estimators.hutchinson(hj.probes.gaussian),
    "Hutch++": functools.partial(gaussian, hj.estimators.hutchpp),
    "XTrace": hj.estimators.xtrace,
}


@pytest.mark.parametrize("budget", [10, 30])
@pytest.mark.parametrize("method", MADE)
def test_two_errors_hold_the_trace_in_about_95_percent_of_runs(x64, method, budget):
    spectra = jnp.asarray(list(SPECTRA.values()))

    def one(key, spectrum):
        matvec = jax.tree_util.Partial(jnp.multiply, spectrum)
        return hj.trace(matvec, key, spectrum, budget, estimator=MADE[method], on_device=True)

    runs = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(jax.random.split(KEY, RUNS), spectra)
    covered = np.abs(runs.mean - spectra.sum(axis=1)[:, None]) <= 2 * runs.stderr
    shares = dict(zip(SPECTRA, np.mean(covered, axis=1), strict=True))
    assert all(0.92 <= share <= 0.985 for share in shares.values()), shares


@pytest.mark.parametrize("num_probes", [1, 3])
def test_two_errors_of_a_probe_hold_the_trace_of_a_function(x64, num_probes):
    """By the quadrature that a probe has after all its steps: the eigenvalues, and its squared components."""
    spectra = jnp.asarray(list(SPECTRA.values()))

    def one(key, spectrum):
        weights = jax.random.normal(key, (num_probes, 60)) ** 2
        nodes, count = jnp.broadcast_to(spectrum, weights.shape), jnp.int32(num_probes)
        weights /= weights.sum(axis=1, keepdims=True)
        return hj.SpectralDensity(
            nodes, weights, count, 60 * count, jnp.asarray(60.0, spectrum.dtype)
        ).trace_of(lambda x: x)

    runs = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(jax.random.split(KEY, RUNS), spectra)
    covered = np.abs(runs.mean - spectra.sum(axis=1)[:, None]) <= 2 * runs.stderr
    shares = dict(zip(SPECTRA, np.mean(covered, axis=1), strict=True))
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares


def test_the_factor_of_few_samples_is_students(x64):
    for n in (2, 3, 5, 10, 30, 1000):
        want = scipy.stats.t.ppf(scipy.stats.norm.cdf(2), n - 1) / 2
        np.testing.assert_allclose(_moments.students_factor(n, np.float64), want, rtol=1e-4)
        assert oracles.student(n) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_moments_one_by_one_are_those_of_all_samples(x64, scale):
    samples = scale * np.random.default_rng(0).gamma(0.5, size=(12, 3))
    moments = _moments.no_samples(jnp.zeros(3))
    for sample in samples:
        moments = _moments.push(moments, jnp.asarray(sample))
    estimate = _moments.estimate(moments)
    np.testing.assert_allclose(estimate.mean, samples.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(estimate.stderr, oracles.standard_error(samples / scale) * scale, rtol=1e-10)
    column = jnp.asarray(samples[:, 0])
    together = _moments.moments_of(column, jnp.ones(12, bool), jnp.int32(12))
    np.testing.assert_allclose(_moments.estimate(together).stderr, estimate.stderr[0], rtol=1e-10)


def test_samples_without_spread_have_no_error():
    moments = _moments.no_samples(jnp.zeros(2))
    for _ in range(3):
        moments = _moments.push(moments, jnp.array([0.0, 7.0]))
    assert _moments.estimate(moments).stderr.tolist() == [0, 0]
