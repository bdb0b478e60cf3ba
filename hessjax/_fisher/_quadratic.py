"""The quadratic model that optimal brain surgeon minimises, by blocks, from the rows that make up the Fisher.

Around weights w the loss changes by g·δ + ½ δᵀ(F + λI)δ, with F = RᵀR and few rows R. Every solve below goes
through the small side: with C = λI + R_K R_Kᵀ, the columns K being free to move,

    (F_KK + λI)⁻¹ v = (v − R_Kᵀ C⁻¹ R_K v) / λ        and        (F_KK + λI)⁻¹ R_Kᵀ r = R_Kᵀ C⁻¹ r,

so that the best move of the kept weights is one ridge regression onto what the pruned ones contributed, and
neither F nor its inverse is ever formed for more weights than there are rows.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._types import Block, Params, Relative
from hessjax._fisher import _factors


class Quadratic(NamedTuple):
    """g·δ + ½ (‖Rδ‖² + λ‖δ‖²) over the weights of one block; over several along a leading axis.

    Attributes:
        rows: R; the columns of weights that are pruned already touch no other.
        slope: g; all zeros where the gradient is taken to vanish.
        damping: λ.
    """

    rows: Float[Array, "*blocks rows size"]
    slope: Float[Array, "*blocks size"]
    damping: Float[Array, "*blocks"]


# -- one block -----------------------------------------------------------------------------------


def factor(model: Quadratic) -> Array:
    """The Cholesky factor of C = λI + RRᵀ."""
    gram = dot(model.rows, model.rows.T)
    return jnp.linalg.cholesky(gram + model.damping * jnp.eye(len(gram), dtype=gram.dtype))


def apply_inverse(model: Quadratic, vector: Array) -> Array:
    """(F + λI)⁻¹ v."""
    inside = cho_solve((factor(model), True), dot(model.rows, vector))
    return (vector - dot(model.rows.T, inside)) / model.damping


def inverse_diagonal(model: Quadratic) -> Array:
    """The diagonal of (F + λI)⁻¹, times λ: in (0, 1].

    It is a difference of nearly equal numbers where a weight is well determined. 1 / (F_jj + λ) is never
    more than the truth, and takes over where rounding has gone below it.
    """
    # The small triangle is inverted first: one matrix product is twice as fast as so many substitutions.
    identity = jnp.eye(len(model.rows), dtype=model.rows.dtype)
    whitened = dot(solve_triangular(factor(model), identity, lower=True), model.rows)
    return jnp.maximum(1 - jnp.sum(whitened**2, axis=0), _least_diagonal(model))


def _least_diagonal(model: Quadratic) -> Array:
    return model.damping / (jnp.sum(model.rows**2, axis=0) + model.damping)


def optimum(model: Quadratic, weights: Array) -> Array:
    """Where the model is least without any constraint, u = w − (F + λI)⁻¹ g."""
    moved = weights - apply_inverse(model, model.slope)
    return jnp.where(jnp.any(model.slope != 0), moved, weights)


def single_scores(model: Quadratic, weights: Array) -> Array:
    """½ u_q² / [(F + λI)⁻¹]_qq: what it costs to prune one weight if all others may make up for it."""
    return model.damping * optimum(model, weights) ** 2 / (2 * inverse_diagonal(model))


def greedy_scores(model: Quadratic, weights: Array, active: Array, steps: Array) -> Array:
    """What each weight costs when its turn comes, the cheapest going first and the others making up for it.

    One weight after the other leaves: S = C⁻¹, the diagonal and the weights are down-dated by the column of
    the one that went. A weight may be cheaper than the one before it; the larger of the two costs is its
    score, so that the scores rank a block's weights in the order they went.
    """
    least, size = _least_diagonal(model), len(weights)

    def prune_one(_: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, diagonal, weights, costs, so_far = carry
        cost = jnp.where(jnp.isinf(costs), model.damping * weights**2 / (2 * diagonal), jnp.inf)
        index = jnp.argmin(cost)
        so_far = jnp.maximum(so_far, jnp.where(jnp.isposinf(cost[index]), 0, cost[index]))  # none is left
        pivot, along = diagonal[index], dot(inverse, model.rows[:, index])
        column = jnp.where(jnp.isinf(costs), (jnp.arange(size) == index) - dot(along, model.rows), 0)
        weights = (weights - column * (weights[index] / pivot)).at[index].set(0)
        diagonal = jnp.maximum(diagonal - column**2 / pivot, least)
        return (
            inverse + jnp.outer(along, along / pivot),
            diagonal,
            weights,
            costs.at[index].min(so_far),
            so_far,
        )

    inverse = cho_solve((factor(model), True), jnp.eye(len(model.rows), dtype=weights.dtype))
    costs = jnp.where(active, jnp.inf, jnp.zeros_like(weights))
    start = (inverse, inverse_diagonal(model), optimum(model, weights), costs, jnp.zeros((), weights.dtype))
    return jax.lax.fori_loop(0, steps, prune_one, start)[3]


def joint_move(model: Quadratic, weights: Array, pruned: Array, kept: Array) -> Array:
    """The δ that minimises the model among those with δ = −w on the pruned weights."""
    gone = jnp.where(pruned, weights, 0)
    free = model._replace(rows=jnp.where(kept, model.rows, 0), slope=jnp.where(kept, model.slope, 0))
    inside = cho_solve(
        (factor(free), True), dot(model.rows, gone) + dot(free.rows, free.slope) / free.damping
    )
    return dot(inside, free.rows) - free.slope / free.damping - gone


def summed_move(model: Quadratic, weights: Array, pruned: Array, kept: Array) -> Array:
    """The sum of the moves that would be best if each pruned weight were the only one."""
    best = optimum(model, weights)
    single = jnp.where(pruned, best * model.damping / inverse_diagonal(model), 0)
    moved = best - weights - apply_inverse(model, single)
    return jnp.where(pruned, -weights, jnp.where(kept, moved, 0))


def no_move(model: Quadratic, weights: Array, pruned: Array, kept: Array) -> Array:
    """The pruned weights go, the others stay where they are."""
    return jnp.where(pruned, -weights, 0)


def increase(model: Quadratic, move: Array) -> Array:
    """g·δ + ½ δᵀ(F + λI)δ."""
    curvature = jnp.sum(dot(model.rows, move) ** 2) + model.damping * jnp.sum(move**2)
    return jnp.sum(model.slope * move) + curvature / 2


def each(function: Callable[..., Array], *blocks: Any) -> Array:
    """The function of every block. One alone goes unbatched: batched solves are several times slower."""
    if jax.tree.leaves(blocks)[0].shape[0] > 1:
        return _factors.each(function, *blocks)
    return function(*jax.tree.map(lambda x: x[0], blocks))[None]


# -- a network -----------------------------------------------------------------------------------


def models_of(
    grads: Block,
    mask: Params,
    damping: Any,
    block_size: int | None,
    filled: Any,
    batch_size: Any,
    with_slope: bool,
) -> list[Quadratic]:
    """The model of every block, over the weights that are not pruned yet.

    F = batch_size · mean of g gᵀ, the mean being one over the share of the rows that are filled.
    """
    dtype = _tree.accumulator_dtype(grads)
    masked = [
        jnp.where(m, g, 0).astype(dtype)
        for m, g in zip(jax.tree.leaves(mask), jax.tree.leaves(grads), strict=True)
    ]
    factor = batch_size / jnp.asarray(filled, dtype)
    scale = jnp.asarray(damping.factor if isinstance(damping, Relative) else damping, dtype)
    if isinstance(damping, Relative):
        squares = sum(jnp.sum(g**2) for g in masked) / masked[0].shape[0] * factor
        scale *= squares / sum(jnp.sum(m) for m in jax.tree.leaves(mask))
        # Without any gradient every damping is as good: the scores then rank by magnitude.
        scale = jnp.where(scale > 0, scale, _NOTHING)
    slope = with_slope / jnp.asarray(filled, dtype)
    return [_model_of(rows, scale, factor, slope) for rows in in_blocks(masked, block_size, 1)]


_NOTHING = 1e-12


def _model_of(rows: Array, damping: Array, factor: Array, slope_factor: Array) -> Quadratic:
    """From (m, blocks, size) gradients, compressed to as many rows as a block has weights at most."""
    slope = slope_factor * jnp.mean(rows, axis=0)
    rows = jnp.moveaxis(rows, 0, 1) * jnp.sqrt(factor / rows.shape[0])
    dampings = jnp.full(len(rows), damping)
    if rows.shape[1] <= rows.shape[2]:
        return Quadratic(rows, slope, dampings)
    # F + λI = LLᵀ + λ/2 I with L the Cholesky factor of F + λ/2 I: fewer rows, the same model.
    gram = jnp.einsum("bmi,bmj->bij", rows, rows, precision="highest")
    half = gram + damping / 2 * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    lower = _factors.each(jnp.linalg.cholesky, half)
    return Quadratic(jnp.swapaxes(lower, 1, 2), slope, dampings / 2)


def in_blocks(leaves: Sequence[Array], block_size: int | None, leading: int = 0) -> list[Array]:
    """(..., blocks, size): consecutive weights of a leaf, zeros at the end; all weights in one for None."""
    flat = [leaf.reshape(*leaf.shape[:leading], -1) for leaf in leaves]
    if block_size is None:
        return [jnp.concatenate(flat, axis=-1)[..., None, :]]
    return [_cut(leaf, min(block_size, leaf.shape[-1])) for leaf in flat if leaf.shape[-1]]


def _cut(flat: Array, size: int) -> Array:
    number = math.ceil(flat.shape[-1] / size)
    padding = [(0, 0)] * (flat.ndim - 1) + [(0, number * size - flat.shape[-1])]
    return jnp.pad(flat, padding).reshape(*flat.shape[:-1], number, size)


def from_blocks(blocks: Sequence[Array], like: Params) -> Params:
    """The tree whose `in_blocks` these are."""
    leaves, treedef = jax.tree.flatten(like)
    full = [leaf for leaf in leaves if leaf.size]
    if len(blocks) == 1 and blocks[0].size == sum(leaf.size for leaf in full):
        ends = [sum(leaf.size for leaf in full[: i + 1]) for i in range(len(full) - 1)]
        parts = jnp.split(blocks[0].reshape(-1), ends)
    else:
        parts = [b.reshape(-1)[: leaf.size] for b, leaf in zip(blocks, full, strict=True)]
    rest = iter(parts)
    joined = [next(rest).reshape(leaf.shape) if leaf.size else jnp.zeros(leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(treedef, joined)


dot = functools.partial(jnp.matmul, precision="highest")
