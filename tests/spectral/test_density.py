import jax.numpy as jnp
import numpy as np
import pytest

from hessjax import SpectralDensity


def made_of(nodes, weights, probes=1):
    nodes, weights = np.atleast_2d(nodes), np.atleast_2d(weights)
    return SpectralDensity(
        jnp.asarray(nodes), jnp.asarray(weights), jnp.int32(probes), jnp.int32(nodes.size), jnp.float32(200)
    )


def outliers():
    return made_of([-1.0, 0.0, 0.1, 0.2, 50.0, 400.0], [0.1, 0.4, 0.3, 0.18, 0.01, 0.01])


def test_moments_and_cumulative_are_sums_over_the_nodes(x64):
    assert float(outliers().moment()) == pytest.approx(-0.1 + 0.03 + 0.036 + 0.5 + 4)
    assert float(outliers().moment(2)) == pytest.approx(0.1 + 0.003 + 0.0072 + 25 + 1600)
    np.testing.assert_allclose(
        outliers().cumulative(jnp.array([-2, -1, 0.15, 399, 400.0])), [0, 0.1, 0.8, 0.99, 1]
    )


def test_probes_are_averaged(x64):
    two = made_of([[1.0, 2.0], [3.0, 4.0]], [[0.5, 0.5], [0.25, 0.75]], probes=2)
    assert float(two.moment()) == pytest.approx((1.5 + 3.75) / 2)
    np.testing.assert_allclose(two.cumulative(jnp.array([2.0, 5.0])), [0.5, 1])


def test_the_curve_integrates_to_one(x64):
    grid, density = outliers().curve(40_000)
    assert np.trapezoid(density, grid) == pytest.approx(1, rel=1e-3)
    grid, density = outliers().signed_log_curve(4000)
    u = np.arcsinh(np.asarray(grid) / 0.4)
    assert np.trapezoid(density, u) == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(np.diff(u), np.diff(u)[0], rtol=1e-5)


@pytest.mark.parametrize("curve", ["curve", "signed_log_curve"])
def test_a_rescaled_loss_gives_the_same_picture(x64, curve):
    scaled = outliers()._replace(nodes=outliers().nodes * 1e-6)
    (grid, density), (grid2, density2) = getattr(outliers(), curve)(), getattr(scaled, curve)()
    np.testing.assert_allclose(grid2, grid * 1e-6, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(density2, density * (1e6 if curve == "curve" else 1), rtol=1e-6, atol=1e-12)


def test_bulk_and_outliers_are_both_visible_on_the_signed_log_axis(x64):
    grid, density = outliers().signed_log_curve()
    peaks = np.asarray(grid)[1:-1][(density[1:-1] > density[:-2]) & (density[1:-1] > density[2:])]
    for node in (-1.0, 0.0, 50.0, 400.0):
        assert np.min(np.abs(peaks - node)) <= 0.05 * abs(node) + 0.05


def test_a_single_eigenvalue_and_a_zero_matrix():
    for node in (3.0, 0.0):
        grid, density = made_of([node, node], [0.5, 0.5]).curve(20_001)
        assert np.isfinite(density).all()
        assert float(grid[np.argmax(density)]) == pytest.approx(node, abs=1e-3)
        assert np.trapezoid(density, grid) == pytest.approx(1, rel=1e-3)
