"""Two Lanczos recurrences behind one face: with a basis that is kept orthogonal, and with two vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax import _tree
from hessjax._typing import Block, Vector
from hessjax.spectral import krylov, recurrence
from hessjax.spectral.recurrence import Krylov


class Quadrature(NamedTuple):
    """The Gauss quadrature of every probe under way; what is not there yet has weight 0, and sorts last."""

    nodes: Float[Array, "g m"]
    weights: Float[Array, "g m"]


class Recurrence(NamedTuple):
    """A Lanczos recurrence from g start vectors at once.

    Attributes:
        start: `(vectors, capacity) -> space`, with room for `capacity` steps.
        restart: `(space, vectors) -> space`, the same memory begun anew.
        rows: `(space) -> block`, what is to be multiplied next.
        extend: `(space, products) -> space`, one step.
        quadrature: `(space) -> Quadrature`.
    """

    start: Callable[[Block, int], Any]
    restart: Callable[[Any, Block], Any]
    rows: Callable[[Any], Block]
    extend: Callable[[Any, Block], Any]
    quadrature: Callable[[Any], Quadrature]


# -- with a basis: one start vector at a time ------------------------------------------------------


def _restart_basis(space: Krylov, vectors: Block) -> Krylov:
    basis = krylov.write(space.basis, jnp.int32(0), _unit(_tree.row(vectors, 0)))
    return Krylov(basis, jnp.zeros_like(space.projected), jnp.zeros_like(space.size), space.asymmetry)


def _extend_basis(space: Krylov, products: Block) -> Krylov:
    return recurrence.extend(space, _tree.row(products, 0))


def quadrature_of_basis(space: Krylov) -> Quadrature:
    """As the space's first vector sees the spectrum."""
    values, vectors = recurrence.ritz(space)
    nodes, weights = _those_inside(values, vectors[0], jnp.arange(len(values)) < space.size)
    return Quadrature(nodes[None], weights[None])


with_basis = Recurrence(
    recurrence.start, _restart_basis, recurrence.pending, _extend_basis, quadrature_of_basis
)


# -- with two vectors: any number of start vectors side by side -------------------------------------


class TwoVectors(NamedTuple):
    """The whole memory of g Lanczos recurrences.

    Attributes:
        row: the rows q to be multiplied next.
        back: −β · the rows before, what the recurrence adds to their products.
        diagonal: (g, m) of T.
        off_diagonal: (g, m) of T: the β after every step; 0 from a breakdown on.
        size: steps done.
    """

    row: Block
    back: Block
    diagonal: Float[Array, "g m"]
    off_diagonal: Float[Array, "g m"]
    size: Int[Array, ""]


def _start_two(vectors: Block, capacity: int) -> TwoVectors:
    num_rows = jax.tree.leaves(vectors)[0].shape[0]
    zeros = jnp.zeros((num_rows, capacity), _tree.accumulator_dtype(vectors))
    return TwoVectors(
        jax.vmap(_unit)(vectors), jax.tree.map(jnp.zeros_like, vectors), zeros, zeros, jnp.int32(0)
    )


def _restart_two(space: TwoVectors, vectors: Block) -> TwoVectors:
    return _start_two(vectors, space.diagonal.shape[1])


def _extend_two(space: TwoVectors, products: Block) -> TwoVectors:
    """One step of the plain recurrence, in Paige's order: α of what is left when the row before is out.

    Orthogonality is lost as Ritz values converge and copies of them appear; they share the weight that one
    would have. After a breakdown the rows are zero.

    References:
        Paige (1972), Computational variants of the Lanczos method; Greenbaum (1989), Behavior of slightly
        perturbed Lanczos and conjugate-gradient recurrences.
    """
    step = jax.vmap(_step, in_axes=(0, 0, 0, 0, None, 0))
    row, back, diagonal, off = step(*space[:4], space.size, products)
    return TwoVectors(row, back, diagonal, off, space.size + 1)


def _step(
    row: Vector, back: Vector, diagonal: Array, off: Array, size: Array, product: Vector
) -> tuple[Vector, Vector, Array, Array]:
    residual = _tree.add_scaled(back, 1, product)
    alpha = _tree.inner(row, residual)
    residual = _tree.add_scaled(residual, -alpha, row)
    beta = _tree.norm(residual)
    diagonal = diagonal.at[size].set(alpha, mode="drop")
    tiny = 64 * jnp.finfo(off.dtype).eps * (jnp.max(jnp.abs(diagonal)) + 2 * jnp.max(off))
    beta = jnp.where(beta > tiny, beta, 0)
    inverse = jnp.where(beta > 0, 1 / jnp.where(beta > 0, beta, 1), 0)
    off = off.at[size].set(beta, mode="drop")
    return _tree.scale(inverse, residual), _tree.scale(-beta, row), diagonal, off


def _quadrature_of_two(space: TwoVectors) -> Quadrature:
    return Quadrature(*jax.vmap(_gauss, in_axes=(0, 0, None))(space.diagonal, space.off_diagonal, space.size))


def _gauss(diagonal: Array, off: Array, size: Array) -> tuple[Array, Array]:
    """Nodes and weights of a tridiagonal T up to its first breakdown (Golub & Welsch 1969)."""
    unbroken = jnp.cumprod(jnp.where(off > 0, 1, 0))
    inside = (jnp.arange(len(off)) < size) & jnp.roll(unbroken, 1).at[0].set(1).astype(bool)
    off = jnp.where(inside[1:], off[:-1], 0)
    # Where T is not filled stands a number above all its eigenvalues, so that these sort last.
    above = 4 * jnp.max(jnp.abs(jnp.where(inside, diagonal, 0))) + 4 * jnp.max(off, initial=0)
    T = jnp.diag(jnp.where(inside, diagonal, above)) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, vectors = jnp.linalg.eigh(T)
    return _those_inside(values, vectors[0], jnp.arange(len(values)) < jnp.sum(inside))


without_basis = Recurrence(_start_two, _restart_two, lambda space: space.row, _extend_two, _quadrature_of_two)


def _those_inside(values: Array, components: Array, inside: Bool[Array, " m"]) -> tuple[Array, Array]:
    """Nodes and weights; what is outside repeats the largest node, with weight 0."""
    largest = jnp.max(values, where=inside, initial=-jnp.inf)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return jnp.where(inside, values, largest), jnp.where(inside, components**2, 0)


def _unit(vector: Vector) -> Vector:
    return _tree.scale(1 / _tree.norm(vector), vector)
