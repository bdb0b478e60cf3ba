"""What pruning during training remembers, and at which steps it makes masks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._messages import checked_count, checked_instance, checked_schedule
from hessjax._core._types import Params
from hessjax.pruning._ranking import Schedule, check_sparsity
from hessjax.pruning.allocations._allocation import (
    AllocationRule,
    GlobalThreshold,
    allocated,
    check_allocation,
)
from hessjax.pruning.allocations._densities import ByCurvature
from hessjax.pruning.allocations._threshold import Threshold
from hessjax.pruning.patterns._pattern import Patterns, check_pattern
from hessjax.pruning.saliencies._saliency import is_hole


def copy_selected(params: Params, hits: Params, dtype: Any = None) -> Params:
    """Copies of the selected leaves: the loop may donate params and state to one jitted step."""
    selected = jax.tree.map(lambda x, hit: x if hit else optax.MaskedNode(), params, hits)
    _tree.check_floating(selected, "params[where]")
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), selected)


def on_selected(f: Callable[..., Array], tree: Params, mask: Params, *rest: Params) -> Params:
    """`f(leaf, mask, ...)` on the pruned leaves; the others as they are."""
    return jax.tree.map(lambda x, m, *r: x if is_hole(m) else f(x, m, *r), tree, mask, *rest)


def times(x: Any, gate: Any) -> Array:
    """The product with a gate; 0 behind a shut one, whatever comes in."""
    return jnp.where(gate == 0, 0, _tree.times(x, gate))


def unmask(param: Any, mask: Any, dense: Any) -> Array:
    """The dense weights: the params where they are kept."""
    return jnp.where(mask, param, dense)


def second(_: Any, other: Any) -> Array:
    """The other tree's leaf."""
    return other


def masked(x: Any, mask: Any) -> Array:
    """Zero where the mask is False."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def land(step: Any, mask: Any, dense: Any, param: Any) -> Array:
    """`M⊙W − param`, in a dtype that holds the params: rounded to a narrower one it would not cancel.

    Added to `param` it gives `M⊙W` again: 0.0 always; a kept weight because W = fl(param + u) for some float
    u, and of all floats fl(W − param) is the nearest to W − param, so that it rounds where u did. (One
    exception: a weight that jumps over zero exactly onto a power of two can land one unit in the last place
    beside it.) Returning u itself would keep one more array alive between this step and the ranking.
    """
    dtype = _numbers.common_dtype(step.dtype, param.dtype)
    return masked(dense, mask).astype(param.dtype).astype(dtype) - param.astype(dtype)


def in_dtypes_of(old: Any, new: Any) -> Any:
    """The state of an optimizer in the dtypes it began with.

    Some, as `optax.inject_hyperparams`, take the dtype of all from the first leaf, and where pruned leaves
    are wider than others a loop would compile anew, and a scan fail.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):  # type: ignore[operator]
        return new
    return jax.tree.map(
        lambda x, y: y.astype(x.dtype) if hasattr(x, "dtype") and x.dtype != y.dtype else y, old, new
    )


class Choice(NamedTuple):
    """What a mask step decides.

    Attributes:
        mask: booleans, True = kept.
        sparsity: what was asked for, or came of a `threshold`.
        num_nan: how many scores were NaN.
        num_undone: how many weights it prunes that will not be 0 for it, being NaN or infinite.
        moved: the dense weights, by a saliency that compensates; None for the others, which need not pay for
            dense weights going through `lax.cond`.
        predicted_increase: of the loss, by the same.
    """

    mask: Params
    sparsity: Float[Array, ""]
    num_nan: Int[Array, ""]
    num_undone: Int[Array, ""]
    moved: Params | None = None
    predicted_increase: Float[Array, ""] | None = None


class PruneState(NamedTuple):
    """What `prune` remembers; `optax.tree.get(opt_state, "num_nan")` reads a field wherever it is nested.

    `dense` and `mask` hold `optax.MaskedNode()` in place of every leaf that is not pruned.

    Attributes:
        num_updates: T, the updates so far.
        inner: the state of the wrapped optimizer.
        dense: the weights without their mask. Read where `mask` is False only: elsewhere the params are the
            truth. (Everywhere, under gates or `dense_dtype`.) None where zeros never come back.
        mask: booleans, True = kept.
        saliency: what the saliency remembers (scores, their optimizer, gradients).
        sparsity: what was asked for at the last mask step, or came of a `threshold`; 0 before the first.
        num_nan: how many scores were NaN at the last mask step; anything but 0 means that the run has gone
            wrong.
        num_undone: the most weights, at any one count, that were pruned and yet not 0 in the params given:
            something after `prune` has changed its updates, or params were put in from elsewhere, or a pruned
            weight was NaN or infinite. Anything but 0 means that the params were not sparse. Counted at mask
            steps, at the update after one, and at every 31st update.
        predicted_increase: of the loss, by a saliency that compensates, at the last mask step; None for the
            others.
    """

    num_updates: Int[Array, ""]
    inner: Any
    dense: Params | None
    mask: Params
    saliency: Any
    sparsity: Float[Array, ""]
    num_nan: Int[Array, ""]
    num_undone: Int[Array, ""]
    predicted_increase: Float[Array, ""] | None = None


Target: TypeAlias = float | int | Schedule | Threshold
"""The fraction of zeros: a number, a schedule of numbers, or what comes of a threshold."""

FAR = 2**31 - 1
"""The last update there can be."""

LOOK_EVERY = 31
"""Updates between two counts of zeros while the mask rests: a pass over the weights, far from free."""


@dataclasses.dataclass(frozen=True)
class MaskSteps:
    """The mask steps: T = start, start + every, ... up to `stop`, and `stop` itself."""

    every: int
    start: int
    stop: int | None

    def __post_init__(self) -> None:
        _checked_step("every", self.every, 1, ", the number of updates between mask steps")
        _checked_step("start", self.start, 0, ", the first mask step")
        if self.stop is not None and _checked_step("stop", self.stop, 0, ", the last mask step") < self.start:
            raise ValueError(f"`stop` must not lie before `start`, which is {self.start}, got {self.stop}.")

    def are_at(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether T = `step` is one of them."""
        # At the last number of the counter, where it stays, T no longer says which update this is.
        due = (step >= self.start) & ((step - self.start) % self.every == 0) & (step < FAR)
        # `stop` itself, be it a multiple of `every` or not: there the schedule reaches its target.
        return due if self.stop is None else (due & (step <= self.stop)) | (step == self.stop)

    def look_at(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether T = `step` counts what is pruned and not 0; outside `jit`, where it can raise, always."""
        if not isinstance(step, jax.core.Tracer):
            return jnp.asarray(True)
        # What changes updates on their way shows after every mask, the first of which acts at T = 1; what
        # acts now and then, as an average put in at every k-th update, meets a prime's multiples in time.
        return self.are_at(step) | self.are_at(step - 1) | (step == 2) | (step % LOOK_EVERY == 0)

    def some(self) -> list[int]:
        """A sample of them that reaches far: the first, doubling gaps, the last."""
        # A schedule changes on some scale nobody knows: doubling gaps meet every scale in 21 trials.
        far = [self.start + self.every * 2**k for k in range(21)]
        steps = [self.start, *(t for t in far if t <= FAR)]
        return steps if self.stop is None else [*(t for t in steps if t < self.stop), self.stop]


def _checked_step(argument: str, number: Any, least: int, meaning: str) -> int:
    """The number of an update as an int, or an error."""
    found = checked_count(argument, number, least, meaning)
    if found >= FAR:
        raise ValueError(
            f"`{argument}` must be below 2**31 - 1, where the counter of updates ends, got {found}."
        )
    return found


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many zeros a mask has at a step, and how they are spread."""

    sparsity: Target
    allocation: AllocationRule
    pattern: Patterns

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_allocation(self.allocation)
        if isinstance(self.sparsity, type):
            checked_instance("sparsity", self.sparsity, Threshold, "threshold(level)")
        if not isinstance(self.sparsity, Threshold) and not callable(
            checked_schedule("sparsity", self.sparsity)
        ):
            check_sparsity(self.sparsity)

    @property
    def over_all_leaves(self) -> bool:
        """Whether a leaf may lose more than its share because others score higher."""
        one_ranking = isinstance(self.allocation, GlobalThreshold | ByCurvature)
        return one_ranking or isinstance(self.sparsity, Threshold)

    def mask(self, order: Params, step: Int[Array, ""], pattern: Patterns) -> tuple[Params, Any]:
        """The mask at T = `step`, and the sparsity that was asked for or came of a threshold."""
        if isinstance(self.sparsity, Threshold):
            mask, share = self.sparsity.mask(order, step, pattern)
            if not isinstance(share, jax.core.Tracer) and jnp.isnan(share):
                raise ValueError(f"`level` must give numbers, got NaN from the schedule at step {step}.")
            return mask, share
        asked = self.sparsity(step) if callable(self.sparsity) else self.sparsity
        if not isinstance(asked, jax.core.Tracer):
            check_sparsity(asked, f" at step {step}")
        return allocated(self.allocation, order, asked, pattern), asked

    def check(self, weights: Params, steps: MaskSteps, pattern: Patterns) -> None:
        """Raise now what a mask step inside `jit` could not."""
        if isinstance(self.sparsity, Threshold):
            _check_levels(self.sparsity.level, steps)
            jax.eval_shape(lambda scores: self.mask(scores, jnp.zeros((), jnp.int32), pattern), weights)
            return
        # The most zeros are the hardest to place: whatever allows them allows fewer.
        most = max(self._scheduled(steps)) if callable(self.sparsity) else self.sparsity
        # Traced and not run: only its errors are wanted.
        jax.eval_shape(lambda scores: allocated(self.allocation, scores, most, pattern), weights)

    def check_first(self, start: int, compensates: bool) -> None:
        """Raise a ValueError if zeros are asked for before any gradient has been seen."""
        if start > 0:
            return
        if isinstance(self.sparsity, Threshold):
            if compensates:
                raise ValueError(
                    "`start` must be at least 1 for a saliency that needs gradients, got 0 with a threshold."
                )
            return
        first = _values(self.sparsity, [0])[0] if callable(self.sparsity) else self.sparsity
        if first > 0:
            raise ValueError(
                "`start` must be at least 1 for a saliency that needs gradients, got 0 with sparsity "
                f"{first:g} at step 0: start later, or with a schedule that begins at 0."
            )

    def _scheduled(self, steps: MaskSteps) -> list[float]:
        """What a schedule gives at some of the steps, checked."""
        some = steps.some()
        *values, at_end = _values(self.sparsity, [*some, FAR])
        for value, step in zip(values, some, strict=True):
            check_sparsity(value, f" from the schedule at step {step}")
        # A schedule in float32 may end a hair short of its target; one that reaches 1 never gets there.
        if steps.stop is not None and values[-1] + 1e-6 < at_end < 1:
            raise ValueError(
                f"`stop` must not come before the schedule has reached its target, which is {at_end:g}: at "
                f"step {steps.stop} it gives {values[-1]:g}. Stop later, or end the schedule earlier."
            )
        return values


def _check_levels(level: Any, steps: MaskSteps) -> None:
    """Raise a ValueError for a schedule of thresholds that gives NaN."""
    some = steps.some()
    for value, step in zip(_values(level, some, "level") if callable(level) else [], some, strict=False):
        if math.isnan(value):
            raise ValueError(f"`level` must give numbers, got NaN from the schedule at step {step}.")


def _values(schedule: Any, steps: list[int], argument: str = "sparsity") -> list[float]:
    """A schedule at these steps, as numbers even where `init` itself is being traced."""
    with jax.ensure_compile_time_eval():
        compiled = jax.jit(schedule)
        try:
            return [float(compiled(jnp.asarray(step, jnp.int32))) for step in steps]
        except TypeError as error:
            raise TypeError(f"`{argument}` must give one number for every step, but {error}") from error
