"""Local search for a mask: weights that are kept change places with zeros, as long as the outputs gain.

A column w with the quadratic ½ (w − v)ᵀH(w − v), H being the same for all columns of a matrix. With the kept
entries S at their best, w_S = v_S + H_SS⁻¹ H_SZ v_Z, a kept one costs ½ w_q² / [H_SS⁻¹]_qq to lose, and a
zero saves ½ f_q² / (H_qq − H_qS H_SS⁻¹ H_Sq) when it comes back, f = H(v − w) being what pulls at it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hessjax.layers._rows import NUMBERS, SMALL

FIRST = 32
"""In the first round so many entries of a column share one exchange; later rounds are half as bold."""


ROUNDED = 32
"""In so many steps the space grows that is reserved for the kept entries of a column."""


class Masked(NamedTuple):
    """A mask of a matrix, and what its entries are worth.

    Attributes:
        kept: the mask.
        costs: of losing what is kept; infinite elsewhere.
        gains: of having back what is not; −∞ elsewhere.
        loss: of the best weights that it leaves.
    """

    kept: Bool[Array, "i o"]
    costs: Float[Array, "i o"]
    gains: Float[Array, "i o"]
    loss: Float[Array, ""]


def exchanged(
    quadratic: Float[Array, "s i i"],
    weights: Float[Array, "s i o"],
    kept: Bool[Array, "s i o"],
    gone: Bool[Array, "s i o"],
    order: Int[Array, " i"],
    size: int,
    each: bool,
    rounds: int,
) -> Bool[Array, "s i o"]:
    """A mask of as many zeros that costs no more, by exchanges of kept entries and zeros.

    In each round the cheapest kept entries give way to those zeros that save more, a few in every column, all
    at once; where that makes the matrix worse, fewer are tried from where it was best.

    Args:
        quadratic: H of every matrix.
        weights: v.
        kept: the mask to begin with.
        gone: which weights stay gone.
        order: of the inputs, in which those of a group follow one another.
        size: how many inputs a group has.
        each: whether groups keep their numbers of zeros; else the matrix does, and columns may change theirs.
        rounds: how many at most.

    Cost:
        For each column and round a Cholesky factor of the kept entries' k × k numbers, and k²·i operations, i
        being the inputs; 2²⁴ numbers are in memory at a time.
    """
    stack, width, columns = kept.shape
    room = width
    if not isinstance(kept, jax.core.Tracer) and stack * columns * width**3 > SMALL:
        step = max(1, width // ROUNDED)  # few sizes, so that few are compiled for
        room = min(width, (int(np.sum(kept, axis=1).max(initial=0)) // step + 2) * step)
    settings = room, max(1, NUMBERS // max(1, width * room)), size, each
    return _exchanged(settings, quadratic, weights, kept, gone, order, rounds)


@functools.partial(jax.jit, static_argnums=0)
def _exchanged(
    settings: tuple[int, int, int, bool],
    quadratic: Array,
    weights: Array,
    kept: Array,
    gone: Array,
    order: Array,
    rounds: Array,
) -> Array:
    one = functools.partial(_matrix, *settings, rounds)
    in_order = [x[:, order] for x in (quadratic[:, :, order], weights, kept, gone)]
    with jax.default_matmul_precision("highest"):
        found = jax.lax.map(lambda matrix: one(*matrix), tuple(in_order))
    return found[:, jnp.argsort(order)]


def _matrix(
    room: int,
    batch: int,
    size: int,
    each: bool,
    rounds: Int[Array, ""],
    quadratic: Float[Array, "i i"],
    weights: Float[Array, "i o"],
    kept: Bool[Array, "i o"],
    gone: Bool[Array, "i o"],
) -> Bool[Array, "i o"]:
    swap = functools.partial(_in_groups if each else _in_all, size, room)

    def again(state: _Search) -> Array:
        return (state.round <= rounds) & state.is_going

    def take(state: _Search) -> _Search:
        found = _look(room, batch, quadratic, weights, gone, state.trial)
        better = (found.loss < state.best.loss) | (state.round == 0)
        best = jax.tree.map(lambda x, y: jnp.where(better, x, y), found, state.best)
        most = jnp.where(better, state.most, (state.most + 1) // 2)
        # At one exchange for each column the same would be tried again.
        return _Search(state.round + 1, most, swap(best, most), best, better | (state.most > 1))

    nothing = jnp.zeros_like(weights)
    start = Masked(kept, nothing, nothing, jnp.zeros((), weights.dtype))
    most = jnp.asarray(max(1, len(kept) // FIRST))
    search = _Search(jnp.asarray(0), most, kept, start, jnp.asarray(True))
    return jax.lax.while_loop(again, take, search).best.kept


class _Search(NamedTuple):
    """Where the search is.

    Attributes:
        round: its number; in round 0 the mask to begin with is looked at.
        most: exchanges in every column.
        trial: the mask to be looked at.
        best: of those that were.
        is_going: whether there is anything left to try.
    """

    round: Int[Array, ""]
    most: Int[Array, ""]
    trial: Bool[Array, "i o"]
    best: Masked
    is_going: Bool[Array, ""]


# -- what entries are worth ------------------------------------------------------------------------


def _look(room: int, batch: int, quadratic: Array, weights: Array, gone: Array, kept: Array) -> Masked:
    column = functools.partial(_column, room, quadratic)
    found = jax.lax.map(lambda x: column(*x), (weights.T, kept.T, gone.T), batch_size=batch)
    costs, gains, losses = found
    return Masked(kept, costs.T, gains.T, jnp.sum(losses))


def _column(
    room: int,
    quadratic: Float[Array, "i i"],
    weights: Float[Array, " i"],
    kept: Bool[Array, " i"],
    gone: Bool[Array, " i"],
) -> tuple[Float[Array, " i"], Float[Array, " i"], Float[Array, ""]]:
    entries = jnp.argsort(~kept, stable=True)[:room]
    there = kept[entries]
    rows = jnp.where(there[:, None], quadratic[entries], 0)
    eye = jnp.eye(room, dtype=rows.dtype)
    lower = jnp.linalg.cholesky(jnp.where(there[None], rows[:, entries], 0) + jnp.where(there, 0, eye))
    # One triangular solve for both: a unit vector for what is kept, H_Sq for a zero.
    unit = ((entries[:, None] == jnp.arange(len(kept))[None]) & there[:, None]).astype(rows.dtype)
    half = jax.scipy.linalg.solve_triangular(lower, jnp.where(kept[None], unit, rows), lower=True)
    squares = jnp.sum(half**2, axis=0)
    # w_S − v_S, not w_S: what is small where little is lost would be a difference of large numbers.
    right = jnp.matmul(rows, jnp.where(kept, 0, weights))
    moves = jax.scipy.linalg.cho_solve((lower, True), right)
    change = jnp.where(kept, 0, -weights).at[entries].add(jnp.where(there, moves, 0))
    pull = -jnp.matmul(quadratic, change)
    costs = jnp.where(kept, (weights + change) ** 2 / (2 * squares), jnp.inf)
    whole = jnp.diagonal(quadratic)
    rest = whole - squares
    # Where rounding has left nothing of it, an input is a combination of those that are kept.
    is_free = ~(kept | gone) & (rest > jnp.finfo(rest.dtype).eps * len(kept) * whole)
    gains = jnp.where(is_free, pull**2 / (2 * jnp.where(is_free, rest, 1)), -jnp.inf)
    return costs, gains, -jnp.dot(change, pull) / 2


# -- who changes places ----------------------------------------------------------------------------


def _ranks(x: Array, axis: int = 0) -> Int[Array, "..."]:
    return jnp.argsort(jnp.argsort(x, axis=axis), axis=axis)


def _in_all(size: int, room: int, best: Masked, most: Array) -> Bool[Array, "i o"]:
    """In the whole matrix: the cheapest give way to what gains most, pair by pair, while that is more."""
    has_room = jnp.sum(best.kept, axis=0, keepdims=True) + most <= room
    costs = jnp.where(_ranks(best.costs) < most, best.costs, jnp.inf).reshape(-1)
    gains = jnp.where((_ranks(-best.gains) < most) & has_room, best.gains, -jnp.inf).reshape(-1)
    number = jnp.sum(-jnp.sort(-gains) > jnp.sort(costs))
    leave, enter = _ranks(costs) < number, _ranks(-gains) < number
    return ((best.kept.reshape(-1) & ~leave) | enter).reshape(best.kept.shape)


def _in_groups(size: int, room: int, best: Masked, most: Array) -> Bool[Array, "i o"]:
    """In every group the cheapest for what gains most; of each column the groups that gain most by it."""
    kept, costs, gains = (x.reshape(-1, size, x.shape[1]) for x in best[:3])
    net = jnp.max(gains, axis=1) - jnp.min(costs, axis=1)
    swaps = ((net > 0) & (_ranks(-net) < most))[:, None]
    places = jnp.arange(size)[None, :, None]
    leave, enter = (places == x[:, None] for x in (jnp.argmin(costs, axis=1), jnp.argmax(gains, axis=1)))
    return jnp.where(swaps, (kept & ~leave) | enter, kept).reshape(best.kept.shape)
