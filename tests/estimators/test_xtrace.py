import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def estimate_of(matrix, tests, i, others):
    """What test vector i says with the basis of the others' products: the trace, and the sampled part."""
    d, omega = len(matrix), tests[i]
    Q = basis(matrix, tests[others])
    mu = omega - Q @ (Q.T @ omega)
    rest = d - Q.shape[1]
    sample = rest * (mu @ matrix @ mu) / (mu @ mu) if rest else 0.0
    return np.trace(Q.T @ matrix @ Q) + sample, sample


def basis(matrix, tests):
    left, values, _ = np.linalg.svd(matrix @ tests.T, full_matrices=False)
    return left[:, values > 1e-10 * max(np.linalg.norm(matrix), 1e-300)]


def leave_one_out(matrix, tests):
    """The definition, from scratch: the mean and its standard error."""
    n = len(tests)
    but = lambda *left_out: [k for k in range(n) if k not in left_out]
    estimates, sampled = np.array([estimate_of(matrix, tests, i, but(i)) for i in range(n)]).T
    if n == 1:
        return estimates.mean(), np.inf
    rank = basis(matrix, tests).shape[1]
    is_needed = [basis(matrix, tests[but(j)]).shape[1] < rank for j in range(n)]
    changes = np.zeros((n, n))
    for i, j in itertools.permutations(range(n), 2):
        if is_needed[j]:
            changes[i, j] = estimates[i] - estimate_of(matrix, tests, i, but(i, j))[0]
    variance = oracles.student(n) ** 2 * estimates.var(ddof=1) / n + max(np.sum(changes * changes.T), 0) / (
        n * (n - 1)
    )
    share = oracles.skewness_share(estimates, sampled) if np.ptp(estimates) else 0
    return estimates.mean(), np.sqrt(variance) * (1 + share / 2)


def drawn(like, num):
    draws = [hj.probes.gaussian(jax.random.fold_in(KEY, i), like) for i in range(num)]
    return np.stack([np.asarray(jax.flatten_util.ravel_pytree(v)[0]) for v in draws])


SPECTRA = {
    "decaying": 0.7 ** np.arange(30),
    "indefinite": np.linspace(-2, 3, 30),
    "steep": 10.0 ** -np.arange(30),
    "rank 4": np.r_[3, -2, 1, 0.5, np.zeros(26)],
    "rank 1": np.r_[5.0, np.zeros(29)],
    "zero": np.zeros(30),
    "identity": np.ones(30),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", SPECTRA)
def test_against_the_definition_after_any_number_of_products(x64, name):
    like = oracles.tree_like(30)
    matrix, _ = oracles.symmetric(SPECTRA[name])
    matvec, state = oracles.matvec_of(matrix, like), None
    estimator = hj.estimators.xtrace(20)
    for products in (2, 1, 3, 14, 4):  # the last four are more than the basis holds
        estimate, state = hj.run(estimator, matvec, KEY, like, max_matvecs=products, state=state)
        n = min(int(state.num_matvecs) // 2, 10)
        mean, stderr = leave_one_out(matrix, drawn(like, n))
        assert int(estimate.num_samples) == n
        np.testing.assert_allclose(estimate.mean, mean, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(estimate.stderr, stderr, rtol=1e-8, atol=1e-10)


def test_as_many_test_vectors_as_dimensions_give_the_trace(x64):
    like = oracles.tree_like(8)
    matrix, _ = oracles.symmetric(np.linspace(-1, 2, 8))
    estimate = hj.trace(oracles.matvec_of(matrix, like), KEY, like, 16, estimator=hj.estimators.xtrace)
    np.testing.assert_allclose(estimate.mean, np.trace(matrix), rtol=1e-10)


def test_it_is_unbiased_and_its_error_bars_have_the_right_size(x64):
    like = jnp.zeros(60)
    spectrum = jnp.arange(1.0, 61) ** -2
    matvec = jax.tree_util.Partial(jnp.multiply, spectrum)
    one = lambda key: hj.trace(matvec, key, like, 20, estimator=hj.estimators.xtrace, on_device=True)
    runs = jax.jit(jax.vmap(one))(jax.random.split(KEY, 400))
    error = np.asarray(runs.mean) - float(spectrum.sum())
    assert abs(error.mean()) < 3 * error.std() / 20
    assert 0.92 <= np.mean(np.abs(error) <= 2 * np.asarray(runs.stderr)) <= 0.98


def test_host_and_device_agree_float32_is_near_and_nothing_compiles_anew(x64, compilations):
    like = oracles.tree_like(30)
    A, _ = oracles.symmetric(0.7 ** np.arange(30))
    device = hj.trace(
        oracles.matvec_of(A, like), KEY, like, 20, estimator=hj.estimators.xtrace, on_device=True
    )
    host = hj.trace(oracles.matvec_of(A, like), KEY, like, 20, estimator=hj.estimators.xtrace)
    oracles.close(device, host, rtol=1e-9)
    short = jax.tree.map(jnp.float32, like)
    low = hj.trace(oracles.matvec_of(jnp.float32(A), short), KEY, short, 20, estimator=hj.estimators.xtrace)
    assert abs(float(low.mean) - np.trace(A)) < 4 * float(host.stderr)
    del compilations[:]
    hj.trace(oracles.matvec_of(jnp.float32(2 * A), short), KEY, short, 20, estimator=hj.estimators.xtrace)
    assert not compilations


def test_float32_on_a_spectrum_below_its_precision():
    """Products inside the span but for rounding errors: no NaN, and the trace to float32's precision."""
    spectrum = 10.0 ** -np.arange(30)
    for factor in (1e-12, 1.0, 1e12):
        matvec = jax.tree_util.Partial(jnp.multiply, jnp.float32(factor * spectrum))
        estimate = hj.trace(matvec, KEY, jnp.zeros(30), 40, estimator=hj.estimators.xtrace)
        np.testing.assert_allclose(estimate.mean, factor * spectrum.sum(), rtol=1e-5)


def test_a_networks_trace(x64):
    params, batch = oracles.leaves(), oracles.batch()
    exact = np.trace(oracles.dense_hessian(oracles.loss_fn, params, batch))
    params = oracles.CONTAINERS["nnx State"](params)
    estimate = hj.trace(
        hj.hessian(oracles.loss_fn, params, batch), KEY, params, 20, estimator=hj.estimators.xtrace
    )
    np.testing.assert_allclose(estimate.mean, exact, rtol=1e-9)


def test_mixed_dtypes():
    like = {"half": jnp.zeros(20, jnp.bfloat16), "single": jnp.zeros(20)}
    matvec = jax.tree_util.Partial(lambda v: jax.tree.map(lambda x: 2 * x, v))
    estimate = hj.trace(matvec, KEY, like, 10, estimator=hj.estimators.xtrace)
    assert estimate.mean.dtype == jnp.float32
    np.testing.assert_allclose(estimate.mean, 80, rtol=2e-2)


def test_it_stops_on_a_tolerance(x64):
    matvec = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 101) ** -2)
    estimate = hj.trace(
        matvec, KEY, jnp.zeros(100), 60, tol=hj.relative(1e-2), estimator=hj.estimators.xtrace
    )
    assert float(estimate.stderr) <= 1e-2 * float(estimate.mean)
    assert 20 <= int(estimate.num_samples) < 30


def test_bad_input():
    with pytest.raises(ValueError, match="`num_matvecs` must be at least 2, got 1"):
        hj.estimators.xtrace(1)
    with pytest.raises(ValueError, match="`num_matvecs` must be at most 20, twice the number of parameters"):
        hj.trace(lambda v: v, KEY, jnp.zeros(10), 21, estimator=hj.estimators.xtrace)
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        hj.trace(lambda v: v, KEY, jnp.zeros(10), 0, estimator=hj.estimators.xtrace)


def test_a_full_basis_ends_a_run(x64):
    matvec = oracles.matvec_of(oracles.symmetric(np.linspace(1, 3, 60))[0], jnp.zeros(60))
    _, state = hj.run(hj.estimators.xtrace(10), matvec, KEY, jnp.zeros(60), max_matvecs=50, tol=1e-9)
    assert int(state.num_matvecs) == 10
