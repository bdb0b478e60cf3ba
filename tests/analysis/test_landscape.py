import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import hessjax as hj
from hessjax.flax import linen_loss, nnx_loss

KEY = jax.random.key(0)


def at(params, distances, directions):
    for t, direction in zip(distances, directions, strict=True):
        params = jax.tree.map(lambda x, d, t=t: x + t * d, params, direction)
    return params


@pytest.mark.smoke
@pytest.mark.parametrize("points_at_once", [1, 4, 100])
def test_the_losses_are_those_at_the_points(x64, points_at_once):
    params, data = oracles.leaves(), oracles.batch()
    directions, axes = [oracles.leaves(1), oracles.leaves(2)], ([-1.0, 0.0, 0.5], [0.0, 2.0])
    options = {"points_at_once": points_at_once}
    plane = hj.landscape(oracles.loss_fn, params, data, directions=directions, distances=axes, **options)
    want = [[oracles.loss_fn(at(params, (s, t), directions), data) for t in axes[1]] for s in axes[0]]
    np.testing.assert_allclose(plane.losses, want, rtol=1e-12)
    curve = hj.landscape(oracles.loss_fn, params, data, directions=directions[1], distances=axes[1])
    np.testing.assert_allclose(curve.losses, np.array(want)[1], rtol=1e-12)
    np.testing.assert_allclose(plane.norms, [np.linalg.norm(oracles.rows(jax.tree.map(lambda x: x[None], d)))
                                             for d in directions])  # fmt: skip
    assert np.all(np.isinf(plane.stderr))
    assert plane.num_batches == 1


@pytest.mark.parametrize("name", oracles.CONTAINERS)
def test_vectors_lists_and_blocks_in_any_container(name):
    wrap = oracles.CONTAINERS[name]
    params, first, second = (wrap(oracles.leaves(i, jnp.float32)) for i in range(3))
    block = jax.tree.map(lambda *xs: jnp.stack(xs), first, second)
    options = {"distances": [-0.5, 0.5]}
    several = (
        [first, [first], jax.tree.map(lambda x: x[:1], block)],
        [[first, second], (first, second), block],
    )
    for ways in several:
        results = [
            hj.landscape(oracles.loss_fn, params, oracles.batch(), directions=d, **options) for d in ways
        ]
        for result in results:
            np.testing.assert_array_equal(result.losses, results[0].losses)
    assert results[0].losses.shape == (2, 2)


def test_params_that_are_one_leaf_or_a_pair():
    one = hj.landscape(jnp.sum, jnp.zeros(2), directions=jnp.eye(2), distances=[0.0, 1.0])
    assert one.losses.tolist() == [[0, 1], [1, 2]]
    loss = lambda pair: pair[0] + 10 * pair[1]
    pair = (jnp.float32(0), jnp.float32(0))
    assert hj.landscape(loss, pair, directions=pair, distances=[2.0]).losses.tolist() == [0]
    both = hj.landscape(loss, pair, directions=[(1.0, 0.0), (0.0, 1.0)], distances=[1.0])
    assert both.losses.tolist() == [[11]]


def test_mean_and_stderr_over_ragged_batches(x64):
    params, data, direction = oracles.leaves(), oracles.batch(23), oracles.leaves(1)
    batches = [jax.tree.map(lambda x, a=a: np.asarray(x[a : a + 5]), data) for a in range(0, 23, 5)]
    axes = {"directions": direction, "distances": [-1.0, 0.3, 2.0]}
    whole = hj.landscape(oracles.loss_fn, params, data, **axes)
    parts = hj.landscape(oracles.loss_fn, params, batches=(b for b in batches), **axes)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-12)
    assert parts.num_batches == 5
    each = [hj.landscape(oracles.loss_fn, params, b, **axes).losses for b in batches[:4]]
    even = hj.landscape(oracles.loss_fn, params, batches=batches[:4], **axes)
    np.testing.assert_allclose(even.stderr, np.std(each, axis=0, ddof=1) / 2, rtol=1e-10)


def times_mean(w, x):
    return w * jnp.mean(x)


def test_error_bars_cover_the_truth():
    """±2.36 standard errors (t, 7 degrees of freedom) from 8 ragged batches: 95 % of data sets."""
    rng = np.random.default_rng(0)
    axes = {"directions": np.float32(1), "distances": [1.0]}
    hits = []
    for _ in range(100):
        batches = [rng.normal(1, 1, size).astype(np.float32) for size in [12] * 7 + [5]]
        result = hj.landscape(times_mean, np.float32(0), batches=batches, **axes)
        hits.append(abs(float(result.losses[0]) - 1) < 2.36 * float(result.stderr[0]))
    assert 0.88 < np.mean(hits) <= 0.99


def test_arguments_after_the_batch_and_examples_counted_otherwise():
    loss = lambda w, batch, scale: w * jnp.sum(batch) / jnp.sum(batch > 0, dtype=batch.dtype) * scale
    batches, count = [jnp.array([1.0, 2.0, 0.0]), jnp.array([3.0, 0.0])], lambda b: int(np.sum(b > 0))
    axes = {"directions": jnp.float32(1), "distances": [1.0]}
    result = hj.landscape(loss, jnp.float32(0), 3.0, batches=batches, weights=count, **axes)
    assert float(result.losses[0]) == pytest.approx(6.0)


@pytest.mark.smoke
def test_other_params_directions_and_grids_compile_nothing(compilations):
    def run(seed, distances):
        directions = [oracles.leaves(seed + 1), oracles.leaves(seed + 2)]
        batches = [oracles.batch(4, seed), oracles.batch(4, seed + 1)]
        loss = jax.tree_util.Partial(oracles.loss_fn)
        return hj.landscape(
            loss, oracles.leaves(seed), batches=batches, directions=directions, distances=distances
        )

    run(0, [0.0, 1.0])
    before = len(compilations)
    run(5, [1.0, 2.0])
    assert len(compilations) == before
    run(5, [1.0, 2.0, 3.0])
    assert len(compilations) == before


def test_infinite_and_nan_losses_are_data():
    loss = lambda w, x: jnp.where(w > 1.5, jnp.inf, jnp.sqrt(w)) * jnp.mean(x)
    axes = {"directions": jnp.float32(1), "distances": [-1.0, 1.0, 2.0]}
    for batches in ([jnp.ones(2)], [jnp.ones(2), jnp.ones(1)]):
        losses = hj.landscape(loss, jnp.float32(0), batches=batches, **axes).losses
        np.testing.assert_array_equal(losses, [np.nan, 1, np.inf])


def test_low_precision_params_and_float32_near_float64(x64):
    direction = oracles.leaves(1)
    wide = hj.landscape(oracles.loss_fn, oracles.leaves(), oracles.batch(), directions=direction)
    narrow = hj.landscape(
        oracles.loss_fn, oracles.leaves(dtype=jnp.float32), oracles.batch(), directions=direction
    )
    np.testing.assert_allclose(narrow.losses, wide.losses, rtol=1e-5)
    # A step of 2⁻⁹ is lost on a bfloat16 weight of 1, but not before the rounding to nearest.
    seen = hj.landscape(
        lambda w: w, jnp.ones((), jnp.bfloat16), directions=jnp.float32(2.0**-9), distances=[1.0, 8.0]
    )
    assert seen.losses.tolist() == [1.0, 1.0 + 2.0**-6]
    mixed = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    loss = lambda p: jnp.sum(p["a"].astype(jnp.float64)) + jnp.sum(p["b"])
    assert hj.landscape(loss, mixed, directions=mixed, distances=[1.0]).losses.tolist() == [8.0]


def test_asks_for_full_precision_unless_told_otherwise():
    seen = []

    def loss(w):
        seen.append(jax.config.jax_default_matmul_precision)
        return jnp.sum(w)

    for precision in ("highest", "bfloat16"):
        hj.landscape(loss, jnp.ones(2), directions=jnp.ones(2), distances=[0.0], precision=precision)
    assert seen == ["highest", "bfloat16"]


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))


def squared(out, batch):
    return jnp.mean((out - batch[1]) ** 2)


def test_batchnorm_uses_the_statistics_it_is_given():
    module, data = Normalised(), (jax.random.normal(KEY, (8, 3)), jnp.ones((8, 1)))
    variables = module.init(KEY, data[0], train=False)
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    loss = linen_loss(module, squared, train=False)
    direction = hj.directions.random(KEY, params)
    halves = [jax.tree.map(lambda x, a=a: x[a : a + 5], data) for a in (0, 5)]
    axes = {"directions": direction, "distances": [0.0, 0.5]}
    whole = hj.landscape(loss, params, data, state, **axes).losses
    np.testing.assert_allclose(
        hj.landscape(loss, params, state, batches=halves, **axes).losses, whole, rtol=1e-5
    )
    np.testing.assert_allclose(
        whole, [loss(at(params, [t], [direction]), data, state) for t in (0, 0.5)], rtol=1e-5
    )


def test_nnx_dropout_has_one_key_for_all_points():
    model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    loss, params, state = nnx_loss(model, squared, mode="train")
    data = (jnp.ones((4, 3)), jnp.ones((4, 8)))
    still = jax.tree.map(jnp.zeros_like, params)
    losses = hj.landscape(
        loss, params, data, state, directions=still, points_at_once=3, distances=[0, 1, 2]
    ).losses
    assert len(set(losses.tolist())) == 1


def test_progress_bar_counts_points_and_batches(capsys):
    hj.landscape(jnp.sum, jnp.zeros(2), directions=jnp.ones(2), distances=[0.0, 1.0], progress=True)
    assert "2/2 evaluations" in capsys.readouterr().out
    axes = {"directions": jnp.float32(1), "distances": [0.0, 1.0], "points_at_once": 2, "progress": True}
    hj.landscape(times_mean, jnp.float32(1), batches=[jnp.ones(2)] * 3, **axes)
    assert "3/3 evaluations" in capsys.readouterr().out
    hj.landscape(times_mean, jnp.float32(1), batches=iter([jnp.ones(2)] * 3), **axes)
    assert "3/" in capsys.readouterr().out


def refused(match, error=ValueError, params=None, **options):
    params = {"a": jnp.ones(2), "b": jnp.ones(3)} if params is None else params
    loss = lambda p, *args: sum(jnp.sum(x) for x in jax.tree.leaves(p))
    with pytest.raises(error, match=match):
        hj.landscape(loss, params, **{"directions": params, **options})


def test_bad_input_is_named():
    refused(
        "`directions` must have the structure of `params`, but\n  b: missing", directions={"a": jnp.ones(2)}
    )
    wrong = {"a": jnp.ones(2), "b": jnp.ones(4)}
    refused(r"b: shape \(4,\), must be \(3,\)", directions=wrong)
    refused(r"`directions\[1\]` must have", directions=[{"a": jnp.ones(2), "b": jnp.ones(3)}, wrong])
    refused(
        "must be one or two, got 3. Of a block", directions={"a": jnp.ones((3, 2)), "b": jnp.ones((3, 3))}
    )
    refused("must be one or two, got 0", directions=[])
    refused("`directions` must have real", TypeError, directions={"a": jnp.arange(2), "b": jnp.ones(3)})
    refused("`params` must have real", TypeError, params={"a": jnp.arange(2)})
    refused("one for each of the 1 directions, got 2", distances=[[0.0], [1.0]])
    for bad in ([], [1.0, 0.0], [0.0, 0.0], [0.0, np.inf], [[[0.0]]]):
        refused("must be increasing, finite", distances=bad)
    refused("`points_at_once` must be at least 1, got 0", points_at_once=0)
    refused("at least one batch, got none", batches=[])
    refused("batch 1 has 0", batches=[jnp.ones(1), jnp.ones(0)])
    refused("must be an iterable of batches, got dict", TypeError, batches={"x": jnp.ones(2)})
    with pytest.raises(TypeError, match="`loss_fn` must return one real number"):
        hj.landscape(lambda w: w, jnp.ones(2), directions=jnp.ones(2))
    with pytest.raises(TypeError, match="`loss_fn` must not look at values"):
        hj.landscape(lambda w: jnp.sum(w) * w[0].item(), jnp.ones(2), directions=jnp.ones(2))
