"""Matrices of one, two and three parameters, few products: what error bars and residuals then say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

STEPS, KEYS = 6, jax.random.split(jax.random.key(7), 30)
SIGNS, GAUSSIAN = hj.probes.rademacher, hj.probes.gaussian
est = hj.estimators


def matrices(n):
    rng = np.random.default_rng(n)
    v, r = rng.normal(size=n), rng.normal(size=(n, n))
    indefinite = np.diag([1.0, -2.0, 0.5][:n])
    some = [
        np.zeros((n, n)),
        np.eye(n),
        np.outer(v, v),
        np.ones((n, n)),
        indefinite,
        np.eye(n)[::-1],
        r + r.T,
    ]
    return np.stack(some).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, None))
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def trajectory(estimator, A, key):
    """Vectors, products and the result after every step."""

    def step(state, _):
        vectors = estimator.query(state)
        products = vectors @ A
        state = estimator.update(state, products)
        return state, (vectors, products, estimator.result(state))

    return jax.lax.scan(step, estimator.init(key, jnp.zeros(A.shape[0])), None, STEPS)[1]


def results(estimator, n):
    A = matrices(n)
    return A, *jax.tree.map(np.asarray, trajectory(estimator, A, KEYS))


def per_parameter(x):
    return x.reshape(*x.shape[:3], -1)


def check_bars(got, want, samples, covered=0.95):
    """An error of 0 only where the value is exact, or samples all agree; else 4 errors hold the truth."""
    mean, stderr = per_parameter(got.mean), per_parameter(got.stderr)
    assert not np.isnan(stderr).any()
    none = np.broadcast_to((got.num_samples == 0)[..., None], mean.shape)
    np.testing.assert_array_equal(np.isnan(mean), none)
    off, tiny = np.abs(mean - want), 1e-5 * (1 + np.abs(want))
    silent = (stderr <= tiny / 10) & (off > tiny)
    if samples is None:
        assert not silent.any()
    else:
        low, high = np.minimum.accumulate(samples, 2), np.maximum.accumulate(samples, 2)
        assert (high - low)[silent].max(initial=0) < 1e-5
    many = np.broadcast_to((got.num_samples > 3)[..., None], off.shape)
    if many.any():
        assert np.mean((off <= 4 * stderr + tiny)[many]) >= covered


TRACES = [(est.hutchinson(SIGNS), n) for n in (1, 2, 3)] + [(est.hutchinson(GAUSSIAN), 3)]
TRACES += [(est.hutchpp(k), n) for k, n in ((3, 1), (3, 2), (6, 2), (4, 3), (6, 3))]
TRACES += [(est.xtrace(k), n) for k, n in ((2, 1), (2, 2), (4, 2), (4, 3), (6, 3))]


def name(setting):
    return str(setting) if isinstance(setting, int) else type(setting).__name__


@pytest.mark.parametrize(("estimator", "n"), TRACES, ids=name)
def test_traces(estimator, n):
    A, vectors, products, got = results(estimator, n)
    forms = (vectors * products).sum(-1)
    want = np.trace(A, axis1=1, axis2=2)[:, None, None, None]
    # Of what has rank 1, Gaussian samples are χ² with one degree of freedom: skewed.
    check_bars(got, want, forms if isinstance(estimator, est.hutchinson) else None, covered=0.93)


@pytest.mark.parametrize(("probe", "n"), [(SIGNS, 1), (SIGNS, 2), (SIGNS, 3), (GAUSSIAN, 3)])
def test_diagonals_and_norms(probe, n):
    A, vectors, products, got = results(est.hutchinson_diagonal(probe), n)
    diagonal = np.diagonal(A, axis1=1, axis2=2)[:, None, None]
    check_bars(got, diagonal, (products / vectors)[..., 0, :])
    A, _, products, got = results(est.hutchinson_frobenius(probe), n)
    squares = np.sum(products**2, axis=-1)
    check_bars(got, np.linalg.norm(A, axis=(1, 2))[:, None, None, None], squares, covered=0.93)


@pytest.mark.parametrize(("num_probes", "num_matvecs"), [(6, 1), (3, 2), (2, 3)])
def test_one_node_tells_no_variance(num_probes, num_matvecs):
    """Its deviation from itself is 0, whatever the matrix."""
    for n in (1, 3) if num_matvecs == 1 else (3,):
        A, _, _, density = results(est.slq(num_probes, num_matvecs), n)
        traces, norms = sums(density)
        for got, want in (
            (traces, np.trace(A, axis1=1, axis2=2)),
            (norms, np.linalg.norm(A, axis=(1, 2))),
        ):
            off = np.abs(got.mean - want[:, None, None])
            assert not np.isnan(got.stderr).any()
            assert (off < 1e-4)[got.stderr < 1e-6].all()
            one_node = (num_matvecs == 1) | (np.arange(STEPS) == 0)
            np.testing.assert_array_equal(
                np.isinf(got.stderr), np.broadcast_to(one_node & (n > 1), off.shape)
            )


@jax.jit
@jax.vmap
@jax.vmap
@jax.vmap
def sums(density):
    return density.trace_of(lambda x: x), density.schatten_norm(2.0)


PAIRS = [est.power_iteration(1), est.lanczos(1, "magnitude"), est.lanczos(1, "both", block_size=2)]


@pytest.mark.parametrize("estimator", PAIRS, ids=name)
def test_residuals_are_those_of_the_pairs(estimator):
    A, _, _, pairs = results(estimator, 2)
    found = ~np.isnan(pairs.values)
    product = np.einsum("mskvi,mij->mskvj", pairs.vectors, A)
    residuals = np.linalg.norm(product - pairs.values[..., None] * pairs.vectors, axis=-1)
    np.testing.assert_allclose(pairs.residuals[found], residuals[found], atol=1e-4)
    # An eigenvalue lies within the residual of every Ritz value.
    distances = np.abs(pairs.values[..., None] - np.linalg.eigvalsh(A)[:, None, None, None]).min(-1)
    assert (distances <= pairs.residuals + 1e-4)[found].all()
    assert found[:, :, 1:].all()
