"""Running statistics taken anew: those of the whole data set, however it is cut into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from flax import nnx

from hessjax.flax import linen_recalibrate, nnx_recalibrate

DATA = np.random.default_rng(0).normal(2.0, 3.0, size=(11, 4, 5)).astype("f")


class Linen(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, momentum=self.momentum, name="first")(x)
        x = nn.relu(nn.Dense(3)(x))
        return nn.BatchNorm(not train, momentum=self.momentum, name="second")(x)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.BatchNorm(5, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.dense = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.dense(self.first(x))))


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(Linen().init, jax.random.key(0), DATA)
    variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.7, x.dtype), shapes)
    variables["params"]["Dense_0"]["kernel"] = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), "f")
    return variables


def cut(*ends):
    return np.split(DATA, ends)


def test_the_first_is_exact_for_any_batches_and_momentum(variables):
    for batches, momentum in ((cut(4, 8), 0.9), (cut(1, 10), 0.99), (cut(), 0.0)):
        stats = linen_recalibrate(Linen(momentum), variables, batches, train=True)["batch_stats"]
        np.testing.assert_allclose(stats["first"]["mean"], DATA.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(stats["first"]["var"], DATA.var((0, 1)), rtol=1e-5)


def test_float64_against_numpy(x64, variables):
    data = [batch.astype(float) for batch in cut(3, 7)]
    module = nn.BatchNorm(param_dtype=jnp.float64)
    wide = {
        "params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
        "batch_stats": {"mean": jnp.ones(5), "var": jnp.ones(5)},
    }
    stats = linen_recalibrate(module, wide, data, use_running_average=False)["batch_stats"]
    whole = np.concatenate(data)
    oracles.close(stats, {"mean": whole.mean((0, 1)), "var": whole.var((0, 1))}, rtol=1e-12, atol=0)


def test_a_later_one_pools_what_training_sees(variables):
    stats = linen_recalibrate(Linen(), variables, cut(4, 8), train=True)["batch_stats"]
    seen = []
    for batch in cut(4, 8):
        first = {"mean": batch.mean((0, 1)), "var": batch.var((0, 1))}
        state = {**variables, "batch_stats": {**variables["batch_stats"], "first": first}}
        _, captured = Linen().apply(state, batch, capture_intermediates=True)
        seen.append(np.maximum(captured["intermediates"]["Dense_0"]["__call__"][0], 0))
    seen = np.concatenate(seen)
    np.testing.assert_allclose(stats["second"]["mean"], seen.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(stats["second"]["var"], seen.var((0, 1)), rtol=1e-4)


def test_in_one_batch_the_running_statistics_are_the_batchs(variables):
    new = linen_recalibrate(Linen(), variables, [DATA], train=True)
    trained, _ = Linen().apply(new, DATA, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(Linen().apply(new, DATA), trained, rtol=1e-4, atol=1e-5)
    assert new["params"] is variables["params"]


def test_nothing_is_left_of_the_old_ones(variables):
    broken = {**variables, "batch_stats": jax.tree.map(lambda x: x * jnp.nan, variables["batch_stats"])}
    one, other = (linen_recalibrate(Linen(), v, cut(5), train=True) for v in (variables, broken))
    oracles.close(one["batch_stats"], other["batch_stats"], rtol=0, atol=0)


def test_nnx_is_linen(variables):
    model = Nnx()
    model.dense.kernel[...] = variables["params"]["Dense_0"]["kernel"]
    model.dense.bias[...] = variables["params"]["Dense_0"]["bias"]
    for norm, name in ((model.first, "first"), (model.second, "second")):
        norm.scale[...], norm.bias[...] = (variables["params"][name][leaf] for leaf in ("scale", "bias"))
    before = nnx.state(model, nnx.BatchStat)["first"]["mean"][...].copy()
    stats = nnx_recalibrate(model, cut(4, 8))
    want = linen_recalibrate(Linen(), variables, cut(4, 8), train=True)["batch_stats"]
    np.testing.assert_array_equal(model.first.mean[...], before)
    nnx.update(model, stats)
    assert model.first.momentum == 0.99
    for norm, name in ((model.first, "first"), (model.second, "second")):
        np.testing.assert_allclose(norm.mean[...], want[name]["mean"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.var[...], want[name]["var"], rtol=1e-4, atol=1e-5)


class Switched(nnx.Module):
    """Told its mode on every call; one BatchNorm is frozen, one is never called."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.frozen = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
        self.last, self.unused = nnx.BatchNorm(5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
        for norm in (self.frozen, self.unused):
            norm.mean[...], norm.var[...] = jnp.full(5, 0.7), jnp.full(5, 0.25)

    def __call__(self, x, train=False):
        return self.last(self.frozen(x), use_running_average=not train)


class FrozenLinen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=True, name="frozen", epsilon=0.0)(x)
        return nn.BatchNorm(not train, name="last")(x)


def test_nnx_changes_only_those_in_training_mode():
    old = nnx.state(Switched(), nnx.BatchStat)
    new = nnx_recalibrate(Switched(), cut(4, 8), train=True)
    for name in ("frozen", "unused"):
        oracles.close(nnx.to_pure_dict(new)[name], nnx.to_pure_dict(old)[name], rtol=0, atol=0)
    seen = (DATA - 0.7) / np.sqrt(0.25 + 1e-5)  # the frozen one works with its own statistics meanwhile
    np.testing.assert_allclose(new["last"]["mean"][...], seen.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(new["last"]["var"][...], seen.var((0, 1)), rtol=1e-5)


def test_nnx_without_training_mode_is_refused():
    evaluated = Nnx()
    evaluated.eval()
    for model in (Switched(), evaluated):
        with pytest.raises(
            ValueError, match=r"into training mode, by `model.train\(\)` or such as `train=True`"
        ):
            nnx_recalibrate(model, [DATA])
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        nnx_recalibrate(Nnx(), [])


def test_nnx_forgets_a_nan():
    model = Nnx()
    model.first.mean[...] = model.first.var[...] = jnp.full(5, jnp.nan)
    new = nnx_recalibrate(model, iter(cut(4, 8)))
    np.testing.assert_allclose(new["first"]["mean"][...], DATA.mean((0, 1)), rtol=1e-5)


def test_linen_keeps_and_uses_a_frozen_one():
    variables = FrozenLinen().init(jax.random.key(0), DATA)
    variables["batch_stats"]["frozen"] = {"mean": jnp.full(5, 0.7), "var": jnp.full(5, 0.25)}
    new = linen_recalibrate(FrozenLinen(), variables, cut(4, 8), train=True)["batch_stats"]
    oracles.close(new["frozen"], variables["batch_stats"]["frozen"], rtol=0, atol=0)
    np.testing.assert_allclose(new["last"]["mean"], ((DATA - 0.7) / 0.5).mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(new["last"]["var"], (DATA / 0.5).var((0, 1)), rtol=1e-5)


def test_nothing_compiles_for_other_weights(variables, compilations):
    linen_recalibrate(Linen(), variables, cut(4, 8), train=True)
    others = jax.tree.map(lambda x: 2 * x, variables)
    del compilations[:]
    linen_recalibrate(Linen(), others, cut(4, 8), train=True)
    assert not compilations


def test_bad_input(variables):
    with pytest.raises(ValueError, match='`variables` must hold the collection "batch_stats"'):
        linen_recalibrate(Linen(), {"params": variables["params"]}, [DATA], train=True)
    with pytest.raises(ValueError, match="must put BatchNorm into training mode"):
        linen_recalibrate(Linen(), variables, [DATA])
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        linen_recalibrate(Linen(), variables, [], train=True)
    with pytest.raises(ValueError, match="must put BatchNorm into training mode"):
        nnx_recalibrate(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), [DATA])
