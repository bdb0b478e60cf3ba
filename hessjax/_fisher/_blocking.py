"""Which weights belong together, and how vectors and gradients are cut into their blocks and joined again."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from hessjax._core import _sharding
from hessjax._core._packing import Packing
from hessjax._core._types import Block, Params, Vector
from hessjax._fisher._cutting import Cutting
from hessjax._fisher._shards import Home, Shards, manual, padded

Rows = Float[Array, "_ _ *_"]
"""(blocks, m, width): gradients of the blocks of a group; (1, m, *shape) of a leaf in one block with all."""

Cut = Float[Array, "_ *_"]
"""(blocks, width): a vector on the blocks of one group; (1, *shape) of a leaf in one block with all."""

Parts = tuple[Cut, ...]
"""A vector, cut: for every group of leaves with equally wide blocks their blocks, below each other."""


def row(block: Block) -> Vector:
    """Shapes and dtypes of one gradient."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), block)


class Group(NamedTuple):
    """Leaves whose blocks have the same width and dtype, and lie together, so that they are worked on so.

    Attributes:
        shape: of the weights of a block: (width,), or that of a leaf in one block with all others.
        dtype: of the gradients, float32 at least.
        members: the numbers of the leaves.
        counts: how many blocks each has.
        cuttings: how each is cut where it lies on several devices; none where nothing is known of that.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    members: tuple[int, ...]
    counts: tuple[int, ...]
    cuttings: tuple[Cutting, ...] = ()

    @property
    def width(self) -> int:
        """The number of weights in a block."""
        return math.prod(self.shape)

    @property
    def home(self) -> Home | None:
        """Where the blocks lie; None: in one place."""
        return self.cuttings[0].home if self.cuttings else None

    def places(self, index: int) -> np.ndarray:
        """Where the blocks of leaf number `index` are among those of the group."""
        place = self.members.index(index)
        if not self.cuttings:
            before = sum(self.counts[:place])
            return np.arange(before, before + self.counts[place])
        orders = [cutting.order() for cutting in self.cuttings]
        everywhere = [np.full_like(order, -1) for order in orders]
        everywhere[place] = orders[place]
        found = np.concatenate(everywhere, axis=1).reshape(-1)
        return np.argsort(found, kind="stable")[-self.counts[place] :]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Blocking:
    """Which weights belong together; itself a pytree without leaves.

    Attributes:
        packing: structure, shapes and dtypes of the params.
        block_size: the most weights in a block; None: every leaf is a part of the one block of them all.
        shards: how the gradients of each leaf lie on several devices, where that is known.
    """

    packing: Packing
    block_size: int | None
    shards: tuple[Shards | None, ...]

    @classmethod
    def of(cls, grads: Block, block_size: int | None) -> "Blocking":
        """The blocking of gradients like these."""
        return cls(Packing.of(row(grads)), block_size, tuple(map(Shards.of, jax.tree.leaves(grads))))

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """Of leaves that have any weights, the widest blocks first; with one block in all, leaf by leaf."""
        shapes, dtypes = self.packing.shapes, self.packing.dtypes
        sizes = {i: math.prod(shape) for i, shape in enumerate(shapes) if math.prod(shape)}
        if self.block_size is None:
            return tuple(Group(shapes[i], dtypes[i], (i,), (1,)) for i in sizes)
        cuttings = {i: self._cutting(i, min(self.block_size, n)) for i, n in sizes.items()}
        homes = {i: None if cut is None else cut.home for i, cut in cuttings.items()}
        kinds = {i: (min(self.block_size, n), dtypes[i], homes[i]) for i, n in sizes.items()}
        groups = []
        # In the order of their leaves, as a set has none; dtypes by name, since of themselves they compare by
        # casting: bfloat16 and float16 neither way.
        for kind in sorted(dict.fromkeys(kinds.values()), key=lambda kind: (-kind[0], str(kind[1]))):
            members = tuple(i for i in sizes if kinds[i] == kind)
            counts = tuple(-(-sizes[i] // kind[0]) for i in members)
            mine = tuple(cut for i in members if (cut := cuttings[i]) is not None)
            groups.append(Group((kind[0],), kind[1], members, counts, mine))
        return tuple(groups)

    def _cutting(self, index: int, width: int) -> Cutting | None:
        shards = self.shards[index]
        return None if shards is None else Cutting(shards, self.packing.shapes[index], width)

    @property
    def like(self) -> Params:
        """Shapes and dtypes of the vectors, in their container."""
        leaves = map(jax.ShapeDtypeStruct, self.packing.shapes, self.packing.dtypes)
        return jax.tree.unflatten(self.packing.structure, leaves)

    @property
    def widest(self) -> int:
        """The number of weights in the widest block."""
        return max(group.width for group in self.groups)

    @property
    def everywhere(self) -> Home | None:
        """All devices that hold different weights or gradients; None where nothing is known of that."""
        known = [shards for shards in self.shards if shards is not None]
        names = {name for shards in known for names in (shards.examples, *shards.spec) for name in names}
        axes = known and tuple(name for name in known[0].mesh.axis_names if name in names)
        return Home(known[0].mesh, axes) if axes else None

    @property
    def num_blocks(self) -> int:
        """How many there are."""
        return 1 if self.block_size is None else sum(sum(group.counts) for group in self.groups)

    def cut(self, vector: Vector) -> Parts:
        """A vector, in at least float32 and cut; the last block of a leaf is filled up with zeros."""
        return tuple(x[:, 0] for x in self._cut(jax.tree.map(lambda x: x[None], vector), is_vector=True))

    def rows(self, grads: Block) -> tuple[Rows, ...]:
        """Gradients, likewise: with all of them where a block is."""
        return self._cut(grads, is_vector=False)

    def _cut(self, block: Block, is_vector: bool) -> tuple[Rows, ...]:
        leaves = jax.tree.leaves(block)
        return tuple(
            self._cut_group(group, [leaves[i].astype(group.dtype) for i in group.members], is_vector)
            for group in self.groups
        )

    def _cut_group(self, group: Group, leaves: list[Array], is_vector: bool) -> Rows:
        if self.block_size is None:
            shards = self.shards[group.members[0]]
            return (leaves[0] if shards is None else shards.exchanged(leaves[0]))[None]
        if not group.cuttings:
            return jnp.concatenate([_blocks(leaf, group.width) for leaf in leaves])
        cuttings, home = group.cuttings, group.cuttings[0].home
        given = tuple(_spread(cut.shards, x, is_vector) for cut, x in zip(cuttings, leaves, strict=True))
        specs = tuple(cut.shards.rows(names) for cut, names in zip(cuttings, given, strict=True))
        laid = [
            _sharding.laid_out(x, NamedSharding(home.mesh, p)) for x, p in zip(leaves, specs, strict=True)
        ]
        local = functools.partial(_cut_here, cuttings, given)
        return manual(local, home.mesh, specs, PartitionSpec(home.axes))(*laid)

    def join(self, parts: Parts) -> Vector:
        """The vector again, its leaves laid out as those of one gradient."""
        shapes, dtypes = self.packing.shapes, self.packing.dtypes
        leaves = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for group, part in zip(self.groups, parts, strict=True):
            for i, leaf in zip(group.members, self._joined(group, part), strict=True):
                leaves[i] = leaf
        return jax.tree.unflatten(self.packing.structure, leaves)

    def _joined(self, group: Group, part: Cut) -> Sequence[Array]:
        if self.block_size is None:
            shards = self.shards[group.members[0]]
            return [_sharding.laid_out(part[0], None if shards is None else shards.of_vector())]
        if group.cuttings:
            home, local = group.cuttings[0].home, functools.partial(_join_here, group.cuttings)
            specs = tuple(cut.shards.of_vector().spec for cut in group.cuttings)
            spec = PartitionSpec(home.axes)
            return manual(local, home.mesh, spec, specs)(
                _sharding.laid_out(part, NamedSharding(home.mesh, spec))
            )
        shapes = [self.packing.shapes[i] for i in group.members]
        pieces = jnp.split(part, np.cumsum(group.counts)[:-1])
        return [x.reshape(-1)[: math.prod(n)].reshape(n) for x, n in zip(pieces, shapes, strict=True)]

    def by_leaf(self, parts: tuple[Array, ...]) -> dict[int, Array]:
        """What has one row a block, by the number of the leaf."""
        pairs = zip(self.groups, parts, strict=True)
        return {i: taken(part, group.places(i)) for group, part in pairs for i in group.members}

    def position(self, index: int) -> tuple[int, np.ndarray] | None:
        """The group of leaf number `index`, and its blocks therein; None for a leaf without weights."""
        for number, group in enumerate(self.groups):
            if index in group.members:
                return number, group.places(index)
        return None

    def coupled(self, parts: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """What stands for the groups, in tuples of what one factor covers: one group each, or all of them."""
        return [parts] if self.block_size is None else [(part,) for part in parts]

    def over(
        self, function: Callable[..., Any], *args: Sequence[Any], common: tuple[Any, ...] = ()
    ) -> list[Any]:
        """`function(like, *args, *common)` for every factor, on all devices that hold blocks of it.

        `like` says what the weights of a block are, in each group that the factor covers.
        """
        places = enumerate(zip(self.coupled(tuple(map(self._like, self.groups))), *args, strict=True))
        return [
            self._run(place, functools.partial(function, like), *mine, *common)
            for place, (like, *mine) in places
        ]

    def _like(self, group: Group) -> jax.ShapeDtypeStruct:
        shards = None if self.block_size else self.shards[group.members[0]]
        layout = None if shards is None else shards.by_weights(group.shape, 0)
        return jax.ShapeDtypeStruct(group.shape, group.dtype, sharding=layout)

    def _run(self, place: int, function: Callable[..., Any], *args: Any) -> Any:
        home = None if self.block_size is None else self.groups[place].home
        return function(*args) if home is None else home.run(function, *args)


def taken(blocks: Array, places: np.ndarray) -> Array:
    """Some of the blocks, on all devices."""
    return blocks.at[places].get(out_sharding=_sharding.everywhere(blocks))


def _blocks(leaf: Array, width: int) -> Rows:
    return padded(leaf.reshape(len(leaf), -1), width, 1).reshape(len(leaf), -1, width).swapaxes(0, 1)


def _spread(shards: Shards, x: Array, is_vector: bool) -> tuple[str, ...]:
    """The axes that the gradients are spread over, unless these are too few for that."""
    return () if is_vector or len(x) % shards.num_parts else shards.examples


def _cut_here(cuttings: tuple[Cutting, ...], given: tuple[tuple[str, ...], ...], *leaves: Array) -> Rows:
    pieces = [cut.cut(x, names) for cut, names, x in zip(cuttings, given, leaves, strict=True)]
    return jnp.concatenate(pieces)


def _join_here(cuttings: tuple[Cutting, ...], blocks: Cut) -> tuple[Array, ...]:
    ends = np.cumsum([cut.slots for cut in cuttings])
    return tuple(cut.join(x) for cut, x in zip(cuttings, jnp.split(blocks, ends[:-1]), strict=True))
