"""Which weights go when the others of their column make up for them: one by one, in sets, and in one sweep.

A column w with the quadratic ½ (w − v)ᵀH(w − v), H being the same for all columns of a matrix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._fisher._scores import eliminated
from hessjax.layers._rows import NUMBERS, inverted


def costs_in_turn(
    quadratic: Float[Array, "s i i"], weights: Float[Array, "s i o"], there: Bool[Array, "s i o"]
) -> Float[Array, "s i o"]:
    """What every weight costs when its turn comes, the cheapest of its column first (OBC's greedy order).

    Args:
        quadratic: H of every matrix.
        weights: of the least point of the quadratic among those that are zero where nothing is there.
        there: which are there.

    Cost:
        2·i² operations for each weight, i being the inputs, and i² numbers for each column that is taken at
        a time: 2²⁴ in all.
    """
    return _costs(max(1, NUMBERS // weights.shape[1] ** 2), quadratic, weights, there)


@functools.partial(jax.jit, static_argnums=0)
def _costs(size: int, quadratic: Array, weights: Array, there: Array) -> Array:
    stack, width, columns = weights.shape
    owner = jnp.repeat(jnp.arange(stack), columns)
    rows = [x.swapaxes(1, 2).reshape(-1, width) for x in (weights, there)]

    def cost(column: tuple[Array, Array, Array]) -> Array:
        matrix, w, is_there = column
        both = is_there[:, None] & is_there[None]
        # Of the kept weights alone: what is gone already makes up for nothing.
        own = jnp.where(both, quadratic[matrix], jnp.eye(width, dtype=w.dtype))
        inverse = jnp.where(both, inverted(own[None])[0], 0)
        return eliminated(inverse, None, jnp.zeros((), w.dtype), w, is_there, jnp.asarray(width, jnp.int32))

    with jax.default_matmul_precision("highest"):
        found = jax.lax.map(cost, (owner, *rows), batch_size=size)
    return found.reshape(stack, columns, width).swapaxes(1, 2)


def costs_of_sets(
    inverse: Float[Array, "s i i"],
    weights: Float[Array, "s i o"],
    there: Bool[Array, "s i o"],
    places: Int[Array, "sets n"],
) -> Float[Array, "sets n"]:
    """What sets of weights cost, ½ w_Qᵀ [H⁻¹_QQ]⁻¹ w_Q, in equal parts on those that are there.

    Args:
        inverse: H⁻¹ of every matrix. What is gone before is taken to make up as the others do.
        weights: the weights.
        there: which are there.
        places: the weights of every set, by their number in the stack.
    """
    return _set_costs(max(1, NUMBERS // places.shape[1] ** 2), inverse, weights, there, places)


@functools.partial(jax.jit, static_argnums=0)
def _set_costs(size: int, inverse: Array, weights: Array, there: Array, places: Array) -> Array:
    def cost(own: Array) -> Array:
        matrix, entry, column = jnp.unravel_index(own, weights.shape)
        is_there, u = there.reshape(-1)[own], weights.reshape(-1)[own]
        same = (matrix[:, None] == matrix[None]) & (column[:, None] == column[None])
        found = jnp.where(same, inverse[matrix[:, None], entry[:, None], entry[None]], 0)
        half = jax.scipy.linalg.solve_triangular(
            jnp.linalg.cholesky(found), jnp.where(is_there, u, 0), lower=True
        )
        number = jnp.maximum(jnp.sum(is_there), 1)
        return jnp.where(is_there, jnp.dot(half, half) / (2 * number), 0)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(cost, places, batch_size=size)


# -- one sweep -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("size", "each", "block"))
def swept(
    quadratic: Float[Array, "s i i"],
    weights: Float[Array, "s i o"],
    kept: Bool[Array, "s i o"],
    gone: Bool[Array, "s i o"],
    order: Int[Array, " i"],
    size: int,
    each: bool,
    block: int,
) -> Bool[Array, "s i o"]:
    """SparseGPT's sweep over the inputs: another mask of as many zeros, chosen as the weights move.

    With H⁻¹ = UᵀU, U upper triangular, row j of U/U_jj tells the inputs from j on how to make up for what
    input j loses, those before being settled. Inputs are taken in blocks; within one the cheapest
    w²/U_jj² go, as many as are due; what comes behind the block moves once, by a product (lazy updates).

    Args:
        quadratic: H of every matrix.
        weights: the weights.
        kept: the mask whose zeros are counted: of every matrix, or of every group and column.
        gone: which weights are gone before, and stay so.
        order: of the inputs.
        size: how many inputs a mask is chosen for at a time.
        each: whether each column loses as many as `kept` has zeros in the same group; else the matrix as
            a whole keeps its number, evenly over the inputs.
        block: how many inputs are taken before what is behind them moves; a multiple of `size`.
    """
    with jax.default_matmul_precision("highest"):
        inverse = inverted(quadratic[:, order][:, :, order])
        factor = jnp.linalg.cholesky(inverse).mT
        one = functools.partial(_matrix, size, each, block)
        found = jax.vmap(one)(factor, weights[:, order], kept[:, order], gone[:, order])
    return found[:, jnp.argsort(order)]


def _matrix(
    size: int,
    each: bool,
    block: int,
    factor: Float[Array, "i i"],
    weights: Float[Array, "i o"],
    kept: Bool[Array, "i o"],
    gone: Bool[Array, "i o"],
) -> Bool[Array, "i o"]:
    width, columns = weights.shape
    number = -(-width // block)
    extra = number * block - width
    # Rows of padding are gone before, and so counted in no number.
    factor = jnp.pad(factor, ((0, extra), (0, extra))) + jnp.diag(
        (jnp.arange(width + extra) >= width).astype(factor.dtype)
    )
    weights, kept, gone = (
        jnp.pad(x, ((0, extra), (0, 0)), constant_values=fill)
        for x, fill in ((weights, 0), (kept, True), (gone, False))
    )
    zeros = jnp.sum(~kept)
    inside = jnp.arange(width + extra) < width

    def take(carry: tuple[Array, Array, Array], start: Array) -> tuple[Any, None]:
        weights, chosen, done = carry
        own = jax.lax.dynamic_slice(factor, (start, 0), (block, factor.shape[1]))
        square = jax.lax.dynamic_slice(own, (0, start), (block, block))
        w, k, g = (jax.lax.dynamic_slice(x, (start, 0), (block, columns)) for x in (weights, kept, gone))
        is_in = jax.lax.dynamic_slice(inside, (start,), (block,))
        share = jnp.round(zeros * (jnp.minimum(start + block, width) / width)).astype(jnp.int32)
        # The last block takes what is left: float32 counts to 2²⁴ only.
        due = jnp.where(start + block >= width, zeros, share) - done
        mask, errors = _block(size, each, square, w, k, g, is_in, due)
        # Columns of U before the block are zero: nothing that is settled moves again.
        behind = jnp.arange(own.shape[1]) >= start + block
        weights = weights - jnp.matmul(jnp.where(behind[None], own, 0).T, errors)
        chosen = jax.lax.dynamic_update_slice(chosen, mask, (start, 0))
        return (weights, chosen, done + jnp.sum(~mask & is_in[:, None], dtype=jnp.int32)), None

    starts = jnp.arange(number) * block
    start = (weights, jnp.ones_like(kept), jnp.zeros((), jnp.int32))
    (_, chosen, _), _ = jax.lax.scan(take, start, starts)
    return chosen[:width]


def _block(
    size: int,
    each: bool,
    factor: Float[Array, "b b"],
    weights: Float[Array, "b o"],
    kept: Bool[Array, "b o"],
    gone: Bool[Array, "b o"],
    inside: Bool[Array, " b"],
    due: Int[Array, ""],
) -> tuple[Bool[Array, "b o"], Float[Array, "b o"]]:
    """The mask of a block, and for every input in it what those behind have to make up for."""
    length, columns = weights.shape
    pivots = jnp.diagonal(factor)

    def scored(rows: Array, start: Any, number: int) -> Array:
        there, lost, pivot = (
            jax.lax.dynamic_slice(x, (start, *[0] * (x.ndim - 1)), (number, *x.shape[1:]))
            for x in (inside, gone, pivots)
        )
        scores = jnp.where(lost, -jnp.inf, (rows / pivot[:, None]) ** 2)
        return jnp.where(there[:, None], scores, jnp.inf)

    def group_mask(weights: Array, mask: Array, j: Array) -> Array:
        """As every group comes up, the cheapest of each column, as many as the given mask has zeros."""
        rows = jax.lax.dynamic_slice(weights, (j, 0), (size, columns))
        zeros = jnp.sum(~jax.lax.dynamic_slice(kept, (j, 0), (size, columns)), axis=0, keepdims=True)
        ranks = jnp.argsort(jnp.argsort(scored(rows, j, size), axis=0), axis=0)
        return jax.lax.dynamic_update_slice(mask, ranks >= zeros, (j, 0))

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, mask, errors = carry
        if each:
            mask = jnp.where(j % size == 0, group_mask(weights, mask, (j // size) * size), mask)
        error = jnp.where(mask[j], 0, weights[j]) / pivots[j]
        weights = weights - jnp.outer(jnp.where(jnp.arange(length) > j, factor[j], 0), error)
        return weights, mask, errors.at[j].set(error)

    mask = jnp.ones_like(kept)
    if not each:
        ranks = jnp.argsort(jnp.argsort(scored(weights, 0, length).reshape(-1)))
        mask = (ranks >= due).reshape(length, columns)
    _, mask, errors = jax.lax.fori_loop(0, length, step, (weights, mask, jnp.zeros_like(weights)))
    return mask, errors
