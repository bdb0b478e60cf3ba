"""Unstructured zeros, made use of as far as that goes: sparse matrices in memory, bit masks on disk."""

import collections
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _archive, _files, _processes, _tree
from hessjax._core._messages import checked_number
from hessjax._core._types import Params, Where, readable_defaults
from hessjax._core._where import match


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


@readable_defaults
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
        ValueError: if `where` matches no leaf, `least_sparsity` is no fraction, or a leaf spans processes.
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
    _processes.check_here(params, "params")

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
        path: where to write; the name is taken as it is. A file that is there is replaced in one go, once the
            new one is on disk; a link stays a link, and the mode is kept.
        params: any pytree of arrays of numbers. Python's numbers are saved as the arrays that jax makes of
            them, arrays of another byte order in the machine's own. If they span processes, all of these make
            the call, and the first of them writes the file.

    Returns:
        `Saved(dense_bytes, bytes)`: what the arrays take, and what the file takes.

    Raises:
        TypeError: if a leaf is not an array of numbers that jax has (a random key, text, long doubles).
        ValueError: if two leaves have the same path; `path` is empty, or a URL.
        OSError: if the file cannot be written; one that was there is then as it was.

    Cost:
        One compression (deflate) of what is not zero; of memory one leaf at a time. One that spans processes
        is for that time whole on each of its devices: where that is too much, save the params by Orbax.

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
    target = _files.local_path("path", path)
    paths, leaves = _tree.unique_paths(params, "params"), jax.tree.leaves(params)
    if not leaves:
        raise ValueError("`params` must hold at least one array, got a tree without any.")
    arrays = [_number_array(name, leaf) for name, leaf in zip(paths, leaves, strict=True)]
    header = [
        {"path": name, "shape": x.shape, "dtype": x.dtype.name} for name, x in zip(paths, arrays, strict=True)
    ]
    return Saved(sum(x.nbytes for x in arrays), _written(target, header, arrays))


def _written(target: Path, header: Any, arrays: list[Any]) -> int:
    """Write the file, by the first of the processes that hold the arrays; its bytes."""
    group, values = _processes.holders(arrays), map(_processes.on_host, arrays)

    def write() -> int:
        entries = (entry for i, value in enumerate(values) for entry in _encoded(str(i), value).items())
        try:
            # As an open file: to a name without it numpy appends `.npz`.
            _files.write_whole(target, lambda file: _archive.write_archive(file, header, entries))
        finally:
            collections.deque(values, maxlen=0)  # or the others would wait for this one in the rest of them
        return target.stat().st_size

    if not group.is_first:
        collections.deque(values, maxlen=0)
    return group.from_first(write)


def load_npz(path: str | os.PathLike[str], like: Params = None) -> Params:
    """Read what `save_npz` wrote.

    A file is not trusted: sizes and checksums are compared, and nothing is allocated that the file cannot
    fill, so that one that is damaged or made up is an error.

    Args:
        path: the file.
        like: a tree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes that are
            expected, and the shardings, where they have one; None for a flat dict by path.

    Returns:
        The arrays, where those of `like` lie; on the default device without one. Each process reads the file.

    Raises:
        ValueError: if the file is of another kind or damaged, it holds 64-bit numbers and jax has 32, or its
            leaves do not have the paths, shapes and dtypes of `like`.
    """
    file = _files.local_path("path", path)
    _tree.check_arrays(like, "like")
    found = _read(file)
    _check_width(found)
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
    placed = [_placed(found[name], leaf) for name, leaf in zip(paths, wanted, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _placed(value: np.ndarray, like: Any) -> jax.Array:
    """The array where `like` was placed; one that was never placed is on the default device."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by path; what is wrong with it is a ValueError."""
    try:
        with _archive.Archive(path) as archive:
            leaves = _checked_leaves(archive.header)
            found = {name: _decoded(archive, str(i), *leaf) for i, (name, leaf) in enumerate(leaves.items())}
            masks = {f"{i}.mask" for i in range(len(leaves))}
            if unknown := archive.names - {str(i) for i in range(len(leaves))} - masks:
                raise ValueError(f"entry {min(unknown)} is of no leaf")
    except ValueError as error:
        raise _archive.file_error(path, error) from error
    return found


def _checked_leaves(header: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every leaf, by path."""
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for leaf in header if isinstance(header, list) else [header]:
        if not isinstance(leaf, dict) or leaf.keys() != {"path", "shape", "dtype"}:
            raise ValueError("the header is not a list of paths, shapes and dtypes")
        name = leaf["path"]
        if not isinstance(name, str) or name in leaves:
            raise ValueError(f"the path {str(name)[:80]!r} is no text, or that of two leaves")
        leaves[name] = _archive.shape_of(leaf["shape"]), _archive.dtype_of(leaf["dtype"])
    return leaves


def _check_width(found: dict[str, np.ndarray]) -> None:
    """Without x64, jax would round float64, and int64 would wrap around, in silence."""
    wide = [
        f"  {name}: {x.dtype.name}"
        for name, x in found.items()
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
    ]
    if wide:
        raise ValueError(
            "`path` must be a file of dtypes that jax can hold as they are, but in the file\n"
            + "\n".join(wide)
            + '\nCall `jax.config.update("jax_enable_x64", True)` first, or save them in 32 bits.'
        )


def _number_array(path: str, leaf: Any) -> Any:
    """The leaf as an array in the machine's byte order; one that jax holds stays where it is."""
    if isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic):
        try:
            return jnp.asarray(leaf)  # as wide as jax has them, or nothing could load it again
        except OverflowError as error:
            raise TypeError(f"`params` must have numbers that jax can hold, got {path}: {error}.") from None
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    if is_array and _archive.is_number_dtype(leaf.dtype):
        return leaf if isinstance(leaf, jax.Array) else _archive.native(np.asarray(leaf))
    kind = getattr(leaf, "dtype", type(leaf).__name__)
    raise TypeError(f"`params` must have arrays of numbers only, got {path}: a {kind}.")


def _encoded(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of one leaf."""
    there = value != 0
    if there.all():
        return {name: value}
    return {name: value[there], f"{name}.mask": np.packbits(there)}


def _decoded(archive: _archive.Archive, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if f"{name}.mask" not in archive.names:
        return archive.array(name, shape, dtype)
    size = math.prod(shape)
    bits = archive.array(f"{name}.mask", ((size + 7) // 8,), np.dtype(np.uint8))
    # `packbits` fills up the last byte: without the count there would be places too many.
    there = np.unpackbits(bits, count=size).astype(bool)
    numbers = archive.array(name, (int(np.count_nonzero(there)),), dtype)
    value = np.zeros(size, dtype)
    value[there] = numbers
    return value.reshape(shape)


def _shown(leaf: Any) -> str:
    return f"{jnp.result_type(leaf).name}{list(jnp.shape(leaf))}"
