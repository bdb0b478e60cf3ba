import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
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


EIGENVALUES = np.r_[np.linspace(-0.5, 1, 190), np.geomspace(2, 20, 10)]


def as_probes_see_it(seed, shape):
    """Complete quadratures of a matrix with EIGENVALUES by uniform directions: (runs, probes)."""
    squares = np.random.default_rng(seed).normal(size=(*shape, 200)) ** 2
    runs = shape[0]
    return SpectralDensity(
        jnp.broadcast_to(jnp.asarray(EIGENVALUES), squares.shape),
        jnp.asarray(squares / squares.sum(axis=-1, keepdims=True)),
        jnp.full(runs, shape[1]),
        jnp.full(runs, 200 * shape[1]),
        jnp.full(runs, 200.0),
    )


def exactly():
    return made_of(EIGENVALUES, np.full(200, 1 / 200))


@pytest.mark.smoke
def test_functions_of_the_matrix_are_sums_over_the_eigenvalues(x64):
    x = EIGENVALUES
    for got, want in [
        (exactly().trace_of(jnp.exp), np.exp(x).sum()),
        (exactly().log_determinant(0.7), np.log(np.abs(x + 0.7)).sum()),
        (exactly().schatten_norm(1), np.abs(x).sum()),
        (exactly().schatten_norm(3.0), (np.abs(x) ** 3).sum() ** (1 / 3)),
        (exactly().effective_dimension(0.9), (x / (x + 0.9)).sum()),
    ]:
        np.testing.assert_allclose(got.mean, want, rtol=1e-10)
        assert int(got.num_samples) == 1


@pytest.mark.parametrize("num_probes", [1, 2, 10])
@pytest.mark.parametrize(
    ("sum_", "want"),
    [
        (lambda d: d.trace_of(jnp.tanh), np.sum(np.tanh(EIGENVALUES))),
        (lambda d: d.log_determinant(0.7), np.sum(np.log(EIGENVALUES + 0.7))),
        (lambda d: d.schatten_norm(1.0), np.sum(np.abs(EIGENVALUES))),
        (lambda d: d.effective_dimension(1.0), np.sum(EIGENVALUES / (EIGENVALUES + 1))),
    ],
)
def test_error_bars_cover_the_truth_from_one_probe_on(x64, num_probes, sum_, want):
    estimates = jax.vmap(sum_)(as_probes_see_it(0, (800, num_probes)))
    errors = np.asarray(estimates.mean) - want
    assert 0.9 <= np.mean(np.abs(errors) <= 2 * np.asarray(estimates.stderr)) <= 0.98
    np.testing.assert_allclose(np.sqrt(np.mean(estimates.stderr**2)), np.sqrt(np.mean(errors**2)), rtol=0.15)


@pytest.mark.parametrize(("num_probes", "least"), [(1, 0.85), (10, 0.92)])
def test_where_few_eigenvalues_are_the_sum_one_probe_is_too_sure(x64, num_probes, least):
    """Σ λ² is to 95 % that of ten outliers: the error bar has the right size on average, and covers less."""
    estimates = jax.vmap(lambda d: d.trace_of(jnp.square))(as_probes_see_it(0, (800, num_probes)))
    errors = np.asarray(estimates.mean) - np.sum(EIGENVALUES**2)
    assert np.mean(np.abs(errors) <= 2 * np.asarray(estimates.stderr)) >= least
    np.testing.assert_allclose(np.sqrt(np.mean(estimates.stderr**2)), np.sqrt(np.mean(errors**2)), rtol=0.15)


def test_nodes_without_weight_and_probes_that_did_not_take_place_do_not_count(x64):
    half = made_of([[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
    assert float(half.log_determinant().mean) == 0
    assert float(half.trace_of(jnp.exp).mean) == pytest.approx(200 * np.e)
    assert float(half.trace_of(jnp.exp).stderr) == 0
    assert float(half.moment(-1)) == 1
    lower, upper = half.bounds(jnp.array([0.5, 1.5]))
    assert float(upper[0]) == 1
    assert float(lower[0]) == 0


def test_a_density_goes_through_jit(x64):
    density, grid = exactly(), jnp.linspace(-1, 20, 50)
    both = jax.jit(lambda d, damping: (d.bounds(grid), d.log_determinant(damping), d.schatten_norm(damping)))
    want = density.bounds(grid), density.log_determinant(0.7), density.schatten_norm(0.7)
    for got, expected in zip(jax.tree.leaves(both(density, 0.7)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_powers_of_small_eigenvalues_stay_in_range():
    tiny = made_of(EIGENVALUES * 1e-12, np.full(200, 1 / 200))
    want = 1e-12 * np.sum(np.abs(EIGENVALUES) ** 4) ** 0.25
    np.testing.assert_allclose(tiny.schatten_norm(4.0).mean, want, rtol=1e-5)
    zero = made_of([0.0], [1.0]).schatten_norm(2.0)
    assert float(zero.mean) == 0
    assert float(zero.stderr) == np.inf  # a probe of one step tells no spread, and not NaN either


def test_bad_input():
    for call, message in [
        (lambda: outliers().log_determinant(-1.0), "`damping` must be at least 0, got -1.0"),
        (lambda: outliers().effective_dimension(0.0), "`damping` must be positive and finite, got 0.0"),
        (lambda: outliers().schatten_norm(0.0), "`p` must be positive and finite, got 0.0"),
        (lambda: outliers().curve(bandwidth=0.0), "`bandwidth` must be positive and finite, got 0.0."),
        (lambda: outliers().curve(bandwidth=-1.0), "`bandwidth` must be positive and finite, got -1.0."),
        (lambda: outliers().signed_log_curve(bandwidth=0.0), "`bandwidth` must be positive and finite"),
        (lambda: outliers().signed_log_curve(bandwidth=-0.1), "`bandwidth` must be positive and finite"),
        (lambda: outliers().signed_log_curve(threshold=0.0), "`threshold` must be positive and finite"),
        (lambda: outliers().signed_log_curve(threshold=np.nan), "`threshold` must be positive and finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_without_a_probe_nothing_is_known():
    estimator = hj.estimators.slq(2, 3)
    density = estimator.result(estimator.init(jax.random.key(0), jnp.zeros(5)))
    assert np.isnan(density.trace_of(jnp.exp).mean)
    assert np.isinf(density.trace_of(jnp.exp).stderr)
    assert [x.tolist() for x in density.bounds(jnp.array([0.0, 1.0]))] == [[0, 0], [1, 1]]
