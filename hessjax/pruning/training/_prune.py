"""Pruning during training: a wrapper round any optax optimizer that keeps the params exactly sparse."""

from typing import Any

import optax

from hessjax._core._layout import kernels
from hessjax._core._messages import check_flags
from hessjax._core._types import Where
from hessjax._core._words import AxisWords
from hessjax.pruning._ranking import Schedule
from hessjax.pruning.allocations._allocation import AllocationRule, global_threshold
from hessjax.pruning.allocations._threshold import Threshold
from hessjax.pruning.patterns._pattern import Patterns, unstructured
from hessjax.pruning.saliencies._saliency import Saliency, checked_saliency
from hessjax.pruning.training._checks import checked_dtype, checked_inner
from hessjax.pruning.training._state import Budget, MaskSteps
from hessjax.pruning.training._transformation import Pruning


def prune(
    inner: optax.GradientTransformation | optax.MultiSteps,
    saliency: Saliency,
    sparsity: float | int | Schedule | Threshold,
    *,
    allocation: AllocationRule = global_threshold(),  # noqa: B008 (a value, never changed)
    pattern: Patterns = unstructured(),  # noqa: B008 (a value, never changed)
    where: Where = kernels,
    axes: AxisWords | None = None,
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
    belong into `inner`; a pruned weight that is not 0 is an error at the next update. Inside `jit`, where it
    is a number in `PruneState.num_undone`, they are counted at mask steps, at the update after one and at
    every 31st. (`optax.MultiSteps` round `prune` is fine: T then counts its emitted updates; inside `prune`,
    T counts the small steps.)

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
        where: which leaves are pruned: a glob over their paths, several, `(path, leaf) -> bool`, or a tree of
            booleans, as `optax.masked` takes. By default all kernels: no biases, scales or embeddings.
        axes: what the axes of leaves mean, where names and shapes do not tell: `{"*/weight": "out in"}`,
            `{"blocks/*": "layer ..."}`, by glob, with the words `layer`, `in`, `out`, `head`, `entry`,
            `heads` (and entries in one axis), `vocab`, and `h`, `w`, `d`, `t`, `window` of convolutions.
            Layers that a leaf stacks, as under `nn.scan`, are pruned each as if it stood alone.
        every: updates between two mask steps.
        start: the first mask step; until then nothing is pruned.
        stop: the last mask step; afterwards the mask rests. None: never.
        regrow: whether a pruned weight may come back. If not, no dense copy is kept, only the mask.
        straight_through: give `inner` the gradient at pruned weights too, not zero.
        dense_dtype: of the dense weights, and of what `inner` sees: float32 for bfloat16 params. The loop's
            params are then rounded copies, and changes made to them outside are not honoured. None: that of
            the params.

    Returns:
        An optax transformation. Its `update` needs `params`. `tx.update(grads, state, params,
        per_example_grads=...)` gives a saliency gradients of single examples: a block, or a function
        `params -> block` that is called at mask steps only. Further keyword arguments go on to `inner`.
        `mask_of(opt_state)` gives the mask.

    Raises:
        ValueError: for `sparsity` outside [0, 1), `every` < 1, `start` < 0, `start` > `stop`, or `regrow` off
            under a saliency with gates or with a `dense_dtype`; by `init`, if `where` matches no leaf, if a
            pattern does not fit its leaf, if a `prune` inside `inner` has the same leaves, if the floors of
            the allocation cannot be met, or if a schedule leaves [0, 1) or has not reached its last value at
            `stop`.
            A schedule is tried at `start`, at `start + every · 2ᵏ` up to `stop` (or k = 20) and at `stop`;
            what it gives elsewhere cannot raise inside `jit`: it is taken to the nearest end of [0, 1] and
            stands in `PruneState.sparsity`. By `update`, if `params` is missing or `grads` differs from it in
            structure, if `state` is not that of this `prune` and these params, if a pruned weight is not 0.
        TypeError: for a `saliency` that is none; by `init`, if a selected leaf is not floating-point.
        FloatingPointError: if a weight that is to be pruned is NaN or infinite: nothing added makes it 0.

    Warns:
        UserWarning: by `init`, if the first mask takes a leaf whose scores are all 0, as of weights that
            begin at zero: set `start`, or an `allocation` by leaves.

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
    check_flags(regrow=regrow, straight_through=straight_through)
    rule = Pruning(
        steps=MaskSteps(every, start, stop),
        budget=Budget(sparsity, allocation, pattern),
        inner=checked_inner(inner),
        saliency=checked_saliency("saliency", saliency),
        where=where,
        axes=axes,
        regrow=regrow,
        straight_through=straight_through,
        dense_dtype=checked_dtype(dense_dtype),
    )
    return optax.GradientTransformationExtraArgs(rule.init, rule.update)
