"""What weights cost by optimal brain surgeon: one alone, a block's one after the other, and sets together.

With u where the quadratic model is least (`_model`), a weight costs ½ u_q² / [F⁻¹]_qq and a set Q of them
½ u_Qᵀ [F⁻¹_QQ]⁻¹ u_Q. The factors give F⁻¹ as cI ± aᵀa with a column of a for each weight (`_factors`), so
that F⁻¹ is never formed for more weights than go together.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _sharding
from hessjax._core._types import Params, Scalar
from hessjax._fisher._blocking import Parts
from hessjax._fisher._factors import Columns, Factor, Like, each
from hessjax._fisher._inverse_fisher import InverseFisher
from hessjax._fisher._readout import determined
from hessjax._fisher._rows import ends, joined, split
from hessjax._fisher._shards import padded

dot = functools.partial(jnp.matmul, precision="highest")

_NUMBERED = 2**24
"""Blocks that float32 can number: two of one number would couple in silence."""


def single_scores(inverse: InverseFisher, u: Parts) -> Parts:
    """½ u_q² / [F⁻¹]_qq: what it costs to prune one weight if all others may make up for it."""
    return tuple(x**2 / (2 * d) for x, d in zip(u, inverse.diagonals(), strict=True))


def greedy_scores(inverse: InverseFisher, u: Parts, active: Parts) -> Parts:
    """What each weight costs when its turn comes, the cheapest of its block going first: see `eliminated`."""
    coupled, at = inverse.blocking.coupled, (inverse.shift, inverse.num_grads)
    found = inverse.blocking.over(_greedy, inverse.parts, coupled(u), coupled(active), common=at)
    return tuple(x for part in found for x in part)


def _greedy(like: Like, factor: Factor, u: Parts, active: Parts, shift: Scalar, count: Array) -> Parts:
    a = joined(_columns(like, factor, shift, count), lead=2)
    is_there, eye = joined(active) > 0, jnp.eye(a.shape[1], dtype=a.dtype)
    core = jnp.broadcast_to(factor.sign * eye, (len(a), *eye.shape))
    constant = jnp.full(len(a), count.astype(shift.dtype) * factor.constant(shift), a.dtype)
    steps = jnp.full(len(a), jnp.max(jnp.sum(is_there, axis=1)))
    found = each(eliminated, core, a, constant, joined(u), is_there, steps)
    return split(found, [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in u])


def eliminated(
    core: Float[Array, "k k"],
    columns: Float[Array, "k n"] | None,
    constant: Float[Array, ""],
    u: Float[Array, " n"],
    active: Bool[Array, " n"],
    steps: Int[Array, ""],
    unit: Float[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """What each weight costs when its turn comes, the cheapest going first and the others making up for it.

    F⁻¹ = cI + aᵀMa. When weight q goes, with p = F⁻¹e_q and π = p_q, the others have the inverse F⁻¹ − ppᵀ/π:
    of that only M changes, by the column Ma_q of the one that went, and F⁻¹'s diagonal and u by p. A weight
    may be cheaper than the one before it; the larger of the two costs is its score, so that the scores rank
    the weights in the order they went.

    Args:
        core: M.
        columns: a; None: the identity, M is F⁻¹ itself but for c.
        constant: c.
        u: where the model is least.
        active: which weights are there.
        steps: at least how many that are.
        unit: of what size the numbers are that the diagonal is a difference of; None: c, or the diagonal.
    """
    quadratic = jnp.diagonal(core) if columns is None else jnp.sum(columns * dot(core, columns), axis=0)
    diagonal = constant + quadratic
    unit = jnp.maximum(constant, diagonal) if unit is None else unit

    def prune_one(_: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        core, diagonal, u, costs, so_far = carry
        is_left = jnp.isposinf(costs)
        cost = jnp.where(is_left, u**2 / (2 * determined(diagonal, unit)), jnp.inf)
        q = jnp.argmin(cost)
        so_far = jnp.maximum(so_far, jnp.where(jnp.isposinf(cost[q]), 0, cost[q]))  # none is left
        along = core[:, q] if columns is None else dot(core, columns[:, q])
        column = along if columns is None else dot(along, columns)
        p = jnp.where(is_left, column.at[q].add(constant), 0)
        # What is gone must not come back as 0/0 in the turns of blocks that are done before the others.
        pivot = jnp.where(is_left[q], diagonal[q], 1)
        u = (u - p * (u[q] / pivot)).at[q].set(0)
        core = core - jnp.outer(along, along / pivot)
        return core, diagonal - p**2 / pivot, u, costs.at[q].min(so_far), so_far

    costs = jnp.where(active, jnp.inf, jnp.zeros_like(u))
    start = (core, diagonal, u, costs, jnp.zeros((), u.dtype))
    return jax.lax.fori_loop(0, steps, prune_one, start)[3]


# -- sets ------------------------------------------------------------------------------------------


class Sets(NamedTuple):
    """Weights that go together, of the leaves of one tie.

    Attributes:
        members: the numbers of the leaves.
        gather: for each, `leaf -> (sets, size)`, the entries that every set has of it.
        scatter: for each, `(sets, size), shape -> leaf`.
        in_turn: whether the weights of a set go one after the other, as in n:m groups.
    """

    members: tuple[int, ...]
    gather: tuple[Callable[[Array], Array], ...]
    scatter: tuple[Callable[[Array, tuple[int, ...]], Array], ...]
    in_turn: bool


def set_scores(inverse: InverseFisher, u: Params, active: Params, sets: Sequence[Sets]) -> Params:
    """Scores whose sum over a set is what the set costs; of those in turn, of one weight after the other."""
    leaves, treedef = jax.tree.flatten(active)
    columns, owners = _by_leaf(inverse)
    trees = (jax.tree.leaves(u), owners, leaves)
    scores: list[Any] = [None] * len(leaves)
    for tied in sets:
        places = list(zip(tied.gather, tied.members, strict=True))
        a = jnp.concatenate([jax.vmap(gather)(columns[i]) for gather, i in places], axis=2)
        weights, owner, is_there = (
            jnp.concatenate([gather(tree[i]) for gather, i in places], axis=1) for tree in trees
        )
        found = _spread(inverse, tied.in_turn, (a.swapaxes(0, 1), weights, owner, is_there))
        widths = [jax.eval_shape(gather, leaves[i]).shape[1] for gather, i in places]
        pieces = jnp.split(found, ends(widths), axis=1)
        for i, scatter, piece in zip(tied.members, tied.scatter, pieces, strict=True):
            scores[i] = scatter(piece, leaves[i].shape)
    return jax.tree.unflatten(treedef, scores)


def _by_leaf(inverse: InverseFisher) -> tuple[list[Float[Array, "k ..."]], list[Float[Array, "..."]]]:
    """In the shapes of the leaves: the columns a of F⁻¹, and whose they are.

    That is the number of the block, from 1; below zero for a dual, of which F⁻¹ = cI − aᵀa.
    """
    # From 1: the sign tells a root from a dual, and 0 has none.
    columns, owners, start = [], [], 1
    at = inverse.shift, inverse.num_grads
    every = inverse.blocking.over(_columns, inverse.parts, common=at)
    for factor, found in zip(inverse.parts, every, strict=True):
        numbers = factor.sign * (start + jnp.arange(len(found[0]), dtype=jnp.float32))
        start += len(numbers)
        if start > _NUMBERED:
            raise ValueError(
                f"`block_size` must make at most {_NUMBERED} blocks for weights that go together, got more."
            )
        columns += found
        owners += [jnp.broadcast_to(_beside(numbers, a.ndim - 1), (len(a), *a.shape[2:])) for a in found]
    most = max(a.shape[1] for a in columns)
    # To one k for all leaves: rows of zeros add nothing to aᵀa.
    padded = tuple(
        jnp.pad(a, [(0, most - n if i == 1 else 0) for i, n in enumerate(a.shape)]) for a in columns
    )
    join = inverse.blocking.join
    return jax.tree.leaves(jax.vmap(join, in_axes=1)(padded)), jax.tree.leaves(join(tuple(owners)))


def _beside(numbers: Array, ndim: int) -> Array:
    return numbers.reshape(-1, *[1] * (ndim - 1))


def _columns(like: Like, factor: Factor, shift: Scalar, count: Array) -> list[Columns]:
    """The columns a of F⁻¹, where those of the factor are of (A + κI)⁻¹ = F⁻¹/m."""
    return [jnp.sqrt(count.astype(a.dtype)) * a for a in factor.columns(like, shift)]


def _spread(inverse: InverseFisher, in_turn: bool, sets: tuple[Array, ...]) -> Float[Array, "sets n"]:
    """What the sets cost, wherever the weights lie: as many sets on every device."""
    # Only a dual has fewer rows than a set may have weights.
    is_wide = inverse.blocking.block_size is None and sets[0].shape[2] > sets[0].shape[1]
    costs: Any = functools.partial(_costs, in_turn, is_wide)
    home = inverse.blocking.everywhere
    if home is None:
        return costs(*sets, inverse.damping)
    number, layout = len(sets[0]), NamedSharding(home.mesh, PartitionSpec(home.axes))
    laid = [_sharding.laid_out(padded(x, home.size, 0), layout) for x in sets]
    return _sharding.laid_out(home.run(costs, *laid, inverse.damping), _sharding.whole(layout))[:number]


def _costs(
    in_turn: bool,
    is_wide: bool,
    a: Float[Array, "sets k n"],
    u: Float[Array, "sets n"],
    owner: Float[Array, "sets n"],
    active: Bool[Array, "sets n"],
    damping: Scalar,
) -> Float[Array, "sets n"]:
    # What is gone has no gradients, so couples with nothing in F⁻¹: with u = 0 it costs nothing.
    u = jnp.where(active, u, 0)
    # The factor's c, times m as all of F⁻¹: m/κ = 1/λ.
    constant = jnp.where(owner < 0, 1 / damping.astype(a.dtype), 0)
    if in_turn:
        return jnp.where(active, each(_costs_in_turn, a, u, owner, constant, active), -jnp.inf)
    costs = each(_wide_cost if is_wide else _cost, a, u, owner, constant)
    number = jnp.maximum(jnp.sum(active, axis=1, keepdims=True, dtype=costs.dtype), 1)
    return jnp.where(active, costs[:, None] / number, -jnp.inf)


def _of_set(a: Array, owner: Array, constant: Array) -> tuple[Array, Array]:
    """[F⁻¹]_QQ, and of what size the numbers are that its diagonal is a difference of."""
    same = owner[:, None] == owner[None, :]  # weights of different blocks do not couple
    signs = jnp.sign(owner)[None].astype(a.dtype)  # owners are counted in float32
    matrix = jnp.diag(constant) + jnp.where(same, signs * dot(a.T, a), 0)
    return matrix, jnp.maximum(constant, jnp.diagonal(matrix))


def _costs_in_turn(a: Array, u: Array, owner: Array, constant: Array, active: Array) -> Array:
    matrix, unit = _of_set(a, owner, constant)
    return eliminated(matrix, None, jnp.zeros((), u.dtype), u, active, jnp.asarray(len(u)), unit)


def _cost(a: Array, u: Array, owner: Array, constant: Array) -> Array:
    """½ uᵀ[F⁻¹_QQ]⁻¹u."""
    return _quadratic_form(*_of_set(a, owner, constant), u) / 2


def _wide_cost(a: Array, u: Array, owner: Array, constant: Array) -> Array:
    """The same of more weights than there are rows.

    Of F⁻¹_QQ = cI − aᵀa the inverse is, by Woodbury's identity, (I + aᵀ(cI − aaᵀ)⁻¹a) / c, with a matrix as
    large as there are rows.
    """
    unit = jnp.full(len(a), constant[0])
    return (dot(u, u) + _quadratic_form(jnp.diag(unit) - dot(a, a.T), unit, dot(a, u))) / (2 * constant[0])


def _quadratic_form(
    matrix: Float[Array, "k k"], unit: Float[Array, " k"], vector: Float[Array, " k"]
) -> Float[Array, ""]:
    """vᵀM⁻¹v, or NaN where rounding has left nothing of M in some direction."""
    lower = jnp.linalg.cholesky(matrix)
    half = solve_triangular(lower, vector, lower=True)
    is_bad = jnp.any(jnp.isnan(determined(jnp.diagonal(lower) ** 2, unit)))
    return jnp.where(is_bad, jnp.nan, dot(half, half))
