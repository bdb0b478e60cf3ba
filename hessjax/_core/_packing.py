"""Vectors as few arrays: what runs over a whole basis should not be compiled once for every leaf."""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax._core import _tree
from hessjax._core._types import Block, Params, Vector

POOLED = 2**22
"""Leaves with fewer entries are laid end to end; larger ones stay as they are, sharding included."""

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
        types: the structure as text: treedefs of two dataclasses with as many fields compare equal.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    types: str

    @classmethod
    def of(cls, like: Params) -> "Packing":
        """The packing of vectors like `like`."""
        leaves, structure = jax.tree.flatten(like)
        dtypes = tuple(np.dtype(_tree.accumulator_dtype(leaf)) for leaf in leaves)
        return cls(structure, tuple(jnp.shape(leaf) for leaf in leaves), dtypes, str(structure))

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(map(math.prod, self.shapes))

    def pack(self, vector: Vector) -> Packed:
        """A vector of this structure, packed."""
        leaves = [leaf.astype(t) for leaf, t in zip(jax.tree.leaves(vector), self.dtypes, strict=True)]
        pools = [jnp.concatenate([leaves[i].reshape(-1) for i in members]) for members in self._pools]
        return (*pools, *(leaves[i] for i in self._large))

    def unpack(self, packed: Packed) -> Vector:
        """The vector again, its leaves in at least float32."""
        leaves: dict[int, Array] = {}
        pools = self._pools
        # Not strict: behind the pools come the large leaves.
        for pool, members in zip(packed, pools, strict=False):
            ends = np.cumsum([math.prod(self.shapes[i]) for i in members])
            for i, part in zip(members, jnp.split(pool, ends[:-1]), strict=True):
                leaves[i] = part.reshape(self.shapes[i])
        leaves |= dict(zip(self._large, packed[len(pools) :], strict=True))
        return jax.tree.unflatten(self.structure, [leaves[i] for i in range(len(leaves))])

    def unpack_block(self, packed: Packed) -> Block:
        """Several vectors, along a leading axis, at once."""
        return jax.vmap(self.unpack)(packed)

    @functools.cached_property
    def _large(self) -> tuple[int, ...]:
        return tuple(i for i, shape in enumerate(self.shapes) if math.prod(shape) >= POOLED)

    @functools.cached_property
    def _pools(self) -> tuple[tuple[int, ...], ...]:
        small = sorted({*range(len(self.shapes))} - {*self._large})
        dtypes = sorted({self.dtypes[i] for i in small}, key=str)
        return tuple(tuple(i for i in small if self.dtypes[i] == dtype) for dtype in dtypes)
