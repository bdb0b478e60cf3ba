import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.sharding import PartitionSpec as P

from hessjax._core._digests import digests

X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
KINDS = ["bool", "int4", "uint4", "int8", "uint16", "float8_e4m3fn", "float16", "bfloat16", "complex64"]


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_jax_agree(kind):
    x = jnp.asarray(X).astype(kind)
    ours, theirs = digests([x, np.asarray(x)])
    assert ours == theirs


def test_wide_numbers_are_not_rounded(x64):
    for kind in ("float64", "int64", "complex128"):
        x = X.astype(kind) * 1e3
        same = [jnp.asarray(x), x, x.astype(x.dtype.newbyteorder())]
        assert len(set(digests(same))) == 1
        nudged = x.copy()
        nudged.view(np.uint8)[0, 0, 0] ^= 1
        assert digests([nudged]) != digests([x])


@pytest.mark.parametrize("kind", programs.MESH_KINDS)
@pytest.mark.parametrize("spec", [P("data"), P("data", None, "model"), P(("data", "model")), P()])
def test_on_every_mesh_the_same_and_nothing_is_gathered(kind, spec):
    mesh = programs.mesh_of(kind)
    with programs.recorded() as texts:
        found = digests([programs.placed(X, mesh, spec)])
    assert found == digests([X])
    assert [
        c for c in map(programs.collectives, texts) for c in c if c.kind != "all-reduce" or c.bytes > 8
    ] == []


def test_every_bit_and_every_place_counts():
    changed = [X, X[::-1], np.roll(X, 1), -X, X.reshape(6, 8, 4)[::-1].reshape(X.shape)]
    for i in range(32):
        x = X.copy()
        x.view(np.uint32)[3, 2, 1] ^= np.uint32(1) << np.uint32(i)
        changed.append(x)
    assert len(set(digests(changed))) == len(changed)


def test_of_any_shape():
    odd = [np.zeros(()), np.zeros((0, 3)), X.T, np.float64(2), np.int8(3), jnp.zeros(5)[1]]
    assert digests(odd) == digests([np.array(x) for x in odd])
