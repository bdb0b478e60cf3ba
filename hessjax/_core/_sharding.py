"""Arrays whose types carry a layout over devices, as on meshes of `AxisType.Explicit`."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt


def explicit(x: Any) -> NamedSharding | None:
    """The layout of an array some axis of which is explicitly sharded; None for all others.

    Where the compiler chooses layouts (`AxisType.Auto`) types say nothing of them, and nothing need be said.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    if isinstance(sharding, NamedSharding) and any(axis is not None for axis in sharding.spec):
        return sharding
    return None


def everywhere(x: Array) -> NamedSharding | None:
    """The layout of what every device of `x`'s explicit mesh holds whole; None without such a mesh.

    Sums over a sharded axis must be told where they go.
    """
    sharding = explicit(x)
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def laid_out(x: Array, sharding: NamedSharding | None) -> Array:
    """`x` in this layout, if one is given: branches and loops must agree in it."""
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def gathered(x: Array) -> Array:
    """`x`, whole on every device of its explicit mesh: before a reshape that no layout follows."""
    return laid_out(x, everywhere(x))


def laid_out_like(x: Array, like: Any) -> Array:
    """`x` in the explicit layout of `like`, if it has one."""
    return laid_out(x, _placement(like))


def shape_of(like: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape and explicit layout of `like`, in this dtype."""
    return jax.ShapeDtypeStruct(jnp.shape(like), dtype, sharding=_placement(like))


def _placement(like: Any) -> NamedSharding | None:
    sharding = explicit(like)
    if sharding is not None and not isinstance(like, jax.core.Tracer):
        sharding = getattr(like, "sharding", sharding)  # outside `jit` with the devices themselves
    return sharding


def longest_axis(x: Any, first: int = 0) -> int:
    """Of the axes from `first` on the longest that is not sharded explicitly; if all are, the longest."""
    spec = sharding.spec if (sharding := explicit(x)) else [None] * jnp.ndim(x)
    return max(range(first, jnp.ndim(x)), key=lambda axis: (spec[axis] is None, jnp.shape(x)[axis]))


def places(like: Any, start: int = 0, axes: Iterable[int] | None = None) -> UInt[Array, "..."]:
    """The position of every entry in row-major order along these axes, or all, plus `start`, modulo 2³²."""
    # Not `arange(n).reshape(shape)`: reshapes of sharded axes gather them, and explicit meshes refuse them.
    shape, layout, stride = jnp.shape(like), _placement(like), 1
    place = laid_out(jnp.full(shape, start, jnp.uint32), layout)
    for axis in reversed(range(len(shape)) if axes is None else [*axes]):
        # Born in its layout, as nothing of this size may be whole on one device.
        number = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=layout)
        place, stride = place + number * jnp.uint32(stride % 2**32), stride * shape[axis]
    return place


def zero_rows(number: int, like: Any) -> Array:
    """So many zero arrays like `like`, along a leading axis, each in its explicit layout."""
    sharding, zeros = explicit(like), jnp.zeros((number, *jnp.shape(like)), jnp.result_type(like))
    if sharding is None:
        return zeros
    return laid_out(zeros, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))
