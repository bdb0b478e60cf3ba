"""Pruning at one go: scores, mask and the move of the kept weights, in one step or in several."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._axes import is_matrix
from hessjax._core._types import Block, Params, Where
from hessjax.pruning._sparsity import check_sparsity
from hessjax.pruning._trial import Point, Trial, bearable, best_trial, loss_of, refill
from hessjax.pruning.allocations._allocation import Allocation, global_threshold
from hessjax.pruning.patterns._pattern import Patterns, unstructured
from hessjax.pruning.saliencies._saliency import Context, Saliency, drop_others, is_hole


class PruneStep(NamedTuple):
    """One step of `prune_once`.

    Attributes:
        sparsity: after it.
        predicted_increase: how much the saliency expects it to raise the loss; NaN for one that does not say.
        realised_increase: how much `loss_fn` rose; NaN without it.
    """

    sparsity: Any
    predicted_increase: Float[Array, ""]
    realised_increase: Float[Array, ""]


class Pruned(NamedTuple):
    """A pruned network.

    Attributes:
        params: the params, exactly zero where `mask` is False.
        mask: as `mask_of` gives it: booleans, True = kept, and a scalar True for leaves that are not pruned.
        predicted_increase: how much the saliency expects the loss to rise, summed over the steps; NaN for a
            saliency that does not say.
        realised_increase: how much `loss_fn` rose; None without it.
        steps: the steps it took, more than `recomputes` where `max_ratio` cut some in two.
    """

    params: Params
    mask: Params
    predicted_increase: Float[Array, ""]
    realised_increase: Float[Array, ""] | None = None
    steps: tuple[PruneStep, ...] = ()


def prune_once(
    params: Params,
    saliency: Saliency | Sequence[Saliency],
    sparsity: float | int,
    *,
    grads_fn: Callable[[Params], Block] | None = None,
    recomputes: int = 1,
    allocation: Allocation = global_threshold(),  # noqa: B008 (a value, never changed)
    pattern: Patterns = unstructured(),  # noqa: B008 (a value, never changed)
    where: Where = is_matrix,
    loss_fn: Callable[[Params], Any] | None = None,
    max_ratio: float | int | None = None,
) -> Pruned:
    """Prune a trained network without training: remove the least salient weights, and move the others.

    With `recomputes=R` the density shrinks by the same factor R times, and the gradients are taken anew at
    the pruned params each time. What is zero already stays zero.

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
        where: which leaves are pruned: a glob over their paths, several, or `(path, leaf) -> bool`. By
            default all with two or more axes.
        loss_fn: `(params) -> scalar`, to hold the predicted increase against, and to choose by.
        max_ratio: the most that the realised increase of a step may be of its predicted one: a step beyond
            goes half as far (in the logarithm of the density), again and again, and the gradients are taken
            anew where it ends. None: no such trust region. Not inside `jit`.

    Returns:
        The pruned params, the mask and the predicted increase of the loss. Exactly `round(sparsity · n)`
        places of the n selected are False in the mask (under `global_threshold`).

    Raises:
        ValueError: for `sparsity` outside [0, 1), `recomputes` < 1, a block of another structure than
            `params`; several saliencies, or `max_ratio`, and no `loss_fn`;
            `max_ratio` not above 1; if `where` matches no leaf, or the floors of the
            allocation cannot be met; if the saliency needs gradients and there is no `grads_fn`.
        FloatingPointError: if the pruned weights are not finite, as when F + λI is not positive definite in
            float32: raise the damping. (Not inside `jit`: there the weights show it.)

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
    if recomputes < 1:
        raise ValueError(f"`recomputes` must be at least 1, the number of steps, got {recomputes}.")
    rules = [saliency] if isinstance(saliency, Saliency) else list(saliency)
    _check_loss(rules, loss_fn, max_ratio)
    if grads_fn is None and any(rule.needs_grads for rule in rules):
        raise ValueError("`grads_fn` must be given for a saliency that needs gradients, got None.")
    hits = _tree.match(params, where)
    current = jax.tree.map(lambda x, hit: jnp.asarray(x) if hit else optax.MaskedNode(), params, hits)
    _tree.check_floating(current, "params[where]")
    active = jax.tree.map(lambda x: x != 0, current)
    states, full = [rule.init(current) for rule in rules], params
    steps: list[PruneStep] = []
    start = at = loss_of(loss_fn, params)
    targets = _targets(active, sparsity, recomputes)
    while targets:
        seen = Context(current, active, jnp.asarray(len(steps) + 1, jnp.int32), pattern=pattern)
        if grads_fn is not None:
            block, mean = _gradients(grads_fn(full), params, current)
            seen = seen._replace(grads=mean, per_example_grads=block)
            states = [rule.update(rule.init(current), seen) for rule in rules]
        point = Point(seen, params, at)

        def attempt(target: Any, point: Point = point, states: Any = states) -> Trial:
            choose = functools.partial(allocation, sparsity=target, pattern=pattern)
            return best_trial(point, rules, states, choose, loss_fn)

        best = attempt(targets[0]) if max_ratio is None else bearable(point, targets, attempt, max_ratio)
        steps.append(PruneStep(targets.pop(0), best.increase, best.loss - at))
        current, at = best.weights, best.loss
        active = jax.tree.map(jnp.logical_and, active, best.mask)
        full = refill(params, current)
    _check_finite(current)
    mask = jax.tree.map(lambda m: jnp.asarray(True) if is_hole(m) else m, best.mask, is_leaf=is_hole)
    predicted = jnp.sum(jnp.stack([step.predicted_increase for step in steps]))
    return Pruned(full, mask, predicted, None if loss_fn is None else at - start, tuple(steps))


def _check_loss(rules: Sequence[Saliency], loss_fn: Any, max_ratio: float | int | None) -> None:
    if not rules or (len(rules) > 1 and loss_fn is None):
        raise ValueError(
            f"`loss_fn` must be given to choose between several saliencies, of which there are {len(rules)}."
        )
    if max_ratio is None:
        return
    if not max_ratio > 1:
        raise ValueError(f"`max_ratio` must be above 1, of realised to predicted increase, got {max_ratio}.")
    if loss_fn is None:
        raise ValueError("`loss_fn` must be given for a `max_ratio`, to measure what a step does.")
    if not all(rule.compensates for rule in rules):
        raise ValueError("`saliency` must predict an increase for a `max_ratio`, as `obs()` and `obd()` do.")


def _gradients(block: Block, params: Params, current: Params) -> tuple[Block, Params]:
    """The block and its mean, of the selected leaves."""
    one = jax.eval_shape(lambda b: jax.tree.map(lambda g: g[0], b), block)
    _tree.check_like(one, params, "grads_fn(params)", "params")
    selected = drop_others(block, current)
    return selected, jax.tree.map(lambda g: jnp.mean(g, axis=0), selected)


def _targets(active: Params, sparsity: float | int, recomputes: int) -> list[Any]:
    """The sparsity after every step: densities in geometric progression, from what is zero already."""
    flags = jax.tree.leaves(active)
    start = 1.0
    if not any(isinstance(flag, jax.core.Tracer) for flag in flags):
        start = sum(int(flag.sum()) for flag in flags) / sum(flag.size for flag in flags)
    ratio = min((1 - sparsity) / start, 1.0) if start else 1.0
    between = [max(1 - start * ratio ** (i / recomputes), 0.0) for i in range(1, recomputes)]
    return [*(min(s, sparsity) for s in between), sparsity]


def _check_finite(current: Params) -> None:
    leaves = jax.tree.leaves(current)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
        raise FloatingPointError(
            "The pruned weights are not finite: F + λI was not positive definite in this precision, or the "
            "gradients were not finite. Raise the saliency's `damping`."
        )
