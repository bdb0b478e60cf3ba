"""Layers of params over several devices: moments, K-FAC and EKFAC as on one."""

import functools

import jax
import jax.numpy as jnp
import programs
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hessjax as hj


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"in": {"bias": normal(1, 16), "kernel": normal(0, 8, 16) / 3}, "out": normal(2, 16, 8) / 4}
BATCH = normal(3, 16, 8)
LAYOUTS = {
    "data": (P(), P("data")),
    "FSDP": ({"in": {"bias": P("data"), "kernel": P("data")}, "out": P("data", None)}, P("data")),
}


def laid(x):
    """Where axes are explicit a model says itself what is gathered."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, P())) if AxisType.Explicit in mesh.axis_types else x


def model_fn(params, x):
    hidden = jnp.tanh(x @ laid(params["in"]["kernel"]) + laid(params["in"]["bias"])[None])
    return hidden @ laid(params["out"])


def everything(params, x):
    """What is made, and what is read off it."""
    moments = hj.layers.moments(model_fn, params, [x], likelihood=hj.likelihoods.gaussian)
    K, E = hj.layers.kfac(moments), hj.layers.ekfac(moments, [x])
    numbers = [m.trace() for m in (K, E)], K.log_determinant(0.1)
    vectors = [f(params) for f in (K, E, K.inverse(0.1), K.inverse(0.1, "factored"))]
    return (moments.leaves, numbers, K.inverse(0.1).diagonal()), vectors


@functools.cache
def on_one_device():
    return everything(PARAMS, BATCH)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_everything_is_as_on_one_device_and_vectors_lie_where_params_do(kind, layout):
    mesh, (specs, of_batch) = programs.mesh_of(kind), LAYOUTS[layout]
    params, x = programs.placed(PARAMS, mesh, specs), programs.placed(BATCH, mesh, of_batch)
    found = everything(params, x)
    assert programs.difference(found, on_one_device()) < 1e-5
    for vector in found[1]:
        assert programs.apart(vector, params) == []


def square(params, x):
    return jnp.mean(model_fn(params, x) ** 2)


def influences(params, x):
    scores = hj.influence(square, params, [x], [x], inverse=None, microbatch=4)
    return scores, hj.self_influence(square, params, [x], inverse=None)


@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_influence_is_as_on_one_device(kind):
    mesh = programs.mesh_of(kind)
    params, x = programs.placed(PARAMS, mesh, P()), programs.placed(BATCH, mesh, P("data"))
    assert programs.difference(influences(params, x), influences(PARAMS, BATCH)) < 1e-5
