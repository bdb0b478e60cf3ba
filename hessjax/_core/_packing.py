"""Vectors as few arrays: what runs over a whole basis should not be compiled once for every leaf."""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax._core import _sharding, _tree
from hessjax._core._sharding import Shardings
from hessjax._core._types import Block, Params, Vector

POOLED = 2**22
"""Leaves with fewer entries are laid end to end; larger ones, and divided ones, stay as they are."""

Packed: TypeAlias = tuple[Array, ...]
"""A vector: one flat array for the small leaves of each dtype, then the large leaves."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Packing:
    """How to pack vectors of one structure, and unpack them; itself a pytree without leaves.

    Attributes:
        structure: the treedef of the params.
        shapes: of the leaves.
        dtypes: of the leaves when packed, float32 at least.
        layouts: where the leaves lie on a mesh, as far as known; None for all others.
        types: the structure as text: treedefs of two dataclasses with as many fields compare equal.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    layouts: Shardings
    types: str

    @classmethod
    def of(cls, like: Params) -> "Packing":
        """The packing of vectors like `like`."""
        leaves, structure = jax.tree.flatten(like)
        dtypes = tuple(np.dtype(_tree.accumulator_dtype(leaf)) for leaf in leaves)
        shapes, layouts = tuple(map(jnp.shape, leaves)), tuple(map(_sharding.layout, leaves))
        return cls(structure, shapes, dtypes, layouts, str(structure))

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(map(math.prod, self.shapes))

    def pack(self, vector: Vector) -> Packed:
        """A vector of this structure, packed."""
        leaves = [leaf.astype(t) for leaf, t in zip(jax.tree.leaves(vector), self.dtypes, strict=True)]
        pools = [jnp.concatenate([leaves[i].reshape(-1) for i in members]) for members in self._pools]
        packed = *pools, *(leaves[i] for i in self._apart)
        return tuple(map(_sharding.laid_out, packed, self.packed_layouts))

    def zeros(self) -> Packed:
        """The vector of zeros, packed."""
        zeros = [jnp.zeros(x.shape, x.dtype) for x in self.packed]
        return tuple(map(_sharding.laid_out, zeros, self.packed_layouts))

    def unpack(self, packed: Packed) -> Vector:
        """The vector again, its leaves in at least float32."""
        leaves: dict[int, Array] = {}
        pools = self._pools
        # Not strict: behind the pools come the large leaves.
        for pool, members in zip(packed, pools, strict=False):
            ends = np.cumsum([math.prod(self.shapes[i]) for i in members])
            for i, part in zip(members, jnp.split(pool, ends[:-1]), strict=True):
                leaves[i] = part.reshape(self.shapes[i])
        leaves |= dict(zip(self._apart, packed[len(pools) :], strict=True))
        laid = [_sharding.laid_out(leaves[i], layout) for i, layout in enumerate(self.layouts)]
        return jax.tree.unflatten(self.structure, laid)

    def unpack_block(self, packed: Packed) -> Block:
        """Several vectors, along a leading axis, at once."""
        return jax.vmap(self.unpack)(packed)

    @functools.cached_property
    def beginnings(self) -> tuple[tuple[int, int], ...]:
        """Of every leaf, which array holds it, and behind how many entries."""
        found = {i: (len(self._pools) + number, 0) for number, i in enumerate(self._apart)}
        for number, members in enumerate(self._pools):
            starts = np.cumsum([0, *(math.prod(self.shapes[i]) for i in members)], dtype=object)
            found |= {i: (number, int(start)) for i, start in zip(members, starts, strict=False)}
        return tuple(found[i] for i in range(len(found)))

    @functools.cached_property
    def packed(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of the arrays of a packed vector."""
        lengths = [sum(math.prod(self.shapes[i]) for i in members) for members in self._pools]
        shapes = *((length,) for length in lengths), *(self.shapes[i] for i in self._apart)
        firsts = *(members[0] for members in self._pools), *self._apart
        return tuple(map(jax.ShapeDtypeStruct, shapes, (self.dtypes[i] for i in firsts)))

    @functools.cached_property
    def packed_layouts(self) -> Shardings:
        """Where the arrays of a packed vector lie: pools are whole on every device of the leaves' mesh."""
        everywhere = _sharding.Layouts(self.layouts).whole
        return (*(everywhere for _ in self._pools), *(self.layouts[i] for i in self._apart))

    @functools.cached_property
    def _apart(self) -> tuple[int, ...]:
        # Laid end to end, divided leaves would be gathered from all devices.
        columns = enumerate(zip(self.shapes, self.layouts, strict=True))
        return tuple(
            i for i, (shape, layout) in columns if _sharding.is_split(layout) or math.prod(shape) >= POOLED
        )

    @functools.cached_property
    def _pools(self) -> tuple[tuple[int, ...], ...]:
        small = sorted({*range(len(self.shapes))} - {*self._apart})
        dtypes = sorted({self.dtypes[i] for i in small}, key=str)
        return tuple(tuple(i for i in small if self.dtypes[i] == dtype) for dtype in dtypes)
