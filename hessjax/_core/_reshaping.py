"""Axes cut into parts, and joined again, where they lie on several devices."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from hessjax._core import _sharding


def split_axes(x: Array, parts: Sequence[tuple[int, ...]]) -> Array:
    """`x` with each axis cut into parts of these lengths, most into one.

    An axis that is sharded explicitly is so afterwards along its first part of more than 1, and is gathered
    only if shards would not hold whole ones of it.
    """
    shape, sharding = tuple(itertools.chain(*parts)), _sharding.explicit(x)
    if sharding is None or shape == x.shape:
        return x.reshape(shape)
    names = (*sharding.spec, *(None for _ in range(x.ndim - len(sharding.spec))))
    sizes = [math.prod(sharding.mesh.shape[name] for name in _sharding.mesh_axes(axis)) for axis in names]
    kept = [
        None if part[_first(part)] % n else name for name, part, n in zip(names, parts, sizes, strict=True)
    ]
    x = _sharding.laid_out(x, NamedSharding(sharding.mesh, PartitionSpec(*kept)))
    spec = [
        name if i == _first(part) else None
        for name, part in zip(kept, parts, strict=True)
        for i in range(len(part))
    ]
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def merge_axes(x: Array, parts: Sequence[tuple[int, ...]]) -> Array:
    """The inverse of `split_axes`."""
    shape, sharding = tuple(map(math.prod, parts)), _sharding.explicit(x)
    if sharding is None or shape == x.shape:
        return x.reshape(shape)
    names = (*sharding.spec, *(None for _ in range(x.ndim - len(sharding.spec))))
    starts = [0, *itertools.accumulate(map(len, parts))]
    spec = PartitionSpec(
        *(names[start + _first(part)] for start, part in zip(starts[:-1], parts, strict=True))
    )
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def _first(part: tuple[int, ...]) -> int:
    """Of the parts of an axis the first that is longer than 1, along which it can be sharded."""
    return next((i for i, length in enumerate(part) if length > 1), 0)


def longest_axis(x: Any, first: int = 0) -> int:
    """Of the axes from `first` on the longest that is not sharded explicitly; if all are, the longest."""
    spec = sharding.spec if (sharding := _sharding.explicit(x)) else [None] * jnp.ndim(x)
    return max(range(first, jnp.ndim(x)), key=lambda axis: (spec[axis] is None, jnp.shape(x)[axis]))
