"""Pruning at one go: scores, mask and the move of the kept weights, in one step or in several."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hessjax import _tree
from hessjax._typing import Block, Params, Where
from hessjax.pruning.allocation import Allocation, global_threshold
from hessjax.pruning.counts import check_sparsity
from hessjax.pruning.pattern import Patterns, unstructured
from hessjax.pruning.saliency import Saliency, drop_others, is_hole
from hessjax.pruning.transform import is_matrix


class Pruned(NamedTuple):
    """A pruned network.

    Attributes:
        params: the params, exactly zero where `mask` is False.
        mask: as `mask_of` gives it: booleans, True = kept, and a scalar True for leaves that are not pruned.
        predicted_increase: how much the saliency expects the loss to rise, summed over the steps; NaN for a
            saliency that does not say.
        realised_increase: how much `loss_fn` rose; None without it.
    """

    params: Params
    mask: Params
    predicted_increase: Float[Array, ""]
    realised_increase: Float[Array, ""] | None = None


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

    Returns:
        The pruned params, the mask and the predicted increase of the loss. Exactly `round(sparsity · n)`
        places of the n selected are False in the mask (under `global_threshold`).

    Raises:
        ValueError: for `sparsity` outside [0, 1), `recomputes` < 1, a block of another structure than
            `params`; several saliencies and no `loss_fn`; if `where` matches no leaf, or the floors of the
            allocation cannot be met; if the saliency needs gradients and there is no `grads_fn`.
        FloatingPointError: if the pruned weights are not finite, as when F + λI is not positive definite in
            float32: raise the damping. (Not inside `jit`: there the weights show it.)

    Cost:
        R times the gradients, and for each saliency its scores, its move, a ranking and `loss_fn`.

    References:
        Singh and Alistarh, WoodFisher (2020), arXiv 2004.14340. Frantar et al., M-FAC (2021), arXiv
        2107.03356: recomputing, with densities in geometric progression.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, -3.0], [0.5, 2.0]]), "bias": jnp.zeros(2)}
        >>> hj.prune_once(params, hj.magnitude(), 0.5).params["kernel"]
        Array([[ 0., -3.],
               [ 0.,  2.]], dtype=float32)
    """
    check_sparsity(sparsity)
    if recomputes < 1:
        raise ValueError(f"`recomputes` must be at least 1, the number of steps, got {recomputes}.")
    rules = [saliency] if isinstance(saliency, Saliency) else list(saliency)
    if not rules or (len(rules) > 1 and loss_fn is None):
        raise ValueError(
            f"`loss_fn` must be given to choose between several saliencies, of which there are {len(rules)}."
        )
    hits = _tree.match(params, where)
    current = jax.tree.map(lambda x, hit: jnp.asarray(x) if hit else optax.MaskedNode(), params, hits)
    _tree.check_floating(current, "params[where]")
    active = jax.tree.map(lambda x: x != 0, current)
    states, full, predicted = [rule.init(current) for rule in rules], params, jnp.zeros(())
    for target in _targets(active, sparsity, recomputes):
        extra: dict[str, Any] = {"pattern": pattern}
        choose = functools.partial(allocation, sparsity=target, pattern=pattern)
        if grads_fn is not None:
            block, mean = _gradients(grads_fn(full), params, current)
            extra["per_example_grads"] = block
            pairs = zip(rules, states, strict=True)
            states = [rule.update(state, mean, current, active, **extra) for rule, state in pairs]
        pairs = zip(rules, states, strict=True)
        steps = [_step(rule, state, current, active, choose, extra) for rule, state in pairs]
        current, mask, rise = steps[0] if loss_fn is None else _best(steps, loss_fn, params)
        active = jax.tree.map(jnp.logical_and, active, mask)
        full = _refill(params, current)
        predicted += rise
    _check_finite(current)
    realised = None if loss_fn is None else loss_fn(full) - loss_fn(params)
    mask = jax.tree.map(lambda m: jnp.asarray(True) if is_hole(m) else m, mask, is_leaf=is_hole)
    return Pruned(full, mask, predicted, realised)


class _Step(NamedTuple):
    """What one step makes of the selected weights."""

    weights: Params
    mask: Params
    increase: Array


def _step(
    saliency: Saliency,
    state: Any,
    current: Params,
    active: Params,
    choose: Callable[[Params], Params],
    extra: dict[str, Any],
) -> _Step:
    scores = saliency.scores(state, current, **extra)
    mask = choose(jax.tree.map(lambda s, a: jnp.where(a, s, -jnp.inf), scores, active))
    moved, rise = current, jnp.asarray(jnp.nan)
    if saliency.compensate is not None:
        moved, rise = saliency.compensate(state, current, mask, **extra)
    landed = jax.tree.map(lambda w, a, m: jnp.where(a & m, w, jnp.zeros_like(w)), moved, active, mask)
    return _Step(landed, mask, rise)


def _best(steps: Sequence[_Step], loss_fn: Callable[[Params], Any], params: Params) -> _Step:
    """The step after which the loss is least."""
    if len(steps) == 1:
        return steps[0]
    losses = jnp.stack([jnp.asarray(loss_fn(_refill(params, step.weights))) for step in steps])
    best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[best], *steps)


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


def _refill(params: Params, current: Params) -> Params:
    return jax.tree.map(lambda p, c: p if is_hole(c) else c, params, current)


def _check_finite(current: Params) -> None:
    leaves = jax.tree.leaves(current)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
        raise FloatingPointError(
            "The pruned weights are not finite: F + λI was not positive definite in this precision, or the "
            "gradients were not finite. Raise the saliency's `damping`."
        )
