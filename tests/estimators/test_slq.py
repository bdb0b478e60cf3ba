import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def wasserstein(density, spectrum):
    """W₁ between a density and the true spectrum: the area between their cumulative functions."""
    grid = jnp.linspace(min(spectrum) - 0.1, max(spectrum) + 0.1, 5001)
    truth = np.mean(np.asarray(spectrum)[None, :] <= np.asarray(grid)[:, None], axis=1)
    return np.trapezoid(np.abs(np.asarray(density.cumulative(grid)) - truth), grid)


@pytest.mark.smoke
def test_the_quadrature_is_that_of_the_dense_matrix(x64):
    """With all d steps the nodes are the eigenvalues, the weights the probe's squared components."""
    matrix, vectors = oracles.symmetric(np.linspace(-1, 2, 12) ** 3)
    like = oracles.tree_like(12)
    density = hj.spectral_density(oracles.matvec_of(matrix, like), KEY, like, 2, 12)
    assert int(density.num_probes) == 2
    assert int(density.num_matvecs) == 24
    for i in range(2):
        v = np.asarray(jax.flatten_util.ravel_pytree(hj.probes.gaussian(jax.random.fold_in(KEY, i), like))[0])
        np.testing.assert_allclose(density.nodes[i], np.linspace(-1, 2, 12) ** 3, atol=1e-11)
        np.testing.assert_allclose(density.weights[i], (vectors.T @ v / np.linalg.norm(v)) ** 2, atol=1e-9)


def test_gauss_quadrature_is_exact_to_degree_2m_minus_1(x64):
    matrix, _ = oracles.symmetric(np.linspace(-1, 2, 40))
    like = oracles.tree_like(40)
    density = hj.spectral_density(oracles.matvec_of(matrix, like), KEY, like, 1, 5)
    v = np.asarray(jax.flatten_util.ravel_pytree(hj.probes.gaussian(jax.random.fold_in(KEY, 0), like))[0])
    v = v / np.linalg.norm(v)
    for power in range(10):
        want = v @ np.linalg.matrix_power(matrix, power) @ v
        np.testing.assert_allclose(density.moment(power), want, rtol=1e-10, atol=1e-12)


def test_more_probes_come_nearer_to_the_truth(x64):
    spectrum = np.r_[np.linspace(0, 1, 180) ** 2, np.linspace(2, 6, 20)]
    like = oracles.tree_like(200)
    matvec = oracles.matvec_of(oracles.symmetric(spectrum)[0], like)
    one, many = (hj.spectral_density(matvec, KEY, like, n, 40) for n in (1, 30))
    assert wasserstein(many, spectrum) < 0.02 * 6
    assert wasserstein(many, spectrum) < wasserstein(one, spectrum)


def test_repeated_eigenvalues_and_breakdown(x64):
    spectrum = np.repeat([0.0, 2.0, 5.0], [60, 30, 10])
    like = oracles.tree_like(100)
    density = hj.spectral_density(oracles.matvec_of(oracles.symmetric(spectrum)[0], like), KEY, like, 20, 12)
    np.testing.assert_allclose(jnp.sum(density.weights, axis=1), 1, rtol=1e-10)
    shares = density.cumulative(jnp.array([1.0, 3.0, 6.0]))
    np.testing.assert_allclose(shares, [0.6, 0.9, 1.0], atol=0.05)


def test_the_quadrature_so_far_is_readable():
    like = oracles.tree_like(40)
    matvec = oracles.matvec_of(oracles.symmetric(np.linspace(0, 1, 40))[0].astype(np.float32), like)
    early, _ = hj.run(hj.estimators.slq(2, 20), matvec, KEY, like, max_matvecs=5)
    assert int(early.num_probes) == 1
    assert int((early.weights[0] > 0).sum()) == 5
    np.testing.assert_allclose(jnp.sum(early.weights), 1, rtol=1e-5)
    later, _ = hj.run(hj.estimators.slq(2, 20), matvec, KEY, like, max_matvecs=25)
    assert int(later.num_probes) == 1
    assert int((later.weights[0] > 0).sum()) == 20


def test_the_error_is_the_standard_error_of_the_mean_eigenvalue(x64):
    like = oracles.tree_like(40)
    matvec = oracles.matvec_of(oracles.symmetric(np.linspace(0, 1, 40))[0], like)
    estimator = hj.estimators.slq(6, 8)
    density, state = hj.run(estimator, matvec, KEY, like, max_matvecs=48)
    means = np.sum(np.asarray(density.weights * density.nodes), axis=1)
    np.testing.assert_allclose(estimator.error(state), oracles.standard_error(means), rtol=1e-10)


@pytest.mark.parametrize("on_device", [False, True])
def test_at_once_is_as_one_by_one(x64, on_device):
    like = oracles.tree_like(40)
    matvec = oracles.matvec_of(oracles.symmetric(np.linspace(-1, 2, 40))[0], like)
    one, three = (
        hj.spectral_density(matvec, KEY, like, 6, 8, reorthogonalise=False, at_once=g, on_device=on_device)
        for g in (1, 3)
    )
    oracles.close(one, three, rtol=1e-8, atol=1e-12)
    assert int(three.num_probes) == 6
    assert int(three.num_matvecs) == 48


def test_several_under_way_are_readable(x64):
    like = oracles.tree_like(40)
    matvec = oracles.matvec_of(oracles.symmetric(np.linspace(-1, 2, 40))[0], like)
    estimator = hj.estimators.slq(6, 8, reorthogonalise=False, at_once=3)
    for products, probes, steps in [(9, 3, 3), (24, 3, 8), (30, 3, 8), (48, 6, 8), (54, 6, 8)]:
        density, _ = hj.run(estimator, matvec, KEY, like, max_matvecs=products)
        assert int(density.num_probes) == probes
        assert np.sum(np.asarray(density.weights) > 0, axis=1).tolist() == [steps] * probes + [0] * (
            6 - probes
        )
        np.testing.assert_allclose(density.moment(0), 1, rtol=1e-10)


def test_a_network(x64):
    params, batch = oracles.leaves(), oracles.batch(30)
    density = hj.spectral_density(hj.hessian(oracles.loss_fn, params, batch), KEY, params, 400, 10)
    want = np.linalg.eigvalsh(oracles.dense_hessian(oracles.loss_fn, params, batch))
    np.testing.assert_allclose(density.nodes[0], want, atol=1e-10)
    np.testing.assert_allclose(density.moment(), want.mean(), rtol=0.1)


def test_bad_input():
    for arguments, message in [
        ((0, 5), "`num_probes` must be at least 1, got 0"),
        ((1, 0), "`num_matvecs` must be at least 1, got 0"),
        ((1, 99), "`num_matvecs` must be at most 9, the number of parameters, got 99"),
    ]:
        with pytest.raises(ValueError, match=message):
            hj.spectral_density(lambda v: v, KEY, oracles.tree_like(9), *arguments)
    with pytest.raises(ValueError, match="`at_once` must divide `num_probes`, 6, got 4"):
        hj.estimators.slq(6, 5, reorthogonalise=False, at_once=4)
    with pytest.raises(ValueError, match="`at_once` must be 1 where every probe keeps a basis, got 2"):
        hj.estimators.slq(6, 5, at_once=2)
