"""Lanczos: the extreme eigenpairs of a symmetric matvec, from as few products as any method can."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int

from hessjax import _tree
from hessjax._numbers import checked_count
from hessjax._packing import Packing
from hessjax._typing import Block, Eigenpairs, Estimator, Key, Params, Relative, Scalar, Tolerance, Vector
from hessjax.estimator import checked_tolerance
from hessjax.spectral import krylov
from hessjax.spectral.probes import gaussian
from hessjax.spectral.recurrence import Krylov, extend, pending, ritz
from hessjax.spectral.recurrence import start as start_space

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


def lanczos(
    k: int = 5,
    which: str = "both",
    *,
    basis_size: int | None = None,
    block_size: int = 1,
    start: Block | None = None,
    tol: Tolerance | None = Relative(1e-4),  # noqa: B008 - immutable
) -> Estimator:
    """Thick-restart Lanczos with full reorthogonalisation, as an estimator of eigenpairs.

    Full reorthogonalisation is what makes every Ritz value count once: without it 10 outliers in 2000
    eigenvalues gave 81 values above the bulk. When the basis is full it is compressed to its best Ritz
    vectors and grows again, so memory is bounded and accuracy is not.

    Args:
        k: number of pairs wanted (with `which="both"`, from each end).
        which: `"both"`, `"largest"`, `"smallest"` (algebraically) or `"magnitude"`.
        basis_size: the most vectors kept. By default three times the pairs wanted, at least 40 and ten
            blocks, at most the number of parameters.
        block_size: vectors multiplied at a time. A start of one vector sees one eigenvector of a repeated
            eigenvalue; a block of b sees b of them, and takes more products for the rest.
        start: block of vectors to start near, such as the `vectors` found a few training steps ago; their
            sum starts the space, with a little noise for what is new. Unconverged or missing ones do no harm.
        tol: residual below which a pair counts as converged: absolute, or `relative` to the largest
            absolute eigenvalue.

    Returns:
        An `Estimator` with result `Eigenpairs` (residuals are those of the recurrence; `eigenpairs`
        recomputes them from products) and error the largest residual among the pairs wanted.

    Raises:
        ValueError: unknown `which`, `k` or `block_size` below 1, or, when it meets the params, more pairs
            wanted than there are parameters, a basis with no room for them, a `start` unlike the params.

    Cost:
        `block_size` products a step; 4·j·d operations for the j-th basis vector, twice that with blocks;
        memory (basis_size + block_size + 4)·d, and three times the pairs' d while the result is read.

    References:
        Wu & Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems;
        Ruhe (1979), Implementation aspects of band Lanczos algorithms.

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
    for name, number in (("k", k), ("block_size", block_size)):
        checked_count(name, number)
    if (checked := checked_tolerance(tol)) is None:
        raise ValueError("`tol` must be a number or `relative(r)`: it decides what counts as converged.")
    wanted = num_wanted(k, which)
    begin = Partial(_Begin(wanted, which, basis_size, block_size), start)
    query, update, error, scale = _methods(wanted, which, block_size)
    return Estimator(begin, query, update, _result(wanted, which, block_size, checked), error, scale)


@dataclasses.dataclass(frozen=True)
class _Begin:
    """How a run starts; equal settings hash alike."""

    wanted: int
    which: str
    basis_size: int | None
    block_size: int

    def __call__(self, near: Block | None, key: Key, like: Params) -> LanczosState:
        packing = Packing.of(like)
        capacity = self._capacity(packing.size)
        keys = jax.random.split(key, self.block_size)
        block = jax.vmap(lambda key: packing.pack(gaussian(key, like)))(keys)
        if near is not None:
            if any(jnp.shape(leaf)[:1] in ((), (0,)) for leaf in jax.tree.leaves(near)):
                raise ValueError("`start` must be a block of at least one vector, got none.")
            _tree.check_like(_tree.row(near, 0), like, "start[0]", "like")
            block = jax.vmap(_near)(_dealt(jax.vmap(packing.pack)(near), self.block_size), block)
        return LanczosState(start_space(block, capacity), packing, jnp.int32(0))

    def _capacity(self, dimension: int) -> int:
        wanted, width = self.wanted, self.block_size
        if wanted > dimension:
            ends = ' (`which="both"` wants k from each end)' if self.which == "both" else ""
            raise ValueError(
                f"`k` must ask for at most {dimension} pairs, the number of parameters, got {wanted}{ends}."
            )
        if width > dimension:
            raise ValueError(
                f"`block_size` must be at most {dimension}, the number of parameters, got {width}."
            )
        default = max(3 * wanted, 40, 10 * width)
        capacity = min(dimension, default if self.basis_size is None else self.basis_size)
        if capacity < (least := min(dimension, wanted + 2 * width)):
            raise ValueError(
                f"`basis_size` must be at least {least}, the pairs wanted and two blocks more, got "
                f"{self.basis_size}."
            )
        return capacity


def _dealt(vectors: Block, num_hands: int) -> Block:
    """The sums of every `num_hands`-th vector; those with NaN (pairs that were never found) are left out."""
    finite = [jnp.all(jnp.isfinite(x), axis=range(1, x.ndim)) for x in jax.tree.leaves(vectors)]
    found = functools.reduce(jnp.logical_and, finite)
    vectors = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), vectors)
    hands = jnp.arange(len(found)) % num_hands == jnp.arange(num_hands)[:, None]
    return _tree.combine((hands & found).astype(_tree.accumulator_dtype(vectors)), vectors)


def _near(vector: Vector, noise: Vector) -> Vector:
    """The direction of `vector` with 2 % of noise; noise alone where there is no direction."""
    length = _tree.norm(vector)
    unit = _tree.scale(1 / jnp.where(length > 0, length, 1), vector)
    return _tree.add_scaled(unit, 0.02 / _tree.norm(noise), noise)


@functools.lru_cache(maxsize=64)
def _methods(wanted: int, which: str, block_size: int) -> tuple[Callable[..., Any], ...]:
    """`query`, `update`, `error` and `scale`: one set of functions, and compiled code, for equal settings."""

    def query(state: LanczosState) -> Block:
        return state.packing.unpack_block(pending(state.space))

    def update(state: LanczosState, products: Block) -> LanczosState:
        products = jax.vmap(state.packing.pack)(products)
        absorb = functools.partial(_absorb, which=which, wanted=wanted, dimension=state.packing.size)
        if block_size == 1:
            space = absorb(state.space, _tree.row(products, 0))
        else:
            space = jax.lax.fori_loop(
                0, block_size, lambda i, space: absorb(space, _tree.row(products, i)), state.space
            )
        return LanczosState(space, state.packing, state.num_matvecs + block_size)

    def error(state: LanczosState) -> Scalar:
        return jnp.max(_wanted(state.space, which, wanted)[2])

    return query, update, error, _scale


def _scale(state: LanczosState) -> Scalar:
    values, _ = ritz(state.space)
    return jnp.max(jnp.abs(jnp.where(jnp.arange(values.shape[0]) < state.space.size, values, 0)))


@functools.lru_cache(maxsize=64)
def _result(wanted: int, which: str, block_size: int, tol: Tolerance) -> Callable[..., Eigenpairs]:
    """`result`, which alone depends on the tolerance."""

    def result(state: LanczosState) -> Eigenpairs:
        values, coefficients, residuals = _wanted(state.space, which, wanted)
        limit = tol.factor * _scale(state) if isinstance(tol, Relative) else tol
        vectors = krylov.combine(state.space.basis, jnp.pad(coefficients, ((0, 0), (0, block_size))))
        vectors = state.packing.unpack_block(vectors)
        pairs = Eigenpairs(values, vectors, residuals, residuals <= limit, state.num_matvecs)
        return pairs._replace(asymmetry=state.space.asymmetry)

    return result


def _absorb(space: Krylov, product: Vector, *, which: str, wanted: int, dimension: int) -> Krylov:
    """One product more, and a restart where that fills the basis."""
    if space.capacity == dimension:  # the basis can hold everything there is
        return jax.lax.cond(space.size < dimension, extend, lambda space, _: space, space, product)
    keep = wanted + (space.capacity - wanted) // 2
    # A `cond` would copy the basis at every step, taken or not; a loop only when it is entered.
    return jax.lax.while_loop(
        lambda space: space.size == space.capacity,
        functools.partial(_restart, which=which, keep=keep),
        extend(space, product),
    )


def _wanted(space: Krylov, which: str, wanted: int) -> tuple[Array, Array, Array]:
    """Values (largest first), coefficients in the basis (rows) and residuals of the pairs wanted."""
    values, vectors = ritz(space)
    best = _ranked(values, space.size, which)[:wanted]
    best = best[jnp.argsort(-jnp.where(best < space.size, values[best], -jnp.inf))]
    exists: Bool[Array, " wanted"] = best < space.size
    # `norm` of each column and not `jnp.linalg.norm`, whose squares leave float32 at 1e-19 and 1e19.
    residuals = jax.vmap(_tree.norm, in_axes=1)(_coupling_of(space, vectors[:, best]))
    return (
        jnp.where(exists, values[best], jnp.nan),
        jnp.where(exists[:, None], vectors[:, best].T, 0),
        jnp.where(exists, residuals, jnp.inf),
    )


def _restart(space: Krylov, which: str, keep: int) -> Krylov:
    """Compress a full basis to its `keep` best Ritz vectors; the pending rows couple to them all."""
    values, vectors = ritz(space)
    best = _ranked(values, space.size, which)[:keep]
    (rows, m), width = space.projected.shape, space.width
    rotation = jnp.zeros((keep + width, rows), values.dtype)
    rotation = rotation.at[:keep, :m].set(vectors[:, best].T)
    rotation = rotation.at[keep:, m:].set(jnp.eye(width, dtype=values.dtype))
    projected = jnp.zeros_like(space.projected).at[jnp.arange(keep), jnp.arange(keep)].set(values[best])
    projected = projected.at[keep : keep + width, :keep].set(_coupling_of(space, vectors[:, best]))
    return Krylov(krylov.rotate(space.basis, rotation), projected, jnp.int32(keep), space.asymmetry)


def _coupling_of(space: Krylov, vectors: Array) -> Array:
    """What of A times these vectors (columns, in the basis) lies along the pending rows: (b, n)."""
    return jnp.matmul(space.coupling(), vectors, precision="highest")
