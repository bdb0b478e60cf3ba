"""Second-order saliencies: the gradients they remember, and what is compiled of them."""

import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core import _tree
from hessjax._core._types import Block, Params, Relative, Tolerance, settings
from hessjax._fisher import _quadratic
from hessjax.pruning.patterns._pattern import Pattern, Patterns, patterns_of
from hessjax.pruning.saliencies._saliency import Context, Saliency, drop_others
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
        ring: the last gradients of the training loop, as a block; None where they are handed over.
        num_seen: how many came in so far.
    """

    ring: Block | None
    num_seen: Int[Array, ""]


class _Settings(NamedTuple):
    """What the compiled functions depend on; a damping of another size compiles nothing."""

    update: str
    is_relative: bool
    block_size: int | None
    with_slope: bool
    patterns: tuple[Pattern, ...] = ()


@settings()
class _FromGradients(Saliency):
    """A rule that is made of gradients, kept in a ring or handed over."""

    num_grads: int | None
    batch_size: int
    compensates: ClassVar[bool] = True

    def init(self, weights: Params) -> Gradients:
        """A ring of gradients, if asked for."""
        ring = None
        if self.num_grads is not None:
            ring = jax.tree.map(lambda x: jnp.zeros((self.num_grads, *x.shape), x.dtype), weights)
        return Gradients(ring, jnp.zeros((), jnp.int32))

    def update(self, state: Gradients, seen: Context) -> Gradients:
        """The newest takes the place of the oldest."""
        if self.num_grads is None:
            return state._replace(num_seen=state.num_seen + 1)
        place = state.num_seen % self.num_grads
        ring = jax.tree.map(lambda rows, g: rows.at[place].set(g.astype(rows.dtype)), state.ring, seen.grads)
        return Gradients(ring, state.num_seen + 1)


@settings()
class SecondOrder(_FromGradients):
    """Scores and moves by the inverse Fisher, as `obs` and `wood_taylor` say."""

    update_by: str
    damping: Tolerance
    block_size: int | None
    with_slope: bool

    def __post_init__(self) -> None:
        if self.update_by not in _MOVES:
            names = ", ".join(f'"{name}"' for name in _MOVES)
            raise ValueError(f'`update` must be one of {names}, got "{self.update_by}".')
        if not 0 < self._amount < math.inf:
            raise ValueError(
                f"`damping` must be positive and finite, got {self._amount}: F from few gradients is "
                "singular without."
            )
        _check_counts(num_grads=self.num_grads, batch_size=self.batch_size, block_size=self.block_size)

    @property
    def _amount(self) -> Any:
        return self.damping.factor if isinstance(self.damping, Relative) else self.damping

    def _settings(self, update: str, patterns: tuple[Pattern, ...] = ()) -> _Settings:
        is_relative = isinstance(self.damping, Relative)
        return _Settings(update, is_relative, self.block_size, self.with_slope, patterns)

    def scores(self, state: Gradients, seen: Context) -> Params:
        """What single weights cost, or groups."""
        grads, filled = _gradients(state, seen)
        # Single scores and the moves that do not follow from them share what is compiled.
        update = "greedy" if self.update_by == "greedy" else "none"
        compiled = self._settings(update, _grouping(seen.pattern, seen.weights))
        return _scores(compiled, grads, (self._amount, filled, self.batch_size), seen.mask, seen.weights)

    def compensate(self, state: Gradients, seen: Context, mask: Params) -> tuple[Params, Float[Array, ""]]:
        """The move of the kept ones."""
        grads, filled = _gradients(state, seen)
        compiled = self._settings("joint" if self.update_by == "greedy" else self.update_by)
        numbers = (self._amount, filled, self.batch_size)
        return _moved(compiled, grads, numbers, seen.mask, seen.weights, mask)


@settings()
class DiagonalOnly(_FromGradients):
    """½ w_q² F_qq, without moves."""

    def __post_init__(self) -> None:
        _check_counts(num_grads=self.num_grads, batch_size=self.batch_size)

    def scores(self, state: Gradients, seen: Context) -> Params:
        """½ w_q² F_qq."""
        return _diagonal_scores(*_gradients(state, seen), seen.mask, seen.weights, self.batch_size)

    def compensate(self, state: Gradients, seen: Context, mask: Params) -> tuple[Params, Float[Array, ""]]:
        """The weights as they are, and the sum of what goes."""
        costs = jax.tree.map(
            lambda s, a, m: jnp.sum(jnp.where(a & ~m, s, 0)), self.scores(state, seen), seen.mask, mask
        )
        return seen.weights, jnp.sum(jnp.stack(jax.tree.leaves(costs)))


# -- gradients -----------------------------------------------------------------------------------


def _gradients(state: Gradients, seen: Context) -> tuple[Block, Array | float]:
    """The block of gradients, and the share of its rows that are filled."""
    if seen.per_example_grads is not None:
        return drop_others(seen.per_example_grads, seen.mask), 1.0
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
