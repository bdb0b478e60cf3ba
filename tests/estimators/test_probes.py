import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj
from hessjax._core import _packing
from hessjax.estimators._samples import hashed_signs


@pytest.mark.parametrize("probe", [hj.probes.rademacher, hj.probes.gaussian])
def test_entries_have_mean_zero_variance_one_and_no_correlation(probe, monkeypatch):
    monkeypatch.setattr(_packing, "POOLED", 1000)  # the matrix is drawn by itself, the rest together
    like = {"a": jnp.zeros((100, 100)), "b": jnp.zeros(900), "c": jnp.zeros(900), "s": jnp.zeros(())}
    v = probe(jax.random.key(0), like)
    assert jax.tree.map(jnp.shape, v) == jax.tree.map(jnp.shape, like)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(v)])
    assert abs(flat.mean()) < 4 / np.sqrt(flat.size)
    assert abs(flat.var() - 1) < 0.06
    for shifted in (v["a"].reshape(-1)[:900], v["c"]):
        assert abs(float(jnp.vdot(v["b"], shifted))) < 4 * 30


def test_same_key_same_vector_in_every_container():
    for container in oracles.CONTAINERS.values():
        one, two = (hj.probes.gaussian(jax.random.key(3), container(oracles.leaves())) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, one, two)
        assert jax.tree.structure(one) == jax.tree.structure(container(oracles.leaves()))


def test_probes_are_wide():
    assert hj.probes.rademacher(jax.random.key(0), jnp.zeros(3, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert hj.probes.gaussian(jax.random.key(0), jnp.zeros(3, jnp.float64)).dtype == jnp.float64


def test_hashed_signs_differ_from_seed_to_seed_and_leaf_to_leaf():
    like = {"a": jnp.zeros(4096), "b": jnp.zeros(4096)}
    one, two = (hashed_signs(jnp.int32(seed), like) for seed in (1, 2))
    vectors = [one["a"], one["b"], two["a"], two["b"]]
    gram = np.array([[float(jnp.vdot(x, y)) for x in vectors] for y in vectors])
    assert np.all(np.abs(gram - 4096 * np.eye(4)) < 4 * 64 * (1 - np.eye(4)) + 1e-3)
