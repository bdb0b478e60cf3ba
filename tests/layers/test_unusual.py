"""Leaves and batches that few networks have: numbers, empty leaves, kernels under `vmap`, random keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from tests.oracles import close


def numbers(params, batch):
    """A scale and a shift without axes."""
    return params["scale"] * jnp.tanh(batch @ params["w"]) + params["shift"]


def kernels(params, batch):
    """Several convolutions of the same images: `vmap` gives the kernels' axes another order."""
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    return jnp.tanh(jax.vmap(conv, in_axes=(None, 0), out_axes=1)(batch, params)).sum(axis=(1, 2))


def nothing(params, batch):
    """A product over no inputs."""
    return batch @ params["w"] + batch[:, :0] @ params["none"]


def dropped(params, batch):
    """A random key for every example."""
    x, keys = batch
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
    return jnp.where(kept, x @ params, 0)


def values(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape))


def problem(name):
    x = values(4, 5)
    return {
        "numbers": (numbers, {"scale": values(), "shift": values(), "w": values(5, 3)}, x),
        "kernels": (kernels, values(2, 3, 2, 3), values(4, 5, 2)),
        "an empty leaf": (nothing, {"none": jnp.zeros((0, 3)), "w": values(5, 3)}, x),
        "new keys": (dropped, values(5, 3), (x, jax.random.split(jax.random.key(0), 4))),
        "old keys": (dropped, values(5, 3), (x, jax.random.split(jax.random.PRNGKey(0), 4))),
    }[name]


@pytest.mark.parametrize("name", ["numbers", "kernels", "an empty leaf", "new keys", "old keys"])
def test_unusual_leaves_have_their_gradients(x64, name):
    model_fn, params, batch = problem(name)

    def loss_fn(params, batch):
        return jnp.mean(jnp.sum(jnp.sin(model_fn(params, batch)), axis=1))

    def one(i):
        return jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[i : i + 1], batch))

    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *map(one, range(4)))
    found = hj.layers.capture(loss_fn, params, batch).grads()
    close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["numbers", "kernels", "an empty leaf"])
def test_unusual_leaves_have_the_fishers_trace(x64, name):
    model_fn, params, x = problem(name)
    moments = hj.layers.moments(model_fn, params, [x], likelihood=hj.likelihoods.gaussian)
    E = hj.layers.ekfac(moments, [x])
    jacobian = jax.jacobian(model_fn)(params, x)
    expected = [float(jnp.sum(leaf**2)) / len(x) for leaf in jax.tree.leaves(jacobian)]
    np.testing.assert_allclose([float(jnp.sum(leaf.values)) for leaf in E.leaves], expected, rtol=1e-10)
    back = E.inverse(0.1)(jax.tree.map(lambda v, p: v + 0.1 * p, E(params), params))
    close(back, params, rtol=1e-10)
