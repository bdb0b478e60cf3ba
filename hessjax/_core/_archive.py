"""Arrays in a zip that any numpy reads, with JSON beside them; read without trusting what it says."""

import io
import itertools
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

HEADER = "hessjax"
"""The entry of JSON."""

_NPY = ".npy"
_MOST_HEADER = 2**28
_MOST_PER_BYTE = 1032
"""What deflate makes of one byte at most."""

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, RuntimeError,
           KeyError, TypeError, OverflowError, AttributeError, OSError)  # fmt: skip
"""What Python's readers raise for a zip that is damaged, beside ValueError."""


def write_archive(file: BinaryIO, header: Any, entries: Iterable[tuple[str, np.ndarray]]) -> None:
    """JSON, and arrays as bytes, by name; one after the other, so that they need not all be there at once."""
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    # What `numpy.savez_compressed` does, which wants all arrays at once.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in itertools.chain([(HEADER, text)], entries):
            with archive.open(name + _NPY, "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, as_bytes(array), version=(1, 0), allow_pickle=False)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, in its order, of the machine's byte order, which names of dtypes stand for."""
    # As bytes, bfloat16 and its like pass through a format that does not know them.
    return np.ascontiguousarray(native(array)).reshape(-1).view(np.uint8)


def native(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def is_number_dtype(dtype: Any) -> bool:
    """Whether jax has arrays of this dtype, whatever the byte order: numbers or booleans."""
    if jnp.issubdtype(dtype, jax.dtypes.extended) or dtype.hasobject or dtype.names is not None:
        return False
    if not (dtype.kind == "b" or jnp.issubdtype(dtype, jnp.number)):
        return False
    # Long doubles are numbers for numpy alone, and differ from machine to machine.
    return dtype.itemsize <= (16 if jnp.issubdtype(dtype, jnp.complexfloating) else 8)


def dtype_of(name: Any) -> np.dtype:
    """A dtype from its name, which must be the plain one.

    Raises:
        ValueError: for any other text.
    """
    try:
        dtype = jnp.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.name != name or not is_number_dtype(dtype):
        raise ValueError(f"there is no dtype {str(name)[:40]!r}")
    return dtype


def shape_of(shape: Any) -> tuple[int, ...]:
    """A shape from JSON.

    Raises:
        ValueError: unless it is a list of lengths.
    """
    if not isinstance(shape, list) or len(shape) > 32:
        raise ValueError(f"there is no shape {str(shape)[:40]}")
    if not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(f"there is no shape {str(shape)[:40]}")
    return tuple(shape)


class Archive:
    """A file of `write_archive`, open for reading. Whatever is wrong with it is a ValueError.

    Nothing is allocated beyond what the file can hold: a size that is written somewhere is compared with
    the zip's own first, and every entry's checksum after.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._length = path.stat().st_size
        try:
            self._zip = zipfile.ZipFile(self._file)
            self.header = json.loads(bytes(self.entry(HEADER, _MOST_HEADER)))
        except (*_BROKEN, ValueError) as error:
            self._file.close()
            raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from error

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def names(self) -> set[str]:
        """The entries beside the header."""
        return {name.removesuffix(_NPY) for name in self._zip.namelist()} - {HEADER}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An entry that must be as long as an array of this shape and dtype is."""
        size = math.prod(shape) * dtype.itemsize
        found = self.entry(name, size)
        if found.size != size:
            raise ValueError(f"entry {name} has {found.size} bytes, and must have {size}")
        return found.view(dtype).reshape(shape)

    def entry(self, name: str, most: int) -> np.ndarray:
        """The bytes of an entry, which must not be longer than `most`."""
        try:
            return self._entry(name, most)
        except _BROKEN as error:
            raise ValueError(f"entry {name} cannot be read ({type(error).__name__}: {error})") from error

    def _entry(self, name: str, most: int) -> np.ndarray:
        info = self._zip.getinfo(name + _NPY)
        packed = info.compress_type == zipfile.ZIP_DEFLATED
        limit = info.compress_size * _MOST_PER_BYTE if packed else info.compress_size
        if info.compress_type not in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
            raise ValueError(f"entry {name} is packed by a method that is not used here")
        if not info.compress_size <= self._length or not info.file_size <= min(limit, most + 128):
            raise ValueError(f"entry {name} claims {info.file_size} bytes, more than can be in it")
        with self._zip.open(info) as file:
            content = io.BytesIO(file.read())  # to the end, where the checksum is compared
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError(f"entry {name} is not of version 1")
        shape, _, dtype = np.lib.format.read_array_header_1_0(content)
        rest = len(content.getbuffer()) - content.tell()
        # numpy's own reader would allocate what this small header says.
        if dtype != np.uint8 or shape != (rest,):
            raise ValueError(f"entry {name} has {rest} bytes, but is written as {dtype}{list(shape)}")
        return np.frombuffer(content.getbuffer(), np.uint8, offset=content.tell())


def file_error(path: str | os.PathLike[str], reason: object) -> ValueError:
    """The error for a file that is not what it should be."""
    return ValueError(f"`path` must be a file that `save_npz` wrote, and whole, but in `{path}` {reason}.")
