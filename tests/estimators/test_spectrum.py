import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)
VALUES = np.r_[np.linspace(0, 1, 196) ** 2, -3, 6, 8, 9]


def problem(values=VALUES):
    like = oracles.tree_like(len(values))
    return oracles.matvec_of(oracles.symmetric(values)[0], like), like


@pytest.mark.smoke
@pytest.mark.parametrize("on_device", [False, True])
def test_one_run_gives_what_three_would(x64, on_device):
    matvec, like = problem()
    pairs, density, trace = hj.spectrum(matvec, KEY, like, k=2, num_matvecs=60, on_device=on_device)
    np.testing.assert_allclose(pairs.values, [9, 8, VALUES[:196].min(), -3], atol=1e-4)
    np.testing.assert_allclose(pairs.values[jnp.array([0, 1, 3])], [9, 8, -3], rtol=1e-10)
    V, A = oracles.rows(pairs.vectors), oracles.symmetric(VALUES)[0]
    true = np.linalg.norm(V @ A - np.asarray(pairs.values)[:, None] * V, axis=1)
    np.testing.assert_allclose(true, pairs.residuals, atol=1e-10)
    assert int(pairs.num_matvecs) == 64
    assert int(density.num_matvecs) == 60
    np.testing.assert_allclose(jnp.sum(density.weights), 1, rtol=1e-12)
    np.testing.assert_allclose(trace.mean, 200 * density.moment(), rtol=1e-12)
    assert abs(float(trace.mean) - VALUES.sum()) < 4 * float(trace.stderr)


def test_all_steps_give_the_whole_spectrum(x64):
    values = np.linspace(-1, 2, 12) ** 3
    matvec, like = problem(values)
    _, density, _ = hj.spectrum(matvec, KEY, like, k=2, num_matvecs=12)
    np.testing.assert_allclose(density.nodes[0], values, atol=1e-11)


def test_bounds_and_error_bars_hold(x64):
    """Over many start vectors, by one compiled program."""
    matvec, like = problem()
    run = jax.jit(lambda key: hj.spectrum(matvec, key, like, k=1, num_matvecs=20, on_device=True)[1:])
    grid = np.linspace(-4, 10, 200)
    truth = np.mean(VALUES[None, :] <= grid[:, None], axis=1)
    outside, covered = 0, 0
    for i in range(100):
        density, trace = run(jax.random.key(i))
        lower, upper = density.bounds(grid)
        outside += bool(np.any((truth < lower) | (truth > upper)))
        covered += abs(float(trace.mean) - VALUES.sum()) < 2 * float(trace.stderr)
    assert outside <= 5
    assert covered >= 85  # four outliers carry a third of the trace: see `SpectralDensity.trace_of`


def test_a_mean_over_batches_carries_its_sampling_error(x64):
    params, (x, y) = oracles.leaves(), oracles.batch(20)
    batches = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]
    matvec = hj.over_batches(lambda b: hj.hessian(oracles.loss_fn, params, b), batches)
    pairs = hj.spectrum(matvec, KEY, params, k=1, num_matvecs=10).eigenpairs
    assert pairs.data_stderr.shape == (2,)
    assert bool(jnp.all(pairs.data_stderr > 0))


def test_bad_input():
    with pytest.raises(ValueError, match="`num_matvecs` must be at least 5, one more than the pairs wanted"):
        hj.spectrum(lambda v: v, KEY, oracles.tree_like(9), k=2, num_matvecs=4)
    with pytest.raises(ValueError, match="`num_matvecs` must be at most 9, the number of parameters, got 11"):
        hj.spectrum(lambda v: v, KEY, oracles.tree_like(9), k=5, num_matvecs=11)


BLOCKS = {"a_bias": slice(0, 3), "c_scale": slice(3, 4), "d_kernel": slice(4, 10)}


@pytest.mark.smoke
@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_every_leaf_has_the_density_of_its_block(x64, reorthogonalise):
    """With more steps than a leaf has parameters: the nodes that carry weight are its eigenvalues."""
    params, batch = oracles.leaves(), oracles.batch(30)
    densities = hj.spectral_density_by_leaf(
        hj.hessian(oracles.loss_fn, params, batch), KEY, params, 2, 8, reorthogonalise=reorthogonalise
    )
    matrix = np.asarray(oracles.dense_hessian(oracles.loss_fn, params, batch))
    assert list(densities) == list(BLOCKS)  # the empty leaf has no spectrum
    for path, block in BLOCKS.items():
        density, want = densities[path], np.linalg.eigvalsh(matrix[block, block])
        assert float(density.dimension) == len(want)
        heavy = np.asarray(density.nodes[1])[np.asarray(density.weights[1]) > 1e-6]
        assert np.all(np.min(np.abs(heavy[:, None] - want), axis=1) < 1e-9)
        assert np.all(np.min(np.abs(heavy - want[:, None]), axis=1) < 1e-9)
        v = oracles.rows(jax.tree.map(lambda x: x[None], probe_of(params, path)))[0]
        rayleigh = v @ matrix @ v / (v @ v)
        np.testing.assert_allclose(
            jnp.sum(density.weights[1] * density.nodes[1]), rayleigh, rtol=1e-9, atol=1e-12
        )


def probe_of(params, path):
    """The second start vector of a leaf."""
    index = list(params).index(path)
    v = hj.probes.gaussian(jax.random.fold_in(jax.random.fold_in(KEY, index), 1), params)
    return {k: x if k == path else jnp.zeros_like(x) for k, x in v.items()}


def test_leaves_share_what_is_compiled_and_on_device_is_the_same(compilations):
    batch = oracles.batch(30)

    def densities(seed, **options):
        params = oracles.leaves(seed)
        return hj.spectral_density_by_leaf(
            hj.hessian(oracles.loss_fn, params, batch), KEY, params, 2, 4, at_once=2, **options
        )

    for options in ({}, {"on_device": True}):
        jax.block_until_ready(densities(0, **options))
        del compilations[:]
        jax.block_until_ready(densities(1, **options))
        assert not compilations
    oracles.close(densities(0), densities(0, on_device=True), rtol=1e-3, atol=1e-3)


def test_bad_input_by_leaf():
    with pytest.raises(
        ValueError, match="`num_matvecs` must be at most 10, the number of parameters, got 99"
    ):
        hj.spectral_density_by_leaf(lambda v: v, KEY, oracles.leaves(), 1, 99)
    twice = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="a path of its own for every leaf, got a/b, a/b"):
        hj.spectral_density_by_leaf(lambda v: v, KEY, twice, 1, 2)


def test_layers_have_densities_of_their_own(x64):
    like = {"dense": {"kernel": jnp.zeros((2, 2, 2))}, "norm": {"scale": jnp.zeros((2, 2))}}
    weights = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), like)
    matvec = jax.tree_util.Partial(lambda w, v: jax.tree.map(jnp.multiply, w, v), weights)
    found = hj.spectral_density_by_leaf(matvec, KEY, like, 1, 4, reorthogonalise=True, by_layer=True)
    assert list(found) == ["dense/kernel[0]", "dense/kernel[1]", "norm/scale[0]", "norm/scale[1]"]
    assert [float(density.dimension) for density in found.values()] == [4, 4, 2, 2]
    for name, values in {"dense/kernel[1]": [5, 6, 7, 8], "norm/scale[0]": [1, 2]}.items():
        heavy = np.asarray(found[name].nodes[0])[np.asarray(found[name].weights[0]) > 1e-6]
        np.testing.assert_allclose(np.sort(heavy), values, rtol=1e-9)
