"""Random vectors: what stochastic estimators multiply."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core import _random, _sharding, _tree
from hessjax._core._messages import checked_any_key
from hessjax._core._packing import Packing
from hessjax._core._types import Key, Params, Vector

Probe: TypeAlias = Callable[[Key, Params], Vector]
"""`(key, like) -> vector` with independent entries of mean 0 and variance 1."""


KEPT = 2**24
"""Up to so many numbers a draw is kept until its leaves are cut out of it; more would cost memory."""


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
    return _sample(_random.signs, key, like)


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
    return _sample(_random.normal, key, like)


def _sample(sampler: Callable[..., Array], key: Key, like: Params) -> Vector:
    """Drawn packed: every draw is a program to compile (a tenth of a second), and leaves are many."""
    _tree.check_floating(like, "like")
    key = checked_any_key(key)
    leaves, structure = jax.tree.flatten(like)
    # As if on one device: where a leaf lies must not change what is drawn for it.
    plain = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    packing = Packing.of(jax.tree.unflatten(structure, plain))
    keys = jax.random.split(key, len(packing.packed))
    if any(_sharding.is_split(_sharding.layout(x)) for x in leaves) or _is_huge(packing):
        wide = tuple(map(_sharding.shape_of, leaves, packing.dtypes))
        drawn = _leaf_by_leaf(sampler, wide, packing.beginnings, keys, [x for x in leaves if _is_there(x)])
    else:
        packed = tuple(map(sampler, keys, packing.packed))
        if packing.size <= KEPT:
            # Else every leaf is fused with the whole draw: as many copies of it to compile.
            packed = jax.lax.optimization_barrier(packed)
        drawn = jax.tree.leaves(packing.unpack(packed))
    return jax.tree.unflatten(structure, map(_sharding.laid_out_like, drawn, leaves))


def _is_huge(packing: Packing) -> bool:
    """Whether a pool has more entries than 32 bits count."""
    return any(x.size > _random.LOWER for x in packing.packed)


def _is_there(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _leaf_by_leaf(
    sampler: Callable[..., Array],
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    places: tuple[tuple[int, int], ...],
    keys: Array,
    arrays: list[Array],
) -> list[Array]:
    """The same numbers, each leaf's where it lies: none is ever whole on one device."""
    drawn = [sampler(keys[i], x, start) for x, (i, start) in zip(leaves, places, strict=True)]
    # The arrays tell jit which mesh it is on, so are not dropped.
    return jax.lax.optimization_barrier((drawn, arrays))[0]


def __dir__() -> list[str]:
    """What tab completion shows: the names made here, not the imports."""
    return [name for name, value in globals().items() if getattr(value, "__module__", None) == __name__]
