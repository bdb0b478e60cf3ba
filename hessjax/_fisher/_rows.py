"""Gradients as rows, cut into blocks of weights: what they add up to, and small algebra of what is cut."""

import math
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _sharding, _tree
from hessjax._core._messages import checked_number
from hessjax._core._types import Amount, Block, Params, Relative, Scalar
from hessjax._fisher._blocking import Blocking, Parts, Rows

# -- gradients -------------------------------------------------------------------------------------


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
    rows = tuple(jnp.sqrt(scale).astype(x.dtype) * x for x in blocking.rows(grads))
    num_weights: Any = blocking.packing.size
    if mask is not None:
        there = blocking.cut(mask)
        rows = tuple(jnp.where(x[:, None] > 0, y, 0) for x, y in zip(there, rows, strict=True))
        # Columns of zeros would lower the mean diagonal, and a relative λ with it, as weights go.
        num_weights = sum(jnp.sum(x, dtype=jnp.int32) for x in jax.tree.leaves(mask))
    squares = sum((jnp.sum(x**2).astype(scale.dtype) for x in rows), jnp.zeros_like(scale))
    return rows, Totals(jnp.int32(num_grads(grads)) if count is None else count, squares, num_weights)


# -- small algebra -----------------------------------------------------------------------------------


def signs(like: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """Fixed numbers ±1 without a pattern, hashed from their places: nothing to store, nothing to draw."""
    sizes = [math.prod(x.shape) for x in like]
    return [_signs(x, sum(sizes[:i])) for i, x in enumerate(like)]


def _signs(like: jax.ShapeDtypeStruct, start: int) -> Array:
    x = _sharding.places(like, start % 2**32)
    # The primes and closing shifts of xxHash: bit j of a product alone repeats every 2ʲ⁺¹ places.
    x = x * jnp.uint32(2654435761)
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    x = (x ^ (x >> 13)) * jnp.uint32(3266489917)
    return (1 - 2 * ((x >> 16) & 1).astype(like.dtype)).astype(like.dtype)


def coefficients(rows: tuple[Rows, ...], v: Parts) -> Float[Array, "blocks m"]:
    """Gv, a sum over the groups."""
    return total([contracted("bg_,b_->bg", x, y) for x, y in zip(rows, v, strict=True)])


def images(rows: tuple[Rows, ...], like: Sequence[jax.ShapeDtypeStruct]) -> Parts:
    """Az = GᵀGz, for the fixed vector z of signs."""
    z = signs(like)
    return combination(rows, total([contracted("bg_,_->bg", x, y) for x, y in zip(rows, z, strict=True)]))


def grams(rows: tuple[Rows, ...]) -> list[Float[Array, "blocks m m"]]:
    """GGᵀ, of each group."""
    return [contracted("bg_,bh_->bgh", x, x) for x in rows]


def combination(rows: tuple[Rows, ...], c: Float[Array, "blocks m"]) -> Parts:
    """Gᵀc."""
    return tuple(_einsum("bg_,bg->b_", x, c.astype(x.dtype)) for x in rows)


def mixed(matrices: Float[Array, "blocks k m"], rows: Rows) -> Float[Array, "blocks k *shape"]:
    """MG."""
    return _einsum("bkg,bg_->bk_", matrices.astype(rows.dtype), rows, last=1)


def contracted(subscripts: str, x: Rows, y: Array) -> Array:
    """A sum over all weights of a block, in whatever axes; it is the same on all devices that hold some."""
    sharding = _sharding.explicit(x)
    if sharding is not None:
        blocks = sharding.spec[0] if sharding.spec else None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(blocks))
    return _einsum(subscripts, x, y, sharding=sharding)


def _einsum(
    subscripts: str, x: Array, y: Array, last: int = 0, sharding: NamedSharding | None = None
) -> Array:
    """All axes of the weights for each `_`: a leaf that is spread over devices is not to be flattened."""
    names = string.ascii_uppercase[: (x, y)[last].ndim - 2]
    # Without a layout jax finds it from those of `x` and `y`, on explicit meshes too.
    return jnp.einsum(subscripts.replace("_", names), x, y, precision="highest", out_sharding=sharding)


def total(products: Sequence[Array]) -> Array:
    """In the widest dtype of any group."""
    first, *others = _numbers.promoted(*products)
    return sum(others, first)


def joined(parts: Sequence[Array], lead: int = 1) -> Array:
    """The groups that one factor covers, end to end along the weights."""
    flat = [_flat(x, lead) for x in parts]
    return flat[0] if len(flat) == 1 else jnp.concatenate(_numbers.promoted(*flat), axis=-1)


def _flat(x: Array, lead: int) -> Array:
    # Only roots ask it of a whole leaf: it has fewer weights than there are gradients.
    return x if x.ndim == lead + 1 else _sharding.gathered(x).reshape(*x.shape[:lead], -1)


def split(whole: Array, like: Sequence[Any]) -> tuple[Array, ...]:
    """The groups again, each with the shape of its weights, in its dtype."""
    pieces = jnp.split(whole, ends([math.prod(x.shape) for x in like]), axis=-1)
    return tuple(
        piece.reshape(*piece.shape[:-1], *x.shape).astype(x.dtype)
        for piece, x in zip(pieces, like, strict=True)
    )


def ends(widths: Sequence[int]) -> list[int]:
    """Where to cut what is laid end to end."""
    return [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
