"""Gradients as rows: how they are cut into blocks of weights, and what they add up to."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _sharding, _tree
from hessjax._core._messages import checked_number
from hessjax._core._packing import Packing
from hessjax._core._types import Amount, Block, Params, Relative, Scalar, Vector

Rows = Float[Array, "_ _ _"]
"""(m, blocks, width): gradients of the blocks of one group."""

Cut = Float[Array, "_ _"]
"""(blocks, width): a vector on the blocks of one group."""

Parts = tuple[Cut, ...]
"""A vector, cut: for every group of leaves with equally wide blocks their blocks, below each other."""


# -- gradients -------------------------------------------------------------------------------------


def row(block: Block) -> Vector:
    """Shapes and dtypes of one gradient."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), block)


def num_grads(block: Block, name: str = "grads") -> int:
    """The common length of the leading axes.

    Raises:
        TypeError: leaves that are not floating point.
        ValueError: the axes disagree, or there is none.
    """
    _tree.check_arrays(block, name)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(block)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(
            f"`{name}` must be a block, its leaves with one common leading axis of gradients, got the shapes "
            f"{shapes}. One gradient is a block too: `jax.tree.map(lambda x: x[None], gradient)`."
        )
    if shapes[0][0]:
        _tree.check_floating(block, name)
    return shapes[0][0]


# -- blocks of weights -----------------------------------------------------------------------------


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
        # Sorted, as a set has no order; dtypes by name, since of themselves they compare by casting: bfloat16
        # and float16 neither way.
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

    def coupled(self, parts: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """What stands for the groups, in tuples of what one factor covers: one group each, or all of them."""
        return [parts] if self.block_size is None else [(part,) for part in parts]


def _blocks(leaf: Array, width: int) -> Array:
    flat = _sharding.gathered(leaf).reshape(-1)
    # A place without a weight is zero in all gradients: κ on the diagonal of A + κI, coupled to nothing.
    return jnp.pad(flat, (0, -flat.size % width)).reshape(-1, width)


# -- what they add up to ---------------------------------------------------------------------------


class Totals(NamedTuple):
    """What was summed over the gradients, or counted.

    Attributes:
        num_grads: m, or where gradients have weights the sum of these.
        squares: of all their entries, times `batch_size`; their mean over the weights is m · mean diag F.
        num_weights: those that are there, pruned ones are not.
    """

    num_grads: Int[Array, ""] | Scalar
    squares: Scalar
    num_weights: Int[Array, ""] | int

    @property
    def number(self) -> Scalar:
        """m, in the dtype of the sums."""
        return jnp.asarray(self.num_grads, self.squares.dtype)

    def times(self, x: Array) -> Array:
        """What F⁻¹ = m (A + κI)⁻¹ is of what the factors say."""
        return self.number.astype(x.dtype) * x

    def plus(self, more: "Totals") -> "Totals":
        """Of both, of the same weights."""
        one, other = self.num_grads, more.num_grads
        if one.dtype != other.dtype:  # a number of gradients and a sum of weights
            one, other = self.number, more.number
        return Totals(one + other, self.squares + more.squares, self.num_weights)

    def shift(self, damping: Amount) -> Scalar:
        """κ = mλ, where a relative λ is a fraction of the mean diagonal of F."""
        # m · mean diag F comes as one sum: a mean times m would be one rounding more.
        dtype = self.squares.dtype
        mean = self.squares / jnp.asarray(self.num_weights, dtype)
        return jnp.asarray(damping.amount, dtype) * (mean if isinstance(damping, Relative) else self.number)


def checked_damping(damping: Any, dtype: Any) -> Amount:
    """λ as the methods want it: an array, so that another damping compiles nothing anew."""
    amount = damping.amount if isinstance(damping, Amount) else damping
    if amount is not None:
        checked_number("damping", amount, " or `relative(r)`")
    is_traced = isinstance(amount, jax.core.Tracer)
    if amount is None or not (is_traced or 0 < amount < math.inf):
        raise ValueError(
            f"`damping` must be a positive finite number or `relative(r)`, got {damping}: without it the "
            f"Fisher of fewer gradients than weights has no inverse."
        )
    kind = Relative if isinstance(damping, Relative) else Amount
    return kind(jnp.asarray(amount, dtype))


def read(
    blocking: Blocking, grads: Block, scale: Scalar, mask: Params | None = None, count: Any = None
) -> tuple[tuple[Rows, ...], Totals]:
    """The gradients, cut and times √b, and what they add up to.

    Args:
        blocking: how to cut.
        grads: m of them.
        scale: b.
        mask: booleans like the params, False for weights that are not there: columns of zeros. None: all are.
        count: how many they are, if rows of zeros beside them do not count, or how much by weight.
    """
    # b enters here, and once: with √b in the rows all that is made of them is of F, and knows no b.
    rows = tuple(
        jnp.sqrt(scale).astype(x.dtype) * _sharding.gathered(x) for x in jax.vmap(blocking.cut)(grads)
    )
    num_weights: Any = blocking.packing.size
    if mask is not None:
        there = blocking.cut(mask)
        rows = tuple(jnp.where(x[None] > 0, y, 0) for x, y in zip(there, rows, strict=True))
        # Columns of zeros would lower the mean diagonal, and a relative λ with it, as weights go.
        num_weights = sum(jnp.sum(x, dtype=jnp.int32) for x in jax.tree.leaves(mask))
    squares = sum((jnp.sum(x**2).astype(scale.dtype) for x in rows), jnp.zeros_like(scale))
    return rows, Totals(jnp.int32(num_grads(grads)) if count is None else count, squares, num_weights)


# -- small algebra -----------------------------------------------------------------------------------


def signs(widths: Sequence[int], dtypes: Sequence[Any]) -> list[Array]:
    """Fixed numbers ±1 without a pattern, hashed from their places: nothing to store, nothing to draw."""
    starts = [0, *ends(widths)]
    return [_signs(*place) for place in zip(starts, widths, dtypes, strict=True)]


def _signs(start: int, count: int, dtype: Any) -> Array:
    # The primes and closing shifts of xxHash: bit j of a product alone repeats every 2ʲ⁺¹ places.
    x = jnp.arange(start, start + count, dtype=jnp.uint32) * jnp.uint32(2654435761)
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    x = (x ^ (x >> 13)) * jnp.uint32(3266489917)
    return (1 - 2 * ((x >> 16) & 1).astype(dtype)).astype(dtype)


def coefficients(rows: tuple[Rows, ...], v: Parts) -> Float[Array, "blocks m"]:
    """Gv, a sum over the groups."""
    products = [jnp.einsum("gbi,bi->bg", x, y, precision="highest") for x, y in zip(rows, v, strict=True)]
    return _sum(products)


def images(rows: tuple[Rows, ...]) -> Parts:
    """Az = GᵀGz, for the fixed vector z of signs."""
    z = signs([x.shape[2] for x in rows], [x.dtype for x in rows])
    products = [jnp.einsum("gbi,i->bg", x, y, precision="highest") for x, y in zip(rows, z, strict=True)]
    return combination(rows, _sum(products))


def _sum(products: Sequence[Array]) -> Array:
    """In the widest dtype of any group."""
    first, *others = _numbers.promoted(*products)
    return sum(others, first)


def combination(rows: tuple[Rows, ...], c: Float[Array, "blocks m"]) -> Parts:
    """Gᵀc."""
    return tuple(jnp.einsum("gbi,bg->bi", x, c.astype(x.dtype), precision="highest") for x in rows)


def joined(parts: Sequence[Array]) -> Array:
    """The groups that one factor covers, end to end along the weights."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(_numbers.promoted(*parts), axis=-1)


def split(whole: Array, like: Sequence[Array]) -> tuple[Array, ...]:
    """The groups again, in their dtypes."""
    pieces = jnp.split(whole, ends([x.shape[-1] for x in like]), axis=-1)
    return tuple(piece.astype(x.dtype) for piece, x in zip(pieces, like, strict=True))


def ends(widths: Sequence[int]) -> list[int]:
    """Where to cut what is laid end to end."""
    return [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
