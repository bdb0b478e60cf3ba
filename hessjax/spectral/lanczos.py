"""Lanczos: the extreme eigenpairs of a symmetric matvec, from as few products as any method can."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax import _tree
from hessjax._packing import Packing
from hessjax._typing import Block, Eigenpairs, Estimator, Key, Params, Relative, Scalar, Tolerance, Vector
from hessjax.spectral import krylov
from hessjax.spectral.probes import gaussian

# -- the recurrence ------------------------------------------------------------------------------


class Krylov(NamedTuple):
    """An orthonormal basis Q of a Krylov space and the matrix in it, T = QᵀAQ.

    Attributes:
        basis: the rows of Q: `size` that T speaks of, then the one to be multiplied next.
        projected: (m, m) T; zero outside the leading `size` × `size`, but for the coupling to the next row.
        coupling: (m,) AQ − QT = next row ⊗ coupling: after a step β in the last place, 0 after a breakdown.
        size: how many rows T speaks of.
    """

    basis: krylov.Basis
    projected: Float[Array, "m m"]
    coupling: Float[Array, " m"]
    size: Int[Array, ""]


def start(vector: Vector, capacity: int) -> Krylov:
    """The space spanned by one vector, with room for `capacity`."""
    dtype = _tree.accumulator_dtype(vector)
    basis = krylov.allocate(vector, capacity + 1)
    basis = krylov.write(basis, jnp.int32(0), _tree.scale(1 / _tree.norm(vector), vector))
    return Krylov(basis, jnp.zeros((capacity, capacity), dtype), jnp.zeros(capacity, dtype), jnp.int32(0))


def next_row(space: Krylov) -> Block:
    """The row to be multiplied next, as a block of one."""
    return jax.tree.map(lambda x: x[None], krylov.read(space.basis, space.size))


def extend(space: Krylov, product: Vector) -> Krylov:
    """Take in the product of the next row: one step of Lanczos with full reorthogonalisation.

    The three-term recurrence takes out what is large; the pass over the whole basis then only has to
    remove rounding errors, and is done twice just where it did more than that. Where nothing is left
    (an invariant subspace) the next row is a fresh random direction, not coupled to the rest.

    References:
        Golub & Van Loan (2013), Matrix Computations, §10.3; Parlett (1998), §13.
    """
    k, T = space.size, space.projected
    row = krylov.read(space.basis, k)
    alpha = _tree.inner(row, product)
    previous = jnp.maximum(k - 1, 0)
    back = jnp.where(k > 0, T[k, previous], 0)
    residual = _tree.add_scaled(product, -alpha, row)
    residual = _tree.add_scaled(residual, -back, krylov.read(space.basis, previous))
    T = T.at[k, k].set(alpha)
    size_of_matrix = jnp.maximum(jnp.max(jnp.sum(jnp.abs(T), axis=1)), _tree.norm(product))
    tiny = 64 * jnp.finfo(T.dtype).eps * size_of_matrix
    following, correction, beta = krylov.orthogonalise(space.basis, k + 1, residual, tiny)
    T = T.at[k, k].add(correction[k]).at[k, k + 1].set(beta, mode="drop").at[k + 1, k].set(beta, mode="drop")
    coupling = jnp.zeros_like(space.coupling).at[k].set(beta)
    return Krylov(krylov.write(space.basis, k + 1, following), T, coupling, k + 1)


def ritz(space: Krylov) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Eigenvalues (ascending) and eigenvectors (columns) of T; entries from `size` on are meaningless."""
    inside = jnp.arange(space.projected.shape[0]) < space.size
    filled = jnp.where(inside[:, None] & inside[None, :], space.projected, 0)
    # Where T is not filled stands a number above all its eigenvalues, so that these sort last.
    above = 2 * jnp.max(jnp.sum(jnp.abs(filled), axis=1))
    return jnp.linalg.eigh(filled + jnp.diag(jnp.where(inside, 0, above)))


# -- which eigenvalues ---------------------------------------------------------------------------

_PRIORITY: dict[str, Callable[[Array, Array, Array], Array]] = {
    "both": lambda values, index, size: jnp.minimum(index, size - 1 - index),
    "largest": lambda values, index, size: size - 1 - index,
    "smallest": lambda values, index, size: index,
    "magnitude": lambda values, index, size: -jnp.abs(values),
}


def _ranked(values: Array, size: Array, which: str) -> Int[Array, " m"]:
    """Indices of the Ritz values, the most wanted first, those that mean nothing last."""
    index = jnp.arange(values.shape[0])
    priority = _PRIORITY[which](values, index, size).astype(values.dtype)
    return jnp.argsort(jnp.where(index < size, priority, jnp.inf))


def num_wanted(k: int, which: str) -> int:
    """How many pairs `k` and `which` ask for: `"both"` means k from each end."""
    return 2 * k if which == "both" else k


# -- the estimator -------------------------------------------------------------------------------


class LanczosState(NamedTuple):
    """A Krylov space of packed vectors, and how many products it took."""

    space: Krylov
    packing: Packing
    num_matvecs: Int[Array, ""]


@functools.lru_cache(maxsize=64)
def lanczos(
    k: int = 5,
    which: str = "both",
    *,
    basis_size: int | None = None,
    tol: Tolerance = Relative(1e-4),  # noqa: B008 - immutable
) -> Estimator:
    """Thick-restart Lanczos with full reorthogonalisation, as an estimator of eigenpairs.

    Full reorthogonalisation is what makes every Ritz value count once: without it 10 outliers in 2000
    eigenvalues gave 81 values above the bulk. When the basis is full it is compressed to its best Ritz
    vectors and grows again, so memory is bounded and accuracy is not.

    Args:
        k: number of pairs wanted (with `which="both"`, from each end).
        which: `"both"`, `"largest"`, `"smallest"` (algebraically) or `"magnitude"`.
        basis_size: the most vectors kept. By default three times the pairs wanted, at least 40, at most
            the number of parameters.
        tol: residual below which a pair counts as converged: absolute, or `relative` to the largest
            absolute eigenvalue.

    Returns:
        An `Estimator` with result `Eigenpairs` (residuals are those of the recurrence; `eigenpairs`
        recomputes them from products) and error the largest residual among the pairs wanted.

    Raises:
        ValueError: unknown `which`, `k` below 1, or, when it meets the params, more pairs wanted than
            there are parameters, or a basis with no room for them.

    Cost:
        One product a step; 4·j·d operations for the j-th basis vector; memory (basis_size + 5)·d, and
            three times the pairs' d while the result is read.

    References:
        Wu & Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 101.0))
        >>> tol = hj.relative(1e-5)
        >>> pairs, _ = hj.run(hj.lanczos(2, "largest", tol=tol), A, jax.random.key(0), jnp.zeros(100),
        ...                   max_matvecs=200, tol=tol)
        >>> [round(float(value), 3) for value in pairs.values]
        [100.0, 99.0]
    """
    if which not in _PRIORITY:
        raise ValueError(f"`which` must be one of {', '.join(map(repr, _PRIORITY))}, got {which!r}.")
    if operator.index(k) < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    wanted = num_wanted(k, which)

    def init(key: Key, like: Params) -> LanczosState:
        packing = Packing.of(like)
        capacity = _capacity(wanted, which, basis_size, packing.size)
        return LanczosState(start(packing.pack(gaussian(key, like)), capacity), packing, jnp.int32(0))

    def query(state: LanczosState) -> Block:
        return state.packing.unpack_block(next_row(state.space))

    def update(state: LanczosState, products: Block) -> LanczosState:
        space, capacity = state.space, state.space.projected.shape[0]
        product = state.packing.pack(_tree.row(products, 0))
        if capacity == state.packing.size:  # the basis can hold everything there is
            space = jax.lax.cond(space.size < capacity, extend, lambda s, _: s, space, product)
        else:
            space = extend(space, product)
            compress = functools.partial(_restart, which=which, keep=wanted + (capacity - wanted) // 2)
            # A `cond` would copy the basis at every step, taken or not; a loop only when it is entered.
            space = jax.lax.while_loop(lambda s: s.size == capacity, compress, space)
        return LanczosState(space, state.packing, state.num_matvecs + 1)

    def result(state: LanczosState) -> Eigenpairs:
        values, coefficients, residuals = _wanted(state.space, which, wanted)
        limit = tol.factor * scale(state) if isinstance(tol, Relative) else tol
        vectors = krylov.combine(state.space.basis, jnp.pad(coefficients, ((0, 0), (0, 1))))
        vectors = state.packing.unpack_block(vectors)
        return Eigenpairs(values, vectors, residuals, residuals <= limit, state.num_matvecs)

    def error(state: LanczosState) -> Scalar:
        return jnp.max(_wanted(state.space, which, wanted)[2])

    def scale(state: LanczosState) -> Scalar:
        values, _ = ritz(state.space)
        return jnp.max(jnp.abs(jnp.where(jnp.arange(values.shape[0]) < state.space.size, values, 0)))

    return Estimator(init, query, update, result, error, scale)


def _capacity(wanted: int, which: str, basis_size: int | None, dimension: int) -> int:
    if wanted > dimension:
        ends = ' (`which="both"` wants k from each end)' if which == "both" else ""
        raise ValueError(
            f"`k` must ask for at most {dimension} pairs, the number of parameters, got {wanted}{ends}."
        )
    capacity = min(dimension, max(3 * wanted, 40) if basis_size is None else basis_size)
    if capacity < min(dimension, wanted + 2):
        raise ValueError(
            f"`basis_size` must be at least {min(dimension, wanted + 2)}, the pairs wanted and two more, got "
            f"{basis_size}."
        )
    return capacity


def _wanted(space: Krylov, which: str, wanted: int) -> tuple[Array, Array, Array]:
    """Values (largest first), coefficients in the basis (rows) and residuals of the pairs wanted."""
    values, vectors = ritz(space)
    best = _ranked(values, space.size, which)[:wanted]
    best = best[jnp.argsort(-jnp.where(best < space.size, values[best], -jnp.inf))]
    exists: Bool[Array, " wanted"] = best < space.size
    residuals = jnp.abs(space.coupling @ vectors[:, best])
    return (
        jnp.where(exists, values[best], jnp.nan),
        jnp.where(exists[:, None], vectors[:, best].T, 0),
        jnp.where(exists, residuals, jnp.inf),
    )


def _restart(space: Krylov, which: str, keep: int) -> Krylov:
    """Compress a full basis to its `keep` best Ritz vectors and the residual, which couples to them all."""
    values, vectors = ritz(space)
    best = _ranked(values, space.size, which)[:keep]
    # The kept Ritz vectors, then the residual, which is the last row.
    coefficients = jnp.zeros((keep + 1, values.shape[0] + 1), values.dtype)
    coefficients = coefficients.at[:keep, :-1].set(vectors[:, best].T).at[keep, -1].set(1)
    basis = krylov.rotate(space.basis, coefficients)
    arrow = space.coupling @ vectors[:, best]
    T = jnp.zeros_like(space.projected).at[jnp.arange(keep), jnp.arange(keep)].set(values[best])
    T = T.at[keep, :keep].set(arrow).at[:keep, keep].set(arrow)
    coupling = jnp.zeros_like(space.coupling).at[:keep].set(arrow)
    return space._replace(basis=basis, projected=T, coupling=coupling, size=jnp.int32(keep))
