"""Random vectors: what stochastic estimators multiply."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core import _random, _sharding, _tree
from hessjax._core._messages import checked_any_key
from hessjax._core._packing import Packing
from hessjax._core._types import Key, Params, Vector

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
    # As if on one device: where a leaf lies must not change what is drawn for it.
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), like)
    packing = Packing.of(plain)
    arrays = jax.eval_shape(packing.pack, plain)
    keys = jax.random.split(key, len(arrays))
    if any(map(_sharding.explicit, jax.tree.leaves(like))) or any(x.size > 2**32 for x in arrays):
        return _leaf_by_leaf(sampler, keys, packing, like)
    return packing.unpack(tuple(sampler(k, x) for k, x in zip(keys, arrays, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _leaf_by_leaf(sampler: Callable[..., Array], keys: Array, packing: Packing, like: Params) -> Vector:
    """The same numbers, each leaf's where it lies: none is ever whole on one device."""
    leaves, structure = jax.tree.flatten(like)
    wide = [_sharding.shape_of(x, t) for x, t in zip(leaves, packing.dtypes, strict=True)]
    places = zip(wide, packing.beginnings, strict=True)
    drawn = jax.tree.unflatten(structure, [sampler(keys[i], x, start) for x, (i, start) in places])
    # `like` tells jit which mesh it is on, so is not dropped.
    return jax.lax.optimization_barrier((drawn, like))[0]


def __dir__() -> list[str]:
    """What tab completion shows: the names made here, not the imports."""
    return [name for name, value in globals().items() if getattr(value, "__module__", None) == __name__]
