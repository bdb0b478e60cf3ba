"""Where gradients lie on several devices, and functions of what each of these holds."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from hessjax._core import _sharding

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Home:
    """The devices that blocks are spread over: every part of these axes of the mesh holds some."""

    mesh: Any
    axes: Axes

    @property
    def size(self) -> int:
        """How many parts there are."""
        return size_of(self.mesh, self.axes)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, on every device of its own blocks; arrays have the blocks first."""
        specs = functools.partial(jax.tree.map, self._spec)
        # Of shapes alone: here, outside, the function could not do with arrays whose types have layouts.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
        out = specs(jax.eval_shape(function, *shapes))
        return manual(function, self.mesh, specs(args), out)(*args)

    def _spec(self, x: Any) -> PartitionSpec:
        return PartitionSpec(self.axes) if jnp.ndim(x) else PartitionSpec()


def manual(function: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function, on every device of what it holds."""
    # Of copies on several devices the check would ask for proof that they agree.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the gradients of a leaf are laid out.

    Attributes:
        mesh: the devices.
        examples: the axes of the mesh that the gradients are spread over.
        spec: those that each axis of the leaf is spread over.
    """

    mesh: Any
    examples: Axes
    spec: tuple[Axes, ...]

    @classmethod
    def of(cls, rows: Any) -> "Shards | None":
        """Those of a leaf of a block; None where each device holds all of it, or nothing is known."""
        found = _sharding.layout(rows)
        if found is None or not _sharding.is_split(found):
            return None
        spec = [*found.spec, *[None] * (jnp.ndim(rows) - len(found.spec))]
        examples, *others = [_names(entry) for entry in spec]
        return cls(found.mesh, examples, tuple(others))

    @property
    def num_parts(self) -> int:
        """How many the gradients are spread over."""
        return size_of(self.mesh, self.examples)

    def of_vector(self) -> NamedSharding:
        """The layout of one gradient."""
        return NamedSharding(self.mesh, PartitionSpec(*map(_entry, self.spec)))

    def rows(self, examples: Axes) -> PartitionSpec:
        """The layout of the gradients, themselves spread over these axes."""
        return PartitionSpec(_entry(examples), *map(_entry, self.spec))

    def by_weights(self, shape: tuple[int, ...], leading: int) -> NamedSharding:
        """The layout in which all gradients of a weight lie together, with axes before the leaf's."""
        spec = list(self.spec)
        if (place := self._place(shape)) is not None:
            spec[place] = (*spec[place], *self.examples)
        return NamedSharding(self.mesh, PartitionSpec(*[None] * leading, *map(_entry, spec)))

    def exchanged(self, rows: Array) -> Array:
        """Gradients, spread over their weights instead: all those of a weight lie together."""
        place, shape = self._place(rows.shape[1:]), rows.shape[1:]
        if not self.examples or place is None or len(rows) % self.num_parts:
            return _sharding.laid_out(rows, self.by_weights(shape, 1))
        spec = self.rows(self.examples)
        # In so many words: XLA gathers all of them where the mesh has other axes too.
        function = functools.partial(_exchanged, self.examples, place + 1)
        out = self.by_weights(shape, 1).spec
        return manual(function, self.mesh, spec, out)(
            _sharding.laid_out(rows, NamedSharding(self.mesh, spec))
        )

    def _place(self, shape: tuple[int, ...]) -> int | None:
        """The longest axis of the leaf that they can be spread over; None: there is none."""
        local = [n // size_of(self.mesh, axes) for n, axes in zip(shape, self.spec, strict=True)]
        fitting = [i for i, n in enumerate(local) if n and n % self.num_parts == 0]
        return max(fitting, key=lambda i: local[i], default=None)


def end_to_end(shards: Sequence[Shards | None], rows: Sequence[Array]) -> Array:
    """Several blocks of gradients as one, on each device what it has of them: their order does not matter."""
    first, same = shards[0], len({*shards}) == 1
    if first is None or not (same and first.examples):
        return jnp.concatenate(rows)
    spec = first.rows(first.examples)
    return manual(_concatenated, first.mesh, tuple(spec for _ in rows), spec)(*rows)


def _concatenated(*rows: Array) -> Array:
    return jnp.concatenate(rows)


def _exchanged(axes: Axes, place: int, rows: Array) -> Array:
    return jax.lax.all_to_all(rows, axes, place, 0, tiled=True)


def padded(x: Array, size: int, axis: int) -> Array:
    """Filled up with zeros to a multiple of the size."""
    # A place without a weight is zero in all gradients: κ on the diagonal of A + κI, coupled to nothing.
    return jnp.pad(x, [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)])


def size_of(mesh: Any, axes: Axes) -> int:
    """How many parts there are along these axes."""
    return math.prod(mesh.shape[name] for name in axes)


def _names(entry: Any) -> Axes:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(names: Axes) -> Any:
    """As jax writes it: one name is itself."""
    return None if not names else names if len(names) > 1 else names[0]
