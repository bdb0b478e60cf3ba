"""When masks are made: the mask steps, and what is checked of them before any work."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core._types import Params
from hessjax.pruning._sparsity import check_sparsity
from hessjax.pruning.allocations._allocation import Allocation
from hessjax.pruning.allocations._threshold import Threshold
from hessjax.pruning.patterns._by_path import Patterns

FAR = 2**31 - 1
"""The last update there can be."""


def is_mask_step(count: Array, every: int, start: int, stop: int | None) -> Array:
    """Whether T = `count` is start, start + every, ... up to `stop`, or `stop` itself."""
    due = (count >= start) & ((count - start) % every == 0)
    return due if stop is None else (due & (count <= stop)) | (count == stop)


def some_mask_steps(every: int, start: int, stop: int | None) -> list[int]:
    """A sample of the mask steps that reaches far: the first, doubling gaps, the last."""
    far = [start + every * 2**k for k in range(21)]
    steps = [start, *(t for t in far if t < 2**31)]
    return steps if stop is None else [*(t for t in steps if t < stop), stop]


def check_steps(every: int, start: int, stop: int | None) -> None:
    """Raise a ValueError for steps that cannot be."""
    if every < 1:
        raise ValueError(
            f"`every` must be at least 1, the number of updates between mask steps, got {every}."
        )
    if start < 0:
        raise ValueError(f"`start` must be at least 0, the first mask step, got {start}.")
    if stop is not None and stop < start:
        raise ValueError(f"`stop` must not lie before `start`, which is {start}, got {stop}.")


def check_budget(
    sparsity: Any,
    allocation: Allocation,
    pattern: Patterns,
    dense: Params,
    steps: list[int],
    stop: int | None,
) -> None:
    """Raise now what a mask step inside `jit` could not."""
    if isinstance(sparsity, Threshold):
        jax.eval_shape(lambda scores: sparsity.mask(scores, jnp.zeros((), jnp.int32), pattern), dense)
        return
    values = [sparsity]
    if callable(sparsity):
        with jax.ensure_compile_time_eval():  # known numbers, even where `init` itself is being traced
            schedule = jax.jit(sparsity)
            values = [float(schedule(jnp.asarray(step, jnp.int32))) for step in steps]
            at_end = float(schedule(jnp.asarray(FAR, jnp.int32)))
        for value, step in zip(values, steps, strict=True):
            check_sparsity(value, f" from the schedule at step {step}")
        if stop is not None:
            _check_target(values[-1], at_end, stop)
    jax.eval_shape(lambda scores: allocation(scores, max(values), pattern), dense)


def _check_target(at_stop: float, at_end: float, stop: int) -> None:
    if at_stop + 1e-6 < at_end < 1:
        raise ValueError(
            f"`stop` must not come before the schedule has reached its target, which is {at_end:g}: at step "
            f"{stop} it gives {at_stop:g}. Stop later, or end the schedule earlier."
        )


def check_first_step(sparsity: Any, start: int, compensates: bool) -> None:
    """Raise a ValueError if zeros are asked for before any gradient has been seen."""
    if start > 0:
        return
    if isinstance(sparsity, Threshold):
        if compensates:
            raise ValueError(
                "`start` must be at least 1 for a saliency that needs gradients, got 0 with a threshold."
            )
        return
    with jax.ensure_compile_time_eval():
        first = float(jax.jit(sparsity)(jnp.zeros((), jnp.int32))) if callable(sparsity) else sparsity
    if first > 0:
        raise ValueError(
            f"`start` must be at least 1 for a saliency that needs gradients, got 0 with sparsity {first:g} "
            "at step 0: start later, or with a schedule that begins at 0."
        )
