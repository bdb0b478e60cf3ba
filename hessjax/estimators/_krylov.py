"""The Lanczos recurrence: an orthonormal basis of a Krylov space, and the matrix in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._sharding import Shardings
from hessjax._core._types import Block, Scalar, Vector
from hessjax.estimators._basis import Basis, allocate, orthogonalise, orthonormal, read, write


class Krylov(NamedTuple):
    """An orthonormal basis Q of a (block) Krylov space and the matrix in it, T = QᵀAQ.

    With blocks of b vectors the first `size` rows of `basis` are Q, and the next b are pending: they wait
    to be multiplied. A maps Q into the span of both, so `projected` says everything that is known of A:
    its first `size` rows hold T, the next b the coupling C = pendingᵀAQ, hence AQ = QT + pending·C.

    Attributes:
        basis: the rows of Q, then the pending ones; m + b in all.
        projected: (m + b, m) the components of the products, on and below the diagonal; zero above.
        size: how many rows have been multiplied.
        asymmetry: the largest |qᵢᵀAqⱼ − qⱼᵀAqᵢ| seen; of the size of rounding errors if A is symmetric.
    """

    basis: Basis
    projected: Float[Array, "rows m"]
    size: Int[Array, ""]
    asymmetry: Float[Array, ""]

    @property
    def capacity(self) -> int:
        """The most rows that Q may have, m."""
        return self.projected.shape[1]

    @property
    def width(self) -> int:
        """How many rows are pending, b."""
        return self.projected.shape[0] - self.projected.shape[1]

    def coupling(self) -> Float[Array, "b m"]:
        """C: what of AQ lies along the pending rows."""
        return jax.lax.dynamic_slice_in_dim(self.projected, self.size, self.width)


def start(block: Block, capacity: int, layouts: Shardings = ()) -> Krylov:
    """The space to be grown from these vectors, of at most `capacity` rows besides the pending ones."""
    width = jax.tree.leaves(block)[0].shape[0]
    basis = allocate(_tree.row(block, 0), capacity + width, layouts)
    # The start is the first pending block: nothing is multiplied yet, so `size` is 0.
    for i, vector in enumerate(_tree.rows(orthonormal(block))):
        basis = write(basis, jnp.int32(i), vector)
    dtype = _tree.accumulator_dtype(block)
    projected = jnp.zeros((capacity + width, capacity), dtype)
    return Krylov(basis, projected, jnp.int32(0), jnp.zeros((), dtype))


def pending(space: Krylov) -> Block:
    """The rows to be multiplied next."""
    return _tree.block_of(*(read(space.basis, space.size + i) for i in range(space.width)))


def extend(space: Krylov, product: Vector) -> Krylov:
    """Take in the product of the first pending row: one step of band Lanczos, fully reorthogonalised.

    The recurrence takes out what is large (with one vector to a block, all of it); the pass over the whole
    basis then only has to remove rounding errors, and is done twice just where it did more than that.
    Where nothing is left (an invariant subspace) the new row is a fresh random direction, not coupled to
    the rest.

    References:
        Golub & Van Loan (2013), Matrix Computations, §10.3; Parlett (1998), §13; Ruhe (1979),
        Implementation aspects of band Lanczos algorithms.
    """
    k, T = space.size, space.projected
    last, index = k + space.width, jnp.arange(T.shape[0], dtype=jnp.int32)
    row = read(space.basis, k)
    alpha = _tree.inner(row, product)
    previous = jnp.maximum(k - space.width, 0)
    back = jnp.where(k >= space.width, T[k, previous], 0)
    # The three-term recurrence, with b rows to a block a band of 2b + 1; the rest of the band is taken out by
    # the pass over the basis.
    residual = _tree.add_scaled(product, -alpha, row)
    residual = _tree.add_scaled(residual, -back, read(space.basis, previous))
    known = jnp.minimum(last, min(_tree.size(product), len(T)))  # rows beyond the dimension hold nothing
    following, components, beta = orthogonalise(space.basis, known, residual, _tiny(T, product))
    column = components.at[k].add(alpha).at[last].set(beta, mode="drop")
    # Row k of T is what earlier products said of qₖᵀAqᵢ; this one says qᵢᵀAqₖ. T keeps the former.
    mirrored = jnp.pad(T[k], (0, space.width))
    asymmetry = jnp.max(jnp.abs(column.at[previous].add(back) - mirrored), where=index < k, initial=0)
    T = T.at[:, k].set(jnp.where(index >= k, column, T[:, k]))
    basis = write(space.basis, last, following)
    return Krylov(basis, T, k + 1, jnp.maximum(space.asymmetry, asymmetry))


def _tiny(projected: Float[Array, "rows m"], product: Vector) -> Scalar:
    """The norm below which what is left of a product is nothing but rounding."""
    size_of_matrix = jnp.maximum(jnp.max(jnp.sum(jnp.abs(projected), axis=0)), _tree.norm(product))
    return 64 * jnp.finfo(projected.dtype).eps * size_of_matrix


def ritz(space: Krylov) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Eigenvalues (ascending) and eigenvectors (columns) of T; entries from `size` on are meaningless."""
    inside = jnp.arange(space.capacity, dtype=jnp.int32) < space.size
    # `extend` fills the lower triangle only.
    lower = jnp.where(inside[:, None] & inside[None, :], space.projected[: space.capacity], 0)
    filled = lower + jnp.tril(lower, -1).T
    # Where T is not filled stands a number above all its eigenvalues, so that these sort last.
    above = 2 * jnp.max(jnp.sum(jnp.abs(filled), axis=1))
    return _numbers.eigh(filled + jnp.diag(jnp.where(inside, 0, above)))
