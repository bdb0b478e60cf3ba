"""Second-order saliencies: the gradients they remember, and what is compiled of them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core import _tree
from hessjax._core._types import Block, Params, Relative, Tolerance
from hessjax._fisher import _quadratic
from hessjax.pruning.patterns._by_path import Patterns, patterns_of
from hessjax.pruning.patterns._pattern import Pattern
from hessjax.pruning.saliencies._saliency import Saliency, drop_others
from hessjax.pruning.saliencies._sets import are_single, set_scores

_MOVES = {
    "joint": _quadratic.joint_move,
    "greedy": _quadratic.joint_move,  # what its steps add up to
    "summed": _quadratic.summed_move,
    "none": _quadratic.no_move,
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
    patterns: tuple[Pattern, ...] = ()


def second_order(
    update: str,
    damping: Tolerance,
    block_size: int | None,
    with_slope: bool,
    num_grads: int | None,
    batch_size: int,
) -> Saliency:
    """Scores and moves by the inverse Fisher, as `obs` and `wood_taylor` say."""
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
        settings = ranking._replace(patterns=_grouping(extra.get("pattern"), dense))
        return _scores(settings, grads, (amount, filled, batch_size), state.mask, dense)

    def compensate(
        state: Gradients, dense: Params, mask: Params, /, **extra: Any
    ) -> tuple[Params, Float[Array, ""]]:
        grads, filled = _gradients(state, extra)
        return _moved(moving, grads, (amount, filled, batch_size), state.mask, dense, mask)

    return Saliency(*_memory(num_grads), scores, compensate)


def diagonal_only(num_grads: int | None, batch_size: int) -> Saliency:
    """½ w_q² F_qq, without moves."""
    _check_counts(num_grads=num_grads, batch_size=batch_size)

    def scores(state: Gradients, dense: Params, /, **extra: Any) -> Params:
        return _diagonal_scores(*_gradients(state, extra), state.mask, dense, batch_size)

    def compensate(
        state: Gradients, dense: Params, mask: Params, /, **extra: Any
    ) -> tuple[Params, Float[Array, ""]]:
        costs = jax.tree.map(
            lambda s, a, m: jnp.sum(jnp.where(a & ~m, s, 0)), scores(state, dense, **extra), state.mask, mask
        )
        return dense, jnp.sum(jnp.stack(jax.tree.leaves(costs)))

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


def _grouping(pattern: Patterns | None, dense: Params) -> tuple[Pattern, ...]:
    """The pattern of every leaf; nothing where every weight goes on its own."""
    patterns = () if pattern is None else tuple(patterns_of(pattern, dense))
    return () if are_single(patterns) else patterns


# -- compiled ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _scores(settings: _Settings, grads: Block, numbers: _Numbers, active: Params, dense: Params) -> Params:
    models, weights = _models(settings, grads, numbers, active), _blocks(settings, dense, active)
    if settings.patterns:
        optima = [_quadratic.each(_quadratic.optimum, *pair) for pair in zip(models, weights, strict=True)]
        return set_scores(models, optima, active, settings.patterns, settings.block_size)
    if settings.update == "greedy":
        parts = [_in_turn(*column) for column in zip(models, weights, _flags(settings, active), strict=True)]
    else:
        parts = [_quadratic.each(_quadratic.single_scores, *p) for p in zip(models, weights, strict=True)]
    scores = _quadratic.from_blocks(parts, dense)
    return jax.tree.map(lambda m, s: jnp.where(m, s, -jnp.inf), active, scores)


def _in_turn(models: _quadratic.Quadratic, weights: Array, active: Array) -> Array:
    steps = jnp.max(jnp.sum(active, axis=1))

    def score(model: _quadratic.Quadratic, weights: Array, active: Array) -> Array:
        return _quadratic.greedy_scores(model, weights, active, steps)

    return _quadratic.each(score, models, weights, active)


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    settings: _Settings, grads: Block, numbers: _Numbers, active: Params, dense: Params, mask: Params
) -> tuple[Params, Float[Array, ""]]:
    models = _models(settings, grads, numbers, jax.tree.map(jnp.logical_or, active, mask))
    # A weight that comes back, as the rule that chose may have it, goes from 0 to its dense copy w: the same
    # to the others as if one of −w went to 0.
    signed = jax.tree.map(lambda w, a: jnp.where(a, w, -w), dense, active)
    weights = _blocks(settings, signed, jax.tree.map(jnp.logical_or, active, mask))
    pruned = _flags(settings, jax.tree.map(jnp.not_equal, active, mask))
    kept = _flags(settings, jax.tree.map(jnp.logical_and, active, mask))
    columns = zip(models, weights, pruned, kept, strict=True)
    moves = [_quadratic.each(_MOVES[settings.update], *column) for column in columns]
    rises = [jnp.sum(_quadratic.each(_quadratic.increase, *pair)) for pair in zip(models, moves, strict=True)]
    step = _quadratic.from_blocks(moves, dense)
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
) -> list[_quadratic.Quadratic]:
    _, is_relative, block_size, with_slope, _ = settings
    amount, filled, batch_size = numbers
    damping = Relative(amount) if is_relative else amount
    return _quadratic.models_of(grads, active, damping, block_size, filled, batch_size, with_slope)


def _blocks(settings: _Settings, dense: Params, active: Params) -> list[Array]:
    dtype = _tree.accumulator_dtype(dense)
    masked = jax.tree.map(lambda m, w: jnp.where(m, w, 0).astype(dtype), active, dense)
    return _quadratic.in_blocks(jax.tree.leaves(masked), settings.block_size)


def _flags(settings: _Settings, flags: Params) -> list[Array]:
    return _quadratic.in_blocks(jax.tree.leaves(flags), settings.block_size)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
