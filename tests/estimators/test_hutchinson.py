import itertools

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
@pytest.mark.parametrize("probe", [hj.probes.rademacher, hj.probes.gaussian])
def test_mean_and_stderr_are_those_of_the_samples(x64, probe):
    matvec, like, matrix = problem()
    estimate = hj.trace(matvec, KEY, like, 25, probe=probe)
    probes = [jax.flatten_util.ravel_pytree(probe(jax.random.fold_in(KEY, i), like))[0] for i in range(25)]
    samples = np.array([v @ matrix @ v for v in map(np.asarray, probes)])
    np.testing.assert_allclose(estimate.mean, samples.mean(), rtol=1e-10)
    np.testing.assert_allclose(estimate.stderr, oracles.standard_error(samples), rtol=1e-10)
    assert int(estimate.num_samples) == 25


def test_the_variance_is_the_one_of_the_formula(x64):
    """Var = 2(‖A‖²_F − Σ aᵢᵢ²) for signs: the standard error has the right size, not only the right name."""
    matvec, like, matrix = problem()
    estimate = hj.trace(matvec, KEY, like, 4000, on_device=True)
    want = np.sqrt(2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / 4000)
    np.testing.assert_allclose(estimate.stderr, want, rtol=0.05)
    assert abs(float(estimate.mean) - np.trace(matrix)) < 3 * float(estimate.stderr)


def test_error_bars_cover_the_truth(x64):
    """±2 standard errors from 30 probes hold the trace in 95 % of runs."""
    matvec, like, matrix = problem()
    runs = jax.jit(jax.vmap(lambda key: hj.trace(matvec, key, like, 30, on_device=True)))(
        jax.random.split(KEY, 400)
    )
    covered = np.abs(np.asarray(runs.mean) - np.trace(matrix)) <= 2 * np.asarray(runs.stderr)
    assert 0.92 <= covered.mean() <= 0.98


@pytest.mark.parametrize("precision", [0.06, 0.15, 2.0])  # about 110, 20 and no samples needed
@pytest.mark.parametrize("tolerance", [float, hj.relative])
def test_error_bars_cover_the_truth_where_they_stopped_the_run(x64, precision, tolerance):
    """A run that stops at the first small standard error must not make a habit of stopping too early."""
    matvec, like, matrix = problem()
    truth = np.trace(matrix)
    tol = tolerance(precision if tolerance is hj.relative else precision * truth)
    one = lambda key: hj.trace(matvec, key, like, 500, tol=tol, on_device=True)
    runs = jax.jit(jax.vmap(one))(jax.random.split(KEY, 1000))
    covered = np.abs(np.asarray(runs.mean) - truth) <= 2 * np.asarray(runs.stderr)
    assert covered.mean() >= 0.93
    assert np.max(runs.num_samples) < 500
    assert np.min(runs.num_samples) == 20 or precision == 0.06


def test_leaves_are_the_diagonal_blocks_and_sum_to_the_total(x64):
    matvec, like, matrix = problem()
    parts = hj.trace_by_leaf(matvec, KEY, like, 3000, on_device=True)
    assert list(parts.leaves) == ["empty", "matrix", "scalar", "vector"]
    bounds = np.cumsum([0, 0, 4, 1, 25])
    for (start, stop), part in zip(itertools.pairwise(bounds), parts.leaves.values(), strict=True):
        want = np.trace(matrix[start:stop, start:stop])
        assert abs(float(part.mean) - want) <= 4 * float(part.stderr) + 1e-12
    total = sum(float(part.mean) for part in parts.leaves.values())
    assert total == pytest.approx(float(parts.total.mean), rel=1e-10)
    whole = hj.trace(matvec, KEY, like, 3000, on_device=True)  # another program: the last bit may differ
    assert float(parts.total.mean) == pytest.approx(float(whole.mean), rel=1e-14)


def test_groups_have_the_traces_and_errors_of_their_summed_samples(x64):
    matvec, like, matrix = problem()
    groups = {"small": ["scalar", "matrix"], "all": "*", "vectors": lambda path, leaf: leaf.ndim == 1}
    parts = hj.trace_by_leaf(matvec, KEY, like, 25, groups=groups)
    probes = [
        jax.flatten_util.ravel_pytree(hj.probes.rademacher(jax.random.fold_in(KEY, i), like))[0]
        for i in range(25)
    ]
    samples = np.array([v * (matrix @ v) for v in map(np.asarray, probes)])
    for name, where in {"small": slice(0, 5), "all": slice(0, 30), "vectors": slice(5, 30)}.items():
        group = samples[:, where].sum(axis=1)
        np.testing.assert_allclose(parts.groups[name].mean, group.mean(), rtol=1e-10)
        np.testing.assert_allclose(parts.groups[name].stderr, oracles.standard_error(group), rtol=1e-10)
    alone = hj.trace_by_leaf(matvec, KEY, like, 25)
    assert alone.groups == {}
    oracles.close((alone.total, alone.leaves), (parts.total, parts.leaves), rtol=0, atol=0)


def test_a_diagonal_matrix_is_exact_after_one_probe(x64):
    estimate = hj.trace(lambda v: v * jnp.arange(10.0), KEY, jnp.zeros(10), 1)
    assert float(estimate.mean) == 45
    assert np.isinf(estimate.stderr)  # one sample says nothing of its spread


def test_tol_is_met_in_the_units_asked_for(x64):
    matvec, like, _ = problem()
    estimate = hj.trace(matvec, KEY, like, 100_000, tol=hj.relative(0.02))
    assert float(estimate.stderr) <= 0.02 * abs(float(estimate.mean))
    assert int(estimate.num_samples) < 100_000


def test_a_network_in_float32_is_near_float64():
    params, batch = oracles.leaves(), oracles.batch()
    short = hj.trace_by_leaf(hj.hessian(oracles.loss_fn, params, batch), KEY, params, 50)
    with jax.enable_x64(True):
        exact = np.trace(oracles.dense_hessian(oracles.loss_fn, *jax.tree.map(jnp.float64, (params, batch))))
    assert abs(float(short.total.mean) - exact) < 4 * float(short.total.stderr)


def test_bad_input():
    for number in (2.5, float("nan")):  # the one was cut to 2, the other never came to an end
        with pytest.raises(TypeError, match="num_probes"):
            hj.trace(lambda v: v, KEY, jnp.zeros(3), number)
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        hj.trace(lambda v: v, KEY, jnp.zeros(3), 0)
    twice = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="a path of its own for every leaf, got a/b, a/b"):
        hj.trace_by_leaf(lambda v: v, KEY, twice, 2)
    with pytest.raises(ValueError, match=r'`groups\["encoder"\]` must match at least one leaf'):
        hj.trace_by_leaf(lambda v: v, KEY, {"a": jnp.zeros(2)}, 2, groups={"encoder": "enc/*"})


def test_the_sampling_error_of_the_data(x64):
    """Traces move from sample to sample of the data by as much as `data_stderr` says."""
    params = oracles.leaves()

    def found(seed):
        x, y = oracles.batch(300, seed)
        batches = [(x[i : i + 40], y[i : i + 40]) for i in range(0, 300, 40)]
        matvec = hj.over_batches(lambda b: hj.hessian(oracles.loss_fn, params, b), batches)
        parts = hj.trace_by_leaf(matvec, KEY, params, 12, groups={"both": ["a_bias", "d_kernel"]})
        return [parts.total, parts.leaves["d_kernel"], parts.groups["both"]]

    runs = [found(seed) for seed in range(40)]
    means, errors = (
        np.array([[getattr(x, name) for x in run] for run in runs]) for name in ("mean", "data_stderr")
    )
    np.testing.assert_allclose(errors.mean(axis=0), means.std(axis=0, ddof=1), rtol=0.35)
    alone = hj.hessian(oracles.loss_fn, params, oracles.batch())
    assert hj.trace(alone, KEY, params, 2).data_stderr is None


def test_layers_have_traces_of_their_own(x64):
    """Sums of the same samples: the layers of a leaf come to the leaf's."""
    like = {"dense": {"kernel": jnp.zeros((2, 3, 2)), "bias": jnp.zeros((2, 2))}, "head": jnp.zeros((3, 2))}
    weights = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), like)
    matvec = jax.tree_util.Partial(lambda w, v: jax.tree.map(jnp.multiply, w, v), weights)
    whole = hj.trace_by_leaf(matvec, KEY, like, 3).leaves
    parts = hj.trace_by_leaf(matvec, KEY, like, 3, groups={"all": "*"}, by_layer=True)
    names = [f"dense/{name}[{i}]" for name in ("bias", "kernel") for i in range(2)]
    assert list(parts.leaves) == [*names, "head"]
    np.testing.assert_allclose(parts.leaves["dense/kernel[1]"].mean, np.arange(7.0, 13).sum(), rtol=1e-12)
    for name in ("dense/kernel", "dense/bias"):
        both = parts.leaves[f"{name}[0]"].mean + parts.leaves[f"{name}[1]"].mean
        np.testing.assert_allclose(both, whole[name].mean, rtol=1e-12)
    np.testing.assert_allclose(parts.groups["all"].mean, parts.total.mean, rtol=1e-12)
    named = hj.trace_by_leaf(matvec, KEY, like, 2, by_layer=True, axes={"head": "in layer"}).leaves
    np.testing.assert_allclose([named["head[0]"].mean, named["head[1]"].mean], [9.0, 12.0], rtol=1e-12)


def test_what_is_no_probe_or_no_estimator_of_a_trace():
    matvec, like, _ = problem()
    for sampler in (jax.random.rademacher, jax.random.normal):  # they take a shape
        with pytest.raises(
            TypeError, match=r"`probe` must be .* such as `hessjax.probes.rademacher`, got the f"
        ):
            hj.trace(matvec, KEY, like, 2, probe=sampler)
    with pytest.raises(TypeError, match=r"`estimator\(num_probes\)` must .* `Estimate`"):
        hj.trace(matvec, KEY, like, 8, estimator=lambda n: hj.estimators.lanczos(1))
