"""Factors of (Σ ggᵀ + κI)⁻¹, block by block: a square root where gradients are many, a dual where few.

With A = Σ ggᵀ over m gradients and κ = mλ the empirical Fisher is F + λI = (A + κI) / m.

Root: S with SSᵀ = (A + κI)⁻¹. For a chunk of gradients, the rows of G, and V = GS, Woodbury's identity
turns I/κ − (…) into S(I − Vᵀ(I + VVᵀ)⁻¹V)Sᵀ, and with the Cholesky factor LLᵀ = I + VVᵀ the middle has the
square root I − Vᵀ L⁻ᵀ(L + I)⁻¹ V (Andrews 1968). Against updates of the inverse itself this is half as much
work again, all of it matrix products; the inverse is positive definite by construction; and errors grow like
the square root of ‖F‖/λ instead of ‖F‖/λ.

Dual: (A + κI)⁻¹ = (I − Gᵀ(κI + GGᵀ)⁻¹G) / κ, with a Cholesky factor of the m × m matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from hessjax._core._types import Scalar
from hessjax._fisher._blocking import signs

Rows = Float[Array, "_ _ _"]
"""(gradients, blocks, width)"""
Cut = Float[Array, "_ _"]
"""(blocks, width)"""


class Root(NamedTuple):
    """S with SSᵀ = (A + κI)⁻¹ for every block, and the image Az of a fixed vector z to check it by."""

    root: Float[Array, "_ _ _"]
    image: Cut

    def solve(self, v: Cut, shift: Scalar) -> Cut:
        """(A + κI)⁻¹v."""
        return _times(self.root, _times(self.root, v, transposed=True))

    def diagonal(self, shift: Scalar) -> Cut:
        """The diagonal of (A + κI)⁻¹."""
        return jnp.sum(self.root**2, axis=-1)

    def dense(self, which: slice, shift: Scalar) -> Float[Array, "_ _ _"]:
        """Some of its blocks, with all their entries."""
        return jnp.einsum("bij,bkj->bik", self.root[which], self.root[which], precision="highest")


class Dual(NamedTuple):
    """The gradients G of every block, and the Cholesky factor of κI + GGᵀ."""

    rows: Rows
    cholesky: Float[Array, "_ _ _"]

    @property
    def image(self) -> Cut:
        """Az, for the fixed vector z of signs."""
        z = signs(self.rows.shape[-1], self.rows.dtype)
        coefficients = jnp.einsum("gbi,i->gb", self.rows, z, precision="highest")
        return jnp.einsum("gbi,gb->bi", self.rows, coefficients, precision="highest")

    def solve(self, v: Cut, shift: Scalar) -> Cut:
        """(A + κI)⁻¹v."""
        coefficients = jnp.einsum("gbi,bi->bg", self.rows, v, precision="highest")
        coefficients = each(_cholesky_solve, self.cholesky, coefficients)
        solution = v - jnp.einsum("gbi,bg->bi", self.rows, coefficients, precision="highest")
        return solution / shift.astype(v.dtype)

    def diagonal(self, shift: Scalar) -> Cut:
        """The diagonal of (A + κI)⁻¹."""
        half = each(_half_solve, self.cholesky, self.rows.swapaxes(0, 1))
        return (1 - jnp.sum(half**2, axis=1)) / shift.astype(half.dtype)

    def dense(self, which: slice, shift: Scalar) -> Float[Array, "_ _ _"]:
        """Some of its blocks, with all their entries."""
        half = each(_half_solve, self.cholesky[which], self.rows[:, which].swapaxes(0, 1))
        products = jnp.einsum("bgi,bgj->bij", half, half, precision="highest")
        return (jnp.eye(products.shape[-1], dtype=products.dtype) - products) / shift.astype(products.dtype)


class Whole(NamedTuple):
    """The gradients of one block that holds all leaves, leaf by leaf, and the factor of κI + GGᵀ.

    Leaves are never laid end to end. 512 gradients of 25 M weights are 51 GB in float32: with every leaf's
    gradients sharded along the weights as the weights are, GGᵀ is a sum over devices of 512 × 512 products
    (1 MB, one all-reduce), its factor is everywhere the same, F⁻¹v needs one more all-reduce of 512 numbers,
    and all else is local.
    """

    rows: tuple[Rows, ...]
    cholesky: Float[Array, "_ _"]

    @property
    def image(self) -> tuple[Cut, ...]:
        """Az, for the fixed vector z of signs."""
        z = tuple(signs(x.shape[-1], x.dtype)[None] for x in self.rows)
        return self._combined(self._coefficients(z))

    def solve(self, v: tuple[Cut, ...], shift: Scalar) -> tuple[Cut, ...]:
        """(A + κI)⁻¹v."""
        combined = self._combined(_cholesky_solve(self.cholesky, self._coefficients(v)))
        return tuple((x - y) / shift.astype(x.dtype) for x, y in zip(v, combined, strict=True))

    def diagonal(self, shift: Scalar) -> tuple[Cut, ...]:
        """The diagonal of (A + κI)⁻¹."""
        return tuple(self._leaf(i).diagonal(shift) for i in range(len(self.rows)))

    def dense(self, index: int, shift: Scalar) -> Float[Array, "_ _ _"]:
        """Some of its blocks, with all their entries."""
        return self._leaf(index).dense(slice(None), shift)

    def _leaf(self, index: int) -> Dual:
        return Dual(self.rows[index], self.cholesky[None].astype(self.rows[index].dtype))

    def _coefficients(self, v: tuple[Cut, ...]) -> Float[Array, " _"]:
        """Gv."""
        products = [
            jnp.einsum("gbi,bi->g", x, y, precision="highest") for x, y in zip(self.rows, v, strict=True)
        ]
        return sum(products[1:], products[0]).astype(self.cholesky.dtype)

    def _combined(self, coefficients: Float[Array, " _"]) -> tuple[Cut, ...]:
        """Gᵀc."""
        return tuple(
            jnp.einsum("gbi,g->bi", x, coefficients.astype(x.dtype), precision="highest") for x in self.rows
        )


def whole_of(rows: tuple[Rows, ...], shift: Scalar) -> Whole:
    """The dual of all leaves together."""
    grams = [jnp.einsum("gbi,hbi->gh", x, x, precision="highest").astype(shift.dtype) for x in rows]
    return Whole(rows, _cholesky(sum(grams[1:], grams[0]), shift))


def root_of(rows: Rows, shift: Scalar, chunk_size: int) -> Root:
    """The root from nothing but these gradients."""
    _, blocks, width = rows.shape
    eye = jnp.broadcast_to(jnp.eye(width, dtype=rows.dtype), (blocks, width, width))
    start = Root(_diagonal_root(eye, shift), jnp.zeros((blocks, width), rows.dtype))
    return absorbed(start, rows, chunk_size)


def absorbed(part: Root, rows: Rows, chunk_size: int) -> Root:
    """The root with more gradients in A, κ as it is."""
    count = rows.shape[0]
    chunk_size = min(chunk_size, count, rows.shape[2])  # VVᵀ of more would be singular
    rows = jnp.pad(rows, ((0, -count % chunk_size), (0, 0), (0, 0)))  # zero gradients change nothing
    chunks = rows.reshape(-1, chunk_size, *rows.shape[1:])
    return jax.lax.scan(lambda part, chunk: (_absorb(part, chunk), None), part, chunks)[0]


def shifted(part: Root, old: Scalar, new: Scalar) -> Root:
    """The root at a larger κ: S L⁻ᵀ with LLᵀ = I + (κ' − κ)SᵀS.

    L is as well conditioned as A + κI, or better where κ'/κ is near 1. So κ must grow before gradients come
    that are larger than all before: they leave too few digits in S for what a small κ is to a large one.
    """
    scaled = jnp.sqrt(new - old).astype(part.root.dtype) * part.root  # SᵀS itself may overflow
    gram = jnp.einsum("bij,bik->bjk", scaled, scaled, precision="highest")
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    root = each(_half_solve, each(jnp.linalg.cholesky, eye + gram), part.root.mT).mT
    return part._replace(root=jnp.where(old > 0, root, _diagonal_root(eye, new)))


def dual_of(rows: Rows, shift: Scalar) -> Dual:
    """The dual, block by block."""
    gram = jnp.einsum("gbi,hbi->bgh", rows, rows, precision="highest")
    return Dual(rows, _cholesky(gram, shift))


def _diagonal_root(eye: Float[Array, "_ _ _"], shift: Scalar) -> Array:
    """S without gradients; I for κ = 0, relative to gradients that were all zero, which has no inverse."""
    return eye / jnp.sqrt(jnp.where(shift > 0, shift, 1)).astype(eye.dtype)


def _absorb(part: Root, chunk: Rows) -> Root:
    z = signs(chunk.shape[-1], chunk.dtype)
    coefficients = jnp.einsum("gbi,i->gb", chunk, z, precision="highest")
    image = part.image + jnp.einsum("gbi,gb->bi", chunk, coefficients, precision="highest")
    return Root(_updated(part.root, chunk.swapaxes(0, 1)), image)


def _updated(root: Float[Array, "_ _ _"], chunk: Float[Array, "_ _ _"]) -> Array:
    V = jnp.matmul(chunk, root, precision="highest")
    eye = jnp.eye(chunk.shape[1], dtype=chunk.dtype)
    L = each(jnp.linalg.cholesky, eye + jnp.matmul(V, V.mT, precision="highest"))
    # Products with inverse factors, for solves with V itself are many times slower. The product of both
    # inverses would lose digits.
    W = jnp.matmul(each(_inverse, L + eye), V, precision="highest")
    W = jnp.matmul(each(_inverse, L).mT, W, precision="highest")
    return root - jnp.matmul(jnp.matmul(root, V.mT, precision="highest"), W, precision="highest")


def each(function: Callable[..., Array], *operands: Any) -> Array:
    """Block by block on a CPU, all blocks at once elsewhere.

    On a CPU, two batched LAPACK calls that XLA runs side by side wait for each other's threads for ever
    where there are as few threads (jaxlib 0.10.2, two cores); calls of one matrix take no other thread.
    """
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *blocks: jax.lax.map(lambda block: function(*block), blocks),
        default=jax.vmap(function),
    )


def _inverse(lower: Array) -> Array:
    return _half_solve(lower, jnp.eye(len(lower), dtype=lower.dtype))


def _cholesky(gram: Float[Array, "*batch _ _"], shift: Scalar) -> Array:
    shifted = gram + shift.astype(gram.dtype) * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return each(jnp.linalg.cholesky, shifted) if gram.ndim == 3 else jnp.linalg.cholesky(shifted)


def _cholesky_solve(lower: Array, b: Array) -> Array:
    return _half_solve(lower, _half_solve(lower, b), transposed=True)


def _half_solve(lower: Array, b: Array, transposed: bool = False) -> Array:
    return solve_triangular(lower, b, lower=True, trans=1 if transposed else 0)


def _times(matrices: Array, v: Cut, transposed: bool = False) -> Cut:
    return jnp.einsum("bji,bj->bi" if transposed else "bij,bj->bi", matrices, v, precision="highest")
