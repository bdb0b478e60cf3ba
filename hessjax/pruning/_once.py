"""Pruning at one go: scores, mask and the move of the kept weights, in one step or in several."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessjax._core import _numbers, _tree
from hessjax._core._counting import num_set_in_all
from hessjax._core._layout import kernels, selected
from hessjax._core._messages import check_functions, checked_count, checked_number
from hessjax._core._types import Block, Params, Scalar, Where
from hessjax._core._words import AxisWords
from hessjax._fisher._blocking import row
from hessjax.pruning._pruned import Pruned, PruneStep
from hessjax.pruning._ranking import check_sparsity
from hessjax.pruning.allocations._allocation import AllocationRule, allocated, global_threshold
from hessjax.pruning.patterns._pattern import Laid, Patterns, unstructured
from hessjax.pruning.saliencies._movement import Movement
from hessjax.pruning.saliencies._saliency import Context, Saliency, checked_ranking, drop_others, is_hole


def prune_once(
    params: Params,
    saliency: Saliency | Sequence[Saliency],
    sparsity: float | int,
    *,
    grads_fn: Callable[[Params], Block] | None = None,
    recomputes: int = 1,
    allocation: AllocationRule = global_threshold(),  # noqa: B008 (a value, never changed)
    pattern: Patterns = unstructured(),  # noqa: B008 (a value, never changed)
    where: Where = kernels,
    axes: AxisWords | None = None,
    loss_fn: Callable[[Params], Any] | None = None,
    max_ratio: float | int | None = None,
) -> Pruned:
    """Prune a trained network without training: remove the least salient weights, and move the others.

    With `recomputes=R` the density shrinks by the same factor R times, and the gradients are taken anew at
    the pruned params each time. What is zero already stays zero, and is False in the mask.

    Args:
        params: pytree of real floating-point arrays, trained.
        saliency: what a weight is worth: `obs()`, `magnitude()`, ...; or several, say `obs` at several
            dampings: each step is taken by the one after which `loss_fn` is least.
        sparsity: the fraction of zeros among the selected weights, in [0, 1).
        grads_fn: `(params) -> block` of gradients, for example
            `lambda p: hj.per_example_grads(loss_fn, p, batch)`; called once per step. Not needed by
            `magnitude()`.
        recomputes: R, the number of steps.
        allocation: how zeros are spread over the leaves, as in `prune`.
        pattern: which weights go together, as in `prune`.
        where: which leaves are pruned, as in `prune`.
        axes: what the axes of leaves mean, where names and shapes do not tell, as in `prune`.
        loss_fn: `(params) -> scalar`, to hold the predicted increase against, and to choose by.
        max_ratio: the most that the realised increase of a step may be of its predicted one: a step beyond
            goes half as far (in the logarithm of the density), again and again, and the gradients are taken
            anew where it ends. None: no such trust region. Not inside `jit`.

    Returns:
        The pruned params, the mask and the predicted increase of the loss. Exactly `round(sparsity · n)`
        places of the n selected are False in the mask (under `global_threshold`); more if more were zero.

    Raises:
        TypeError: for a `saliency` that is none.
        ValueError: for `sparsity` outside [0, 1), `recomputes` < 1, a block of another structure than
            `params`; several saliencies, or `max_ratio`, and no `loss_fn`; `max_ratio` not above 1; if
            `where` matches no leaf, or the floors of the allocation cannot be met; if the saliency needs
            gradients and there is no `grads_fn`; if its damping is too small for the precision (`obs`).
        FloatingPointError: if scores or the pruned weights are not finite. (In `jit` the weights show it.)

    Cost:
        R times the gradients, and for each saliency its scores, its move, a ranking and `loss_fn`. A step
        that is cut in two costs all but the gradients once more.

    References:
        Singh and Alistarh, WoodFisher (2020), arXiv 2004.14340. Frantar et al., M-FAC (2021), arXiv
        2107.03356: recomputing, with densities in geometric progression.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, -3.0], [0.5, 2.0]]), "bias": jnp.zeros(2)}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 0.5).params["kernel"]
        Array([[ 0., -3.],
               [ 0.,  2.]], dtype=float32)
    """
    check_sparsity(sparsity)
    recomputes = checked_count("recomputes", recomputes, 1, ", the number of steps")
    given = saliency if isinstance(saliency, Sequence) and not isinstance(saliency, str) else (saliency,)
    rules = tuple(checked_ranking("saliency", rule) for rule in given)
    check_functions(grads_fn=grads_fn, loss_fn=loss_fn)
    _check_loss(rules, loss_fn, max_ratio)
    # Movement's scores without a gradient are those of magnitude.
    if grads_fn is None and any(rule.needs_grads or isinstance(rule, Movement) for rule in rules):
        raise ValueError("`grads_fn` must be given for a saliency that needs gradients, got None.")
    task = _Task(params, rules, grads_fn, allocation, Laid(pattern, params, axes), loss_fn, max_ratio)
    weights = _selected(params, where, axes)
    active = jax.tree.map(lambda x: x != 0, weights)
    point, states = _Point(weights, active, task.loss_at(weights)), [rule.init(weights) for rule in rules]
    start, targets, steps = point.loss, _targets(active, sparsity, recomputes), list[PruneStep]()
    while targets:
        seen, states = task.look(point, states, len(steps) + 1)
        best = task.step(point, seen, states, targets)
        with _numbers.meant():  # NaN without a `loss_fn`
            steps.append(PruneStep(targets.pop(0), best.increase, best.loss - point.loss))
        point = _Point(best.weights, jax.tree.map(jnp.logical_and, point.active, best.mask), best.loss)
    _check_finite(point.weights, weights)
    mask = jax.tree.map(lambda m: jnp.asarray(True) if is_hole(m) else m, point.active, is_leaf=is_hole)
    with _numbers.meant():  # NaN without a prediction
        predicted = jnp.sum(jnp.stack([step.predicted_increase for step in steps]))
    rise = None if loss_fn is None else point.loss - start
    return Pruned(_refilled(params, point.weights), mask, predicted, rise, tuple(steps))


class _Point(NamedTuple):
    """Where a step begins: the selected weights, which of them are not pruned yet, and the loss (or NaN)."""

    weights: Params
    active: Params
    loss: Scalar


class _Trial(NamedTuple):
    """Where a step would lead: the weights, the mask, the predicted increase, and the loss (or NaN)."""

    weights: Params
    mask: Params
    increase: Scalar
    loss: Scalar


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """What is the same in all steps: the arguments of `prune_once`."""

    params: Params
    rules: tuple[Saliency, ...]
    grads_fn: Callable[[Params], Block] | None
    allocation: AllocationRule
    pattern: Laid
    loss_fn: Callable[[Params], Any] | None
    max_ratio: float | int | None

    def look(self, point: _Point, states: list[Any], number: int) -> tuple[Context, list[Any]]:
        """What the rules get to see at the start of a step, and their states."""
        seen = Context(point.weights, point.active, jnp.int32(number), pattern=self.pattern)
        if self.grads_fn is None:
            return seen, states
        block = self.grads_fn(_refilled(self.params, point.weights))
        rows, mean = _gradients(block, self.params, point.weights)
        seen = seen._replace(grads=mean, per_example_grads=rows)
        # States from scratch: gradients taken elsewhere say nothing here.
        return seen, [rule.update(rule.init(point.weights), seen) for rule in self.rules]

    def step(self, point: _Point, seen: Context, states: list[Any], targets: list[Any]) -> _Trial:
        """The step to the first target, or within the trust region half as far, again and again.

        The targets it stops at on the way are put in front of the others. Where half as far would remove
        nothing, groups being as large as they are, the shortest step there is has to do.
        """
        trial = self._best(seen, states, targets[0])
        while self.max_ratio is not None and _goes_too_far(point, trial, self.max_ratio):
            halfway = _halfway(point, trial)
            nearer = self._best(seen, states, halfway)
            before, after, _ = _counts(point, nearer)
            if before == after:
                break
            targets.insert(0, halfway)
            trial = nearer
        return trial

    def loss_at(self, weights: Params) -> Scalar:
        """The loss; NaN if there is no function for it."""
        loss = _numbers.unknown() if self.loss_fn is None else self.loss_fn(_refilled(self.params, weights))
        return jnp.asarray(checked_number("loss_fn(params)", loss))

    def _best(self, seen: Context, states: list[Any], target: Any) -> _Trial:
        """The step, of those of all rules, after which the loss is least."""
        trials = [self._trial(seen, *pair, target) for pair in zip(self.rules, states, strict=True)]
        if len(trials) == 1:
            return trials[0]
        # On the device, so that it works inside `jit`; a loss that is NaN never wins.
        losses = jnp.stack([trial.loss for trial in trials])
        best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves)[best], *trials)

    def _trial(self, seen: Context, rule: Saliency, state: Any, target: Any) -> _Trial:
        weights, active = seen.weights, seen.mask
        scores = rule.scores(state, seen)
        _check_scores(scores, active)
        # What is zero already is ranked below everything, whatever a rule says of it: it stays zero.
        order = jax.tree.map(lambda s, a: jnp.where(a, s, -jnp.inf), scores, active)
        mask = rule.change.settle(allocated(self.allocation, order, target, self.pattern), scores, seen)
        moved, increase = weights, _numbers.unknown()
        if rule.compensates:
            moved, increase = rule.compensate(state, seen, mask)
        landed = jax.tree.map(lambda w, a, m: jnp.where(a & m, w, jnp.zeros_like(w)), moved, active, mask)
        return _Trial(landed, mask, increase, self.loss_at(landed))


_num_set = jax.jit(num_set_in_all)


def _goes_too_far(point: _Point, trial: _Trial, max_ratio: float | int) -> bool:
    """Whether the loss rises by more than so many times the prediction, and a shorter step is possible."""
    rounding = 1e-5 * (1 + abs(float(point.loss)))  # of a loss in float32, where the prediction is near 0
    allowed = max_ratio * max(float(trial.increase), 0.0) + rounding
    before, after, _ = _counts(point, trial)
    # `not <=` rather than `>`: a loss that is NaN goes too far.
    return not float(trial.loss - point.loss) <= allowed and before - after > 1 and after > 0


def _halfway(point: _Point, trial: _Trial) -> float:
    """The sparsity between, where the density is the geometric mean of those at both ends."""
    before, after, total = _counts(point, trial)
    return 1 - math.sqrt(before * after) / total


def _counts(point: _Point, trial: _Trial) -> tuple[int, int, int]:
    """Weights left before and after, and all."""
    pairs = list(zip(jax.tree.leaves(point.active), jax.tree.leaves(trial.mask), strict=True))
    before = sum(_num_set(active).exactly() for active, _ in pairs)
    after = sum(_num_set(active & mask).exactly() for active, mask in pairs)
    return before, after, sum(active.size for active, _ in pairs)


def _selected(params: Params, where: Where, axes: AxisWords | None) -> Params:
    """The leaves that are pruned; holes in place of the others."""
    hits = selected(params, where, axes)
    found = jax.tree.map(lambda x, hit: jnp.asarray(x) if hit else optax.MaskedNode(), params, hits)
    _tree.check_floating(found, "params[where]")
    return found


def _refilled(params: Params, weights: Params) -> Params:
    """The params with these weights where they are selected."""
    return jax.tree.map(lambda p, w: p if is_hole(w) else w, params, weights)


def _gradients(block: Block, params: Params, current: Params) -> tuple[Block, Params]:
    """The block and its mean, of the selected leaves."""
    _tree.check_like(row(block), params, "grads_fn(params)", "params")
    selected = drop_others(block, current)
    return selected, jax.tree.map(lambda g: jnp.mean(g, axis=0), selected)


def _targets(active: Params, sparsity: float | int, recomputes: int) -> list[Any]:
    """The sparsity after every step: densities in geometric progression, from what is zero already."""
    flags = jax.tree.leaves(active)
    start = 1.0  # inside `jit`, where zeros cannot be counted yet
    if not any(isinstance(flag, jax.core.Tracer) for flag in flags):
        start = sum(_num_set(flag).exactly() for flag in flags) / sum(flag.size for flag in flags)
    ratio = min((1 - sparsity) / start, 1.0) if start else 1.0  # more zeros than asked for stay
    between = [max(1 - start * ratio ** (i / recomputes), 0.0) for i in range(1, recomputes)]
    return [*(min(s, sparsity) for s in between), sparsity]  # not beyond it by rounding


def _check_loss(rules: Sequence[Saliency], loss_fn: Any, max_ratio: float | int | None) -> None:
    if not rules or (len(rules) > 1 and loss_fn is None):
        raise ValueError(
            f"`loss_fn` must be given to choose between several saliencies, of which there are {len(rules)}."
        )
    if max_ratio is not None and not checked_number("max_ratio", max_ratio) > 1:
        raise ValueError(f"`max_ratio` must be above 1, of realised to predicted increase, got {max_ratio}.")
    if max_ratio is not None and loss_fn is None:
        raise ValueError("`loss_fn` must be given for a `max_ratio`, to measure what a step does.")
    if max_ratio is not None and not all(rule.compensates for rule in rules):
        raise ValueError("`saliency` must predict an increase for a `max_ratio`, as `obs()` and `obd()` do.")


def _check_scores(scores: Params, active: Params) -> None:
    bad = sum(jax.tree.leaves(jax.tree.map(lambda s, a: jnp.sum(jnp.isnan(s) & a), scores, active)))
    if not isinstance(bad, jax.core.Tracer) and bad > 0:
        raise FloatingPointError(
            f"`saliency` must give every weight a score, got NaN for {int(bad)}: weights or gradients are "
            "not finite, or F + λI is not positive definite in this precision: raise the `damping`."
        )


def _check_finite(current: Params, given: Params) -> None:
    if found := _not_finite(current):
        if before := ", ".join(_not_finite(given)):
            raise FloatingPointError(f"`params` must be finite, got NaN or infinities in {before}.")
        raise FloatingPointError(
            f"The pruned weights of {', '.join(found)} are not finite: F + λI was not positive definite in "
            "this precision, or the gradients were not finite. Raise the saliency's `damping`."
        )


def _not_finite(tree: Params) -> list[str]:
    """The leaves that hold NaN or infinities; none inside `jit`."""
    pairs = zip(_tree.leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    return [p for p, x in pairs if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all())]
