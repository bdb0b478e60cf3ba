"""Second-order saliencies: the gradients they remember, and what the Fisher of these says about weights."""

import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _sharding, _tree
from hessjax._core._messages import checked_choice, checked_count, checked_number
from hessjax._core._types import Amount, Block, Params, Scalar, Tolerance, assign, settings
from hessjax._fisher import _model, _scores
from hessjax._fisher._blocking import Blocking, Parts, row
from hessjax._fisher._inverse_fisher import InverseFisher, verdict_of
from hessjax._fisher._readout import INACCURATE, Verdict
from hessjax._fisher._rows import num_grads
from hessjax.pruning._units import together
from hessjax.pruning.patterns._fitting import patterns_of
from hessjax.pruning.patterns._pattern import Pattern, Patterns, unstructured
from hessjax.pruning.saliencies._saliency import Context, Saliency, drop_others

_MOVES = {
    "joint": _model.joint_move,
    "greedy": _model.joint_move,  # what its steps add up to
    "summed": _model.summed_move,
    "none": _model.no_move,
}


class Gradients(NamedTuple):
    """What a second-order saliency remembers.

    Attributes:
        ring: the last gradients of the training loop, as a block; None where they are passed in.
        num_seen: how many came in so far.
    """

    ring: Block | None
    num_seen: Int[Array, ""]


@settings()
class _FromGradients(Saliency):
    """A rule that is made of gradients, kept in a ring or passed in."""

    num_grads: int | None
    batch_size: int
    compensates: ClassVar[bool] = True

    def init(self, weights: Params) -> Gradients:
        """A ring of gradients, if asked for."""
        ring = None
        if self.num_grads is not None:
            ring = jax.tree.map(functools.partial(_empty_rows, self.num_grads), weights)
        return Gradients(ring, jnp.zeros((), jnp.int32))

    def update(self, state: Gradients, seen: Context) -> Gradients:
        """The newest takes the place of the oldest."""
        if self.num_grads is None:
            return state._replace(num_seen=optax.safe_increment(state.num_seen))
        # M-FAC's ring (arXiv 2107.03356): of the training loop's gradients the last m make the Fisher.
        place = state.num_seen % self.num_grads
        ring = jax.tree.map(lambda rows, g: rows.at[place].set(g.astype(rows.dtype)), state.ring, seen.grads)
        # At the end of its range the count goes back by one ring: which place is next stays right.
        last = jnp.iinfo(jnp.int32).max
        return Gradients(ring, jnp.where(state.num_seen < last, state.num_seen, last - self.num_grads) + 1)

    def gradients(self, state: Gradients, seen: Context) -> tuple[Block, Int[Array, ""]]:
        """The block of gradients, and how many of its rows are filled."""
        if seen.per_example_grads is not None:
            given = drop_others(seen.per_example_grads, seen.mask)
            if not (count := num_grads(given, "per_example_grads")):
                raise ValueError("`per_example_grads` must hold at least one gradient, got none.")
            _tree.check_like(row(given), seen.weights, "per_example_grads", "params[where]")
            return given, jnp.asarray(count, jnp.int32)
        if state.ring is None:
            raise ValueError(
                "`per_example_grads` must be given, the gradients that make the Fisher: pass `grads_fn` to "
                "`prune_once`, pass it to `tx.update(...)`, or keep those of the training loop by "
                "`num_grads=`."
            )
        # At least 1: F is a mean over as many, and before the first gradient that of zeros.
        return state.ring, jnp.clip(state.num_seen, 1, self.num_grads)


def _empty_rows(number: int, weights: Array) -> Array:
    return _sharding.zero_rows(number, weights, _sharding.layout(weights))


class _Kind(NamedTuple):
    """What the compiled functions depend on; a damping of another size compiles nothing."""

    update: str
    blocking: Blocking
    with_slope: bool
    patterns: tuple[Pattern, ...] = ()


@settings(arrays=("damping",))
class SecondOrder(_FromGradients):
    """Scores and moves by the inverse Fisher, as `obs` and `wood_taylor` say."""

    update_by: str
    damping: Tolerance | Scalar
    block_size: int | None
    with_slope: bool

    def __repr__(self) -> str:
        name = "wood_taylor" if self.with_slope else "obs"
        given = f"{self.update_by!r}, {self.damping}, {self.block_size}"
        return f"{name}({given}, num_grads={self.num_grads}, batch_size={self.batch_size})"

    def __post_init__(self) -> None:
        checked_choice("update", self.update_by, _MOVES)
        assign(self, damping=_checked(self.damping))
        _check_counts(num_grads=self.num_grads, block_size=self.block_size)
        assign(self, batch_size=_checked_batch_size(self.batch_size))

    def scores(self, state: Gradients, seen: Context) -> Params:
        """What single weights cost, or groups."""
        grads, count = self.gradients(state, seen)
        # Single scores and the moves that do not follow from them share what is compiled.
        update = "greedy" if self.update_by == "greedy" else "none"
        blocking = Blocking.of(grads, self.block_size)
        kind = _Kind(update, blocking, self.with_slope, _grouping(seen.pattern, seen.weights))
        numbers = (self.damping, self.batch_size, count)
        scores, verdict = _scored(kind, grads, numbers, seen.mask, seen.weights)
        _check(verdict, blocking)
        return scores

    def compensate(self, state: Gradients, seen: Context, mask: Params) -> tuple[Params, Float[Array, ""]]:
        """The move of the kept ones."""
        grads, count = self.gradients(state, seen)
        blocking = Blocking.of(grads, self.block_size)
        kind = _Kind("joint" if self.update_by == "greedy" else self.update_by, blocking, self.with_slope)
        numbers = (self.damping, self.batch_size, count)
        moved, increase, verdict = _moved(kind, grads, numbers, seen.mask, seen.weights, mask)
        if verdict is not None:
            _check(verdict, blocking)
        return moved, increase


@settings()
class DiagonalOnly(_FromGradients):
    """½ w_q² F_qq, without moves."""

    def __repr__(self) -> str:
        return f"obd(num_grads={self.num_grads}, batch_size={self.batch_size})"

    def __post_init__(self) -> None:
        _check_counts(num_grads=self.num_grads)
        assign(self, batch_size=_checked_batch_size(self.batch_size))

    def scores(self, state: Gradients, seen: Context) -> Params:
        """½ w_q² F_qq."""
        grads, count = self.gradients(state, seen)
        return _diagonal_scores(grads, count, seen.mask, seen.weights, self.batch_size)

    def compensate(self, state: Gradients, seen: Context, mask: Params) -> tuple[Params, Float[Array, ""]]:
        """The weights as they are, and the sum of what goes."""
        costs = jax.tree.map(
            lambda s, a, m: jnp.sum(jnp.where(a & ~m, s, 0)), self.scores(state, seen), seen.mask, mask
        )
        return seen.weights, jnp.sum(jnp.stack(jax.tree.leaves(costs)))


def _grouping(pattern: Patterns, weights: Params) -> tuple[Pattern, ...]:
    """The pattern of every leaf; nothing where every weight goes on its own."""
    patterns = tuple(patterns_of(pattern, weights))
    return () if all(pattern == unstructured() for pattern in patterns) else patterns


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None:
            checked_count(name, count)


def _checked_batch_size(batch_size: Any) -> float | int:
    # As of `inverse_fisher`: no integer where gradients are means over a fractional number of examples.
    if not checked_number("batch_size", batch_size) >= 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    return batch_size.item() if hasattr(batch_size, "item") else batch_size  # static, hence one that hashes


def _checked(damping: Any) -> Amount:
    """λ, an absolute one too as an `Amount`."""
    made = damping if isinstance(damping, Amount) else Amount(damping)
    if isinstance(checked_number("damping", made.amount, " or `relative(r)`"), jax.core.Tracer):
        return made
    if not 0 < made.amount < math.inf:
        raise ValueError(
            f"`damping` must be positive and finite, got {made.amount}: F from few gradients is singular "
            "without."
        )
    return made


def _check(verdict: Verdict, blocking: Blocking) -> None:
    """An error if some block's damping is too weak for the precision; nothing inside `jit`."""
    # By no argument's name: they may come from `grads_fn`, `per_example_grads` or the training loop.
    verdict.check(blocking, "the gradients that make the Fisher", "A smaller `block_size` helps")


# -- compiled ------------------------------------------------------------------------------------

_Numbers = tuple[Amount, Any, Int[Array, ""]]
"""The damping, how many examples a gradient is the mean of, and how many gradients there are."""


@functools.partial(jax.jit, static_argnums=0)
def _scored(
    kind: _Kind, grads: Block, numbers: _Numbers, active: Params, weights: Params
) -> tuple[Params, Verdict]:
    model = _model_of(kind, grads, numbers, active)
    inverse, cut = model.inverse(), model.blocking.cut
    u = _model.optimum(model, inverse, cut(jax.tree.map(lambda m, w: jnp.where(m, w, 0), active, weights)))
    if kind.patterns:
        found = _scores.set_scores(inverse, model.blocking.join(u), active, _sets(kind.patterns))
    elif kind.update == "greedy":
        found = model.blocking.join(_scores.greedy_scores(inverse, u, cut(active)))
    else:
        found = model.blocking.join(_scores.single_scores(inverse, u))
    scores = jax.tree.map(lambda m, s: jnp.where(m, s, -jnp.inf), active, found)
    return scores, _with_lost(inverse, cut(scores), u)


def _with_lost(inverse: InverseFisher, scores: Parts, u: Parts) -> Verdict:
    """A block is also lost if some score is NaN that should not be: its pivot was nothing but rounding."""
    lost = [
        functools.reduce(
            jnp.logical_or,
            [
                jnp.any(jnp.isnan(s) & jnp.isfinite(x), axis=range(1, x.ndim))
                for s, x in zip(*part, strict=True)
            ],
        )
        for part in zip(*map(inverse.blocking.coupled, (scores, u)), strict=True)
    ]
    verdict = verdict_of(inverse)
    residuals = zip(verdict.residuals, lost, strict=True)
    return verdict._replace(residuals=tuple(jnp.where(bad, jnp.inf, x) for x, bad in residuals))


def _sets(patterns: tuple[Pattern, ...]) -> list[_scores.Sets]:
    sets = []
    for members in together(patterns):
        mine = [patterns[i] for i in members]
        gather, scatter = tuple(p.group for p in mine), tuple(p.ungroup for p in mine)
        sets.append(_scores.Sets(tuple(members), gather, scatter, mine[0].at_most is not None))
    return sets


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    kind: _Kind, grads: Block, numbers: _Numbers, active: Params, weights: Params, mask: Params
) -> tuple[Params, Float[Array, ""], Verdict | None]:
    there = jax.tree.map(jnp.logical_or, active, mask)
    model = _model_of(kind, grads, numbers, there)
    cut, coupled = model.blocking.cut, model.blocking.coupled
    # A weight that comes back, as the rule that chose may have it, goes from 0 to its dense copy w: the same
    # to the others as if one of −w went to 0.
    signed = cut(jax.tree.map(lambda w, a, t: jnp.where(t, jnp.where(a, w, -w), 0), weights, active, there))
    free = jax.tree.map(jnp.logical_and, active, mask)
    pruned, kept = cut(jax.tree.map(jnp.not_equal, active, mask)), cut(free)
    moves, inverse = _MOVES[kind.update](model, signed, pruned, kept)
    increases = _model.increases(model, moves)
    if inverse is not None:
        # Where the damping is too weak nothing moves, and nothing is promised.
        is_good = [x <= INACCURATE for x in inverse.residuals]
        increases = [jnp.where(good, x, jnp.nan) for good, x in zip(is_good, increases, strict=True)]
        parts = zip(is_good, coupled(moves), strict=True)
        moves = tuple(
            jnp.where(good.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for good, part in parts for x in part
        )
    # A pruned weight keeps its dense copy: the mask is what makes it zero.
    moved = jax.tree.map(
        lambda w, f, s: jnp.where(f, jnp.add(*_numbers.promoted(w, s)).astype(w.dtype), w),
        weights,
        free,
        model.blocking.join(moves),
    )
    increase = jnp.sum(jnp.stack([jnp.sum(x) for x in increases]))
    return moved, increase, None if inverse is None else verdict_of(inverse)


def _model_of(kind: _Kind, grads: Block, numbers: _Numbers, there: Params) -> _model.Model:
    damping, batch_size, count = numbers
    return _model.model_of(
        kind.blocking, grads, there, damping, batch_size, count, with_slope=kind.with_slope
    )


@functools.partial(jax.jit, static_argnums=4)
def _diagonal_scores(
    grads: Block, count: Int[Array, ""], active: Params, weights: Params, batch_size: int
) -> Params:
    def leaf(m: Array, g: Array, w: Array) -> Array:
        squares = jnp.sum(_tree.wide(g) ** 2, axis=0)
        squares = batch_size * squares / count.astype(squares.dtype)
        return jnp.where(m, _tree.wide(w) ** 2 * squares / 2, -jnp.inf)

    return jax.tree.map(leaf, active, grads, weights)
