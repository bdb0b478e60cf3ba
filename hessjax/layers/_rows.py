"""Best kept weights, column by column: least squares on the entries that a mask keeps, many at a time.

A column w of a matrix has the quadratic ½ wᵀHw − bᵀw, H being the same for all columns of a matrix. On the
kept entries S its least point is w_S = H_SS⁻¹ b_S. With u = H⁻¹b, where nothing is held at zero, it is also
u − H⁻¹_{:,Z} [H⁻¹_ZZ]⁻¹ u_Z, with Z what is not kept: the set formula of optimal brain surgeon. Whichever
system is smaller is solved.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NUMBERS = 2**24
"""As many numbers as the systems that are solved at a time may hold."""

PARTS = 8
"""Sizes of systems are rounded up to this part of the width, so that few are compiled for."""

SMALL = 2**30
"""Below as many operations one program for all masks of a matrix is better than a smaller one for each."""


class Systems(NamedTuple):
    """Linear systems, one for each mask that columns have, each column in one.

    Attributes:
        matrix: which matrix of the stack each belongs to.
        entries: the entries of the columns that it is made of, some of them padding.
        there: which are none.
        columns: the columns that share it; beyond the last one for padding.
    """

    matrix: Int[Array, " systems"]
    entries: Int[Array, "systems k"]
    there: Bool[Array, "systems k"]
    columns: Int[Array, "systems c"]


def best_columns(
    quadratic: Float[Array, "s i i"], slope: Float[Array, "s i o"], kept: Bool[Array, "s i o"]
) -> Float[Array, "s i o"]:
    """The least point of every column's quadratic among those that are zero where it is not kept.

    Args:
        quadratic: H of every matrix, positive definite; NaN comes back where it is not.
        slope: b of every column.
        kept: which entries may differ from zero. Traced ones, and those of small matrices, are solved for in
            systems of full size, 1 on the diagonal for what is not kept.

    Cost:
        A Cholesky factor for every mask that columns have, of as many rows as the column with the most kept
        entries has of these, or of as many as the one with the most zeros has, whichever is less; with the
        zeros an inverse of H for each matrix too. Systems of 2²⁴ numbers are in memory at a time.
    """
    stack, width, columns = kept.shape
    if isinstance(kept, jax.core.Tracer) or stack * columns * width**3 <= SMALL:
        return _solved_in_full(quadratic, slope, kept)
    mask = np.asarray(kept)
    by_zeros = int(np.sum(~mask, axis=1).max(initial=0)) < int(np.sum(mask, axis=1).max(initial=0))
    systems = _systems(~mask if by_zeros else mask)
    size = _batch(systems.entries.shape[1], systems.columns.shape[1])
    return _solved(by_zeros, size, quadratic, slope, systems)


@jax.jit
def _solved_in_full(quadratic: Array, slope: Array, kept: Array) -> Array:
    return _solved(False, _batch(kept.shape[1], 1), quadratic, slope, _full(kept))


def _batch(width: int, columns: int) -> int:
    return max(1, NUMBERS // max(1, width * (width + columns)))


def _full(kept: Bool[Array, "s i o"]) -> Systems:
    """A system for every column, of all its entries."""
    stack, width, columns = kept.shape
    there = kept.swapaxes(1, 2).reshape(stack * columns, width)
    return Systems(
        jnp.repeat(jnp.arange(stack), columns),
        jnp.tile(jnp.arange(width), (len(there), 1)),
        there,
        jnp.tile(jnp.arange(columns), stack)[:, None],
    )


def _systems(chosen: np.ndarray) -> Systems:
    """The systems on the entries that are chosen in each column."""
    stack, width, columns = chosen.shape
    masks = chosen.transpose(0, 2, 1).reshape(-1, width)
    owner = np.repeat(np.arange(stack), columns)
    first, members = _shared(owner, masks, columns)
    number = masks[first].sum(axis=1)
    size = min(width, -(-int(np.max(number, initial=1)) // (step := max(1, width // PARTS))) * step)
    # Chosen entries first, in their order: the rest are padding.
    entries = np.argsort(~masks[first], axis=1, kind="stable")[:, :size]
    there = np.arange(size)[None] < number[:, None]
    return Systems(*map(jnp.asarray, (owner[first], entries, there, members)))


def _shared(owner: np.ndarray, masks: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """One row for each mask, and the columns that have it; for every column one, where few share any."""
    own = np.arange(len(masks))
    codes = np.concatenate([owner[:, None].view(np.uint8), np.packbits(masks, axis=1)], axis=1)
    _, first, which, counts = np.unique(
        codes, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    if not counts.size or len(counts) * int(np.max(counts)) > 2 * len(masks):
        return own, own[:, None] % max(columns, 1)
    which = which.ravel()
    order = np.argsort(which, kind="stable")
    place = np.arange(len(masks)) - np.repeat(np.cumsum(counts) - counts, counts)
    members = np.full((len(counts), int(np.max(counts))), columns)
    members[which[order], place] = order % columns
    return first, members


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solved(by_zeros: bool, size: int, quadratic: Array, slope: Array, systems: Systems) -> Array:
    with jax.default_matmul_precision("highest"):
        solve: Any
        if by_zeros:
            inverse = inverted(quadratic)
            free = jnp.matmul(inverse, slope)
            solve = functools.partial(_by_zeros, inverse, free)
        else:
            solve = functools.partial(_by_kept, quadratic, slope)
        found = jax.lax.map(solve, systems, batch_size=size)
    out = jnp.zeros_like(slope)
    place = (systems.matrix[:, None], slice(None), systems.columns)
    return out.at[place].set(found.swapaxes(1, 2), mode="drop")


def inverted(quadratic: Float[Array, "s i i"]) -> Float[Array, "s i i"]:
    """The inverses, by Cholesky factors: NaN where there are none."""
    eye = jnp.broadcast_to(jnp.eye(quadratic.shape[-1], dtype=quadratic.dtype), quadratic.shape)
    found = jax.vmap(_spread)(quadratic, eye)
    return (found + found.mT) / 2


def _spread(matrix: Float[Array, "k k"], right: Float[Array, "k c"]) -> Float[Array, "k c"]:
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), right)


def _restricted(matrix: Float[Array, "i i"], system: Systems) -> Float[Array, "k k"]:
    """The entries of a system, and 1 on the diagonal for padding."""
    both = system.there[:, None] & system.there[None]
    eye = jnp.eye(len(system.there), dtype=matrix.dtype)
    return jnp.where(both, matrix[system.entries[:, None], system.entries[None]], eye)


def _right(values: Float[Array, "s i o"], system: Systems) -> Float[Array, "k c"]:
    columns = jnp.minimum(system.columns, values.shape[2] - 1)  # those of padding are dropped in the end
    found = values[system.matrix, system.entries[:, None], columns[None]]
    return jnp.where(system.there[:, None], found, 0)


def _by_kept(quadratic: Array, slope: Array, system: Systems) -> Float[Array, "i c"]:
    values = _spread(_restricted(quadratic[system.matrix], system), _right(slope, system))
    out = jnp.zeros((slope.shape[1], values.shape[1]), values.dtype)
    # Padding is zero by its right side; entries are all different, so that nothing is added twice.
    return out.at[system.entries].add(values)


def _by_zeros(inverse: Array, free: Array, system: Systems) -> Float[Array, "i c"]:
    own = inverse[system.matrix]
    forces = _spread(_restricted(own, system), _right(free, system))
    columns = jnp.minimum(system.columns, free.shape[2] - 1)
    moved = free[system.matrix][:, columns] - jnp.matmul(own[:, system.entries], forces)
    # Zero by the formula up to rounding; exactly zero is what a mask means.
    gone = jnp.zeros(len(own), bool).at[system.entries].set(system.there)
    return jnp.where(gone[:, None], 0, moved)
