import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def problem(d=30):
    like = oracles.tree_like(d)
    matrix, _ = oracles.symmetric(np.linspace(-1, 3, d))
    return oracles.matvec_of(matrix, like), like, matrix


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


@pytest.mark.smoke
@pytest.mark.parametrize("probe", [hj.probes.rademacher, hj.probes.gaussian])
def test_mean_and_stderr_are_those_of_the_samples(x64, probe):
    matvec, like, matrix = problem()
    estimate = hj.diagonal(matvec, KEY, like, 25, probe=probe)
    V = np.stack([flat(probe(jax.random.fold_in(KEY, i), like)) for i in range(25)])
    mean = np.sum(V * (V @ matrix), axis=0) / np.sum(V**2, axis=0)
    rest = V @ matrix - mean * V
    np.testing.assert_allclose(flat(estimate.mean), mean, rtol=1e-10)
    stderr = oracles.student(25) * np.sqrt(np.sum(rest**2, axis=0) / 24 / np.sum(V**2, axis=0))
    np.testing.assert_allclose(flat(estimate.stderr), stderr, rtol=1e-10)
    if probe is hj.probes.rademacher:  # then it is the plain mean and its standard error
        samples = V * (V @ matrix)
        stderr = oracles.student(25) * samples.std(axis=0, ddof=1) / 5
        np.testing.assert_allclose(flat(estimate.stderr), stderr, rtol=1e-10)
    assert jax.tree.structure(estimate.mean) == jax.tree.structure(like)
    assert int(estimate.num_samples) == 25


def test_the_variance_is_the_one_of_the_formula(x64):
    """Var of one sample of entry i with signs: Σ_{j≠i} a_ij²."""
    matvec, like, matrix = problem()
    estimate = hj.diagonal(matvec, KEY, like, 4000, on_device=True)
    off_diagonal = np.sum(matrix**2, axis=1) - np.diag(matrix) ** 2
    np.testing.assert_allclose(flat(estimate.stderr), np.sqrt(off_diagonal / 4000), rtol=0.1)


@pytest.mark.parametrize("probe", [hj.probes.rademacher, hj.probes.gaussian])
def test_error_bars_cover_the_truth(x64, probe):
    matvec, like, matrix = problem()
    one = lambda key: hj.diagonal(matvec, key, like, 30, probe=probe, on_device=True)
    runs = jax.jit(jax.vmap(one))(jax.random.split(KEY, 200))
    mean, stderr = (np.concatenate([x.reshape(200, -1) for x in jax.tree.leaves(y)], 1) for y in runs[:2])
    covered = np.abs(mean - np.diag(matrix)) <= 2 * stderr
    assert 0.93 <= covered.mean() <= 0.97


def test_tol_and_error_are_the_norm_over_all_entries(x64):
    matvec, like, _ = problem()
    estimator = hj.estimators.hutchinson_diagonal()
    estimate, state = hj.run(estimator, matvec, KEY, like, max_matvecs=10_000, tol=hj.relative(0.05))
    error = np.linalg.norm(flat(estimate.stderr))
    assert error <= 0.05 * np.linalg.norm(flat(estimate.mean))
    np.testing.assert_allclose(estimator.error(state), error, rtol=1e-12)
    assert 20 < int(estimate.num_samples) < 10_000
    early = estimator.init(KEY, like)
    assert np.isinf(estimator.error(early))
    assert np.isnan(flat(estimator.result(early).mean)).all()


def test_a_network_in_mixed_dtypes_is_near_float64():
    params, batch = oracles.leaves(), oracles.batch()
    with jax.enable_x64(True):
        exact = np.diag(oracles.dense_hessian(oracles.loss_fn, *jax.tree.map(jnp.float64, (params, batch))))
    params = {**params, "a_bias": params["a_bias"].astype(jnp.bfloat16)}
    matvec = hj.hessian(oracles.loss_fn, params, batch)
    host = hj.diagonal(matvec, KEY, params, 60)
    assert {leaf.dtype for leaf in jax.tree.leaves(host.mean)} == {jnp.dtype(jnp.float32)}
    assert np.all(np.abs(flat(host.mean) - exact) < 4 * flat(host.stderr) + 0.02 * np.abs(exact).max())
    oracles.close(host, hj.diagonal(matvec, KEY, params, 60, on_device=True), rtol=1e-3, atol=1e-3)


def test_bad_input():
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        hj.diagonal(lambda v: v, KEY, jnp.zeros(3), 0)


@pytest.mark.smoke
def test_the_mean_and_stderr_of_the_norm_are_those_of_the_samples(x64):
    matvec, like, matrix = problem()
    estimate = hj.frobenius_norm(matvec, KEY, like, 25, probe=hj.probes.gaussian)
    draws = [hj.probes.gaussian(jax.random.fold_in(KEY, i), like) for i in range(25)]
    squares = np.array([np.sum((matrix @ jax.flatten_util.ravel_pytree(v)[0]) ** 2) for v in draws])
    np.testing.assert_allclose(estimate.mean, np.sqrt(squares.mean()), rtol=1e-10)
    stderr = oracles.standard_error(squares) / (2 * np.sqrt(squares.mean()))
    np.testing.assert_allclose(estimate.stderr, stderr, rtol=1e-10)
    assert int(estimate.num_samples) == 25


def test_error_bars_of_the_norm_cover_the_truth(x64):
    matvec, like, matrix = problem()
    one = lambda key: hj.frobenius_norm(matvec, key, like, 30, on_device=True)
    runs = jax.jit(jax.vmap(one))(jax.random.split(KEY, 400))
    covered = np.abs(np.asarray(runs.mean) - np.linalg.norm(matrix)) <= 2 * np.asarray(runs.stderr)
    assert 0.91 <= covered.mean() <= 0.98


def test_tol_is_met_in_units_of_the_norm(x64):
    matvec, like, _ = problem()
    estimate = hj.frobenius_norm(matvec, KEY, like, 10_000, tol=hj.relative(0.02))
    assert float(estimate.stderr) <= 0.02 * float(estimate.mean)
    assert 20 <= int(estimate.num_samples) < 10_000


def test_the_norm_of_the_zero_matrix_and_bad_input():
    zero = hj.frobenius_norm(lambda v: 0 * v, KEY, jnp.zeros(3), 3)
    assert (float(zero.mean), float(zero.stderr)) == (0, 0)
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        hj.frobenius_norm(lambda v: v, KEY, jnp.zeros(3), 0)


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_no_square_of_the_norm_leaves_float32(factor):
    matrix = np.diag(np.r_[np.ones(20), np.zeros(20)]).astype(np.float32)
    matrix[0, 30] = matrix[30, 0] = 3
    plain, scaled = (
        hj.frobenius_norm(oracles.matvec_of(c * matrix, jnp.zeros(40)), KEY, jnp.zeros(40), 20)
        for c in (1, np.float32(factor))
    )
    np.testing.assert_allclose(scaled.mean / factor, plain.mean, rtol=1e-4)
    np.testing.assert_allclose(scaled.stderr / factor, plain.stderr, rtol=1e-3)
