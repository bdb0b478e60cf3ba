"""Digests of arrays: sums over entries, so the same wherever their parts lie, and read nowhere whole."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

from hessjax._core import _archive, _processes, _sharding, _tree


def digests(arrays: Sequence[Any]) -> list[str]:
    """64 bits that change if a bit of the array does, or the place of an entry.

    Nothing but the sums leaves the devices. All processes that hold a part of an array must ask.

    Args:
        arrays: numpy's, or jax's; no random keys.

    Cost:
        One pass over the arrays, two sums of 32 bits; one program for the arrays of each set of devices.
    """
    found = jax.device_get(_processes.by_devices(_sums, [_as_given(x) for x in arrays]))
    return [f"{int(a):08x}{int(b):08x}" for a, b in found]


def check_alike(params: Any, args: Any) -> None:
    """Raise a ValueError naming what is not the same in every process, though it does not span them.

    Beside params that span processes jax takes such arrays for copies of one, and does not look.
    """
    if len((group := _processes.holders(params)).members) == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(args)
    own = [(path, x) for path, x in leaves if hasattr(x, "dtype") and not _processes.spans(x)]
    # Not those that are traced: their numbers are known to nobody yet.
    if not own or any(isinstance(x, jax.core.Tracer) for _, x in own):
        return
    words = group.exchanged(" ".join(of_data([x for _, x in own])))
    columns = zip(*(word.split() for word in words), strict=True)
    for (path, _), column in zip(own, columns, strict=True):
        if len(set(column)) > 1:
            raise ValueError(
                f"`args` must be the same in all processes, or span them as `params` do, but "
                f"{_tree.path_name(path)} differs from process to process: make one array of the parts, "
                '`jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), part)`.'
            )


def of_data(arrays: Sequence[Any]) -> list[str]:
    """`digests`, of random keys too."""
    return digests([_numbers(x) for x in arrays])


def _numbers(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _as_given(x: Any) -> Any:
    """Numpy's arrays as words: jax would round what is wider than its own."""
    if isinstance(x, jax.Array):
        return x
    array = _archive.native(np.asarray(x))
    array = np.ascontiguousarray(array.astype(_whole_bytes(array.dtype))).reshape(array.shape)
    size = min(array.dtype.itemsize, 4)
    many = array.dtype.itemsize // size
    return array.reshape(-1).view(f"u{size}").reshape(array.shape + (many,) * (many > 1))


def _whole_bytes(dtype: Any) -> Any:
    """A dtype that holds the same numbers: numpy and jax pack those of a few bits each in its own way."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.int8
    if jnp.issubdtype(dtype, jnp.integer):
        return np.int8 if jnp.iinfo(dtype).bits < 8 else dtype
    return jnp.bfloat16 if jnp.finfo(dtype).bits < 8 else dtype


@jax.jit
def _sums(arrays: list[Any]) -> list[tuple[Array, Array]]:
    return [_both(_words(jnp.asarray(x))) for x in arrays]


def _words(x: Array) -> UInt[Array, "..."]:
    """The bits, in words of at most 32; of wider numbers along a last axis, the lower one first."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(jnp.real(x)), _words(jnp.imag(x))], axis=x.ndim)
    x = x.astype(_whole_bytes(x.dtype))
    width = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _both(words: UInt[Array, "..."]) -> tuple[Array, Array]:
    # For a given place `_mixed` is one-to-one in the word, so a change of one entry alone always shows.
    place = _mixed(_sharding.places(words) + jnp.uint32(0x9E3779B9))
    return _total(_mixed(words ^ place)), _total(_mixed(words + _mixed(place)))


def _total(words: UInt[Array, "..."]) -> UInt[Array, ""]:
    return jnp.sum(words, dtype=jnp.uint32)  # modulo 2³²: in any order the same


def _mixed(x: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Wellons' `lowbias32`, a bijection of 32 bits in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
