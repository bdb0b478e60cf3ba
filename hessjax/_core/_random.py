"""Random numbers by position: alike in every layout, drawn where they lie, in no memory but their own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from hessjax._core import _sharding
from hessjax._core._types import Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

LOWER = 2**32
"""How far one half of a place counts."""

Words = tuple[UInt[Array, "..."], UInt[Array, "..."]]
"""Two halves of 64 bits, the upper first."""


# Static shapes, which hash: outside `jit` a draw is one program, not a hundred.
@functools.partial(jax.jit, static_argnums=(1, 2))
def uniform(key: Key, like: jax.ShapeDtypeStruct, start: int = 0) -> Float[Array, "..."]:
    """Numbers in [0, 1) like `like`; those of a flat array are the same, from `start` on."""
    upper, lower = _bits(key, like, start)
    dtype = np.dtype(like.dtype)
    # The upper bits as the fraction of a number between 1 and 2.
    one = np.array(1, dtype).view(f"u{dtype.itemsize}")
    if dtype == np.float64:
        bits = (upper.astype(jnp.uint64) << 32 | lower.astype(jnp.uint64)) >> 12
    else:
        bits = (upper ^ lower) >> 9
    return jax.lax.bitcast_convert_type(bits | one, dtype) - np.array(1, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: Key, like: jax.ShapeDtypeStruct, start: int = 0) -> Float[Array, "..."]:
    """Standard normal numbers, likewise."""
    dtype = np.dtype(like.dtype)
    lowest = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
    between = jnp.maximum(uniform(key, like, start) * (1 - lowest) + lowest, lowest)
    return np.sqrt(2).astype(dtype) * jax.lax.erf_inv(between)


@functools.partial(jax.jit, static_argnums=(1, 2))
def signs(key: Key, like: jax.ShapeDtypeStruct, start: int = 0) -> Float[Array, "..."]:
    """±1 with equal probability, likewise."""
    upper, lower = _bits(key, like, start)
    # As jax's, whose uniform numbers have as many bits as its default float.
    bits = upper if jnp.result_type(float) == jnp.float64 else upper ^ lower
    return jnp.where(bits >> 31, -1, 1).astype(like.dtype)


def _bits(key: Key, like: jax.ShapeDtypeStruct, start: int) -> Words:
    """64 bits for every entry (of float32 or float64), from the key and its place in row-major order.

    The numbers are those of `jax.random` (with `jax_threefry_partitionable`, its default). That takes 3 to 7
    times the memory of what it draws, as its rounds are a loop, or a kernel, over whole arrays. These here
    are written out: one pass of elementwise operations, which the compiler fuses, and shards as the array is.
    """
    words = jax.random.key_data(key)
    if words.shape != (2,):  # of another generator: it draws a key for this one
        words = jax.random.bits(key, (2,), jnp.uint32)
    return _threefry(words[0], words[1], _places(like, start))


def _places(like: jax.ShapeDtypeStruct, start: int) -> Words:
    """The place of every entry, counted from `start`."""
    shape = like.shape
    # No more axes count in the lower half than `LOWER` allows; the others count in the upper.
    cut = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) <= LOWER)
    lower = _sharding.places(like, start % LOWER, range(cut, len(shape)))
    upper = _sharding.places(like, start // LOWER, range(cut))
    # What does not fit into the lower half is carried.
    return upper + (lower < jnp.uint32(start % LOWER)).astype(jnp.uint32), lower


def _threefry(first: UInt[Array, ""], second: UInt[Array, ""], places: Words) -> Words:
    """Threefry-2×32 in 20 rounds (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3)."""
    keys = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    x, y = places[0] + keys[0], places[1] + keys[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = x + y
            y = (y << rotation | y >> 32 - rotation) ^ x
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y
