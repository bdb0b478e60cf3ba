import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


@pytest.mark.smoke
def test_against_the_dense_matrix_with_residuals_that_are_true(x64):
    spectrum = np.r_[np.linspace(-1, 1, 190), -4, -3, -2, 3, 5, 8, 9, 10, 20, 30]
    matrix, _ = oracles.symmetric(spectrum)
    like = oracles.tree_like(200)
    pairs = hj.eigenpairs(oracles.matvec_of(matrix, like), KEY, like, k=3, tol=hj.relative(1e-9))
    np.testing.assert_allclose(pairs.values, [30, 20, 10, -2, -3, -4], rtol=1e-10)
    V = oracles.rows(pairs.vectors)
    np.testing.assert_allclose(
        np.linalg.norm(V @ matrix - np.asarray(pairs.values)[:, None] * V, axis=1),
        pairs.residuals,
        atol=1e-12,
    )
    assert bool(pairs.converged.all())


def test_every_product_is_counted():
    count = [0]

    def counting(vector):
        count[0] += 1
        return vector * jnp.arange(30.0)

    pairs = hj.eigenpairs(counting, KEY, jnp.zeros(30), k=2, max_matvecs=12)
    assert int(pairs.num_matvecs) == count[0] == 12 + 4


def test_converged_is_honest_when_products_run_out(x64):
    matrix, _ = oracles.symmetric(np.linspace(0, 1, 300))
    like = oracles.tree_like(300)
    pairs = hj.eigenpairs(oracles.matvec_of(matrix, like), KEY, like, k=2, max_matvecs=15)
    assert not bool(pairs.converged.any())
    distance = np.min(np.abs(np.linspace(0, 1, 300)[:, None] - np.asarray(pairs.values)), axis=0)
    assert np.all(distance <= np.asarray(pairs.residuals))  # what a residual promises


def test_an_absolute_tolerance_and_a_small_basis(x64):
    matrix, _ = oracles.symmetric(np.linspace(0, 1, 300) ** 3)
    like = oracles.tree_like(300)
    matvec = oracles.matvec_of(matrix, like)
    pairs = hj.eigenpairs(matvec, KEY, like, 3, "largest", tol=1e-6, basis_size=10, max_matvecs=1000)
    np.testing.assert_allclose(pairs.values, (np.linspace(0, 1, 300) ** 3)[:-4:-1], rtol=1e-10)
    assert float(pairs.residuals.max()) <= 1e-6


def test_over_batches_and_float32_near_float64():
    params = oracles.leaves()
    batches = [oracles.batch(8, 0), oracles.batch(5, 1)]
    pairs = hj.eigenpairs(
        hj.over_batches(lambda b: hj.hessian(oracles.loss_fn, params, b), batches), KEY, params, 2
    )
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, batches))
        weights = np.array([8, 5]) / 13
        dense = sum(
            w * oracles.dense_hessian(oracles.loss_fn, jax.tree.map(jnp.asarray, exact[0]), b)
            for w, b in zip(weights, exact[1], strict=True)
        )
        want = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(pairs.values, want[[0, 1, -2, -1]], rtol=1e-4, atol=1e-4)


def test_inside_jit(x64):
    matrix, _ = oracles.symmetric(np.r_[np.linspace(-1, 1, 30), 5.0])
    like = oracles.tree_like(31)
    matvec = oracles.matvec_of(matrix, like)
    solve = jax.jit(lambda a, k: hj.eigenpairs(a, k, like, 1, tol=1e-8, on_device=True))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7),
        solve(matvec, KEY),
        hj.eigenpairs(matvec, KEY, like, 1, tol=1e-8),
    )


def test_a_relative_tolerance_means_the_same_to_the_search_and_to_the_verdict(x64):
    """The smallest eigenvalues are tiny beside the largest, which sets the scale for both."""
    matrix, _ = oracles.symmetric(np.r_[-0.01, -0.009, np.linspace(0, 1, 300), 50])
    like = oracles.tree_like(303)
    pairs = hj.eigenpairs(oracles.matvec_of(matrix, like), KEY, like, 2, "smallest", tol=hj.relative(1e-3))
    assert bool(pairs.converged.all())
    assert float(pairs.residuals.max()) <= 1e-3 * 50


def test_the_sampling_error_of_the_data(x64):
    """The value moves from sample to sample of the data by as much as `data_stderr` says."""
    params = oracles.leaves()

    def found(seed):
        x, y = oracles.batch(400, seed)
        batches = [(x[i : i + 30], y[i : i + 30]) for i in range(0, 400, 30)]
        matvec = hj.over_batches(lambda b: hj.hessian(oracles.loss_fn, params, b), batches)
        return hj.eigenpairs(matvec, KEY, params, k=1, which="largest")

    runs = [found(seed) for seed in range(30)]
    values, errors = (np.array([getattr(run, name) for run in runs]) for name in ("values", "data_stderr"))
    np.testing.assert_allclose(errors.mean(axis=0), values.std(axis=0, ddof=1), rtol=0.35)
    one_batch = hj.hessian(oracles.loss_fn, params, oracles.batch())
    assert hj.eigenpairs(one_batch, KEY, params, k=1).data_stderr is None


@pytest.mark.parametrize("block_size", [1, 3])
def test_a_matvec_that_is_not_symmetric_shows(x64, block_size):
    like = oracles.tree_like(60)
    matrix, _ = oracles.symmetric(np.linspace(-1, 5, 60))
    skew = np.random.default_rng(0).normal(size=(60, 60)) * 1e-3
    find = lambda matrix: hj.eigenpairs(
        oracles.matvec_of(matrix, like), KEY, like, k=2, basis_size=20, block_size=block_size
    )
    assert float(find(matrix).asymmetry) < 1e-13
    assert 1e-4 < float(find(matrix + skew - skew.T).asymmetry) < 1e-1
