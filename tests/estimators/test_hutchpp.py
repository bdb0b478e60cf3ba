import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def probes(like, start, stop, probe=hj.probes.rademacher):
    draws = [probe(jax.random.fold_in(KEY, i), like) for i in range(start, stop)]
    return np.stack([np.asarray(jax.flatten_util.ravel_pytree(v)[0]) for v in draws], axis=1)


@pytest.mark.smoke
@pytest.mark.parametrize("spectrum", [0.8 ** np.arange(30), np.linspace(-2, 3, 30)])
def test_against_the_dense_algorithm_after_any_number_of_products(x64, spectrum):
    like = oracles.tree_like(30)
    A, _ = oracles.symmetric(spectrum)
    matvec, state, estimator = oracles.matvec_of(A, like), None, hj.estimators.hutchpp(20)
    Q, _ = np.linalg.qr(A @ probes(like, 0, 6))
    rest = probes(like, 12, 24)
    rest = rest - Q @ (Q.T @ rest)
    samples = np.einsum("ik,ij,jk->k", rest, A, rest)
    for products, done in ((5, 5), (7, 12), (1, 13), (1, 14), (10, 24)):  # the last are beyond the 20
        estimate, state = hj.run(estimator, matvec, KEY, like, max_matvecs=products, state=state)
        n = max(done - 12, 0)
        assert int(estimate.num_samples) == n
        want = np.trace(Q.T @ A @ Q) + samples[:n].mean() if n else np.nan
        np.testing.assert_allclose(estimate.mean, want, rtol=1e-9)
        stderr = oracles.standard_error(samples[:n]) if n > 1 else np.inf
        np.testing.assert_allclose(estimate.stderr, stderr, rtol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_matrix_of_low_rank_is_met_exactly(x64, rank):
    like = oracles.tree_like(30)
    A, _ = oracles.symmetric(np.r_[3, -2, 1, 0.5, np.zeros(26)] * (np.arange(30) < rank))
    estimate = hj.trace(oracles.matvec_of(A, like), KEY, like, 20, estimator=hj.estimators.hutchpp)
    np.testing.assert_allclose(estimate.mean, np.trace(A), atol=1e-12)
    assert float(estimate.stderr) < 1e-12


def test_error_bars_cover_the_truth(x64):
    """±2 standard errors from 20 samples of the rest: 93 to 95 % by Student's distribution."""
    like = jnp.zeros(61)  # with a product for every parameter the trace would be exact
    A, _ = oracles.symmetric(0.95 ** np.arange(61))
    run = functools.partial(hj.trace, num_probes=60, estimator=hj.estimators.hutchpp, on_device=True)
    runs = jax.jit(jax.vmap(lambda key: run(oracles.matvec_of(A, like), key, like)))(
        jax.random.split(KEY, 300)
    )
    covered = np.abs(np.asarray(runs.mean) - np.trace(A)) <= 2 * np.asarray(runs.stderr)
    assert 0.90 <= covered.mean() <= 0.98


def test_it_runs_on_the_device_in_float32_and_compiles_once(x64, compilations):
    like = oracles.tree_like(30)
    A, _ = oracles.symmetric(0.8 ** np.arange(30))
    want = hj.trace(
        oracles.matvec_of(A, like), KEY, like, 15, estimator=hj.estimators.hutchpp, on_device=True
    )
    host = hj.trace(oracles.matvec_of(A, like), KEY, like, 15, estimator=hj.estimators.hutchpp)
    oracles.close(want, host, rtol=1e-10)
    short = jax.tree.map(jnp.float32, like)
    low = hj.trace(oracles.matvec_of(jnp.float32(A), short), KEY, short, 15, estimator=hj.estimators.hutchpp)
    assert abs(float(low.mean) - np.trace(A)) < 4 * float(want.stderr)
    del compilations[:]
    hj.trace(oracles.matvec_of(jnp.float32(2 * A), short), KEY, short, 15, estimator=hj.estimators.hutchpp)
    assert not compilations


def test_bad_input():
    with pytest.raises(ValueError, match="`num_matvecs` must be at least 3, got 2"):
        hj.estimators.hutchpp(2)
    with pytest.raises(ValueError, match="`num_matvecs` must be at most 30, three times the number of param"):
        hj.trace(lambda v: v, KEY, jnp.zeros(10), 31, estimator=hj.estimators.hutchpp)
    with pytest.raises(ValueError, match="`probe` must be left out with `estimator`"):
        hj.trace(
            lambda v: v, KEY, jnp.zeros(10), 9, estimator=hj.estimators.hutchpp, probe=hj.probes.gaussian
        )


@pytest.mark.parametrize(
    "diagonal", [[3.0], [1.0, -2.0], [0.0, 0.0], [1.0, -2.0, 3.0], [1.0, -1.0, 0.0, 0.0]]
)
def test_an_error_of_zero_only_where_the_trace_is_exact(diagonal):
    """Few signs are often the same, and equal samples of a matrix that small say nothing."""
    d = len(diagonal)
    A, _ = oracles.symmetric(diagonal)
    matvec = oracles.matvec_of(jnp.float32(A), jnp.zeros(d))
    for num_matvecs in range(max(d, 3), 3 * d + 1):
        state, method = None, hj.estimators.hutchpp(num_matvecs)
        for products in (d - 1, 1, num_matvecs - d):
            if products:
                estimate, state = hj.run(method, matvec, KEY, jnp.zeros(d), max_matvecs=products, state=state)
        np.testing.assert_allclose(estimate.mean, sum(diagonal), atol=1e-5)
        assert float(estimate.stderr) == 0
