"""Sparse matrices and sparse files: every number comes back, and the sizes are as told."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.sparse import BCOO

import hessjax as hj


def sparse_array(shape, sparsity, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) >= sparsity)).astype(dtype)


def params():
    return {
        "bias": jnp.zeros(3),
        "dense": jnp.asarray(sparse_array((5, 4), 0.3)),
        "kernel": jnp.asarray(sparse_array((40, 30), 0.9)),
        "conv": jnp.asarray(sparse_array((3, 3, 4, 4), 0.9)),
    }


def test_matrices_with_enough_zeros_become_sparse():
    sparse = hj.to_sparse(params())
    assert [name for name, x in sparse.items() if isinstance(x, BCOO)] == ["kernel"]
    assert sparse["bias"] is not None
    x = jnp.asarray(sparse_array((6, 40), 0.0))
    oracles.close(
        jax.jit(lambda p, x: x @ p)(sparse["kernel"], x), x @ params()["kernel"], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(sparse["kernel"].todense(), params()["kernel"])
    more = hj.to_sparse(params(), where=["conv", "dense"], least_sparsity=0.0)
    assert [name for name, x in more.items() if isinstance(x, BCOO)] == ["conv", "dense"]
    np.testing.assert_array_equal(more["conv"].todense(), params()["conv"])


def test_an_array_of_zeros():
    sparse = hj.to_sparse({"w": jnp.zeros((4, 3))})["w"]
    assert sparse.nse == 0
    np.testing.assert_array_equal(jnp.ones((2, 4)) @ sparse, np.zeros((2, 3)))


@pytest.mark.parametrize("wrap", oracles.CONTAINERS.values(), ids=oracles.CONTAINERS)
def test_any_container_comes_back(wrap, tmp_path):
    tree = wrap(oracles.leaves())
    hj.save_npz(tmp_path / "params.npz", tree)
    back = hj.load_npz(tmp_path / "params.npz", tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    oracles.close(back, tree, rtol=0, atol=0)


def test_every_number_comes_back(tmp_path, x64):
    odd = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 0.0, 2.0])
    tree = {str(dtype): jnp.asarray(odd, dtype) for dtype in ("float16", "bfloat16", "float32", "float64")}
    tree |= {"int": jnp.array([0, 3, 0]), "bool": jnp.array([True, False]), "empty": jnp.zeros((0, 3))}
    tree |= {"scalar": jnp.zeros(()), "transposed": np.asfortranarray(sparse_array((4, 3), 0.5))}
    hj.save_npz(tmp_path / "x", tree)
    back = hj.load_npz(tmp_path / "x")
    assert list(back) == sorted(tree)
    for name, x in tree.items():
        assert back[name].dtype == x.dtype
        assert back[name].shape == x.shape
        np.testing.assert_array_equal(*(np.asarray(a).astype(float) for a in (back[name], x)), err_msg=name)


def test_what_jax_would_round_is_refused(tmp_path):
    tree = {"third": np.array([1 / 3, 0.0]), "count": np.array([2**40]), "fine": jnp.ones(2)}
    hj.save_npz(tmp_path / "x", tree)
    for like in (None, tree, jax.tree.map(jnp.asarray, {**tree, "count": np.zeros(1, np.int32)})):
        with pytest.raises(
            ValueError, match="as they are, but in the file\n  count: int64\n  third: float64\n.*x64"
        ):
            hj.load_npz(tmp_path / "x", like)
    with jax.enable_x64(True):
        back = hj.load_npz(tmp_path / "x", tree)
        assert (back["third"][0], back["count"][0]) == (1 / 3, 2**40)


def test_only_what_becomes_sparse_is_searched(monkeypatch):
    searched, argwhere = [], np.argwhere
    monkeypatch.setattr(np, "argwhere", lambda x: searched.append(x.shape) or argwhere(x))
    tree = {"dense": jnp.ones((5, 4)), "other": jnp.zeros((7, 6)), "kernel": jnp.eye(8)}
    sparse = hj.to_sparse(tree, where=["dense", "kernel"])
    assert searched == [(8, 8)]
    assert sparse["other"] is tree["other"]


@pytest.mark.parametrize(("sparsity", "most"), [(0.0, 1.0), (0.9, 0.16), (0.99, 0.02)])
def test_the_sizes(sparsity, most, tmp_path):
    tree = {"kernel": sparse_array((300, 300), sparsity)}
    saved = hj.save_npz(tmp_path / "x.npz", tree)
    assert saved.dense_bytes == 360_000
    assert saved.bytes == (tmp_path / "x.npz").stat().st_size < most * saved.dense_bytes
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"`least_sparsity` must be in \[0, 1\]"):
        hj.to_sparse(params(), least_sparsity=90)
    with pytest.raises(TypeError, match="must have real floating-point leaves only"):
        hj.to_sparse({"table": jnp.zeros((3, 3), jnp.int32)})
    with pytest.raises(TypeError, match="`params` must have arrays of numbers only, got key"):
        hj.save_npz(tmp_path / "x", {"key": jax.random.key(0)})
    hj.save_npz(tmp_path / "x", {"w": jnp.ones(3), "extra": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"extra: float32\[2\], must be missing\n  w: float32\[3\], must be .*\[4\]"
    ):
        hj.load_npz(tmp_path / "x", {"w": jnp.ones(4)})
    np.savez(tmp_path / "other.npz", w=np.ones(3))
    with pytest.raises(ValueError, match="`path` must be a file that `save_npz` wrote"):
        hj.load_npz(tmp_path / "other.npz")
