"""Sparse matrices and sparse files: every number comes back, and the sizes are as told."""

import io
import json
import os
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import programs
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import PartitionSpec as P

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


@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_arrays_come_back_to_where_they_lay(tmp_path, kind):
    mesh = programs.mesh_of(kind)
    tree = {"w": sparse_array((8, 6), 0.5), "b": jnp.arange(3.0)}
    placed = programs.placed(tree, mesh, {"w": P("data", "model"), "b": P()})
    hj.save_npz(tmp_path / "x", placed)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)
    for like in (placed, structs):
        back = hj.load_npz(tmp_path / "x", like)
        for name, x in tree.items():
            assert back[name].sharding == placed[name].sharding
            np.testing.assert_array_equal(back[name], x)
    assert not hj.load_npz(tmp_path / "x", {"w": jnp.zeros((8, 6)), "b": np.zeros(3, np.float32)})[
        "w"
    ].committed


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


# -- dtypes and names ------------------------------------------------------------------------------

DTYPES = ["bool", "int4", "uint4", "int8", "uint16", "int32", "float16", "bfloat16", "float32", "complex64",
          "float8_e4m3fn", "float8_e5m2"]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 5), (2, 2, 9)])
def test_every_dtype_and_shape_comes_back(dtype, shape, tmp_path):
    dense = (np.arange(1, np.prod(shape, dtype=int) + 1) % 7 + 1).reshape(shape).astype(jnp.dtype(dtype))
    tree = {"dense": dense, "holes": np.where(np.indices(shape).sum(0) % 2, dense, 0).astype(dense.dtype)}
    hj.save_npz(tmp_path / "x", tree)
    for back in (hj.load_npz(tmp_path / "x"), hj.load_npz(tmp_path / "x", tree)):
        for name, want in tree.items():
            assert (back[name].dtype, back[name].shape) == (want.dtype, want.shape)
            assert np.asarray(back[name]).tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", ["i2", "u4", "f2", "f4", "c8"])
def test_another_byte_order_comes_back_as_the_same_numbers(kind, tmp_path):
    want = np.array([[1, 0, 3], [258, 0, 6]], f"<{kind}")
    for order in "<>":
        hj.save_npz(
            tmp_path / "x",
            {"w": want.astype(f"{order}{kind}"), "dense": want[:, ::2].astype(f"{order}{kind}")},
        )
        back = hj.load_npz(tmp_path / "x")
        np.testing.assert_array_equal(back["w"], want)
        np.testing.assert_array_equal(back["dense"], want[:, ::2])
        assert hj.load_npz(tmp_path / "x", {"w": want, "dense": want[:, ::2]})["w"].dtype == want.dtype


def test_any_memory_layout_and_pythons_numbers(tmp_path):
    array = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    tree = {"f": np.asfortranarray(array), "step": array[::-2, 1::3], "n": 3, "x": 0.5, "b": True}
    hj.save_npz(tmp_path / "x", tree)
    back = hj.load_npz(tmp_path / "x", tree)
    for name, want in tree.items():
        np.testing.assert_array_equal(back[name], want)
    assert back["n"].dtype == jnp.asarray(3).dtype


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "", ".", "file", "hessjax", "0.mask", "ü\n\0\ud800", "n" * 5000]
)
def test_any_name_comes_back(name, tmp_path):
    hj.save_npz(tmp_path / "x", {name: jnp.ones(2), "other": jnp.zeros(2)})
    assert set(hj.load_npz(tmp_path / "x")) == {
        jax.tree_util.keystr((jax.tree_util.DictKey(name),), simple=True) or ".",
        "other",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "leaf",
    [
        np.array([object()]), np.array(["text"]), np.array([b"x"]), np.array(["2026-01-01"], "datetime64[D]"),
        np.zeros(2, [("a", "f4")]), np.zeros(2, np.longdouble), 10**30, "text", object(), jax.random.key(0),
    ],
    ids=lambda leaf: str(getattr(leaf, "dtype", type(leaf).__name__)),
)  # fmt: skip
def test_what_could_not_be_loaded_is_not_saved(leaf, tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(TypeError, match="`params` must have .* got w: "):
        hj.save_npz(tmp_path / "x", {"fine": jnp.ones(2), "w": leaf})
    assert (tmp_path / "x").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


# -- damaged and made-up files ----------------------------------------------------------------------


def small():
    return {"holes": jnp.array([0.0, 1.5, 0.0, 2.5]), "full": jnp.arange(1, 7, dtype=jnp.int32).reshape(2, 3),
            "zero": jnp.zeros((3, 1), ml_dtypes.bfloat16)}  # fmt: skip


def test_a_damaged_file_is_right_or_an_error(tmp_path):
    """Cut anywhere, any byte changed: the same arrays, or a ValueError that names the file."""
    file = tmp_path / "x.npz"
    hj.save_npz(file, small())
    good, wrong, right = file.read_bytes(), 0, 0
    changed = [good[:n] for n in range(0, len(good), 7)]
    for i in range(0, len(good), 2):
        flip = (1, 0x80, 0xFF)[i % 3]
        changed.append(good[:i] + bytes([good[i] ^ flip]) + good[i + 1 :])
    for content in changed:
        file.write_bytes(content)
        try:
            back = hj.load_npz(file)
        except ValueError as error:
            assert "`path` must be a file that `save_npz` wrote" in str(error)  # noqa: PT017
            wrong += 1
        else:
            assert list(back) == sorted(small())
            jax.tree.map(np.testing.assert_array_equal, back, small())
            right += 1
    assert wrong > len(good) / 4
    assert right  # dates and the like


def rewritten(file, change):
    """The file with its header or its entries changed, all checksums right."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: np.load(io.BytesIO(archive.read(name))) for name in archive.namelist()}
    header = json.loads(entries.pop("hessjax.npy").tobytes())
    header = change(header, entries) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"hessjax.npy": np.frombuffer(text, np.uint8), **entries}.items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(name, content.getvalue())


def set_leaf(index, **fields):
    return lambda header, entries: header[index].update(fields)


def set_entry(name, array):
    return lambda header, entries: entries.update({f"{name}.npy": np.asarray(array)})


def remove(name):
    return lambda header, entries: entries.pop(f"{name}.npy") is None


BAD = {
    "many entries": set_leaf(0, shape=[500_000_000]),
    "many more": set_leaf(1, shape=[2**39]),
    "overflowing": set_leaf(1, shape=[2**39, 2**39, 2**39]),
    "minus one": set_leaf(0, shape=[-1]),
    "minus one, masked": set_leaf(1, shape=[-1]),
    "two minus": set_leaf(1, shape=[-2, -2]),
    "fraction": set_leaf(1, shape=[4.0]),
    "true": set_leaf(1, shape=[True, 4]),
    "no list": set_leaf(1, shape="4"),
    "null": set_leaf(1, shape=None),
    "deep": set_leaf(1, shape=[1] * 60 + [4]),
    "other size": set_leaf(0, shape=[3, 3]),
    "object": set_leaf(1, dtype="object"),
    "text": set_leaf(1, dtype="U4"),
    "big-endian": set_leaf(1, dtype=">f4"),
    "no dtype": set_leaf(1, dtype="float31"),
    "wider": set_leaf(1, dtype="float64"),
    "list of dtypes": set_leaf(1, dtype=["float32"]),
    "same path": set_leaf(1, path="full"),
    "path no text": set_leaf(1, path=3),
    "no path": lambda header, entries: header[0].pop("path") and None,
    "one leaf less": lambda header, entries: header[:-1],
    "one leaf more": lambda header, entries: [*header, {"path": "x", "shape": [2], "dtype": "int8"}],
    "no leaves": lambda header, entries: b"[]",
    "a dict": lambda header, entries: {"a": 1},
    "no json": lambda header, entries: b"{",
    "nested": lambda header, entries: b"[" * 200_000,
    "not utf-8": lambda header, entries: b"\xff\xfe",
    "a number": lambda header, entries: b"3",
    "short mask": set_entry("1.mask", np.zeros(0, np.uint8)),
    "long mask": set_entry("1.mask", np.zeros(2, np.uint8)),
    "mask of more": set_entry("1.mask", np.array([0xFF], np.uint8)),
    "mask of fewer": set_entry("1.mask", np.array([0x00], np.uint8)),
    "mask of floats": set_entry("1.mask", np.zeros(1)),
    "short numbers": set_entry("1", np.zeros(5, np.uint8)),
    "long numbers": set_entry("1", np.zeros(12, np.uint8)),
    "other numbers": set_entry("0", np.zeros(6, np.int32)),
    "two axes": set_entry("0", np.zeros((4, 6), np.uint8)),
    "no mask": remove("1.mask"),
    "no numbers": remove("0"),
    "unknown entry": set_entry("x", np.zeros(1, np.uint8)),
}  # fmt: skip


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_made_up_file_is_an_error_and_allocates_little(change, tmp_path):
    file = tmp_path / "x.npz"
    hj.save_npz(file, small())
    rewritten(file, change)
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match="`path` must be a file that `save_npz` wrote, and whole, but in `"
        ):
            hj.load_npz(file)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_other_files_are_errors(tmp_path):
    for content in (b"", b"PK", b"a text", b"\x93NUMPY", b"\x80\x04K\x03."):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="`path` must be a file that `save_npz` wrote"):
            hj.load_npz(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        hj.load_npz(tmp_path / "none")
    for path, message in (("", "an empty string"), ("gs://bucket/x", "the URL `gs://bucket/x`")):
        for call in (lambda p: hj.save_npz(p, small()), hj.load_npz):
            with pytest.raises(ValueError, match=f"`path` must .*{message}"):
                call(path)


# -- how it is written ------------------------------------------------------------------------------


def test_links_modes_and_homes(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "x.npz", tmp_path / "link"
    target.write_text("")
    target.chmod(0o640)
    link.symlink_to(target)
    hj.save_npz(link, small())
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    jax.tree.map(np.testing.assert_array_equal, hj.load_npz(link), small())
    mask = os.umask(0o027)
    monkeypatch.setenv("HOME", str(tmp_path))
    hj.save_npz("~/new", small())
    os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert len(hj.load_npz("~/new")) == 3
    with pytest.raises(IsADirectoryError):
        hj.save_npz(tmp_path / "there", small())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["link", "new", "there", "x.npz"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    hj.save_npz(tmp_path / "x", small())
    before = (tmp_path / "x").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        hj.save_npz(tmp_path / "x", {"w": jnp.ones(9)})
    assert (tmp_path / "x").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
