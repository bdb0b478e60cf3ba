"""The two functions of the transformation that `prune` makes: the first state, and one update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from hessjax._core import _sharding, _tree
from hessjax._core._layout import selected
from hessjax._core._types import Block, Params, Where
from hessjax._core._words import AxisWords
from hessjax.pruning._ranking import cond_now
from hessjax.pruning.patterns._pattern import Laid
from hessjax.pruning.saliencies._saliency import Context, Nested, Saliency, drop_others, promoting
from hessjax.pruning.training._checks import (
    block_at,
    check_kind,
    check_update,
    check_wide_enough,
    most_undone,
    num_nan,
    num_stuck,
    rows_of,
    warn_uninformed,
)
from hessjax.pruning.training._masks import check_apart
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


@dataclasses.dataclass(frozen=True, eq=False)
class Pruning:
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
        full = jax.tree.map(lambda x: _sharding.born_like(jnp.full_like(x, True, dtype=bool), x), dense)
        # No array stands twice in the state, so that a loop may donate it.
        increase = jnp.zeros((), jnp.float32) if compensates else None
        none = jnp.zeros((), jnp.int32)
        choice = Choice(full, jnp.zeros((), jnp.float32), none, jnp.copy(none), None, increase)
        if self.steps.start == 0 and not compensates:
            seen = Context(dense, full, count, pattern=pattern)
            choice = self._choose(scorer, seen, params)
            warn_uninformed(self.saliency, scorer, seen, choice.mask, self.budget)
        seen_by_inner = params if self.dense_dtype is None else on_selected(second, params, dense)
        inner = _sharding.born_like_tree(self.inner.init(seen_by_inner), seen_by_inner)
        check_apart(full, inner)
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
        count = optax.safe_increment(state.num_updates)
        # The number goes on into the `cond` of the masks. So XLA knows this to come first: of arrays read
        # here, and written later where the loop donates them, it would else make copies.
        undone = cond_now(
            self.steps.look_at(count), lambda: most_undone(state, params), lambda: state.num_undone
        )
        state = state._replace(num_undone=undone)
        weights = self._weights(params, state)
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
            choice = self._choose(scorer, self._seen(dense, state.mask, count, grads, found), params)
            return choice._replace(num_undone=jnp.maximum(choice.num_undone, state.num_undone))

        choice = cond_now(self.steps.are_at(count), choose, lambda: self._rest(state, dense))
        # They went through the `cond` only where a saliency moves them.
        dense = dense if choice.moved is None else choice.moved
        landing = dense
        if self.saliency.gated:
            landing = jax.tree.map(times, landing, self.saliency.gates(scorer))
        updates = on_selected(land, steps, choice.mask, landing, params)
        return updates, self._state(count, inner, dense, scorer, choice)

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

    def _choose(self, scorer: Any, seen: Context, params: Params) -> Choice:
        """A mask step."""
        order = self.saliency.change.order(self.saliency.scores(scorer, seen), seen)
        bad = num_nan(order)  # before those of weights that never come back are overwritten
        if not self.regrow:
            order = NESTED.order(order, seen)
        mask, asked = self.budget.mask(order, seen.step, seen.pattern)
        mask = self.saliency.change.settle(mask, order, seen)
        if not self.regrow:
            mask = NESTED.settle(mask, order, seen)
        stuck = num_stuck(mask, drop_others(params, mask))
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
