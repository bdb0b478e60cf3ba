"""One step of pruning at one go: tried by every rule, taken by the best, and shorter where it goes wrong."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core._types import Params
from hessjax.pruning.saliencies._saliency import Context, Saliency, is_hole


class Point(NamedTuple):
    """Where a step begins.

    Attributes:
        seen: the selected weights, which of them are not pruned yet, and their gradients.
        params: all, for what is not selected.
        loss: here; NaN where it is not measured.
    """

    seen: Context
    params: Params
    loss: Array


class Trial(NamedTuple):
    """Where a step would lead.

    Attributes:
        weights: the selected ones.
        mask: of the allocation.
        increase: of the loss, predicted.
        loss: there; NaN where it is not measured.
    """

    weights: Params
    mask: Params
    increase: Array
    loss: Array


def best_trial(
    point: Point,
    rules: Sequence[Saliency],
    states: Sequence[Any],
    choose: Callable[[Params], Params],
    loss_fn: Callable[[Params], Any] | None,
) -> Trial:
    """The step, of those of all rules, after which the loss is least."""
    pairs = zip(rules, states, strict=True)
    trials = [_trial(point, rule, state, choose, loss_fn) for rule, state in pairs]
    if len(trials) == 1:
        return trials[0]
    losses = jnp.stack([trial.loss for trial in trials])
    best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[best], *trials)


def bearable(
    point: Point, targets: list[Any], attempt: Callable[[Any], Trial], max_ratio: float | int
) -> Trial:
    """The step to the first target, or half as far, again and again, until the loss bears it.

    The targets it stops at on the way are put in front of the others. Where half as far would remove
    nothing, groups being as large as they are, the shortest step there is has to do.
    """
    trial = attempt(targets[0])
    while _goes_too_far(point, trial, max_ratio):
        nearer = attempt(_halfway(point, trial))
        before, after, _ = _counts(point, nearer)
        if before == after:
            break
        targets.insert(0, _halfway(point, trial))
        trial = nearer
    return trial


def _goes_too_far(point: Point, trial: Trial, max_ratio: float | int) -> bool:
    """Whether the loss rises by more than so many times the prediction, and a shorter step is possible."""
    rounding = 1e-5 * (1 + abs(float(point.loss)))
    allowed = max_ratio * max(float(trial.increase), 0.0) + rounding
    before, after, _ = _counts(point, trial)
    return not float(trial.loss - point.loss) <= allowed and before - after > 1 and after > 0


def _halfway(point: Point, trial: Trial) -> float:
    """The sparsity between, where the density is the geometric mean of those at both ends."""
    before, after, total = _counts(point, trial)
    return 1 - math.sqrt(before * after) / total


def loss_of(loss_fn: Callable[[Params], Any] | None, params: Params) -> Array:
    """The loss; NaN if there is no function for it."""
    return jnp.asarray(jnp.nan if loss_fn is None else loss_fn(params))


def refill(params: Params, weights: Params) -> Params:
    """The params with these weights where they are selected."""
    return jax.tree.map(lambda p, w: p if is_hole(w) else w, params, weights)


def _trial(
    point: Point,
    rule: Saliency,
    state: Any,
    choose: Callable[[Params], Params],
    loss_fn: Callable[[Params], Any] | None,
) -> Trial:
    weights, active = point.seen.weights, point.seen.mask
    scores = rule.scores(state, point.seen)
    _check_scores(scores, active)
    mask = choose(jax.tree.map(lambda s, a: jnp.where(a, s, -jnp.inf), scores, active))
    moved, rise = weights, jnp.asarray(jnp.nan)
    if rule.compensates:
        moved, rise = rule.compensate(state, point.seen, mask)
    landed = jax.tree.map(lambda w, a, m: jnp.where(a & m, w, jnp.zeros_like(w)), moved, active, mask)
    return Trial(landed, mask, rise, loss_of(loss_fn, refill(point.params, landed)))


def _check_scores(scores: Params, active: Params) -> None:
    pairs = list(zip(jax.tree.leaves(scores), jax.tree.leaves(active), strict=True))
    bad = sum(jnp.sum(jnp.isnan(s) & a) for s, a in pairs)
    if not isinstance(bad, jax.core.Tracer) and bad > 0:
        raise FloatingPointError(
            f"`saliency` must give every weight a score, got NaN for {int(bad)}: weights or gradients are "
            "not finite, or F + λI is not positive definite in this precision: raise the `damping`."
        )


def _counts(point: Point, trial: Trial) -> tuple[int, int, int]:
    """Weights left before and after, and all."""
    pairs = list(zip(jax.tree.leaves(point.seen.mask), jax.tree.leaves(trial.mask), strict=True))
    before = sum(int(jnp.sum(active)) for active, _ in pairs)
    after = sum(int(jnp.sum(active & mask)) for active, mask in pairs)
    return before, after, sum(active.size for active, _ in pairs)
