"""Pruning during training: a wrapper round any optax optimizer that keeps the params exactly sparse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from hessjax._core import _tree
from hessjax._core._layout import kernels, selected
from hessjax._core._messages import check_flags
from hessjax._core._types import Block, Params, Where
from hessjax._core._words import AxisWords
from hessjax.pruning._ranking import Schedule, cond_now
from hessjax.pruning.allocations._allocation import AllocationRule, global_threshold
from hessjax.pruning.allocations._densities import Threshold
from hessjax.pruning.patterns._pattern import Laid, Patterns, unstructured
from hessjax.pruning.saliencies._saliency import (
    Context,
    Nested,
    Saliency,
    checked_saliency,
    drop_others,
    promoting,
)
from hessjax.pruning.training._checks import (
    block_at,
    check_kind,
    check_update,
    check_wide_enough,
    checked_dtype,
    checked_inner,
    num_nan,
    num_stuck,
    num_undone,
    rows_of,
    warn_uninformed,
)
from hessjax.pruning.training._state import (
    Budget,
    Choice,
    MaskSteps,
    PruneState,
    copy_selected,
    in_dtypes_of,
    land,
    masked,
    on_selected,
    second,
    times,
    unmask,
)

NESTED = Nested()


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
    belong into `inner`; a pruned weight that is not 0 is an error at the next update, or inside `jit` a
    number in `PruneState.num_undone`. (`optax.MultiSteps` round `prune` is fine: T then counts its emitted
    updates; inside `prune`, T counts the small steps.)

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
            pattern does not fit its leaf, if the floors of the allocation cannot be met, or if a schedule
            leaves [0, 1) or has not reached its last value at `stop`.
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
    rule = _Pruning(
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Pruning:
    """The arguments of `prune`, and the two functions of its transformation."""

    steps: MaskSteps
    budget: Budget
    inner: optax.GradientTransformationExtraArgs
    saliency: Saliency
    where: Where
    axes: AxisWords | None
    regrow: bool
    straight_through: bool
    dense_dtype: Any

    def __post_init__(self) -> None:
        if self._dense_is_truth and not self.regrow:
            raise ValueError(
                "`regrow` must be True under gates or a `dense_dtype`, which keep dense weights, got False."
            )

    @property
    def _dense_is_truth(self) -> bool:
        """Whether params cannot be read back: gates multiply them, or a narrower dtype rounds them."""
        return self.saliency.gated or self.dense_dtype is not None

    def init(self, params: Params) -> PruneState:
        """The state at T = 0; under `start=0` with the mask that the first update imposes."""
        hits, count = selected(params, self.where, self.axes), jnp.zeros((), jnp.int32)
        dense, pattern = copy_selected(params, hits, self.dense_dtype), self._laid(params)
        check_wide_enough(dense, params)
        self.budget.check(dense, self.steps, pattern)
        scorer, compensates = self.saliency.init(dense), self.saliency.compensates
        if compensates or self.saliency.needs_grads:
            self.budget.check_first(self.steps.start, compensates)
        full = jax.tree.map(lambda x: jnp.full_like(x, True, dtype=bool), dense)
        # No array stands twice in the state, so that a loop may donate it.
        increase = jnp.zeros((), jnp.float32) if compensates else None
        none = jnp.zeros((), jnp.int32)
        choice = Choice(full, jnp.zeros((), jnp.float32), none, jnp.copy(none), None, increase)
        if self.steps.start == 0 and not compensates:
            seen = Context(dense, full, count, pattern=pattern)
            choice = self._choose(scorer, seen)
            warn_uninformed(self.saliency, scorer, seen, choice.mask, self.budget)
        inner = self.inner.init(params if self.dense_dtype is None else on_selected(second, params, dense))
        return self._state(count, inner, dense, scorer, choice)

    def update(
        self,
        grads: Params,
        state: Any,
        params: Params | None = None,
        *,
        per_example_grads: Any = None,
        **extra: Any,
    ) -> tuple[Params, PruneState]:
        """What takes the params to the masked weights after a step of `inner`, and the next state."""
        check_update(grads, state, params)
        try:
            return self._update(grads, state, params, per_example_grads, extra)
        except (AttributeError, TypeError, ValueError) as error:
            check_kind(state, lambda: jax.eval_shape(self.init, params), error)
            raise

    def _update(
        self, grads: Params, state: PruneState, params: Params, per_example_grads: Any, extra: dict[str, Any]
    ) -> tuple[Params, PruneState]:
        undone = num_undone(state, params)
        count, weights = optax.safe_increment(state.num_updates), self._weights(params, state)
        if per_example_grads is not None:
            extra["per_example_grads"] = per_example_grads  # for a `prune` inside
        through = self._masked_grads(grads, state, weights)
        with promoting():
            steps, inner = self.inner.update(through, state.inner, weights, **extra)
            moved = optax.apply_updates(weights, steps)
        if self.dense_dtype is not None:
            inner = in_dtypes_of(state.inner, inner)
        # Scores learn at the weights that the gradient belongs to, and rank those after the step.
        before, dense = (drop_others(x, state.mask) for x in (weights, moved))
        block = None if callable(per_example_grads) else per_example_grads
        seen = self._seen(before, state.mask, count, grads, block)
        scorer = self.saliency.update(state.saliency, seen)

        def choose() -> Choice:
            # Called in the branch: between mask steps no such gradient is computed or held.
            found = block_at(params, per_example_grads) if callable(per_example_grads) else block
            return self._choose(scorer, self._seen(dense, state.mask, count, grads, found))

        choice = cond_now(self.steps.are_at(count), choose, lambda: self._rest(state, dense))
        # They went through the `cond` only where a saliency moves them.
        dense = dense if choice.moved is None else choice.moved
        landing = dense
        if self.saliency.gated:
            landing = jax.tree.map(times, landing, self.saliency.gates(scorer))
        updates = on_selected(land, steps, choice.mask, landing, params)
        worst = jnp.maximum(state.num_undone, jnp.maximum(undone, choice.num_undone))
        return updates, self._state(count, inner, dense, scorer, choice._replace(num_undone=worst))

    def _weights(self, params: Params, state: PruneState) -> Params:
        """What `inner` sees for params."""
        if self._dense_is_truth:
            return on_selected(second, params, state.dense)
        return params if state.dense is None else on_selected(unmask, params, state.mask, state.dense)

    def _masked_grads(self, grads: Params, state: PruneState, weights: Params) -> Params:
        """What `inner` sees for gradients."""
        through = grads if self.straight_through else on_selected(masked, grads, state.mask)
        if self.saliency.gated:
            through = on_selected(times, through, self.saliency.gates(state.saliency))
        return _tree.cast_like(through, weights) if self._dense_is_truth else through

    def _seen(
        self, weights: Params, mask: Params, count: Int[Array, ""], grads: Params, block: Block | None
    ) -> Context:
        """What the saliency gets to see of it: the leaves that are pruned."""
        rows = None if block is None else rows_of(block, mask)
        return Context(weights, mask, count, drop_others(grads, mask), rows, self._laid(grads))

    def _laid(self, whole: Params) -> Laid:
        """The pattern, with the whole tree, or what is like it, that says what axes mean."""
        return Laid(self.budget.pattern, whole, self.axes)

    def _choose(self, scorer: Any, seen: Context) -> Choice:
        """A mask step."""
        order = self.saliency.change.order(self.saliency.scores(scorer, seen), seen)
        bad = num_nan(order)  # before those of weights that never come back are overwritten
        if not self.regrow:
            order = NESTED.order(order, seen)
        mask, asked = self.budget.mask(order, seen.step, seen.pattern)
        mask = self.saliency.change.settle(mask, order, seen)
        if not self.regrow:
            mask = NESTED.settle(mask, order, seen)
        stuck = num_stuck(seen.mask, mask, seen.weights)
        choice = Choice(mask, jnp.asarray(asked, jnp.float32), bad, stuck)
        if not self.saliency.compensates:
            return choice
        moved, increase = self.saliency.compensate(scorer, seen, mask)
        return choice._replace(moved=moved, predicted_increase=jnp.asarray(increase, jnp.float32))

    def _rest(self, state: PruneState, dense: Params) -> Choice:
        """Between mask steps all stays as it is."""
        moved = dense if self.saliency.compensates else None
        numbers = state.sparsity, state.num_nan, state.num_undone
        return Choice(state.mask, *numbers, moved, state.predicted_increase)

    def _state(
        self, count: Int[Array, ""], inner: Any, dense: Params, scorer: Any, choice: Choice
    ) -> PruneState:
        """The state, without a dense copy where zeros never come back."""
        kept = dense if self.regrow else None
        mask, sparsity, bad, undone, _, increase = choice
        return PruneState(count, inner, kept, mask, scorer, sparsity, bad, undone, increase)
