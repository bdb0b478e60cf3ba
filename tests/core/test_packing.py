import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from hessjax._core import _packing
from hessjax._core._packing import Packing


@pytest.mark.parametrize("pooled", [0, 3, 2**22])
@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_there_and_back_in_every_container(container, pooled, monkeypatch):
    monkeypatch.setattr(_packing, "POOLED", pooled)
    params = oracles.CONTAINERS[container](oracles.leaves())
    there = Packing.of(params)
    packed = there.pack(params)
    assert sum(array.size for array in packed) == there.size == 10
    assert len(packed) == {0: 4, 3: 3, 2**22: 1}[pooled]
    oracles.close(there.unpack(packed), params, rtol=0, atol=0)
    block = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), packed)
    double = jax.tree.map(lambda x: x[1], there.unpack_block(block))
    oracles.close(double, jax.tree.map(lambda x: 2 * x, params), rtol=0, atol=0)


def test_mixed_dtypes_keep_apart_and_are_wide(x64):
    params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(3, jnp.float32), "double": jnp.ones(4)}
    packed = Packing.of(params).pack(params)
    assert [(x.dtype, x.size) for x in packed] == [(np.dtype("float32"), 5), (np.dtype("float64"), 4)]
    assert Packing.of(params).unpack(packed)["half"].dtype == jnp.float32


def test_equal_structures_have_equal_packings_which_jit_can_tell():
    one, two = Packing.of(oracles.leaves(0)), Packing.of(oracles.leaves(1))
    assert one == two
    assert hash(one) == hash(two)
    assert jax.tree.leaves(one) == []
    assert Packing.of({"a": jnp.zeros(2)}) != Packing.of({"a": jnp.zeros(3)})
    kinds = [Packing.of(make(oracles.leaves())) for make in oracles.CONTAINERS.values()]
    assert len(set(kinds)) == len(kinds)
    assert all((a == b) == (a is b) for a in kinds for b in kinds)
