import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def both(matvec, like, num_probes, num_matvecs, **options):
    return [
        hj.spectral_density(matvec, KEY, like, num_probes, num_matvecs, reorthogonalise=flag, **options)
        for flag in (True, False)
    ]


@pytest.mark.smoke
def test_two_vectors_find_what_the_basis_does(x64):
    like = oracles.tree_like(40)
    matvec = oracles.matvec_of(oracles.symmetric(np.linspace(-1, 2, 40))[0], like)
    kept, plain = both(matvec, like, 2, 10)
    np.testing.assert_allclose(plain.nodes, kept.nodes, rtol=1e-8)
    np.testing.assert_allclose(plain.weights, kept.weights, rtol=1e-8)
    assert float(plain.dimension) == float(kept.dimension) == 40
    assert int(plain.num_matvecs) == 20


def test_after_a_breakdown_weights_are_zero(x64):
    like = oracles.tree_like(100)
    spectrum = np.repeat([0.0, 2.0, 5.0], [60, 30, 10])
    _, plain = both(oracles.matvec_of(oracles.symmetric(spectrum)[0], like), like, 2, 12)
    np.testing.assert_allclose(plain.nodes[:, :3], [[0, 2, 5]] * 2, atol=1e-10)
    np.testing.assert_allclose(jnp.sum(plain.weights[:, :3], axis=1), 1, rtol=1e-10)
    assert np.all(plain.weights[:, 3:] == 0)
    np.testing.assert_allclose(plain.nodes[:, 3:], 5, rtol=1e-10)


def test_copies_share_the_weight_of_the_one():
    """In float32 and with many steps orthogonality is lost; the density is not."""
    spectrum = np.r_[np.linspace(0, 1, 190) ** 2, np.geomspace(3, 50, 10)]
    like = jnp.zeros(200)
    A = jax.tree_util.Partial(jnp.multiply, jnp.asarray(spectrum, jnp.float32))
    kept, plain = both(A, like, 1, 120, on_device=True)
    assert np.sum(np.abs(np.asarray(plain.nodes) - 50) < 1e-3) > 1
    assert np.sum(np.abs(np.asarray(kept.nodes) - 50) < 1e-3) == 1
    outliers = spectrum[190:]  # inside the bulk copies cost resolution
    grid = jnp.asarray(np.sort(np.r_[outliers * 0.999, outliers * 1.001]), jnp.float32)
    np.testing.assert_allclose(plain.cumulative(grid), kept.cumulative(grid), atol=1e-4)
    for power in (0, 1, 2):
        np.testing.assert_allclose(plain.moment(power), kept.moment(power), rtol=1e-4)


@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_any_container_mixed_dtypes_and_no_matrix_at_all(container):
    like = {
        k: v.astype(jnp.bfloat16 if k == "d_kernel" else jnp.float32) for k, v in oracles.leaves().items()
    }
    like = oracles.CONTAINERS[container](like)
    double = jax.tree_util.Partial(lambda v: jax.tree.map(lambda x: 2 * x, v))
    density = hj.spectral_density(double, KEY, like, 1, 3, reorthogonalise=False)
    assert float(density.moment()) == pytest.approx(2, rel=1e-2)
    zero = jax.tree_util.Partial(lambda v: jax.tree.map(jnp.zeros_like, v))
    density = hj.spectral_density(zero, KEY, like, 1, 3, reorthogonalise=False)
    assert float(density.moment()) == 0
    assert float(jnp.sum(density.weights)) == pytest.approx(1)
