"""Factors of (Σ ggᵀ + κI)⁻¹, block by block: a square root where gradients are many, a dual where few.

With A = Σ ggᵀ over m gradients and κ = mλ the empirical Fisher is F + λI = (A + κI) / m.

Root: S with SSᵀ = (A + κI)⁻¹. For a chunk of gradients, the rows of G, and V = GS, Woodbury's identity
turns I/κ − (…) into S(I − Vᵀ(I + VVᵀ)⁻¹V)Sᵀ, and with the Cholesky factor LLᵀ = I + VVᵀ the middle has the
square root I − Vᵀ L⁻ᵀ(L + I)⁻¹ V (Andrews 1968). Against updates of the inverse itself this is half as much
work again, all of it matrix products; the inverse is positive definite by construction; and errors grow like
the square root of ‖F‖/λ instead of ‖F‖/λ.

Dual: (A + κI)⁻¹ = (I − Gᵀ(κI + GGᵀ)⁻¹G) / κ, with a Cholesky factor of the m × m matrix.

Both read (A + κI)⁻¹ = c·I ± aᵀa, with one column of a for each weight: c = 0 and a = Sᵀ, or c = 1/κ and
a = L⁻¹G/√κ. Diagonals, dense blocks and optimal brain surgeon are written in terms of c, sign and columns.
A factor covers one or several groups of equally wide blocks; vectors come and go as tuples over them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from hessjax._core._numbers import common_dtype
from hessjax._core._types import Scalar
from hessjax._fisher._blocking import Cut, Parts, Rows
from hessjax._fisher._rows import coefficients, combination, grams, images, joined, mixed, split, total

Columns: TypeAlias = Float[Array, "_ _ *_"]
"""(blocks, k, width): for every weight of every block a vector of k numbers; (1, k, *shape) as of `Rows`."""

Like: TypeAlias = Sequence[jax.ShapeDtypeStruct]
"""The weights of a block, in each group that a factor covers."""

_CACHED = 2**18
"""On a CPU roots of so many entries together stay in the cache while all gradients enter."""


class Root(NamedTuple):
    """S with SSᵀ = (A + κI)⁻¹ for every block, and what to judge it by.

    Attributes:
        root: S.
        pivot: the smallest fraction of a diagonal entry of I + VVᵀ that was left of it as a pivot.
        image: Az for a fixed vector z.
    """

    root: Float[Array, "blocks n n"]
    pivot: Float[Array, " blocks"]
    image: Cut

    def solve(self, v: Parts, shift: Scalar) -> Parts:
        """(A + κI)⁻¹v."""
        found = _times(self.root, _times(self.root, joined(v), transposed=True))
        return split(found, [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in v])

    def solve_combination(self, c: Float[Array, "blocks m"], rows: tuple[Rows, ...], shift: Scalar) -> Parts:
        """(A + κI)⁻¹Gᵀc."""
        return self.solve(combination(rows, c), shift)

    def columns(self, like: Like, shift: Scalar) -> tuple[Columns, ...]:
        """The columns a, for each group."""
        return split(self.root.mT, like)

    def constant(self, shift: Scalar) -> Scalar:
        """The number c."""
        return jnp.zeros_like(shift)

    @property
    def sign(self) -> int:
        """Of aᵀa."""
        return 1

    def images(self, like: Like) -> Parts:
        """Az, for the fixed vector z of signs."""
        return split(self.image, like)

    def replaced(self, keep: Array) -> "Root":
        """NaN in the blocks that are not to be kept."""
        return self._replace(root=jnp.where(keep[:, None, None], self.root, jnp.nan))


class Dual(NamedTuple):
    """The gradients G of every block, and the Cholesky factor of κI + GGᵀ.

    With one block in all, its leaves are never laid end to end. 512 gradients of 25 M weights are 51 GB in
    float32: with every leaf's gradients sharded along the weights as the weights are, GGᵀ is a sum over
    devices of 512 × 512 products (1 MB, an all-reduce for each leaf), its factor is everywhere the same, F⁻¹v
    needs one more of 512 numbers, and all else is local.
    """

    rows: tuple[Rows, ...]
    cholesky: Float[Array, "blocks m m"]

    def solve(self, v: Parts, shift: Scalar) -> Parts:
        """(A + κI)⁻¹v."""
        inside = self._inside(coefficients(self.rows, v))
        moved = zip(v, combination(self.rows, inside), strict=True)
        return tuple((x - y) / shift.astype(x.dtype) for x, y in moved)

    def solve_combination(self, c: Float[Array, "blocks m"], rows: tuple[Rows, ...], shift: Scalar) -> Parts:
        """(A + κI)⁻¹Gᵀc = Gᵀ(κI + GGᵀ)⁻¹c, without the difference that loses digits in `solve`."""
        return combination(self.rows, self._inside(c))

    def columns(self, like: Like, shift: Scalar) -> tuple[Columns, ...]:
        """The columns a, for each group."""
        # The small triangle is inverted first: one matrix product is twice as fast as so many substitutions.
        half = each(_inverse, self.cholesky) / jnp.sqrt(shift).astype(self.cholesky.dtype)
        return tuple(mixed(half, x) for x in self.rows)

    def constant(self, shift: Scalar) -> Scalar:
        """The number c."""
        return 1 / shift

    @property
    def sign(self) -> int:
        """Of aᵀa."""
        return -1

    def images(self, like: Like) -> Parts:
        """Az, for the fixed vector z of signs."""
        return images(self.rows, like)

    @property
    def pivot(self) -> Float[Array, " blocks"]:
        """The smallest fraction of a diagonal entry of κI + GGᵀ that was left of it as a pivot."""
        return _smallest_pivot(self.cholesky)

    def replaced(self, keep: Array) -> "Dual":
        """NaN in the blocks that are not to be kept."""
        return self._replace(cholesky=jnp.where(keep[:, None, None], self.cholesky, jnp.nan))

    def _inside(self, c: Float[Array, "blocks m"]) -> Float[Array, "blocks m"]:
        return each(_cholesky_solve, self.cholesky, c.astype(self.cholesky.dtype))


Factor: TypeAlias = Root | Dual


# -- how they are made -----------------------------------------------------------------------------


def factor_of(chunk_size: int, like: Like, rows: tuple[Rows, ...], shift: Scalar) -> Factor:
    """A root if the gradients are at least as many as a block's weights, the dual otherwise."""
    blocks, width = rows[0].shape[0], sum(math.prod(x.shape) for x in like)
    if rows[0].shape[1] < width:
        return dual_of(rows, shift)
    dtype = common_dtype(*rows)
    start = _diagonal_root(jnp.broadcast_to(jnp.eye(width, dtype=dtype), (blocks, width, width)), shift)
    empty = Root(start, jnp.ones(blocks, dtype), jnp.zeros((blocks, width), dtype))
    return absorbed(chunk_size, like, empty, rows)


def dual_of(rows: tuple[Rows, ...], shift: Scalar) -> Dual:
    """The dual, block by block."""
    gram = total([x.astype(shift.dtype) for x in grams(rows)]).astype(common_dtype(*rows))
    shifted = gram + shift.astype(gram.dtype) * jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
    return Dual(rows, each(jnp.linalg.cholesky, shifted))


def absorbed(chunk_size: int, like: Like, part: Root, rows: tuple[Rows, ...]) -> Root:
    """The root with more gradients in A, κ as it is."""
    stacked = joined(rows, lead=2)
    count = stacked.shape[1]
    chunk_size = min(chunk_size, count, stacked.shape[2])  # VVᵀ of more would be singular
    stacked = jnp.pad(stacked, ((0, 0), (0, -count % chunk_size), (0, 0)))  # zero gradients change nothing
    return _in_place(functools.partial(_absorb, chunk_size), part, stacked)


def shifted(part: Root, old: Scalar, new: Scalar) -> Root:
    """The root at a larger κ: S L⁻ᵀ with LLᵀ = I + (κ' − κ)SᵀS.

    L is as well conditioned as A + κI, or better where κ'/κ is near 1. So κ must grow before gradients come
    that are larger than all before: they leave too few digits in S for what a small κ is to a large one.
    """
    return _in_place(functools.partial(_shift, old, new), part)


def extended(
    chunk_size: int, like: Like, part: Factor, more: tuple[Rows, ...], old: Scalar, new: Scalar
) -> Factor:
    """A factor with more gradients at another κ; a dual of enough gradients becomes a root."""
    if isinstance(part, Root):
        return absorbed(chunk_size, like, shifted(part, old, new), more)
    rows = tuple(jnp.concatenate(pair, axis=1) for pair in zip(part.rows, more, strict=True))
    return factor_of(chunk_size, like, rows, new)


def followed(factor: float, like: Like, part: Root, old: Scalar, new: Scalar) -> Root:
    """A root at a κ that has grown by more than a factor, or as it is."""
    # A loop of one turn or none: the branches of a condition would copy the roots.
    return jax.lax.while_loop(
        lambda state: factor * state[1] < new,
        lambda state: (shifted(state[0], state[1], new), new),
        (part, old),
    )[0]


def _diagonal_root(eye: Float[Array, "blocks n n"], shift: Scalar) -> Array:
    """S without gradients; I for κ = 0, relative to gradients that were all zero, which has no inverse."""
    return eye / jnp.sqrt(jnp.where(shift > 0, shift, 1)).astype(eye.dtype)


def _shift(old: Scalar, new: Scalar, part: Root) -> Root:
    root, pivot, _ = part
    scaled = jnp.sqrt(new - old).astype(root.dtype) * root  # SᵀS itself may overflow
    eye = jnp.broadcast_to(jnp.eye(root.shape[-1], dtype=root.dtype), root.shape)
    gram = jnp.einsum("bij,bik->bjk", scaled, scaled, precision="highest")
    found = each(_half_solve, each(jnp.linalg.cholesky, eye + gram), root.mT).mT
    # Errors of eps·‖A‖/κ become those of eps·‖A‖/κ'.
    pivot = jnp.where(old > 0, jnp.minimum(1, pivot * (new / old).astype(pivot.dtype)), 1)
    return Root(jnp.where(old > 0, found, _diagonal_root(eye, new)), pivot, part.image)


def _absorb(chunk_size: int, part: Root, rows: Rows) -> Root:
    chunks = rows.reshape(len(rows), -1, chunk_size, rows.shape[2]).swapaxes(0, 1)
    return jax.lax.scan(lambda part, chunk: (_updated(part, chunk), None), part, chunks)[0]


def _updated(part: Root, chunk: Float[Array, "blocks k n"]) -> Root:
    V = _matmul(chunk, part.root)
    eye = jnp.eye(chunk.shape[1], dtype=chunk.dtype)[None]
    L = each(jnp.linalg.cholesky, eye + _matmul(V, V.mT))
    # Products with inverse factors, for solves with V itself are many times slower. The product of both
    # inverses would lose digits.
    W = _matmul(each(_inverse, L + eye), V)
    W = _matmul(each(_inverse, L).mT, W)
    root = part.root - _matmul(_matmul(part.root, V.mT), W)
    # The image here, where the gradients are being read: a pass over all of them costs a fifth of this.
    image = part.image + joined(images((chunk,), [jax.ShapeDtypeStruct(chunk.shape[2:], chunk.dtype)]))
    return Root(root, jnp.minimum(part.pivot, _smallest_pivot(L)), image)


def _smallest_pivot(L: Float[Array, "blocks k k"]) -> Float[Array, " blocks"]:
    # The sum of a row's squares is the diagonal entry that the pivot was taken from.
    return jnp.min(jnp.diagonal(L, axis1=1, axis2=2) ** 2 / jnp.sum(L**2, axis=2), axis=1)


# -- loops over blocks -----------------------------------------------------------------------------


def each(function: Callable[..., Array], *operands: Any) -> Array:
    """Block by block on a CPU, all blocks at once elsewhere; one block alone without a batch axis.

    On a CPU, two batched LAPACK calls that XLA runs side by side wait for each other's threads for ever
    where there are as few threads (jaxlib 0.10.2, two cores); calls of one matrix take no other thread.
    """
    if jax.tree.leaves(operands)[0].shape[0] == 1:
        return function(*jax.tree.map(lambda x: x[0], operands))[None]
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *blocks: jax.lax.map(lambda block: function(*block), blocks),
        default=jax.vmap(function),
    )


def _in_place(function: Callable[..., Root], part: Root, *rows: Rows) -> Root:
    """The roots made anew by a function of some of them and of the rows that belong to these.

    A root takes part in several products for every chunk of gradients. On a CPU all gradients enter a few
    roots, which stay in the cache, before it is the turn of the next: a loop over chunks of all roots spends
    as long on reading and writing them. Elsewhere all blocks together are the larger, better products.
    """
    number, width, _ = part.root.shape
    together = max(1, _CACHED // width**2)
    if number <= together:
        return function(part, *rows)
    by_turns = functools.partial(_by_turns, function, together)
    return jax.lax.platform_dependent(part, *rows, cpu=by_turns, default=function)


def _by_turns(function: Callable[..., Root], together: int, part: Root, *rows: Rows) -> Root:
    def turn(start: Any, size: int, part: Root) -> Root:
        some = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), part)
        theirs = [jax.lax.dynamic_slice_in_dim(x, start, size) for x in rows]
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=0),
            part,
            function(some, *theirs),
        )

    # The roots are what the loop carries, so that they stay in their memory; `map` would make a second copy.
    number, rest = divmod(part.root.shape[0], together)
    part = jax.lax.fori_loop(0, number, lambda i, part: turn(i * together, together, part), part)
    return turn(number * together, rest, part) if rest else part


# -- small algebra ---------------------------------------------------------------------------------


def _inverse(lower: Array) -> Array:
    return _half_solve(lower, jnp.eye(len(lower), dtype=lower.dtype))


def _cholesky_solve(lower: Array, b: Array) -> Array:
    return _half_solve(lower, _half_solve(lower, b), transposed=True)


def _half_solve(lower: Array, b: Array, transposed: bool = False) -> Array:
    return solve_triangular(lower, b, lower=True, trans=1 if transposed else 0)


def _times(matrices: Array, v: Cut, transposed: bool = False) -> Cut:
    return jnp.einsum("bji,bj->bi" if transposed else "bij,bj->bi", matrices, v, precision="highest")


_matmul = functools.partial(jnp.matmul, precision="highest")
