"""Lanczos: the extreme eigenpairs of a symmetric matvec, from as few products as any method can."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._messages import checked_choice, checked_count, shown
from hessjax._core._packing import Packed, Packing
from hessjax._core._results import Eigenpairs
from hessjax._core._sharding import Shardings
from hessjax._core._types import (
    CONVERGENCE,
    Amount,
    Block,
    Key,
    Params,
    Relative,
    Scalar,
    Tolerance,
    Vector,
    assign,
    settings,
)
from hessjax._run._estimator import Estimator, limit_of
from hessjax.estimators import _basis
from hessjax.estimators._krylov import Krylov, compressed, coupling_of, extend, pending, ritz
from hessjax.estimators._krylov import start as start_space
from hessjax.estimators.probes import gaussian

# -- which eigenvalues ---------------------------------------------------------------------------

_PRIORITY: dict[str, Callable[[Array, Array, Array], Float[Array, " m"] | Int[Array, " m"]]] = {
    "both": lambda values, index, size: jnp.minimum(index, size - 1 - index),
    "largest": lambda values, index, size: size - 1 - index,
    "smallest": lambda values, index, size: index,
    "magnitude": lambda values, index, size: -jnp.abs(values),
}


def _ranked(values: Float[Array, " m"], size: Int[Array, ""], which: str) -> Int[Array, " m"]:
    """Indices of the Ritz values, the most wanted first, those that mean nothing last."""
    index = jnp.arange(values.shape[0], dtype=jnp.int32)
    priority = _PRIORITY[which](values, index, size).astype(values.dtype)
    return jnp.argsort(jnp.where(index < size, priority, jnp.inf)).astype(jnp.int32)


def num_wanted(k: int, which: str) -> int:
    """How many pairs `k` and `which` ask for: `"both"` means k from each end."""
    return 2 * k if which == "both" else k


# -- the estimator -------------------------------------------------------------------------------


class LanczosState(NamedTuple):
    """A Krylov space of packed vectors, and how many products it took."""

    space: Krylov
    packing: Packing
    num_matvecs: Int[Array, ""]


Which: TypeAlias = Literal["both", "largest", "smallest", "magnitude"]
"""Which end of the spectrum: both, one, or what is largest in absolute value."""


@settings(arrays=("start", "tol"))
class Lanczos(Estimator):
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
        basis_dtype: None keeps the vectors in at least float32, `jnp.bfloat16` in half of that memory. All
            sums are taken in float32, so eigenvalues keep 4 digits or more; residuals stay near 1e-3 of the
            largest eigenvalue, and a `tol` below 1e-2 of it is seldom met.

    Returns:
        An `Estimator` with result `Eigenpairs` (residuals are those of the recurrence, and what rounding a
        narrow basis adds at most; `eigenpairs` recomputes them from products) and error the largest residual
        among the pairs wanted.

    Raises:
        ValueError: unknown `which`, `k` or `block_size` below 1, or, when it meets the params, more pairs
            wanted than there are parameters, a basis too small for them, a `start` unlike the params.

    Cost:
        `block_size` products a step; 4·j·d operations for the j-th basis vector, twice that with blocks;
        memory (basis_size + 3·block_size + 3)·d, (basis_size + block_size + pairs + 4)·d while the result
        is read; in bfloat16 the basis counts half, and the pairs twice.

    References:
        Wu & Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems;
        Ruhe (1979), Implementation aspects of band Lanczos algorithms.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 101.0))
        >>> tol = hj.relative(1e-5)
        >>> pairs, _ = hj.run(hj.estimators.lanczos(2, "largest", tol=tol), A, jax.random.key(0),
        ...                                                                                   jnp.zeros(100),
        ...                   max_matvecs=200, tol=tol)
        >>> [round(float(value), 3) for value in pairs.values]
        [100.0, 99.0]
    """

    init_only = ("basis_size", "start", "basis_dtype")
    less_memory = "a smaller `basis_size`, `basis_dtype=jnp.bfloat16`"

    k: int = 5
    which: Which = "both"
    _: dataclasses.KW_ONLY
    basis_size: int | None = None
    block_size: int = 1
    start: Block | None = None
    tol: Tolerance | None = Relative(1e-4)
    basis_dtype: Any = None

    def __post_init__(self) -> None:
        if self.basis_dtype is not None:
            assign(self, basis_dtype=_checked_dtype(self.basis_dtype))
        checked_choice("which", self.which, _PRIORITY)
        if self.start is not None:
            _tree.check_arrays(self.start, "start")
        assign(self, k=checked_count("k", self.k), block_size=checked_count("block_size", self.block_size))
        if self.basis_size is not None:
            assign(
                self,
                basis_size=checked_count("basis_size", self.basis_size, self.wanted, ", the pairs wanted"),
            )
        assign(self, tol=Amount.of(self.tol, meaning=CONVERGENCE))

    @property
    def wanted(self) -> int:
        """How many pairs are asked for: with `"both"`, k from each end."""
        return num_wanted(self.k, self.which)

    def init(self, key: Key, like: Params) -> LanczosState:
        """An empty space, with a random start or one near the vectors given."""
        packing = Packing.of(like)
        capacity = self._capacity(packing.size)
        keys = jax.random.split(key, self.block_size)
        block = jax.vmap(lambda key: packing.pack(gaussian(key, like)))(keys)
        if self.start is not None:
            block = jax.vmap(_near)(self._given(packing, like), block)
        return LanczosState(
            start_space(block, capacity, packing.packed_layouts, self.basis_dtype), packing, jnp.int32(0)
        )

    def _given(self, packing: Packing, like: Params) -> Block:
        """The vectors to start near, as many as a block has."""
        if any(jnp.shape(leaf)[:1] in ((), (0,)) for leaf in jax.tree.leaves(self.start)):
            raise ValueError("`start` must be a block of at least one vector, got none.")
        _tree.check_like(_tree.row(self.start, 0), like, "start[0]", "like")
        return _distributed(jax.vmap(packing.pack)(self.start), self.block_size)

    def _capacity(self, dimension: int) -> int:
        """How many vectors are kept."""
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

    def query(self, state: LanczosState) -> Block:
        """The last rows of the basis, which are not multiplied yet."""
        return state.packing.unpack_block(pending(state.space))

    def update(self, state: LanczosState, products: Block) -> LanczosState:
        """A step of the recurrence for every product, and a restart where the basis is full."""
        products = jax.vmap(state.packing.pack)(products)
        absorb = functools.partial(_absorb, which=self.which, wanted=self.wanted, packing=state.packing)
        # One by one also where a block was multiplied: each new row is made orthogonal to the one before.
        if self.block_size == 1:
            space = absorb(state.space, _tree.row(products, 0))
        else:
            space = jax.lax.fori_loop(
                0, self.block_size, lambda i, space: absorb(space, _tree.row(products, i)), state.space
            )
        return LanczosState(space, state.packing, state.num_matvecs + self.block_size)

    def result(self, state: LanczosState) -> Eigenpairs:
        """The Ritz pairs wanted, with the residuals of the recurrence."""
        values, coefficients, residuals = _wanted(state.space, self.which, self.wanted)
        limit = limit_of(self, Amount.of(self.tol), state)
        # The pending rows are in the basis too, but no part of a Ritz vector.
        coefficients = jnp.pad(coefficients, ((0, 0), (0, self.block_size)))
        combined = _basis.combine(state.space.basis, coefficients)
        if state.space.rounding is not None:
            combined = jax.lax.map(_unit, combined)  # sums of rows that are so long up to rounding
        vectors = state.packing.unpack_block(combined)
        pairs = Eigenpairs(values, vectors, residuals, residuals <= limit, state.num_matvecs)
        return pairs._replace(asymmetry=state.space.asymmetry)

    def error(self, state: LanczosState) -> Scalar:
        """The largest residual among the pairs wanted."""
        return jnp.max(_wanted(state.space, self.which, self.wanted)[2])

    def scale(self, state: LanczosState) -> Scalar:
        """The largest absolute Ritz value."""
        values, _ = ritz(state.space)
        return jnp.max(
            jnp.abs(jnp.where(jnp.arange(values.shape[0], dtype=jnp.int32) < state.space.size, values, 0))
        )


lanczos = Lanczos


def _checked_dtype(dtype: Any) -> np.dtype:
    # Not float16: the entries of a unit vector of 10⁹ weights are below its smallest normal number.
    try:
        # Of an array NumPy still takes the dtype, with a warning.
        if not isinstance(dtype, jax.Array | np.ndarray) and (found := np.dtype(dtype)) == jnp.bfloat16:
            return found
    except TypeError:
        pass
    raise ValueError(f"`basis_dtype` must be None or `jnp.bfloat16`, got {shown(dtype)}.")


def _unit(vector: Vector) -> Vector:
    length = _tree.norm(vector)
    return _tree.scale(1 / jnp.where(length > 0, length, 1), vector)


def _distributed(vectors: Block, num_sums: int) -> Block:
    """The vectors distributed over so many sums; those with NaN (pairs never found) are left out."""
    finite = [jnp.all(jnp.isfinite(x), axis=range(1, x.ndim)) for x in jax.tree.leaves(vectors)]
    found = functools.reduce(jnp.logical_and, finite)
    vectors = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), vectors)  # 0 · NaN would be NaN
    members = (jnp.arange(len(found), dtype=jnp.int32) % num_sums)[None] == jnp.arange(
        num_sums, dtype=jnp.int32
    )[:, None]
    return _tree.combine((members & found[None]).astype(_tree.accumulator_dtype(vectors)), vectors)


def _near(vector: Vector, noise: Vector) -> Vector:
    """The direction of `vector` with 2 % of noise; noise alone where there is no direction."""
    length = _tree.norm(vector)
    unit = _tree.scale(1 / jnp.where(length > 0, length, 1), vector)
    # Without noise the space would stay in what was found before: a new outlier would never be seen.
    return _tree.add_scaled(unit, 0.02 / _tree.norm(noise), noise)


def _absorb(space: Krylov, product: Packed, *, which: str, wanted: int, packing: Packing) -> Krylov:
    """One product more, and a restart where that fills the basis."""
    if space.capacity == packing.size:  # the basis can hold everything there is
        return jax.lax.cond(space.size < packing.size, extend, lambda space, _: space, space, product)
    # Half of the other Ritz vectors stay too: with the wanted alone convergence slows down after a restart
    # (Wu & Simon 2000 keep more than are wanted for the same reason).
    keep = wanted + (space.capacity - wanted) // 2
    # A `cond` would copy the basis at every step, taken or not; a loop only when it is entered.
    return jax.lax.while_loop(
        lambda space: space.size == space.capacity,
        functools.partial(_restart, which=which, keep=keep, layouts=packing.packed_layouts),
        extend(space, product),
    )


def _wanted(
    space: Krylov, which: str, wanted: int
) -> tuple[Float[Array, " k"], Float[Array, "k m"], Float[Array, " k"]]:
    """Values (largest first), coefficients in the basis (rows) and residuals of the pairs wanted."""
    values, vectors = ritz(space)
    best = _ranked(values, space.size, which)[:wanted]
    # NaN has no place in an order: pairs that do not exist count as −∞ and come last.
    best = best[jnp.argsort(-jnp.where(best < space.size, values[best], -jnp.inf))]
    exists: Bool[Array, " wanted"] = best < space.size
    # A(Qs) − θ(Qs) = (pending rows)ᵀ · coupling · s: the residual needs no product (Parlett 1998, §13.2).
    # `norm` of each column and not `jnp.linalg.norm`, whose squares leave float32 at 1e-19 and 1e19.
    residuals = jax.vmap(_tree.norm, in_axes=1)(coupling_of(space, vectors[:, best]))
    if space.rounding is not None:
        residuals = residuals + jnp.matmul(space.rounding, jnp.abs(vectors[:, best]), precision="highest")
    return (
        _numbers.or_nan(exists, values[best]),
        jnp.where(exists[:, None], vectors[:, best].T, 0),
        jnp.where(exists, residuals, jnp.inf),
    )


def _restart(space: Krylov, which: str, keep: int, layouts: Shardings) -> Krylov:
    """Compress a full basis to its `keep` best Ritz vectors."""
    values, vectors = ritz(space)
    best = _ranked(values, space.size, which)[:keep]
    return compressed(space, values[best], vectors[:, best], layouts)
