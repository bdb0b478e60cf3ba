"""Where arrays lie on several devices: by their types, by themselves, or as one is told."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt

Shardings: TypeAlias = tuple[NamedSharding | None, ...]
"""Where several arrays lie, as far as known."""

Known: TypeAlias = dict[int, tuple[Any, NamedSharding]]

_known: contextvars.ContextVar[Known | None] = contextvars.ContextVar("known", default=None)
"""Of traced arrays, by identity, where they lie; while a function is traced that was told."""


# -- what is known of one array --------------------------------------------------------------------


def layout(x: Any) -> NamedSharding | None:
    """Where an array lies on a mesh of several devices, if that is known; None for all others.

    Of an array that is there it is. Of a traced one its type says so on explicit meshes. Where the compiler
    chooses layouts (`AxisType.Auto`) only who traced it may know: see `Layouts.told`.
    """
    if isinstance(x, jax.core.Tracer):
        known = (_known.get() or {}).get(id(x))
        return known[1] if known else explicit(x)
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or (sharding.mesh.size < 2 and not explicit(x)):
        return None
    return _plain(sharding)


def explicit(x: Any) -> NamedSharding | None:
    """The layout of an array some axis of which is explicitly sharded; None for all others.

    Where the compiler chooses layouts (`AxisType.Auto`) types say nothing of them.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and is_split(sharding) else None


def is_split(sharding: NamedSharding | None) -> bool:
    """Whether a layout is known, and divides some axis."""
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def everywhere(x: Array) -> NamedSharding | None:
    """The layout of what every device of `x`'s explicit mesh holds whole; None without such a mesh.

    Sums over a sharded axis must be told where they go.
    """
    return whole(explicit(x))


def mesh_axes(axis: Any) -> tuple[Any, ...]:
    """The mesh axes that an axis is sharded along."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def whole(sharding: NamedSharding | None) -> NamedSharding | None:
    """The layout on the same mesh of what every device holds whole."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def _plain(sharding: NamedSharding) -> NamedSharding:
    """As jax writes the layouts of results, so that equal ones are equal; in the devices' own memory."""
    spec = tuple(sharding.spec)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    if len(spec) == len(sharding.spec) and sharding.memory_kind in (None, "device"):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def different_places(leaves: Sequence[Any]) -> list[str]:
    """In words, where each leaf lies, if no program can take them all; nothing of those that can be moved."""
    if jax.device_count() == 1:
        return []
    kept = [x.sharding if isinstance(x, jax.Array) and not _is_movable(x) else None for x in leaves]
    found = [sharding for sharding in kept if sharding is not None]
    if all(_is_same_place(sharding, found[0]) for sharding in found):
        return []
    return ["" if sharding is None else _described(sharding) for sharding in kept]


def _is_movable(x: jax.Array) -> bool:
    return isinstance(x, jax.core.Tracer) or not x.committed


def _is_same_place(a: Any, b: Any) -> bool:
    """The compiler chooses among the axes of any mesh of the same devices; types know one mesh only."""
    ours, theirs = getattr(a, "mesh", None), getattr(b, "mesh", None)
    if ours == theirs and ours is not None:
        return True
    explicit_axes = any(mesh is not None and AxisType.Explicit in mesh.axis_types for mesh in (ours, theirs))
    return a.device_set == b.device_set and not (explicit_axes and ours is not None and theirs is not None)


def _described(sharding: Any) -> str:
    devices = sorted(device.id for device in sharding.device_set)
    mesh = getattr(sharding, "mesh", None)
    axes = "" if mesh is None else f"mesh {dict(mesh.shape)} of "
    listed = ", ".join(map(str, devices[:8])) + " …" * (len(devices) > 8)
    return f"{axes}device{'s' * (len(devices) > 1)} {listed}"


# -- putting arrays there --------------------------------------------------------------------------


def laid_out(x: Array, sharding: NamedSharding | None) -> Array:
    """`x` in this layout, if one is given: branches and loops must agree in it."""
    if sharding is None:
        return x
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    if AxisType.Explicit in kinds.values():
        x = jax.sharding.reshard(x, _along(sharding, kinds, AxisType.Explicit))
    if AxisType.Auto in kinds.values():
        x = jax.lax.with_sharding_constraint(x, _along(sharding, kinds, AxisType.Auto))
    return _remembered(x, sharding)


def _remembered(x: Array, sharding: NamedSharding) -> Array:
    known = _known.get()
    if known is not None and isinstance(x, jax.core.Tracer):
        known[id(x)] = x, sharding  # with the array, or another one might get its identity
    return x


def _along(sharding: NamedSharding, kinds: dict[Any, AxisType], kind: AxisType) -> NamedSharding:
    """What of a layout runs along the mesh's axes of one kind: each has a function of its own in jax."""
    if set(kinds.values()) == {kind}:
        return sharding
    names = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in sharding.spec]
    kept = [tuple(name for name in group if kinds[name] == kind) or None for group in names]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def gathered(x: Array) -> Array:
    """`x`, whole on every device of its explicit mesh: before a reshape that no layout follows."""
    return laid_out(x, everywhere(x))


def laid_out_like(x: Array, like: Any) -> Array:
    """`x` in the layout of `like`, if that is known."""
    return laid_out(x, layout(like))


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


def shape_of(like: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape and layout of `like`, in this dtype."""
    return jax.ShapeDtypeStruct(jnp.shape(like), dtype, sharding=layout(like))


def places(like: Any, start: int = 0, axes: Iterable[int] | None = None) -> UInt[Array, "..."]:
    """The position of every entry in row-major order along these axes, or all, plus `start`, modulo 2³²."""
    # Not `arange(n).reshape(shape)`: reshapes of sharded axes gather them, and explicit meshes refuse them.
    shape, sharding, stride = jnp.shape(like), layout(like), 1
    is_explicit = sharding is not None and set(sharding.mesh.axis_types) == {AxisType.Explicit}
    place = laid_out(jnp.full(shape, start, jnp.uint32), sharding)
    for axis in reversed(range(len(shape)) if axes is None else [*axes]):
        # Born in its layout, as nothing of this size may be whole on one device.
        born = sharding if is_explicit else None
        number = laid_out(jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=born), sharding)
        place, stride = place + number * jnp.uint32(stride % 2**32), stride * shape[axis]
    return laid_out(place, sharding)


def zero_rows(number: int, like: Any, sharding: NamedSharding | None = None) -> Array:
    """So many zero arrays like `like`, along a leading axis, each in this layout or that of its type."""
    sharding, zeros = sharding or explicit(like), jnp.zeros((number, *jnp.shape(like)), jnp.result_type(like))
    if sharding is None:
        return zeros
    return laid_out(zeros, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))


# -- what is known of a tree, for programs to be compiled for --------------------------------------


@dataclasses.dataclass(frozen=True)
class Layouts:
    """Where the leaves of a tree lie, as far as known: a static argument of `jit`.

    `jit` traces once for all layouts on automatic axes, and lets the compiler choose those of new arrays and
    of results. Given this, a function can say them itself.

    Attributes:
        shardings: of each leaf; none at all where nothing is known of any.
    """

    shardings: Shardings = ()

    @classmethod
    def of(cls, tree: Any) -> "Layouts":
        """Those of a tree's leaves."""
        if jax.device_count() == 1:  # first, as products ask at every call
            return UNKNOWN
        found = tuple(map(layout, jax.tree.leaves(tree)))
        return cls(found) if any(found) else UNKNOWN

    @classmethod
    def of_rows(cls, params: Any, batch: Any = None) -> "Layouts":
        """Those of one gradient for each example: spread as the params are, and as the examples besides."""
        leaves = [layout(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)] if jax.device_count() > 1 else []
        examples = next(filter(is_split, leaves), None)
        mine = [layout(x) or whole(examples) for x in jax.tree.leaves(params)]
        found = tuple(x and _rows(x, examples) for x in mine)
        return cls(found) if any(map(is_split, found)) else UNKNOWN

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.shardings)  # asked for at every step

    def laid(self, tree: Any) -> Any:
        """The tree, its leaves in these layouts."""
        if not self.shardings:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, map(laid_out, leaves, self.shardings))

    @contextlib.contextmanager
    def told(self, tree: Any) -> Iterator[None]:
        """Inside, `layout` knows these of the tree's traced leaves, and what else is laid out."""
        leaves = zip(jax.tree.leaves(tree), self.shardings, strict=False)
        known = {id(x): (x, sharding) for x, sharding in leaves if sharding}
        token = _known.set({**(_known.get() or {}), **known})
        try:
            yield
        finally:
            _known.reset(token)

    @property
    def whole(self) -> NamedSharding | None:
        """The layout of what every device of the leaves' mesh holds whole."""
        return whole(next(filter(None, self.shardings), None))


def _rows(like: NamedSharding, examples: NamedSharding | None) -> NamedSharding:
    used = {name for axis in like.spec for name in mesh_axes(axis)}
    names = () if examples is None or examples.mesh != like.mesh else mesh_axes(examples.spec[0])
    free = tuple(name for name in names if name not in used)
    # As jax writes it: one name is itself.
    return NamedSharding(like.mesh, PartitionSpec(free[0] if len(free) == 1 else free or None, *like.spec))


UNKNOWN = Layouts()
"""Of trees on one device, and of traced ones: the compiler decides."""
