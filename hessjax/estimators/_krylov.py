"""The Lanczos recurrence, which grows an orthonormal basis of packed vectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._sharding import Shardings
from hessjax._core._types import Block, Scalar, Vector
from hessjax.estimators._basis import (
    Basis,
    allocate,
    is_narrow,
    orthogonalise,
    orthonormal,
    read,
    rotate,
    write,
)


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
        rounding: (m,) of rows kept in less than float32: by how much, in norm, each column of AQ = QT +
            pending·C is off. None for others.
    """

    basis: Basis
    projected: Float[Array, "rows m"]
    size: Int[Array, ""]
    asymmetry: Float[Array, ""]
    rounding: Float[Array, " m"] | None = None

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


def start(block: Block, capacity: int, layouts: Shardings = (), basis_dtype: Any = None) -> Krylov:
    """The space to be grown from these vectors, of at most `capacity` rows besides the pending ones."""
    width = jax.tree.leaves(block)[0].shape[0]
    basis = allocate(_tree.row(block, 0), capacity + width, layouts, basis_dtype)
    # The start is the first pending block: nothing is multiplied yet, so `size` is 0.
    for i, vector in enumerate(_tree.rows(orthonormal(block))):
        basis = write(basis, jnp.int32(i), vector)
    dtype = _tree.accumulator_dtype(block)
    projected = jnp.zeros((capacity + width, capacity), dtype)
    rounding = jnp.zeros(capacity, dtype) if is_narrow(basis) else None
    return Krylov(basis, projected, jnp.int32(0), jnp.zeros((), dtype), rounding)


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
    # By masks and not `at[]`: scatters are a dozen small programs, and T is small.
    column = jnp.where(index == last, beta, components + jnp.where(index == k, alpha, 0))
    # Row k of T is what earlier products said of qₖᵀAqᵢ; this one says qᵢᵀAqₖ. T keeps the former.
    mirrored = jnp.pad(T[k], (0, space.width))
    differences = jnp.where(index < k, column + jnp.where(index == previous, back, 0) - mirrored, 0)
    asymmetry = jnp.max(jnp.abs(differences))
    new = (index >= k)[:, None] & (jnp.arange(T.shape[1], dtype=jnp.int32) == k)[None]
    T = jnp.where(new, column[:, None], T)
    basis = write(space.basis, last, following)
    rounding = space.rounding
    if rounding is not None:
        # The row is multiplied as it is kept. Neither its rounding nor what T leaves out lies along a row.
        lost = _tree.add_scaled(following, -1, read(basis, last))
        rounding = rounding.at[k].set(beta * _tree.norm(lost) + _tree.norm(differences))
    return Krylov(basis, T, k + 1, jnp.maximum(space.asymmetry, asymmetry), rounding)


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


def compressed(
    space: Krylov, values: Float[Array, " n"], vectors: Float[Array, "m n"], layouts: Shardings
) -> Krylov:
    """The space of these Ritz vectors alone (columns, in the basis); the pending rows couple to them all."""
    keep = len(values)
    (rows, m), width = space.projected.shape, space.width
    # The pending rows come along unchanged: they are orthogonal to every Ritz vector.
    rotation = jnp.zeros((keep + width, rows), values.dtype)
    rotation = rotation.at[:keep, :m].set(vectors.T)
    rotation = rotation.at[keep:, m:].set(jnp.eye(width, dtype=values.dtype))
    # In the basis of Ritz vectors T is diagonal, but for how each couples to the pending rows: an arrow.
    projected = jnp.zeros_like(space.projected).at[jnp.arange(keep), jnp.arange(keep)].set(values)
    projected = projected.at[keep : keep + width, :keep].set(coupling_of(space, vectors))
    rounding = space.rounding
    if rounding is not None:
        # Rounded once more, Ritz vectors y become y + d, and A(y + d) is off by Ad − θd.
        unit = float(jnp.finfo(jnp.bfloat16).eps) / 2
        anew = 2 * unit * jnp.max(jnp.abs(values))
        before = jnp.matmul(rounding**2, vectors**2, precision="highest")
        rounding = jnp.zeros_like(rounding).at[:keep].set(jnp.sqrt(before + anew**2))
    turned = rotate(space.basis, rotation, layouts)
    return Krylov(turned, projected, jnp.int32(keep), space.asymmetry, rounding)


def coupling_of(space: Krylov, vectors: Array) -> Array:
    """What of A times these vectors (columns, in the basis) lies along the pending rows: (b, n)."""
    return jnp.matmul(space.coupling(), vectors, precision="highest")
