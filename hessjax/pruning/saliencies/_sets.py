"""What it costs to prune weights together: the set formula of optimal brain surgeon, for every pattern.

With A = L⁻¹R and C = LLᵀ, the inverse Fisher of a block is (I − AᵀA)/λ. A set Q of its weights costs
½ u_Qᵀ [F⁻¹_QQ]⁻¹ u_Q = ½ λ u_Qᵀ K⁻¹ u_Q with K = I − A_QᵀA_Q, and by Woodbury's identity
½ λ (‖u_Q‖² + ‖S⁻¹A_Q u_Q‖²) with SSᵀ = I − A_QA_Qᵀ where a set has more weights than there are rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from hessjax._core._types import Params
from hessjax._fisher import _quadratic
from hessjax._fisher._quadratic import dot
from hessjax.pruning._ranking import together
from hessjax.pruning.patterns._pattern import Pattern, unstructured


def are_single(patterns: Sequence[Pattern]) -> bool:
    """Whether every weight goes on its own."""
    return all(pattern == unstructured() for pattern in patterns)


def set_scores(
    models: Sequence[_quadratic.Quadratic],
    optima: Sequence[Array],
    active: Params,
    patterns: Sequence[Pattern],
    block_size: int | None,
) -> Params:
    """Scores whose sum over a set is what the set costs; in n:m groups, of the weights one after the other.

    Args:
        models: of every block.
        optima: u, where they are least, in blocks.
        active: the weights that are not pruned yet.
        patterns: of every leaf.
        block_size: which cut the models.
    """
    leaves, treedef = jax.tree.flatten(active)
    columns, weights, blocks = _by_leaf(models, optima, active, block_size)
    scores: list[Any] = [None] * len(leaves)
    for members in together(patterns):
        mine = [patterns[i] for i in members]
        rows = jnp.concatenate([jax.vmap(p.group)(columns[i]) for p, i in zip(mine, members, strict=True)], 2)
        u, block, is_active = (
            jnp.concatenate([p.group(tree[i]) for p, i in zip(mine, members, strict=True)], axis=1)
            for tree in (weights, blocks, leaves)
        )
        in_turn, is_one_block = mine[0].at_most is not None, block_size is None
        found = _set_scores(jnp.moveaxis(rows, 1, 0), u, block, is_active, in_turn, is_one_block)
        start = 0
        for pattern, i in zip(mine, members, strict=True):
            width = jax.eval_shape(pattern.group, leaves[i]).shape[1]
            scores[i] = pattern.ungroup(found[:, start : start + width], leaves[i].shape)
            start += width
    return jax.tree.unflatten(treedef, scores)


def _by_leaf(
    models: Sequence[_quadratic.Quadratic], optima: Sequence[Array], like: Params, block_size: int | None
) -> tuple[list[Array], list[Array], list[Array]]:
    """In the shapes of the leaves: the columns of A (along a leading axis), √λ u, and the block's number."""
    most = max(model.rows.shape[1] for model in models)
    whitened = [_quadratic.each(_whitened, model) for model in models]
    padded = [jnp.pad(a, ((0, 0), (0, most - a.shape[1]), (0, 0))) for a in whitened]
    columns = jax.vmap(lambda blocks: _quadratic.from_blocks(blocks, like), in_axes=1)(padded)
    scaled = [u * jnp.sqrt(model.damping)[:, None] for u, model in zip(optima, models, strict=True)]
    starts = [sum(len(model.damping) for model in models[:i]) for i in range(len(models))]
    numbers = [
        jnp.broadcast_to(start + jnp.arange(len(u), dtype=jnp.float32)[:, None], u.shape)
        for start, u in zip(starts, optima, strict=True)
    ]
    trees = columns, _quadratic.from_blocks(scaled, like), _quadratic.from_blocks(numbers, like)
    return tuple(jax.tree.leaves(tree) for tree in trees)  # type: ignore[return-value]


def _whitened(model: _quadratic.Quadratic) -> Array:
    """A = L⁻¹R."""
    return solve_triangular(_quadratic.factor(model), model.rows, lower=True)


def _set_scores(
    columns: Float[Array, "sets rows size"],
    weights: Float[Array, "sets size"],
    blocks: Float[Array, "sets size"],
    active: Bool[Array, "sets size"],
    in_turn: bool,
    is_one_block: bool,
) -> Float[Array, "sets size"]:
    columns = jnp.where(active[:, None], columns, 0)
    weights = jnp.where(active, weights, 0)
    if in_turn:
        costs = _quadratic.each(_costs_in_turn, columns, weights, blocks, active)
        return jnp.where(active, costs, -jnp.inf)
    wide = is_one_block and columns.shape[2] > columns.shape[1]
    costs = _quadratic.each(_wide_cost if wide else _cost, columns, weights, blocks)
    number = jnp.maximum(jnp.sum(active, axis=1, keepdims=True), 1)
    return jnp.where(active, costs[:, None] / number, -jnp.inf)


def _inverse(columns: Array, blocks: Array) -> Array:
    """K = λ [F⁻¹]_QQ: weights of different blocks do not couple."""
    same = blocks[:, None] == blocks[None, :]
    return jnp.eye(len(blocks), dtype=columns.dtype) - jnp.where(same, dot(columns.T, columns), 0)


def _cost(columns: Array, weights: Array, blocks: Array) -> Array:
    """½ vᵀK⁻¹v."""
    return _quadratic_form(_inverse(columns, blocks), weights) / 2


def _wide_cost(columns: Array, weights: Array, blocks: Array) -> Array:
    rows = columns.shape[0]
    small = jnp.eye(rows, dtype=columns.dtype) - dot(columns, columns.T)
    return (jnp.sum(weights**2) + _quadratic_form(small, dot(columns, weights))) / 2


def _quadratic_form(matrix: Array, vector: Array) -> Array:
    """vᵀM⁻¹v of M = I − (something positive), of which rounding may leave nothing in some direction."""
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.sum(dot(vector, vectors) ** 2 / jnp.maximum(values, jnp.finfo(values.dtype).eps))


def _costs_in_turn(columns: Array, weights: Array, blocks: Array, active: Array) -> Array:
    """The cheapest goes first, the others of the set making up for it; never less than the one before."""
    size = len(weights)

    def prune_one(_: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, weights, costs, so_far = carry
        diagonal = jnp.maximum(jnp.diagonal(inverse), jnp.finfo(weights.dtype).eps)
        cost = jnp.where(jnp.isinf(costs), weights**2 / (2 * diagonal), jnp.inf)
        index = jnp.argmin(cost)
        so_far = jnp.maximum(so_far, jnp.where(jnp.isposinf(cost[index]), 0, cost[index]))
        column, pivot = inverse[:, index], diagonal[index]
        open_ = jnp.isinf(costs)
        column = jnp.where(open_, column, 0)
        weights = (weights - column * weights[index] / pivot).at[index].set(0)
        inverse = inverse - jnp.outer(column, column / pivot)
        return inverse, weights, costs.at[index].min(so_far), so_far

    costs = jnp.where(active, jnp.inf, jnp.zeros_like(weights))
    start = (_inverse(columns, blocks), weights, costs, jnp.zeros((), weights.dtype))
    return jax.lax.fori_loop(0, size, prune_one, start)[2]
