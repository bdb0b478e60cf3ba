"""Random vectors: what stochastic estimators multiply."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax import _tree
from hessjax._typing import Key, Params, Vector

POOLED = 2**22
"""Leaves with fewer entries are drawn together."""

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


def hashed_signs(seed: Array, like: Params) -> Vector:
    """Signs from an integer hash (the finalizer of MurmurHash3): no statistics, just no structure.

    For directions that only have to be new. It compiles in a tenth of the time of a random generator.
    """
    leaves, structure = jax.tree.flatten(like)

    def signs(index: int, leaf: Array) -> Array:
        bits = jax.lax.iota(jnp.uint32, leaf.size) + (seed * 64 + index + 1).astype(jnp.uint32) * jnp.uint32(
            0x9E3779B9
        )
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
        return jnp.where(bits & 1, 1, -1).astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree.unflatten(structure, [signs(i, leaf) for i, leaf in enumerate(leaves)])


def _sample(sampler: Callable[..., Array], key: Key, like: Params) -> Vector:
    """Small leaves share one draw, since every draw is a program to compile (a third of a second)."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [jnp.size(leaf) for leaf in leaves]
    keys = jax.random.split(key, 1 + len(leaves))
    dtype = _tree.accumulator_dtype(like)
    pool = sampler(keys[0], (sum(n for n in sizes if n < POOLED),), dtype=dtype)
    samples, used = [], 0
    for leaf, leaf_key, n in zip(leaves, keys[1:], sizes, strict=True):
        if n < POOLED:
            samples.append(
                pool[used : used + n].reshape(jnp.shape(leaf)).astype(_tree.accumulator_dtype(leaf))
            )
            used += n
        else:  # never flattened, so that a sharded leaf keeps its layout
            samples.append(sampler(leaf_key, jnp.shape(leaf), dtype=_tree.accumulator_dtype(leaf)))
    return jax.tree.unflatten(structure, samples)
