"""Unstructured zeros, made use of as far as that goes: sparse matrices in memory, bit masks on disk."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _tree
from hessjax._core._messages import check_path, checked_number
from hessjax._core._types import Params, Where
from hessjax._core._where import match

HEADER = "hessjax"


class Saved(NamedTuple):
    """What `save_npz` wrote.

    Attributes:
        dense_bytes: what the arrays take in memory.
        bytes: what the file takes.
    """

    dense_bytes: int
    bytes: int


def has_two_axes(path: str, leaf: Any) -> bool:
    """Whether a leaf is a matrix."""
    return jnp.ndim(leaf) == 2


def to_sparse(params: Params, *, where: Where = has_two_axes, least_sparsity: float | int = 0.7) -> Params:
    """The params with their sparse matrices as `BCOO`, which `@` and `jax.experimental.sparse` understand.

    Smaller in memory from a sparsity of 2/3 on: an entry of a matrix takes its own bytes and eight for its
    place. Rarely faster: on a CPU the product with a BCOO matrix is often slower than the dense one even at
    90 % zeros, and flax's layers do not take it. What is faster for certain is `compact`.

    Args:
        params: any pytree of floating-point arrays.
        where: which leaves: a glob over their paths, several, `(path, leaf) -> bool`, or booleans as a tree.
            By default all with two axes.
        least_sparsity: leaves with a smaller fraction of zeros stay dense.

    Returns:
        The same tree with `jax.experimental.sparse.BCOO` leaves, indices sorted; `.todense()` gives a leaf
        back.

    Raises:
        ValueError: if `where` matches no leaf, or `least_sparsity` is no fraction.
        TypeError: if a leaf is not floating-point.

    Cost:
        One pass on the host over the leaves that `where` matches, and another over those that become sparse.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> sparse = hj.to_sparse({"kernel": jnp.eye(4), "bias": jnp.zeros(4)})
        >>> sparse["kernel"].nse, (jnp.arange(4.0) @ sparse["kernel"]).tolist()
        (4, [0.0, 1.0, 2.0, 3.0])
    """
    from jax.experimental.sparse import BCOO  # here, as it alone takes half as long to import as hessjax

    if not 0 <= checked_number("least_sparsity", least_sparsity) <= 1:
        raise ValueError(
            f"`least_sparsity` must be in [0, 1], the fraction of zeros of a leaf, got {least_sparsity}."
        )
    _tree.check_floating(params)

    def convert(leaf: Any, hit: bool) -> Any:
        if not hit or not jnp.size(leaf):
            return leaf
        value = np.asarray(leaf)
        if np.count_nonzero(value) > (1 - least_sparsity) * value.size:
            return leaf
        places = np.argwhere(value)  # eight bytes for every index of a nonzero: not for dense leaves
        data = jnp.asarray(value[tuple(places.T)])
        indices = jnp.asarray(places, jnp.int32)
        return BCOO((data, indices), shape=value.shape, indices_sorted=True, unique_indices=True)

    return jax.tree.map(convert, params, match(params, where))


def save_npz(path: str | os.PathLike[str], params: Params) -> Saved:
    """Write arrays to a compressed npz, one bit for every zero.

    A leaf with zeros is stored as a bit mask and the rest of its numbers, in the order of the array; a bit
    mask with few ones compresses well. Nothing is rounded: `load_npz` returns every number exactly, NaN and
    infinities included; -0.0, which `weights * mask` leaves behind, comes back as 0.0.

    The entry `hessjax` of the file is JSON: path, shape and dtype of every leaf, in order; entry `i` holds
    the numbers of leaf i as bytes, entry `i.mask` its mask (`numpy.packbits`), if it has one.

    Args:
        path: where to write; the name is taken as it is. A file that is there is replaced in one go.
        params: any pytree of arrays of numbers.

    Returns:
        `Saved(dense_bytes, bytes)`: what the arrays take, and what the file takes.

    Raises:
        TypeError: if a leaf is not an array of numbers (a random key).
        ValueError: if two leaves have the same path.

    Cost:
        One compression (deflate) of what is not zero.

    Example:
        >>> import tempfile, numpy as np, hessjax as hj
        >>> params = {"kernel": np.eye(200, dtype=np.float32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = hj.save_npz(f"{folder}/params.npz", params)
        ...     back = hj.load_npz(f"{folder}/params.npz", params)
        >>> saved.dense_bytes, saved.bytes < 2000
        (160000, True)
        >>> bool((back["kernel"] == params["kernel"]).all())
        True
    """
    check_path("path", path)
    _tree.check_leaves(params)
    paths, leaves = _tree.unique_paths(params, "params"), jax.tree.leaves(params)
    values = [_number_array(name, leaf) for name, leaf in zip(paths, leaves, strict=True)]
    header = [
        {"path": name, "shape": x.shape, "dtype": x.dtype.name} for name, x in zip(paths, values, strict=True)
    ]
    entries = {HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8)}
    for i, value in enumerate(values):
        entries |= _encoded(str(i), value)
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    # As an open file: to a name without it numpy appends `.npz`.
    with partial.open("wb") as file:
        np.savez_compressed(file, **entries)  # type: ignore[arg-type]
    partial.replace(target)
    return Saved(sum(x.nbytes for x in values), target.stat().st_size)


def load_npz(path: str | os.PathLike[str], like: Params = None) -> Params:
    """Read what `save_npz` wrote.

    Args:
        path: the file.
        like: a tree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes that are
            expected; None for a flat dict by path.

    Returns:
        The arrays, on the default device.

    Raises:
        ValueError: if the file is of another kind, it holds 64-bit numbers and jax has 32, or its leaves do
            not have the paths, shapes and dtypes of `like`.
    """
    check_path("path", path)
    _tree.check_arrays(like, "like")
    with np.load(path) as file:
        if HEADER not in file:
            raise ValueError(f"`path` must be a file that `save_npz` wrote, but {path} has no header of its.")
        header = json.loads(file[HEADER].tobytes())
        found = {leaf["path"]: _decoded(file, str(i), leaf) for i, leaf in enumerate(header)}
    _check_width(header)
    if like is None:
        return {name: jnp.asarray(x) for name, x in found.items()}
    paths, wanted = _tree.unique_paths(like, "like"), jax.tree.leaves(like)
    got, want = (
        {name: _shown(x) for name, x in found.items()},
        dict(zip(paths, map(_shown, wanted), strict=True)),
    )
    if got != want:
        names = sorted({name for name in {*got, *want} if got.get(name) != want.get(name)})
        lines = (f"  {n}: {got.get(n, 'missing')}, must be {want.get(n, 'missing')}" for n in names)
        raise ValueError(
            "`like` must have the leaves that the file holds, but in the file\n" + "\n".join(lines)
        )
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(found[name]) for name in paths])


def _check_width(header: list[dict[str, Any]]) -> None:
    """Without x64, jax would round float64, and int64 would wrap around, in silence."""
    dtypes = {leaf["path"]: jnp.dtype(leaf["dtype"]) for leaf in header}
    wide = [f"  {name}: {x.name}" for name, x in dtypes.items() if jax.dtypes.canonicalize_dtype(x) != x]
    if wide:
        raise ValueError(
            "`path` must be a file of dtypes that jax can hold as they are, but in the file\n"
            + "\n".join(wide)
            + '\nCall `jax.config.update("jax_enable_x64", True)` first, or save them in 32 bits.'
        )


def _number_array(path: str, leaf: Any) -> np.ndarray:
    is_number = hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    value = np.asarray(leaf) if is_number or isinstance(leaf, (bool, int, float)) else None
    if value is None or value.dtype.hasobject or value.dtype.kind in "SU":
        raise TypeError(f"`params` must have arrays of numbers only, got {path}: a {type(leaf).__name__}.")
    return value


def _encoded(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of one leaf: as bytes, so that bfloat16 passes through a format that does not know it."""
    there = value != 0
    if there.all():
        return {name: np.frombuffer(value.tobytes(), np.uint8)}
    return {name: np.frombuffer(value[there].tobytes(), np.uint8), f"{name}.mask": np.packbits(there)}


def _decoded(file: Any, name: str, leaf: dict[str, Any]) -> np.ndarray:
    dtype, shape = jnp.dtype(leaf["dtype"]), tuple(leaf["shape"])
    numbers = file[name].view(dtype)
    if f"{name}.mask" not in file:
        return numbers.reshape(shape)
    value = np.zeros(shape, dtype)
    # `packbits` fills up the last byte: without the count there would be places too many.
    value.reshape(-1)[np.unpackbits(file[f"{name}.mask"], count=value.size).astype(bool)] = numbers
    return value


def _shown(leaf: Any) -> str:
    return f"{jnp.result_type(leaf).name}{list(jnp.shape(leaf))}"
