"""Random vectors: what stochastic estimators multiply."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from hessjax._core import _sharding, _tree
from hessjax._core._messages import checked_any_key
from hessjax._core._packing import POOLED, Packing
from hessjax._core._sharding import Layouts
from hessjax._core._types import Key, Params, Vector

_PIECE = 2**18
"""Entries of a flat array that are drawn at a time."""

Probe: TypeAlias = Callable[[Key, Params], Vector]
"""`(key, like) -> vector` with independent entries of mean 0 and variance 1."""


def rademacher(key: Key, like: Params) -> Vector:
    """Independent signs ±1: the entries with the smallest variance for traces.

    Args:
        key: random key.
        like: pytree that gives structure and shapes.

    Returns:
        A vector like `like`, in at least float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> sorted(set(hj.probes.rademacher(jax.random.key(0), jnp.zeros(99)).tolist()))
        [-1.0, 1.0]
    """
    return _sample(jax.random.rademacher, key, like)


def gaussian(key: Key, like: Params) -> Vector:
    """Independent standard normal entries: the direction is uniform on the sphere.

    Args:
        key: random key.
        like: pytree that gives structure and shapes.

    Returns:
        A vector like `like`, in at least float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> hj.probes.gaussian(jax.random.key(0), {"w": jnp.zeros((2, 3))})["w"].shape
        (2, 3)
    """
    return _sample(jax.random.normal, key, like)


def _sample(sampler: Callable[..., Array], key: Key, like: Params) -> Vector:
    """Drawn packed: every draw is a program to compile (a third of a second), and leaves are many."""
    _tree.check_floating(like, "like")
    key = checked_any_key(key)
    packing = Packing.of(jax.tree.map(functools.partial(_plain, Layouts.of(like).whole), like))
    keys = jax.random.split(key, len(packing.packed))
    draws = [_draw(sampler, k, x) for k, x in zip(keys, packing.packed, strict=True)]
    return jax.tree.map(_sharding.laid_out_like, packing.unpack(tuple(draws)), like)


def _plain(whole: NamedSharding | None, leaf: Any) -> jax.ShapeDtypeStruct:
    """As if on one device: where a leaf lies must not change what is drawn for it."""
    # Every device draws the pools, and takes its parts: divided, leaves would be put together from several.
    layout = None if jnp.size(leaf) >= POOLED else whole
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=layout)


def _draw(sampler: Callable[..., Array], key: Key, like: jax.ShapeDtypeStruct) -> Array:
    """Long flat arrays piece by piece: a generator takes three times the memory of what it draws."""
    if like.ndim != 1 or like.size <= _PIECE:
        return sampler(key, like.shape, dtype=like.dtype)

    def piece(i: Int[Array, ""], drawn: Float[Array, " d"]) -> Float[Array, " d"]:
        numbers = sampler(jax.random.fold_in(key, i), (_PIECE,), dtype=like.dtype)
        return jax.lax.dynamic_update_slice(drawn, numbers, (i * _PIECE,))  # the last one overlaps

    return jax.lax.fori_loop(0, -(-like.size // _PIECE), piece, jnp.zeros(like.shape, like.dtype))


def __dir__() -> list[str]:
    """What tab completion shows: the names made here, not the imports."""
    return [name for name, value in globals().items() if getattr(value, "__module__", None) == __name__]
