"""When masks are made and how many zeros they have, and what is checked of both before any work."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from hessjax._core._types import Params
from hessjax.pruning._sparsity import Schedule, check_sparsity
from hessjax.pruning.allocations._allocation import AllocationRule
from hessjax.pruning.allocations._densities import Threshold
from hessjax.pruning.patterns._pattern import Patterns

Target: TypeAlias = float | int | Schedule | Threshold
"""The fraction of zeros: a number, a schedule of numbers, or what comes of a threshold."""

FAR = 2**31 - 1
"""The last update there can be."""


@dataclasses.dataclass(frozen=True)
class MaskSteps:
    """The mask steps: T = start, start + every, ... up to `stop`, and `stop` itself."""

    every: int
    start: int
    stop: int | None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(
                f"`every` must be at least 1, the number of updates between mask steps, got {self.every}."
            )
        if self.start < 0:
            raise ValueError(f"`start` must be at least 0, the first mask step, got {self.start}.")
        if self.stop is not None and self.stop < self.start:
            raise ValueError(f"`stop` must not lie before `start`, which is {self.start}, got {self.stop}.")

    def are_at(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether T = `step` is one of them."""
        due = (step >= self.start) & ((step - self.start) % self.every == 0)
        return due if self.stop is None else (due & (step <= self.stop)) | (step == self.stop)

    def some(self) -> list[int]:
        """A sample of them that reaches far: the first, doubling gaps, the last."""
        # A schedule changes on some scale nobody knows: doubling gaps meet every scale in 21 trials.
        far = [self.start + self.every * 2**k for k in range(21)]
        steps = [self.start, *(t for t in far if t <= FAR)]
        return steps if self.stop is None else [*(t for t in steps if t < self.stop), self.stop]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many zeros a mask has at a step, and how they are spread."""

    sparsity: Target
    allocation: AllocationRule
    pattern: Patterns

    def __post_init__(self) -> None:
        if not callable(self.sparsity) and not isinstance(self.sparsity, Threshold):
            check_sparsity(self.sparsity)

    def mask(self, order: Params, step: Int[Array, ""]) -> tuple[Params, Any]:
        """The mask at T = `step`, and the sparsity that was asked for or came of a threshold."""
        asked = self.sparsity(step) if callable(self.sparsity) else self.sparsity
        if isinstance(asked, Threshold):
            return asked.mask(order, step, self.pattern)
        return self.allocation(order, asked, self.pattern), asked

    def check(self, weights: Params, steps: MaskSteps) -> None:
        """Raise now what a mask step inside `jit` could not."""
        if isinstance(self.sparsity, Threshold):
            jax.eval_shape(lambda scores: self.mask(scores, jnp.zeros((), jnp.int32)), weights)
            return
        # The most zeros are the hardest to place: whatever allows them allows fewer.
        most = max(self._scheduled(steps)) if callable(self.sparsity) else self.sparsity
        jax.eval_shape(lambda scores: self.allocation(scores, most, self.pattern), weights)

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


def _values(schedule: Any, steps: list[int]) -> list[float]:
    """A schedule at these steps, as numbers even where `init` itself is being traced."""
    with jax.ensure_compile_time_eval():
        compiled = jax.jit(schedule)
        return [float(compiled(jnp.asarray(step, jnp.int32))) for step in steps]
