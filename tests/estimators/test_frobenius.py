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


@pytest.mark.smoke
def test_mean_and_stderr_are_those_of_the_samples(x64):
    matvec, like, matrix = problem()
    estimate = hj.frobenius_norm(matvec, KEY, like, 25, probe=hj.probes.gaussian)
    draws = [hj.probes.gaussian(jax.random.fold_in(KEY, i), like) for i in range(25)]
    squares = np.array([np.sum((matrix @ jax.flatten_util.ravel_pytree(v)[0]) ** 2) for v in draws])
    np.testing.assert_allclose(estimate.mean, np.sqrt(squares.mean()), rtol=1e-10)
    stderr = squares.std(ddof=1) / 5 / (2 * np.sqrt(squares.mean()))
    np.testing.assert_allclose(estimate.stderr, stderr, rtol=1e-10)
    assert int(estimate.num_samples) == 25


def test_error_bars_cover_the_truth(x64):
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


def test_the_zero_matrix_and_bad_input():
    zero = hj.frobenius_norm(lambda v: 0 * v, KEY, jnp.zeros(3), 3)
    assert (float(zero.mean), float(zero.stderr)) == (0, 0)
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        hj.frobenius_norm(lambda v: v, KEY, jnp.zeros(3), 0)


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_no_square_leaves_float32(factor):
    matrix = np.diag(np.r_[np.ones(20), np.zeros(20)]).astype(np.float32)
    matrix[0, 30] = matrix[30, 0] = 3
    plain, scaled = (
        hj.frobenius_norm(oracles.matvec_of(c * matrix, jnp.zeros(40)), KEY, jnp.zeros(40), 20)
        for c in (1, np.float32(factor))
    )
    np.testing.assert_allclose(scaled.mean / factor, plain.mean, rtol=1e-4)
    np.testing.assert_allclose(scaled.stderr / factor, plain.stderr, rtol=1e-3)
