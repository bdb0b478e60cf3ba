"""How a vector is cut into blocks of consecutive weights, and put together again."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core._packing import Packing
from hessjax._core._types import Params, Vector

Parts = tuple[Float[Array, "_ _"], ...]
"""A vector, cut: for every group of leaves with equally wide blocks their blocks, below each other."""


class Group(NamedTuple):
    """Leaves whose blocks have the same width and dtype, so that they are worked on together."""

    width: int
    dtype: np.dtype
    members: tuple[int, ...]
    counts: tuple[int, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Blocking:
    """Which weights belong together; itself a pytree without leaves.

    Attributes:
        packing: structure, shapes and dtypes of the params.
        block_size: the most weights in a block; None: every leaf is a part of the one block of them all.
    """

    packing: Packing
    block_size: int | None

    @classmethod
    def of(cls, like: Params, block_size: int | None) -> "Blocking":
        """The blocking of vectors like `like`."""
        return cls(Packing.of(like), block_size)

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """Of leaves that have any weights, the widest blocks first; with one block in all, leaf by leaf."""
        sizes = {i: math.prod(shape) for i, shape in enumerate(self.packing.shapes) if math.prod(shape)}
        if self.block_size is None:
            return tuple(Group(n, self.packing.dtypes[i], (i,), (1,)) for i, n in sizes.items())
        limit = self.block_size
        kinds = {i: (min(limit, n), self.packing.dtypes[i]) for i, n in sizes.items()}
        groups = []
        for kind in sorted(set(kinds.values()), key=lambda kind: (-kind[0], str(kind[1]))):
            members = tuple(i for i in sizes if kinds[i] == kind)
            groups.append(Group(*kind, members, tuple(-(-sizes[i] // kind[0]) for i in members)))
        return tuple(groups)

    @property
    def like(self) -> Params:
        """Shapes and dtypes of the vectors, in their container."""
        leaves = map(jax.ShapeDtypeStruct, self.packing.shapes, self.packing.dtypes)
        return jax.tree.unflatten(self.packing.structure, leaves)

    @property
    def widest(self) -> int:
        """The number of weights in the widest block."""
        return max(group.width for group in self.groups)

    def cut(self, vector: Vector) -> Parts:
        """A vector, in at least float32 and cut; the last block of a leaf is filled up with zeros."""
        leaves = jax.tree.leaves(vector)
        return tuple(
            jnp.concatenate([_blocks(leaves[i].astype(group.dtype), group.width) for i in group.members])
            for group in self.groups
        )

    def join(self, parts: Parts) -> Vector:
        """The vector again."""
        shapes, dtypes = self.packing.shapes, self.packing.dtypes
        leaves = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for i, blocks in self.by_leaf(parts).items():
            leaves[i] = blocks.reshape(-1)[: math.prod(shapes[i])].reshape(shapes[i])
        return jax.tree.unflatten(self.packing.structure, leaves)

    def by_leaf(self, parts: tuple[Array, ...]) -> dict[int, Array]:
        """What has one row a block, sorted by the number of the leaf."""
        return {
            i: rows
            for group, part in zip(self.groups, parts, strict=True)
            for i, rows in zip(group.members, jnp.split(part, np.cumsum(group.counts)[:-1]), strict=True)
        }

    def position(self, index: int) -> tuple[int, slice] | None:
        """The group of leaf number `index`, and its blocks therein; None for a leaf without weights."""
        for number, group in enumerate(self.groups):
            if index in group.members:
                before = sum(group.counts[: group.members.index(index)])
                return number, slice(before, before + group.counts[group.members.index(index)])
        return None


def _blocks(leaf: Array, width: int) -> Array:
    flat = leaf.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % width)).reshape(-1, width)


def signs(count: int, dtype: Any) -> Array:
    """Fixed numbers ±1 without a pattern, hashed from their places: nothing to store, nothing to draw."""
    x = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(2654435761)
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    x = (x ^ (x >> 13)) * jnp.uint32(3266489917)
    return (1 - 2 * ((x >> 16) & 1).astype(dtype)).astype(dtype)
