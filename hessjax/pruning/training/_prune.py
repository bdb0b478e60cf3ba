"""Pruning during training: a wrapper round any optax optimizer that keeps the params exactly sparse."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from hessjax._core import _tree
from hessjax._core._types import Params, Where
from hessjax.pruning._sparsity import Schedule, check_sparsity, cond_now
from hessjax.pruning.allocations._allocation import Allocation, global_threshold
from hessjax.pruning.allocations._threshold import Threshold
from hessjax.pruning.patterns._by_path import Patterns
from hessjax.pruning.patterns._pattern import unstructured
from hessjax.pruning.saliencies._saliency import Saliency, drop_others
from hessjax.pruning.training._state import (
    PruneState,
    copy_selected,
    land,
    masked,
    on_selected,
    second,
    unmask,
)
from hessjax.pruning.training._steps import (
    check_budget,
    check_first_step,
    check_steps,
    is_mask_step,
    some_mask_steps,
)


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a leaf has two or more axes: matrices, kernels, embeddings; no scales, and no biases.

    (Attention has biases of two axes, heads and their entries: they are called `bias` all the same.)
    """
    return jnp.ndim(leaf) >= 2 and path.rsplit("/", 1)[-1] != "bias"


def prune(
    inner: optax.GradientTransformation | optax.MultiSteps,
    saliency: Saliency,
    sparsity: float | int | Schedule | Threshold,
    *,
    allocation: Allocation = global_threshold(),  # noqa: B008 (a value, never changed)
    pattern: Patterns = unstructured(),  # noqa: B008 (a value, never changed)
    where: Where = is_matrix,
    every: int = 100,
    start: int = 0,
    stop: int | None = None,
    regrow: bool = True,
    straight_through: bool = False,
    dense_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Train with `inner` while pruning: the params that the loop holds are the masked ones, exactly.

    The loop stays as it is. The dense weights W and the mask M live in the optimizer state; the gradient G,
    taken at the masked weights, goes into `inner` as G⊙M together with W. After T updates the params are M⊙W
    with M from the last mask step, T' = start, start + every, ... up to `stop`, and `stop` itself, and its
    sparsity is `sparsity(T')`. The mask of T' = 0 is made from the params given to `init` and acts from the
    first update on.

    Guaranteed, whatever `inner` is:

    - a pruned weight is exactly 0.0 after `optax.apply_updates`, and the number of zeros is exact;
    - a kept weight moves as `inner` alone would move it, to the last bit (at mask steps a saliency that
      compensates, as `obs` does, moves it too), and a leaf that is not pruned trains as if `prune` were not
      there (operation for operation: inside `jit` the two are different programs, and XLA may contract
      a·b + c in one of them). At kept places W is by definition the params, read anew at every update, so
      that the two cannot drift apart and outside changes are honoured;
    - a weight that comes back starts from its dense copy, which `inner` has kept moving (with zero gradient).

    Nothing may change the updates after `prune`: in a chain it comes last, and decay, ema, accumulation
    belong into `inner`. (`optax.MultiSteps` round `prune` is fine: T then counts its emitted updates; inside
    `prune`, T counts the small steps.)

    Args:
        inner: the optimizer. Its state may hold anything; its weight decay sees the dense weights.
        saliency: what a weight is worth, for example `magnitude()`.
        sparsity: the fraction of zeros among the selected weights, in [0, 1): a number, or a schedule
            `T -> sparsity` such as `optax.polynomial_schedule(0.0, 0.9, 3, 1000)` (a float32: of 25 million
            weights its 0.9 leaves one more than the number 0.9 does). Or `threshold(...)`:
            whatever scores no more than that goes, and `allocation` has no part in it.
        allocation: how zeros are spread over the leaves: `global_threshold()`, `uniform()`, `explicit(...)`,
            `erdos_renyi()`, `by_curvature(...)`.
        pattern: which weights go together: `unstructured()`, `n_of_m(2, 4)`, `blocks((32, 32))`,
            `channels()`, `filters()`, `rows()`, `heads()`; or several by glob over paths,
            `{"conv/*": filters(), "*": unstructured()}`, the first that matches counting.
        where: which leaves are pruned: a glob over their paths, several, or `(path, leaf) -> bool`. By
            default all with two or more axes that are not called `bias`.
        every: updates between two mask steps.
        start: the first mask step; until then nothing is pruned.
        stop: the last mask step; afterwards the mask rests. None: never.
        regrow: whether a pruned weight may come back. If not, no dense copy is kept, only the mask.
        straight_through: give `inner` the gradient at pruned weights too, not zero.
        dense_dtype: of the dense weights, and of what `inner` sees: float32 for bfloat16 params. The loop's
            params are then rounded copies, and changes made to them outside are not honoured. None: that of
            the params.

    Returns:
        An optax transformation. Its `update` needs `params`, and hands further keyword arguments on to
        `inner` and to the saliency. `mask_of(opt_state)` gives the mask.

    Raises:
        ValueError: for `sparsity` outside [0, 1), `every` < 1, `start` < 0, `start` > `stop`, or `regrow` off
            under a saliency with gates or with a `dense_dtype`; by `init`, if `where` matches no leaf, if a
            pattern does not fit its leaf, if the floors of the allocation cannot be met, or if a schedule
            leaves [0, 1) or has not reached its last value at `stop`.
            A schedule is tried at `start`, at `start + every · 2ᵏ` up to `stop` (or k = 20) and at `stop`;
            what it gives elsewhere cannot raise inside `jit`: it is taken to the nearest end of [0, 1] and
            stands in `PruneState.sparsity`. By `update`, if `params` is missing or `grads` differs from it in
            structure.
        TypeError: by `init`, if a selected leaf is not floating-point.

    Cost:
        Between mask steps a few elementwise operations per selected weight; the ranking runs inside
        `lax.cond`, at mask steps only. Memory beyond `inner`'s: one dense copy (none without `regrow`)
        and one byte per selected weight, nothing for other leaves.

    References:
        Zhu and Gupta, To prune, or not to prune (2017), arXiv 1710.01878: the cubic schedule.
        Lin et al., Dynamic model pruning with feedback (2020), arXiv 2006.07253: dense weights under a mask.

    Example:
        >>> import jax, jax.numpy as jnp, optax, hessjax as hj
        >>> params = {"kernel": jnp.arange(-4.0, 4.0).reshape(2, 4), "bias": jnp.zeros(4)}
        >>> tx = hj.prune(optax.adam(0.1), hj.saliencies.magnitude(), sparsity=0.5)
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = tx.update(grads, state, params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[-4.1, -3.1,  0. ,  0. ],
               [ 0. ,  0. ,  1.9,  2.9]], dtype=float32)
    """
    check_steps(every, start, stop)
    if not callable(sparsity) and not isinstance(sparsity, Threshold):
        check_sparsity(sparsity)
    if isinstance(inner, optax.MultiSteps):  # which hands extra arguments on only as a transformation
        inner = inner.gradient_transformation()
    inner = optax.with_extra_args_support(inner)
    compensates, gates = saliency.compensate is not None, saliency.gates
    dense_is_truth = gates is not None or dense_dtype is not None
    if dense_is_truth and not regrow:
        raise ValueError(
            "`regrow` must be True under gates or a `dense_dtype`, which keep dense weights, got False."
        )

    def choose(dense: Params, old: Params, scorer: Any, count: Any, extra: dict[str, Any]) -> dict[str, Any]:
        """The fields of the state that a mask step changes."""
        extra = {"pattern": pattern, **extra}
        scores = saliency.scores(scorer, dense, **extra)
        choice: dict[str, Any] = {"num_nan": _num_nan(scores)}
        if not regrow:
            scores = jax.tree.map(lambda s, m: jnp.where(m, s, -jnp.inf), scores, old)
        asked = sparsity(count) if callable(sparsity) else sparsity
        if isinstance(asked, Threshold):
            mask, asked = asked.mask(scores, count, pattern)
        else:
            mask = allocation(scores, asked, pattern)
        mask = mask if regrow else jax.tree.map(jnp.logical_and, mask, old)
        choice |= {"mask": mask, "sparsity": jnp.asarray(asked, jnp.float32)}
        if saliency.compensate is not None:
            dense, increase = saliency.compensate(scorer, dense, mask, **extra)
            choice |= {"dense": dense, "predicted_increase": jnp.asarray(increase, jnp.float32)}
        return choice

    def init(params: Params) -> PruneState:
        dense = copy_selected(params, where, dense_dtype)
        check_budget(sparsity, allocation, pattern, dense, some_mask_steps(every, start, stop), stop)
        scorer, count = saliency.init(dense), jnp.zeros((), jnp.int32)
        if compensates or saliency.needs_grads:
            check_first_step(sparsity, start, compensates)
        full = jax.tree.map(lambda x: jnp.full_like(x, True, dtype=bool), dense)
        # No array stands twice in the state, so that a loop may donate it.
        choice = {"mask": full, "sparsity": jnp.zeros((), jnp.float32), "num_nan": jnp.zeros((), jnp.int32)}
        choice |= {"predicted_increase": jnp.zeros((), jnp.float32)} if compensates else {}
        if start == 0 and not compensates:
            choice = choose(dense, full, scorer, count, {})
        inner_state = inner.init(params if dense_dtype is None else on_selected(second, params, dense))
        return PruneState(count, inner_state, dense if regrow else None, saliency=scorer, **choice)

    def weights_of(params: Params, state: PruneState) -> Params:
        """What `inner` sees for params."""
        if dense_is_truth:
            return on_selected(second, params, state.dense)
        return params if state.dense is None else on_selected(unmask, params, state.mask, state.dense)

    def grads_of(grads: Params, state: PruneState, weights: Params) -> Params:
        """What `inner` sees for gradients."""
        through = grads if straight_through else on_selected(masked, grads, state.mask)
        if gates is not None:
            through = on_selected(jnp.multiply, through, gates(state.saliency))
        return _tree.cast_like(through, weights) if dense_is_truth else through

    def update(
        grads: Params, state: PruneState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, PruneState]:
        _check_update(grads, params)
        count = optax.safe_increment(state.num_updates)
        weights = weights_of(params, state)
        steps, inner_state = inner.update(grads_of(grads, state, weights), state.inner, weights, **extra)
        before, dense = (drop_others(x, state.mask) for x in (weights, optax.apply_updates(weights, steps)))
        scorer = saliency.update(state.saliency, drop_others(grads, state.mask), before, state.mask, **extra)
        rest = {"mask": state.mask, "sparsity": state.sparsity, "num_nan": state.num_nan}
        if compensates:  # the others need not pay for dense weights going through `cond`
            rest |= {"dense": dense, "predicted_increase": state.predicted_increase}
        choice = {"dense": dense} | cond_now(
            is_mask_step(count, every, start, stop),
            lambda: choose(dense, state.mask, scorer, count, extra),
            lambda: rest,
        )
        landing = choice["dense"]
        if gates is not None:
            landing = jax.tree.map(jnp.multiply, landing, gates(scorer))
        updates = on_selected(land, steps, choice["mask"], landing, params)
        choice["dense"] = choice["dense"] if regrow else None
        return updates, PruneState(count, inner_state, saliency=scorer, **choice)

    return optax.GradientTransformationExtraArgs(init, update)


def _num_nan(scores: Params) -> Array:
    return sum((jnp.sum(jnp.isnan(x), dtype=jnp.int32) for x in jax.tree.leaves(scores)), jnp.int32(0))


def _check_update(grads: Params, params: Params | None) -> None:
    if params is None:
        raise ValueError("`params` must be given: write `tx.update(grads, state, params)`, got None.")
    _tree.check_like(grads, params, "grads", "params")
