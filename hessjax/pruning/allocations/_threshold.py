"""A level of the scores in the place of a sparsity."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core._counting import count_where
from hessjax._core._messages import checked_number, checked_schedule
from hessjax._core._types import Params, settings
from hessjax.pruning._ranking import Schedule, smallest
from hessjax.pruning._units import units_of
from hessjax.pruning.patterns._pattern import Patterns


@settings()
class Threshold:
    """Prune whatever scores no more than `level`: the sparsity is what comes of it.

    For saliencies whose scores have a scale of their own: `soft_movement`, whose scores lie between 0 and 1,
    or `hard_concrete`, whose gates are exactly 0.

    It takes the place of the `sparsity` of `prune`.

    Args:
        level: a score, or a schedule `T -> score`. It need not lie in [0, 1].
        least: the share of every leaf that stays whatever its scores, its best.

    Raises:
        ValueError: if `level` is no number, or `least` lies outside [0, 1].

    References:
        Sanh et al., Movement pruning (2020), arXiv 2005.07683: soft movement keeps 0.5 % at least.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> tx = hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), hj.allocations.threshold(1.5))
        >>> hj.mask_of(tx.init({"kernel": jnp.array([[1.0, -2.0, 3.0]])}))["kernel"]
        Array([[False,  True,  True]], dtype=bool)
    """

    level: float | int | Schedule
    _: dataclasses.KW_ONLY
    least: float | int = 0.005

    def __post_init__(self) -> None:
        if not callable(level := checked_schedule("level", self.level)) and not math.isfinite(level):
            raise ValueError(f"`level` must be a number or a schedule, got {self.level}.")
        if not 0 <= checked_number("least", self.least) <= 1:
            raise ValueError(f"`least` must be in [0, 1], the share of a leaf that stays, got {self.least}.")

    def mask(
        self, scores: Params, step: Int[Array, ""], pattern: Patterns
    ) -> tuple[Params, Float[Array, ""]]:
        """The mask at T = `step`, and the sparsity it comes to."""
        level = self.level(step) if callable(self.level) else float(self.level)
        units = units_of(scores, pattern)
        # `not above` rather than `at most`: a NaN goes first, as in every ranking. A level that is NaN, as a
        # schedule may give inside `jit`, prunes nothing, and shows in the sparsity.
        some = ~jnp.isnan(level)
        low = [_num_low(x, free, level) for x, free in zip(units.scores, units.free, strict=True)]
        counts = zip(units.counts, units.most, strict=True)
        caps = [min(most, n - math.ceil(self.least * n)) for n, most in counts]
        zeros = [jnp.where(some, jnp.minimum(number, cap), 0) for number, cap in zip(low, caps, strict=True)]
        gone, _ = smallest(units.keys(), jnp.stack(zeros))
        mask = units.spread([~flags for flags in gone])
        weights = sum(n.astype(jnp.float32) * size for n, size in zip(zeros, units.sizes, strict=True))
        share = jnp.asarray(weights / sum(units.num_weights), jnp.float32)
        return mask, jnp.where(some, share, jnp.nan)


@jax.jit
def _num_low(scores: Array, free: Array | None, level: Any) -> Array:
    """How many are not above the level, of those that may go."""

    def is_low(_: int, score: Array, *free: Array) -> list[Array]:
        return [functools.reduce(jnp.logical_and, free, ~(score > level))]

    return count_where(is_low, *([x] for x in (scores, free) if x is not None))[0, 0]


threshold = Threshold
