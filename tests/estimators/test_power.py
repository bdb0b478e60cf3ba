import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


@pytest.mark.smoke
def test_against_the_dense_matrix(x64):
    spectrum = np.r_[np.linspace(-1, 1, 50), 10, -9, 5]
    matrix, _ = oracles.symmetric(spectrum)
    like = oracles.tree_like(53)
    tol = hj.relative(1e-8)
    pairs, _ = hj.run(
        hj.estimators.power_iteration(3, tol=tol),
        oracles.matvec_of(matrix, like),
        KEY,
        like,
        max_matvecs=900,
        tol=tol,
    )
    np.testing.assert_allclose(pairs.values, [10, 5, -9], rtol=1e-10)
    V = oracles.rows(pairs.vectors)
    np.testing.assert_allclose(V @ V.T, np.eye(3), atol=1e-12)
    true = np.linalg.norm(V @ matrix - np.asarray(pairs.values)[:, None] * V, axis=1)
    np.testing.assert_allclose(true, pairs.residuals, atol=1e-12)
    assert bool(pairs.converged.all())


def test_it_does_not_stop_on_the_second_eigenvalue():
    """A start almost orthogonal to the first eigenvector: θ rests at 9 for dozens of steps, then rises."""
    matrix = jnp.diag(jnp.array([10.0, 9.0, 1.0]))
    estimator = hj.estimators.power_iteration(1, tol=hj.relative(1e-5))
    state = estimator.init(KEY, jnp.zeros(3))
    start = jnp.array([[1e-3, 1.0, 1.0]])
    state = state._replace(iterate=(start / jnp.linalg.norm(start),))
    pairs, _ = hj.run(
        estimator,
        oracles.matvec_of(matrix, jnp.zeros(3)),
        KEY,
        jnp.zeros(3),
        max_matvecs=500,
        tol=hj.relative(1e-5),
        state=state,
    )
    assert float(pairs.values[0]) == pytest.approx(10, rel=1e-5)


def test_values_vectors_and_residuals_belong_together_at_any_moment(x64):
    matrix, _ = oracles.symmetric(np.linspace(-1, 2, 40))
    like = oracles.tree_like(40)
    for products in (2, 6, 20):
        pairs, _ = hj.run(
            hj.estimators.power_iteration(2), oracles.matvec_of(matrix, like), KEY, like, max_matvecs=products
        )
        V = oracles.rows(pairs.vectors)
        np.testing.assert_allclose(np.einsum("ki,ij,kj->k", V, matrix, V), pairs.values, rtol=1e-12)
        true = np.linalg.norm(V @ matrix - np.asarray(pairs.values)[:, None] * V, axis=1)
        np.testing.assert_allclose(true, pairs.residuals, rtol=1e-10)


def test_rank_deficient_and_zero_matrices():
    for spectrum in ([3.0, 0, 0, 0, 0, 0], [0.0] * 6):
        matvec = oracles.matvec_of(np.diag(spectrum).astype(np.float32), jnp.zeros(6))
        pairs, _ = hj.run(
            hj.estimators.power_iteration(3, tol=1e-5), matvec, KEY, jnp.zeros(6), max_matvecs=60
        )
        np.testing.assert_allclose(pairs.values, sorted(spectrum)[::-1][:3], atol=1e-6)
        assert bool(pairs.converged.all())


def test_lanczos_needs_far_fewer_products(x64):
    """Outliers over a bulk, the spectrum of a network: the reason why `eigenpairs` is not this."""
    spectrum = np.r_[np.linspace(0, 1, 390), np.linspace(2, 20, 10)]
    like = oracles.tree_like(400)
    matvec = oracles.matvec_of(oracles.symmetric(spectrum)[0], like)
    tol = hj.relative(1e-4)
    power, _ = hj.run(
        hj.estimators.power_iteration(10, tol=tol), matvec, KEY, like, max_matvecs=5000, tol=tol
    )
    lanczos = hj.eigenpairs(matvec, KEY, like, 10, "largest", tol=tol)
    np.testing.assert_allclose(power.values, lanczos.values, rtol=1e-4)
    assert 4 * int(lanczos.num_matvecs) <= int(power.num_matvecs)


def test_bad_input():
    with pytest.raises(ValueError, match="`tol` must be at least 0, got -1"):
        hj.estimators.power_iteration(2, tol=-1.0)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        hj.estimators.power_iteration(0)
    with pytest.raises(ValueError, match="`k` must be at most 3, the number of parameters, got 4"):
        hj.run(hj.estimators.power_iteration(4), lambda v: v, KEY, jnp.zeros(3), max_matvecs=9)
