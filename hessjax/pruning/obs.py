"""Optimal brain surgeon: prune what the loss misses least, and let the other weights make up for it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax import _tree
from hessjax._typing import Block, Params, Relative, Tolerance
from hessjax.pruning import quadratic
from hessjax.pruning.saliency import Saliency, drop_others

_MOVES = {
    "joint": quadratic.joint_move,
    "greedy": quadratic.joint_move,  # what its steps add up to
    "summed": quadratic.summed_move,
    "none": quadratic.no_move,
}


_Numbers = tuple[Any, Any, Any]
"""The damping, the share of the rows that are filled, and how many examples a gradient is the mean of."""


class Gradients(NamedTuple):
    """What a second-order saliency remembers.

    Attributes:
        mask: the mask at the last update.
        ring: the last gradients of the training loop, as a block; None where they are handed over.
        num_seen: how many came in so far.
    """

    mask: Params
    ring: Block | None
    num_seen: Int[Array, ""]


class _Settings(NamedTuple):
    """What the compiled functions depend on; a damping of another size compiles nothing."""

    update: str
    is_relative: bool
    block_size: int | None
    with_slope: bool


def obs(
    update: str = "joint",
    damping: Tolerance = Relative(0.01),  # noqa: B008 (a value, never changed)
    block_size: int | None = None,
    *,
    num_grads: int | None = None,
    batch_size: int = 1,
) -> Saliency:
    """Optimal brain surgeon with the empirical Fisher: scores ½ w_q² / [F⁻¹]_qq, and the kept weights move.

    With F = 1/m Σ g gᵀ + λI, the loss rises by ½ δᵀFδ. Pruning one weight costs least when the others move
    by −F⁻¹e_q w_q / [F⁻¹]_qq; pruning a set Q when they move by −F⁻¹_{:,Q} [F⁻¹_QQ]⁻¹ w_Q, which then costs
    ½ w_Qᵀ [F⁻¹_QQ]⁻¹ w_Q. Weights pruned before stay at zero and count for nothing.

    Args:
        update: how the kept weights make up for the pruned ones: `"joint"`, the best move for all that go
            together; `"greedy"`, the same move for a set chosen one weight at a time, each after the others
            have made up for the last; `"summed"`, the single moves added up, as WoodFisher does; `"none"`.
        damping: λ in loss per squared parameter, or `hj.relative(r)`: r times the mean of diag F over the
            weights still there.
        block_size: F couples only the weights of a block: so many consecutive ones of a leaf. None: all
            weights of all leaves.
        num_grads: in training, F is made from the last `num_grads` gradients of the loop. None: the
            gradients are handed over at every update, as `tx.update(grads, state, params,
            per_example_grads=block)`; so it is by `prune_once`.
        batch_size: b, how many examples each gradient is a mean over; such means make F smaller by b, which
            is made up for.

    Returns:
        A `Saliency` that needs gradients; scores in units of the loss.

    Raises:
        ValueError: an `update` not listed; a damping that is not positive; `block_size`, `num_grads` or
            `batch_size` below 1.

    Cost:
        With m gradients and k = min(m, block size): (m·d·k + d·k²) operations and m·d + d·k numbers (k² for
        one block) of memory; `"greedy"` takes d·(k² + k·block size) in `block_size` steps one after the
        other. `num_grads` gradients are kept in the optimizer's state.

    References:
        Hassibi and Stork, Second order derivatives for network pruning: Optimal brain surgeon (1993).
        Singh and Alistarh, WoodFisher (2020), arXiv 2004.14340, eqs. 8-10.
        Frantar et al., M-FAC (2021), arXiv 2107.03356: gradients of the training loop.
        Kurtic et al., The optimal BERT surgeon (2022), arXiv 2203.07259, eq. 4: sets of weights.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
        >>> grads = {"kernel": jnp.array([[[1.0, 1.0]]])}  # the loss sees only the sum of the two weights
        >>> pruned = hj.prune_once(params, hj.obs(damping=1e-4), 0.5, grads_fn=lambda p: grads)
        >>> pruned.params["kernel"].round(2)
        Array([[0., 3.]], dtype=float32)
    """
    return _second_order(update, damping, block_size, False, num_grads, batch_size)


def wood_taylor(
    update: str = "joint",
    damping: Tolerance = Relative(0.01),  # noqa: B008 (a value, never changed)
    block_size: int | None = None,
    *,
    num_grads: int | None = None,
    batch_size: int = 1,
) -> Saliency:
    """Optimal brain surgeon where the gradient ḡ is not zero: the kept weights also take a Newton step.

    The loss changes by ḡ·δ + ½ δᵀFδ, least at u = w − F⁻¹ḡ; scores ½ u_q² / [F⁻¹]_qq, and the joint move is
    −F⁻¹ḡ − F⁻¹_{:,Q} [F⁻¹_QQ]⁻¹ u_Q. ḡ is the mean of the gradients that make F.

    Args:
        update: as in `obs`.
        damping: as in `obs`; with little of it the step is long.
        block_size: as in `obs`.
        num_grads: as in `obs`.
        batch_size: as in `obs`.

    Returns:
        A `Saliency` that needs gradients; scores in units of the loss. The increase it predicts includes
        what the Newton step gains, and so may be negative.

    Raises:
        ValueError: as `obs`.

    Cost:
        As `obs`.

    References:
        Singh and Alistarh, WoodFisher (2020), arXiv 2004.14340, section 6 (WoodTaylor).

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
        >>> grads = {"kernel": jnp.array([[[1.0, 0.0]], [[1.0, 2.0]]])}
        >>> pruned = hj.prune_once(params, hj.wood_taylor(damping=1e-4), 0.5, grads_fn=lambda p: grads)
        >>> pruned.params["kernel"].round(2)
        Array([[0., 2.]], dtype=float32)
    """
    return _second_order(update, damping, block_size, True, num_grads, batch_size)


def obd(*, num_grads: int | None = None, batch_size: int = 1) -> Saliency:
    """Optimal brain damage: ½ w_q² F_qq with the diagonal of the empirical Fisher; nothing else moves.

    Args:
        num_grads: as in `obs`.
        batch_size: as in `obs`.

    Returns:
        A `Saliency` that needs gradients; scores in units of the loss.

    Raises:
        ValueError: `num_grads` or `batch_size` below 1.

    Cost:
        One pass over the gradients at a mask step.

    References:
        LeCun et al., Optimal brain damage (1990).

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[3.0, 2.0]])}
        >>> grads = {"kernel": jnp.array([[[1.0, 2.0]]])}
        >>> hj.prune_once(params, hj.obd(), 0.5, grads_fn=lambda p: grads).params["kernel"]
        Array([[0., 2.]], dtype=float32)
    """
    _check_counts(num_grads=num_grads, batch_size=batch_size)

    def scores(state: Gradients, dense: Params, /, **extra: Any) -> Params:
        return _diagonal_scores(*_gradients(state, extra), state.mask, dense, batch_size)

    def compensate(
        state: Gradients, dense: Params, mask: Params, /, **extra: Any
    ) -> tuple[Params, Float[Array, ""]]:
        costs = jax.tree.map(lambda s, m: jnp.sum(jnp.where(m, 0, s)), scores(state, dense, **extra), mask)
        return dense, jnp.sum(jnp.stack(jax.tree.leaves(costs)))

    return Saliency(*_memory(num_grads), scores, compensate)


def _second_order(
    update: str,
    damping: Tolerance,
    block_size: int | None,
    with_slope: bool,
    num_grads: int | None,
    batch_size: int,
) -> Saliency:
    if update not in _MOVES:
        names = ", ".join(f'"{name}"' for name in _MOVES)
        raise ValueError(f'`update` must be one of {names}, got "{update}".')
    is_relative = isinstance(damping, Relative)
    amount = damping.factor if isinstance(damping, Relative) else damping
    if not 0 < amount < math.inf:
        raise ValueError(
            f"`damping` must be positive and finite, got {amount}: F from few gradients is singular without."
        )
    _check_counts(num_grads=num_grads, batch_size=batch_size, block_size=block_size)
    # Single scores and the moves that do not follow from them share what is compiled.
    ranking = _Settings("greedy" if update == "greedy" else "none", is_relative, block_size, with_slope)
    moving = _Settings("joint" if update == "greedy" else update, is_relative, block_size, with_slope)

    def scores(state: Gradients, dense: Params, /, **extra: Any) -> Params:
        grads, filled = _gradients(state, extra)
        return _scores(ranking, grads, (amount, filled, batch_size), state.mask, dense)

    def compensate(
        state: Gradients, dense: Params, mask: Params, /, **extra: Any
    ) -> tuple[Params, Float[Array, ""]]:
        grads, filled = _gradients(state, extra)
        return _moved(moving, grads, (amount, filled, batch_size), state.mask, dense, mask)

    return Saliency(*_memory(num_grads), scores, compensate)


# -- gradients -----------------------------------------------------------------------------------


def _memory(num_grads: int | None) -> tuple[Callable[[Params], Gradients], Callable[..., Gradients]]:
    """`init` and `update`: a ring of gradients, if asked for, and the mask they are to be read with."""

    def init(dense: Params) -> Gradients:
        mask = jax.tree.map(lambda x: jnp.full_like(x, True, dtype=bool), dense)
        ring = None
        if num_grads is not None:
            ring = jax.tree.map(lambda x: jnp.zeros((num_grads, *x.shape), x.dtype), dense)
        return Gradients(mask, ring, jnp.zeros((), jnp.int32))

    def update(state: Gradients, grads: Params, dense: Params, mask: Params, /, **extra: Any) -> Gradients:
        if num_grads is None:
            return state._replace(mask=mask, num_seen=state.num_seen + 1)
        place = state.num_seen % num_grads
        ring = jax.tree.map(lambda rows, g: rows.at[place].set(g.astype(rows.dtype)), state.ring, grads)
        return Gradients(mask, ring, state.num_seen + 1)

    return init, update


def _gradients(state: Gradients, extra: dict[str, Any]) -> tuple[Block, Array | float]:
    """The block of gradients, and the share of its rows that are filled."""
    given = extra.get("per_example_grads")
    if given is not None:
        return drop_others(given, state.mask), 1.0
    if state.ring is None:
        raise ValueError(
            "`per_example_grads` must be given, the gradients that make the Fisher: pass `grads_fn` to "
            "`prune_once`, pass it to `tx.update(...)`, or keep those of the training loop by `num_grads=`."
        )
    size = jax.tree.leaves(state.ring)[0].shape[0]
    return state.ring, jnp.clip(state.num_seen, 1, size) / size


# -- compiled ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _scores(settings: _Settings, grads: Block, numbers: _Numbers, active: Params, dense: Params) -> Params:
    models, weights = _models(settings, grads, numbers, active), _blocks(settings, dense, active)
    if settings.update == "greedy":
        parts = [_in_turn(*column) for column in zip(models, weights, _flags(settings, active), strict=True)]
    else:
        parts = [quadratic.each(quadratic.single_scores, *p) for p in zip(models, weights, strict=True)]
    scores = quadratic.from_blocks(parts, dense)
    return jax.tree.map(lambda m, s: jnp.where(m, s, -jnp.inf), active, scores)


def _in_turn(models: quadratic.Quadratic, weights: Array, active: Array) -> Array:
    steps = jnp.max(jnp.sum(active, axis=1))

    def score(model: quadratic.Quadratic, weights: Array, active: Array) -> Array:
        return quadratic.greedy_scores(model, weights, active, steps)

    return quadratic.each(score, models, weights, active)


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    settings: _Settings, grads: Block, numbers: _Numbers, active: Params, dense: Params, mask: Params
) -> tuple[Params, Float[Array, ""]]:
    models = _models(settings, grads, numbers, active)
    weights = _blocks(settings, dense, active)
    pruned = _flags(settings, jax.tree.map(lambda a, m: a & ~m, active, mask))
    kept = _flags(settings, jax.tree.map(lambda a, m: a & m, active, mask))
    columns = zip(models, weights, pruned, kept, strict=True)
    moves = [quadratic.each(_MOVES[settings.update], *column) for column in columns]
    rises = [jnp.sum(quadratic.each(quadratic.increase, *pair)) for pair in zip(models, moves, strict=True)]
    step = quadratic.from_blocks(moves, dense)
    # A pruned weight keeps its dense copy: the mask is what makes it zero.
    free = jax.tree.map(lambda a, m: a & m, active, mask)
    moved = jax.tree.map(lambda w, f, s: jnp.where(f, w + s, w).astype(w.dtype), dense, free, step)
    return moved, jnp.sum(jnp.stack(rises))


@functools.partial(jax.jit, static_argnums=4)
def _diagonal_scores(
    grads: Block, filled: Array | float, active: Params, dense: Params, batch_size: int
) -> Params:
    def leaf(m: Array, g: Array, w: Array) -> Array:
        wide = _tree.wide(g)
        squares = batch_size * jnp.mean(wide**2, axis=0) / filled
        return jnp.where(m, _tree.wide(w) ** 2 * squares / 2, -jnp.inf)

    return jax.tree.map(leaf, active, grads, dense)


def _models(
    settings: _Settings, grads: Block, numbers: _Numbers, active: Params
) -> list[quadratic.Quadratic]:
    _, is_relative, block_size, with_slope = settings
    amount, filled, batch_size = numbers
    damping = Relative(amount) if is_relative else amount
    return quadratic.models_of(grads, active, damping, block_size, filled, batch_size, with_slope)


def _blocks(settings: _Settings, dense: Params, active: Params) -> list[Array]:
    dtype = _tree.accumulator_dtype(dense)
    masked = jax.tree.map(lambda m, w: jnp.where(m, w, 0).astype(dtype), active, dense)
    return quadratic.in_blocks(jax.tree.leaves(masked), settings.block_size)


def _flags(settings: _Settings, flags: Params) -> list[Array]:
    return quadratic.in_blocks(jax.tree.leaves(flags), settings.block_size)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
