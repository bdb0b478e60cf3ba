"""Arrays whose types carry a layout over devices, as on meshes of `AxisType.Explicit`."""

import itertools
import math
from collections.abc import Sequence
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
    sharding = explicit(like)
    if sharding is not None and not isinstance(like, jax.core.Tracer):
        sharding = getattr(like, "sharding", sharding)  # outside `jit` with the devices themselves
    return laid_out(x, sharding)


def born_like(x: Array, like: Any) -> Array:
    """`x`, which depends on nothing, in the layout of `like`, also where only the compiler knows that."""
    x = laid_out_like(x, like)
    # In a program a constant lies anywhere; a choice lies where what it is made by does.
    return jnp.where(like == like, x, x) if isinstance(like, jax.core.Tracer) else x


def born_like_tree(state: Any, tree: Any) -> Any:
    """What an optimizer holds for the leaves of a tree, each in the layout of its leaf."""
    structure = jax.tree.structure(tree)

    def is_like(node: Any) -> bool:
        same: bool = jax.tree.structure(node) == structure  # type: ignore[operator]
        return same

    def leaf(x: Any, like: Any) -> Any:
        return born_like(x, like) if jnp.shape(x) == jnp.shape(like) else x

    return jax.tree.map(
        lambda node: jax.tree.map(leaf, node, tree) if is_like(node) else node, state, is_leaf=is_like
    )


def split_axes(x: Array, parts: Sequence[tuple[int, ...]]) -> Array:
    """`x` with each axis cut into parts of these lengths, most into one.

    An axis that is sharded explicitly is so afterwards along its first part, and is gathered only if shards
    would not hold whole ones of it.
    """
    shape, sharding = tuple(itertools.chain(*parts)), explicit(x)
    if sharding is None or shape == x.shape:
        return x.reshape(shape)
    names = (*sharding.spec, *(None for _ in range(x.ndim - len(sharding.spec))))
    sizes = [math.prod(sharding.mesh.shape[name] for name in _names(axis)) for axis in names]
    kept = [name if part[0] % n == 0 else None for name, part, n in zip(names, parts, sizes, strict=True)]
    x = laid_out(x, NamedSharding(sharding.mesh, PartitionSpec(*kept)))
    spec = itertools.chain(
        *((name, *(None for _ in part[1:])) for name, part in zip(kept, parts, strict=True))
    )
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def merge_axes(x: Array, parts: Sequence[tuple[int, ...]]) -> Array:
    """The inverse of `split_axes`."""
    shape, sharding = tuple(map(math.prod, parts)), explicit(x)
    if sharding is None or shape == x.shape:
        return x.reshape(shape)
    names = (*sharding.spec, *(None for _ in range(x.ndim - len(sharding.spec))))
    starts = [0, *itertools.accumulate(map(len, parts))]
    spec = PartitionSpec(*(names[start] for start in starts[:-1]))
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def _names(axis: Any) -> tuple[Any, ...]:
    """The mesh axes that an axis is sharded along."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def longest_axis(x: Any, first: int = 0) -> int:
    """Of the axes from `first` on the longest that is not sharded explicitly; if all are, the longest."""
    spec = sharding.spec if (sharding := explicit(x)) else [None] * jnp.ndim(x)
    return max(range(first, jnp.ndim(x)), key=lambda axis: (spec[axis] is None, jnp.shape(x)[axis]))


def places(like: Any, start: int = 0) -> UInt[Array, "..."]:
    """The position of every entry in row-major order, plus `start`, modulo 2³²."""
    # Not `arange(n).reshape(shape)`: reshapes of sharded axes gather them, and explicit meshes refuse them.
    place, stride = jnp.full(jnp.shape(like), start, jnp.uint32), 1
    for axis in reversed(range(jnp.ndim(like))):
        place += jax.lax.broadcasted_iota(jnp.uint32, jnp.shape(like), axis) * jnp.uint32(stride % 2**32)
        stride *= jnp.shape(like)[axis]
    return laid_out_like(place, like)


def zero_rows(number: int, like: Any) -> Array:
    """So many zero arrays like `like`, along a leading axis, each in its explicit layout."""
    sharding, zeros = explicit(like), jnp.zeros((number, *jnp.shape(like)), jnp.result_type(like))
    if sharding is None:
        return zeros
    return laid_out(zeros, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))
