"""Pruning by a level of the scores instead of a number of zeros."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core._types import Params
from hessjax.pruning._ranking import smallest, units_of
from hessjax.pruning._sparsity import Schedule
from hessjax.pruning.patterns._by_path import Patterns


class Threshold(NamedTuple):
    """In the place of a sparsity: how low a score has to be to go.

    Attributes:
        level: a score, or a schedule of scores.
        least: the share of every leaf that stays whatever its scores.
    """

    level: float | Schedule
    least: float

    def mask(self, scores: Params, count: Any, pattern: Patterns) -> tuple[Params, Array]:
        """The mask at a step, and the sparsity it comes to."""
        level = self.level(count) if callable(self.level) else self.level
        units = units_of(scores, pattern)
        low = [
            jnp.sum(~(x > level) & (True if free is None else free), dtype=jnp.int32)
            for x, free in zip(units.scores, units.free, strict=True)
        ]
        counts = zip(units.counts, units.most, strict=True)
        caps = [min(most, n - math.ceil(self.least * n)) for n, most in counts]
        zeros = [jnp.minimum(number, cap) for number, cap in zip(low, caps, strict=True)]
        mask = units.spread([~flags for flags in smallest(units.keys(), jnp.stack(zeros))])
        weights = sum(n.astype(jnp.float32) * size for n, size in zip(zeros, units.sizes, strict=True))
        return mask, jnp.asarray(weights / sum(units.num_weights), jnp.float32)


def threshold(level: float | int | Schedule, *, least: float = 0.005) -> Threshold:
    """Prune whatever scores no more than `level`: the sparsity is what comes of it.

    For saliencies whose scores have a scale of their own: `soft_movement`, whose scores lie between 0 and 1,
    or `hard_concrete`, whose gates are exactly 0.

    Args:
        level: a score, or a schedule `T -> score`. It need not lie in [0, 1].
        least: the share of every leaf that stays whatever its scores, its best.

    Returns:
        What `prune` takes as `sparsity`.

    Raises:
        ValueError: if `least` lies outside [0, 1].

    References:
        Sanh et al., Movement pruning (2020), arXiv 2005.07683: soft movement keeps 0.5 % at least.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> tx = hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), hj.allocations.threshold(1.5))
        >>> hj.mask_of(tx.init({"kernel": jnp.array([[1.0, -2.0, 3.0]])}))["kernel"]
        Array([[False,  True,  True]], dtype=bool)
    """
    if not 0 <= least <= 1:
        raise ValueError(f"`least` must be in [0, 1], the share of a leaf that stays, got {least}.")
    return Threshold(level if callable(level) else float(level), least)
