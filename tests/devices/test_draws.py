"""What is drawn does not depend on where it lies, and is never whole on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.sharding import PartitionSpec as P

import hessjax as hj
from hessjax._core import _packing

LIKE = {"a": jnp.zeros((16, 32)), "b": jnp.zeros(8), "c": jnp.zeros(()), "d": jnp.zeros((4, 8, 4))}
SPECS = {"a": P("data", "model"), "b": P("data"), "c": P(), "d": P(None, "model", None)}
KEY = jax.random.key(5)


def drawn(like):
    return hj.probes.gaussian(KEY, like), hj.probes.rademacher(KEY, like)


@pytest.mark.parametrize("pooled", [2**22, 100], ids=["small", "large"])
@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_same_numbers_as_on_one_device(kind, pooled, monkeypatch):
    monkeypatch.setattr(_packing, "POOLED", pooled)
    here = drawn(LIKE)
    with programs.recorded() as texts:
        there = drawn(programs.placed(LIKE, programs.mesh_of(kind), SPECS))
    assert not [c for text in texts for c in programs.collectives(text)]
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_sharded_leaf_is_drawn_where_it_lies():
    like = programs.placed(LIKE, programs.mesh_of("Explicit"), SPECS)
    added = jax.jit(lambda like: jax.tree.map(jnp.add, hj.probes.gaussian(KEY, like), like))
    assert added.lower(like).compile().memory_analysis().temp_size_in_bytes < 16 * 32 * 4
    assert added(like)["a"].sharding.spec == SPECS["a"]
