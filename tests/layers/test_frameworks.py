"""Networks as people write them: linen, nnx, and modules that are trees of arrays themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import hessjax as hj
from hessjax.flax import nnx_model
from tests.oracles import close

pytestmark = pytest.mark.promotes


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        mixed = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(x + mixed))), None


class Encoder(nn.Module):
    """Tokens, positions, a scanned stack with remat, a tied head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(1.0), (1, 3, 4))
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        x, _ = nn.scan(nn.remat(Block), **options)()(x, None)
        return embed.attend(nn.RMSNorm()(x).mean(axis=1))


class Image(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))


def linen():
    model, tokens = Encoder(), jnp.array([[0, 2, 5], [6, 6, 1]])
    params = model.init(jax.random.key(0), tokens)["params"]
    return lambda p, x: model.apply({"params": p}, x), params, tokens


def of_nnx():
    model_fn, params, state = nnx_model(Image(nnx.Rngs(0)))
    return lambda p, x: model_fn(p, x, state), params, jax.random.normal(jax.random.key(1), (3, 6, 6, 2))


def equinox():
    """(out, in), for one example: its arrays are the params."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [eqx.nn.Conv1d(2, 3, 2, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.LayerNorm((3, 4))]
    model = eqx.nn.Sequential([*layers, eqx.nn.Lambda(jnp.ravel), eqx.nn.MLP(12, 2, 4, 1, key=keys[1])])
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, jax.random.normal(keys[2], (5, 2, 5))


def haiku():
    hk = pytest.importorskip("haiku")

    def forward(tokens):
        x = hk.Embed(7, 4)(tokens)
        x = hk.LayerNorm(-1, True, True)(
            x + hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal())(x, x, x)
        )
        state, _ = hk.dynamic_unroll(hk.VanillaRNN(3), x.swapaxes(0, 1), jnp.zeros((len(x), 3)))
        return hk.Linear(2)(state[-1])

    model, tokens = hk.without_apply_rng(hk.transform(forward)), jnp.array([[0, 2, 5], [6, 6, 1]])
    return model.apply, model.init(jax.random.key(0), tokens), tokens


@pytest.mark.parametrize("made", [linen, of_nnx, equinox, haiku])
def test_every_leaf_is_covered_and_its_gradients_are_made_up(x64, made):
    model_fn, params, x = made()
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    found = hj.layers.coverage(model_fn, params, x)
    assert not found.reasons, found.reasons

    def loss_fn(params, x):
        return jnp.mean(jnp.sum(jnp.sin(model_fn(params, x)), axis=-1))

    grads = hj.layers.capture(loss_fn, params, x).grads()
    close(grads, hj.per_example_grads(loss_fn, params, x), rtol=1e-9, atol=1e-12)
    moments = hj.layers.moments(model_fn, params, [x], likelihood=hj.likelihoods.categorical)
    product = hj.layers.kfac(moments)(params)
    assert jax.tree.structure(product) == jax.tree.structure(params)
