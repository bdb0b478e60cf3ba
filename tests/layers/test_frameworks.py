"""Networks as people write them: linen, nnx, and modules that are trees of arrays themselves."""

import dataclasses
from typing import Any

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """As Equinox has it: (out, in), for one example."""

    weight: Any
    bias: Any

    def __call__(self, x):
        return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Perceptron:
    layers: list[Linear]

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


def linen():
    model, tokens = Encoder(), jnp.array([[0, 2, 5], [6, 6, 1]])
    params = model.init(jax.random.key(0), tokens)["params"]
    return lambda p, x: model.apply({"params": p}, x), params, tokens


def of_nnx():
    model_fn, params, state = nnx_model(Image(nnx.Rngs(0)))
    return lambda p, x: model_fn(p, x, state), params, jax.random.normal(jax.random.key(1), (3, 6, 6, 2))


def equinox():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((4, 3), (4,)), ((2, 4), (2,))
    layers = [
        Linear(*(jax.random.normal(k, s) for k, s in zip(keys[2 * i :], shape, strict=False)))
        for i, shape in enumerate(shapes)
    ]
    return lambda p, x: jax.vmap(p)(x), Perceptron(layers), jax.random.normal(keys[0], (5, 3))


@pytest.mark.parametrize("made", [linen, of_nnx, equinox])
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
