import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj
from hessjax.estimators._quadrature import quadrature_bounds, sphere_deviation

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


SPECTRA = {
    "even": np.linspace(-1, 2, 60),
    "outliers": np.r_[np.linspace(-0.01, 0.1, 55), 1, 2, 3, 5, 9],
    "repeated": np.repeat([0.0, 2.0, 5.0], [40, 15, 5]),
}


def staircase(places, weights, grid):
    return np.sum(np.where(places <= np.asarray(grid)[:, None], weights, 0), axis=1)


def grid_about(places, gap):
    """Points on, and just beside, all places, and between."""
    even = np.linspace(places.min() - 1, places.max() + 1, 300)
    return np.sort(np.concatenate([places - gap, places, places + gap, even]))


@pytest.mark.smoke
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_the_probes_own_measure_is_between_the_bounds(x64, name, reorthogonalise):
    """Not a matter of confidence: this part is a theorem, breakdown and copies of Ritz values included."""
    matrix, vectors = oracles.symmetric(SPECTRA[name])
    like = oracles.tree_like(60)
    density = hj.spectral_density(
        oracles.matvec_of(matrix, like), KEY, like, 1, 12, reorthogonalise=reorthogonalise
    )
    v = np.asarray(jax.flatten_util.ravel_pytree(hj.probes.gaussian(jax.random.fold_in(KEY, 0), like))[0])
    measure = (vectors.T @ v / np.linalg.norm(v)) ** 2
    gap = 1e-11  # eigenvalues are known to rounding errors, in numpy too
    for nodes, weights in ((density.nodes[0], density.weights[0]),):
        grid = grid_about(np.concatenate([SPECTRA[name], nodes]), 1e-9)
        lower, upper = map(np.asarray, quadrature_bounds(nodes, weights, jnp.asarray(grid)))
        assert np.all(lower <= staircase(SPECTRA[name] - gap, measure, grid) + 1e-12)
        assert np.all(upper >= staircase(SPECTRA[name] + gap, measure, grid) - 1e-12)
        assert np.all((lower <= upper) & (lower >= 0) & (upper <= 1 + 1e-12))


def test_the_bounds_at_and_between_the_nodes_by_hand(x64):
    nodes, weights = jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([0.1, 0.2, 0.0, 0.7])
    lower, upper = quadrature_bounds(nodes, weights, jnp.array([-1, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4]))
    # On a node rounding decides: the wider bound. The node without weight is as if it were not there.
    np.testing.assert_allclose(lower, [0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.3], atol=1e-12)
    np.testing.assert_allclose(upper, [0.1, 0.3, 0.3, 1, 1, 1, 1, 1, 1], atol=1e-12)


def test_the_deviation_holds_for_uniform_directions(x64):
    d, n, rng = 50, 3, np.random.default_rng(0)
    squares = rng.normal(size=(2000, n, d)) ** 2
    shares = np.cumsum(squares / squares.sum(axis=2, keepdims=True), axis=2).mean(axis=1)
    furthest = np.abs(shares - np.arange(1, d + 1) / d).max(axis=1)
    t = float(sphere_deviation(jnp.float64(d), jnp.int32(n), 0.95))
    assert t == pytest.approx(np.sqrt(np.log(2 * d / 0.05) / (n * (d + 2))))
    assert np.mean(furthest > t) <= 0.05


def test_bounds_contain_the_truth_and_shrink(x64):
    """All of it, in at least 95 % of 200 runs; narrower with more products and with more probes."""
    spectrum = np.r_[np.linspace(0, 1, 92) ** 3, np.geomspace(1.5, 9, 8)]
    like = jnp.zeros(100)
    matvec = oracles.matvec_of(np.diag(spectrum), like)
    grid = grid_about(spectrum, 1e-9)
    truth = np.mean(spectrum[None] <= grid[:, None], axis=1)
    widths = []
    for num_probes, num_matvecs in [(1, 6), (1, 24), (4, 24)]:
        estimate = lambda key, n=num_probes, m=num_matvecs: hj.spectral_density(
            matvec, key, like, n, m, on_device=True, reorthogonalise=False, at_once=n
        ).bounds(jnp.asarray(grid))
        runs = 200 if num_matvecs == 24 else 10
        lower, upper = jax.jit(jax.vmap(estimate))(jax.random.split(KEY, runs))
        held = np.all((lower <= truth[None] + 1e-12) & (upper >= truth[None] - 1e-12), axis=1)
        assert held.mean() >= 0.95
        widths.append(float(jnp.mean(upper - lower)))
    assert widths[0] > 1.2 * widths[1] > 1.2**2 * widths[2]


def test_confidence_widens_them_and_must_be_a_probability(x64):
    density = hj.SpectralDensity(
        jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.3, 0.4, 0.3]]), *map(jnp.int32, (1, 3)), jnp.array(1e4)
    )
    grid = jnp.array([-0.5, 0.5, 1.5, 2.5])
    (low, high), (lower, higher) = density.bounds(grid, 0.5), density.bounds(grid, 0.999)
    assert np.all((lower <= low) & (higher >= high))
    for inside in (lower, higher):
        assert np.all((inside >= 0) & (inside <= 1))
    with pytest.raises(ValueError, match="`confidence` must be between 0 and 1, got 95"):
        density.bounds(grid, 95)
