"""What pruning during training remembers, and at which steps it makes masks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._messages import (
    checked_count,
    checked_instance,
    checked_int,
    checked_schedule,
)
from hessjax._core._types import Params
from hessjax.pruning._ranking import Schedule, check_sparsity
from hessjax.pruning.allocations._allocation import AllocationRule, allocated, check_allocation
from hessjax.pruning.allocations._densities import Threshold
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


class Choice(NamedTuple):
    """What a mask step decides.

    Attributes:
        mask: booleans, True = kept.
        sparsity: what was asked for, or came of a `threshold`.
        num_nan: how many scores were NaN.
        moved: the dense weights, by a saliency that compensates; None for the others, which need not pay for
            dense weights going through `lax.cond`.
        predicted_increase: of the loss, by the same.
    """

    mask: Params
    sparsity: Float[Array, ""]
    num_nan: Int[Array, ""]
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
    predicted_increase: Float[Array, ""] | None = None


def mask_of(opt_state: Any) -> Params:
    """The current mask, True = kept, from the state of any optimizer that has `prune` somewhere in it.

    Args:
        opt_state: an optax state, nested in any way (chain, MultiSteps, ...), or something that holds one,
            such as a linen `TrainState`.

    Returns:
        A pytree like the params: booleans in the shape of every pruned leaf, and a scalar True for every
        other, so that `jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, hj.mask_of(opt_state))` masks a
        tree (dense weights, an average of params). Before the first update this is the mask that the first
        update will impose. From an `nnx.Optimizer`, whose state is made of Variables:
        `nnx.as_pure(hj.mask_of(optimizer.opt_state))`.

    Raises:
        ValueError: if there is no prune state in it, or more than one that has a mask for the same leaf.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> tx = optax.chain(optax.clip(1.0), hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(),
        ...                                                                                    sparsity=0.5))
        >>> hj.mask_of(tx.init({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)}))
        {'bias': Array(True, dtype=bool), 'kernel': Array([[False,  True]], dtype=bool)}
    """
    found = _prune_states(opt_state)
    if not found:
        raise ValueError(
            f"`opt_state` must hold the state of a `hessjax.prune`, found none in {type(opt_state).__name__}."
        )
    mask = functools.reduce(_either, [state.mask for state in found])
    return jax.tree.map(lambda m: jnp.asarray(True) if is_hole(m) else m, mask, is_leaf=is_hole)


def _prune_states(tree: Any) -> list[PruneState]:
    """All of them, those inside the inner optimizer of another included."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, PruneState))
    found = [node for node in nodes if isinstance(node, PruneState)]
    # The walk ends at a state of `prune`: what is inside its `inner` is looked for from there.
    return [state for node in found for state in (node, *_prune_states(node.inner))]


def _either(a: Params, b: Params) -> Params:
    """Two masks as one."""

    def leaf(x: Any, y: Any) -> Any:
        if not is_hole(x) and not is_hole(y):
            raise ValueError(
                "`opt_state` must hold one mask for every leaf, found two for the same: pass the part that "
                "belongs to one `hessjax.prune`."
            )
        return y if is_hole(x) else x

    return jax.tree.map(leaf, a, b, is_leaf=is_hole)


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
        checked_count("every", self.every, 1, ", the number of updates between mask steps")
        checked_count("start", self.start, 0, ", the first mask step")
        if self.stop is not None and checked_int("stop", self.stop) < self.start:
            raise ValueError(f"`stop` must not lie before `start`, which is {self.start}, got {self.stop}.")

    def are_at(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether T = `step` is one of them."""
        due = (step >= self.start) & ((step - self.start) % self.every == 0)
        # `stop` itself, be it a multiple of `every` or not: there the schedule reaches its target.
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
        check_pattern(self.pattern)
        check_allocation(self.allocation)
        if isinstance(self.sparsity, type):
            checked_instance("sparsity", self.sparsity, Threshold, "threshold(level)")
        if not isinstance(self.sparsity, Threshold) and not callable(
            checked_schedule("sparsity", self.sparsity)
        ):
            check_sparsity(self.sparsity)

    def mask(self, order: Params, step: Int[Array, ""], pattern: Patterns) -> tuple[Params, Any]:
        """The mask at T = `step`, and the sparsity that was asked for or came of a threshold."""
        asked = self.sparsity(step) if callable(self.sparsity) else self.sparsity
        if isinstance(asked, Threshold):
            return asked.mask(order, step, pattern)
        return allocated(self.allocation, order, asked, pattern), asked

    def check(self, weights: Params, steps: MaskSteps, pattern: Patterns) -> None:
        """Raise now what a mask step inside `jit` could not."""
        if isinstance(self.sparsity, Threshold):
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


def _values(schedule: Any, steps: list[int]) -> list[float]:
    """A schedule at these steps, as numbers even where `init` itself is being traced."""
    with jax.ensure_compile_time_eval():
        compiled = jax.jit(schedule)
        try:
            return [float(compiled(jnp.asarray(step, jnp.int32))) for step in steps]
        except TypeError as error:
            raise TypeError(f"`sparsity` must give one number for every step, but {error}") from error
