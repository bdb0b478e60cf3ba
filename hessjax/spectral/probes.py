"""Random vectors: what stochastic estimators multiply."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax import _tree
from hessjax._typing import Key, Params, Vector

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
        >>> sorted(set(hj.rademacher(jax.random.key(0), jnp.zeros(99)).tolist()))
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
        >>> hj.gaussian(jax.random.key(0), {"w": jnp.zeros((2, 3))})["w"].shape
        (2, 3)
    """
    return _sample(jax.random.normal, key, like)


def _sample(sampler: Callable[..., Array], key: Key, like: Params) -> Vector:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    samples = [
        sampler(k, jnp.shape(x), dtype=_tree.accumulator_dtype(x)) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, samples)
