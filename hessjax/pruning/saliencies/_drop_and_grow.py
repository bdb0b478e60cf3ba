"""Masks of a constant size that move while the weights train: the least weights go, others come back."""

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core import _random, _sharding, _tree
from hessjax._core._messages import checked_key, checked_schedule
from hessjax._core._types import Params, settings
from hessjax.pruning._ranking import Schedule, ordered_keys, smallest
from hessjax.pruning._units import units_of
from hessjax.pruning.saliencies._first_order import Magnitude
from hessjax.pruning.saliencies._saliency import (
    Context,
    MaskChange,
    Saliency,
    checked_ranking,
    of_the_largest,
)

_MAGNITUDE = Magnitude()

BACK, AWAY, GONE = -1.0, -2.0, -3.0
"""Where bands of what is ranked begin, each 1/2 wide; weights that stay have their scores, from 0 up."""


@settings()
class DropAndGrow(MaskChange):
    """In every leaf the kept units of the lowest scores go, and as many others come back, by `growth`.

    Attributes:
        fraction: of the kept units that is replaced, in [0, 1], or a schedule `T -> fraction`.
    """

    fraction: float | int | Schedule
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_schedule("fraction", self.fraction)
        if not callable(self.fraction) and not 0 <= self.fraction <= 1:
            raise ValueError(
                f"`fraction` must be in [0, 1], the share of kept weights replaced, got {self.fraction}."
            )

    def growth(self, seen: Context) -> Params:
        """Numbers from 0 up, in the shapes of the weights: of pruned ones the largest come back."""
        raise NotImplementedError(f"{type(self).__name__} must have a method `growth(seen)`.")

    def order(self, scores: Params, seen: Context) -> Params:
        """Four bands, the lowest going first: what goes, what stays away, what comes back, what stays.

        Whatever ranks them, over all leaves or in each, at a constant number of zeros every leaf keeps its
        number; where the number rises fewer come back, where it falls more, and what has just gone only if
        nothing else is left.
        """
        share = self.fraction(seen.step) if callable(self.fraction) else self.fraction
        worth, fresh = _from_zero(_tree.wide(scores)), self.growth(seen)
        bands = _bands(seen, worth, fresh, share)
        shares = of_the_largest(worth), of_the_largest(fresh)
        below = jax.tree.map(lambda b, w, f: b + jnp.where(b == GONE, w, f) / 2, bands, *shares)
        return jax.tree.map(lambda b, w, x: jnp.where(b == 0, w, x), bands, worth, below)


@settings(arrays=("key",))
class RandomGrowth(DropAndGrow):
    """What comes back is drawn at random, anew at every T.

    Attributes:
        key: of the random numbers.
    """

    key: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_key(self.key)

    def growth(self, seen: Context) -> Params:
        """Uniform in [0, 1)."""
        leaves, treedef = jax.tree.flatten(seen.weights)
        now, ends = jax.random.fold_in(self.key, seen.step), itertools.accumulate(x.size for x in leaves)
        shapes = [_sharding.shape_of(x, jnp.float32) for x in leaves]
        parts = [_random.uniform(now, x, end - x.size) for x, end in zip(shapes, ends, strict=True)]
        return jax.tree.unflatten(treedef, parts)


@settings()
class GradientGrowth(DropAndGrow):
    """What comes back has the largest gradients."""

    def growth(self, seen: Context) -> Params:
        """|G|; zeros before the first gradient, when nothing is pruned that could come back."""
        grads = _tree.zeros_like(seen.weights) if seen.grads is None else seen.grads
        return _tree.wide(jax.tree.map(lambda g, w: jnp.abs(g).astype(w.dtype), grads, seen.weights))


class _Rewired(Saliency):
    """All of another saliency, `score`, but its change of masks."""

    score: Saliency

    @property
    def needs_grads(self) -> bool:  # type: ignore[override]
        """Whether the scores do."""
        return self.score.needs_grads

    @property
    def compensates(self) -> bool:  # type: ignore[override]
        """Whether the scores' saliency does."""
        return self.score.compensates

    @property
    def gated(self) -> bool:  # type: ignore[override]
        """Whether the scores' saliency is."""
        return self.score.gated

    def init(self, weights: Params) -> Any:
        """That of the scores' saliency."""
        return self.score.init(weights)

    def update(self, state: Any, seen: Context) -> Any:
        """That of the scores' saliency."""
        return self.score.update(state, seen)

    def scores(self, state: Any, seen: Context) -> Params:
        """Those of the saliency."""
        return self.score.scores(state, seen)

    def compensate(self, state: Any, seen: Context, mask: Params) -> tuple[Params, Float[Array, ""]]:
        """The move of the scores' saliency."""
        return self.score.compensate(state, seen, mask)

    def gates(self, state: Any) -> Params:
        """Those of the scores' saliency."""
        return self.score.gates(state)


@settings(arrays=("key", "score"))
class SparseEvolution(_Rewired):
    """SET: at each mask step the smallest weights of a leaf go, and as many come back at random.

    Of the K kept weights of a leaf (groups, under a pattern) the `round(fraction · K)` of least |w| go, no
    more than there are zeros, and as many others come back, so that at a constant sparsity every leaf keeps
    its number. Where the sparsity rises fewer come back, where it falls more; what has just gone only if
    nothing else is left. The first mask is by magnitude, so that a trained network may be given; for a fresh
    one, where it is a random choice within each leaf, take `uniform()` or `erdos_renyi()` as `allocation`.

    For `prune` with `regrow=True` and no `threshold`. A weight that comes back starts from its dense copy, in
    the paper from a random number.

    Args:
        fraction: of the kept weights that is replaced, in [0, 1], or a schedule `T -> fraction`.
        key: of the random numbers, which are new ones at every T.
        score: what a kept weight is worth, in the place of |w|; numbers below zero are all moved up alike.

    Raises:
        ValueError: if a number `fraction` lies outside [0, 1]. (A schedule is taken to its nearest end.)
        TypeError: if `key` is not a random key, or `score` no saliency.

    Cost:
        At a mask step a random number per weight and two rankings beside that of the allocation. Memory: a
        few numbers per weight during a mask step.

    References:
        Mocanu et al., Nature Communications 9 (2018), arXiv 1707.04780: fraction 0.3, each sign on its own.

    Example:
        >>> import jax, jax.numpy as jnp, optax, hessjax as hj
        >>> params, grads = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}, {"kernel": jnp.zeros((1, 4))}
        >>> tx = hj.prune(optax.sgd(0.1), hj.saliencies.sparse_evolution(0.5, jax.random.key(0)), 0.5,
        ...                                                                                  every=1)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[4., 0., 2., 0.]], dtype=float32)
    """

    fraction: float | int | Schedule
    key: Any
    _: dataclasses.KW_ONLY
    score: Saliency = _MAGNITUDE

    def __post_init__(self) -> None:
        _ = self.change  # which refuses what it cannot use
        checked_ranking("score", self.score)

    @property
    def change(self) -> MaskChange:  # type: ignore[override]
        """The least go, others come back at random."""
        return RandomGrowth(self.fraction, self.key)


@settings(arrays=("score",))
class Rigl(_Rewired):
    """RigL: at each mask step the smallest weights of a leaf go, and those of the largest gradient come back.

    As `sparse_evolution` in all else. The gradient is that of the mask step's update, at the masked weights.
    In the paper what has just gone may come back at once.

    For `prune` with `regrow=True` and no `threshold`. A weight that comes back starts from its dense copy, in
    the paper from zero.

    Args:
        fraction: of the kept weights that is replaced, in [0, 1], or a schedule `T -> fraction`; in the paper
            `optax.cosine_decay_schedule(0.3, stop)`, with `stop` at 3/4 of the training.
        score: as in `sparse_evolution`.

    Raises:
        ValueError: if a number `fraction` lies outside [0, 1]. (A schedule is taken to its nearest end.)
        TypeError: if `score` is no saliency.

    Cost:
        At a mask step two rankings beside that of the allocation. Memory: a few numbers per weight during a
        mask step.

    References:
        Evci et al., Rigging the lottery: Making all tickets winners (2020), arXiv 1911.11134.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> params, grads = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}, {"w": jnp.array([[0.0, 9.0, 1.0, -2]])}
        >>> tx = hj.prune(optax.sgd(0.1), hj.saliencies.rigl(0.5), 0.5, every=1)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[4., 0., 0., 1.]], dtype=float32)
    """

    fraction: float | int | Schedule
    _: dataclasses.KW_ONLY
    score: Saliency = _MAGNITUDE

    def __post_init__(self) -> None:
        _ = self.change  # which refuses what it cannot use
        checked_ranking("score", self.score)

    @property
    def change(self) -> MaskChange:  # type: ignore[override]
        """The least go, those of the largest gradients come back."""
        return GradientGrowth(self.fraction)


def _bands(seen: Context, worth: Params, fresh: Params, share: Any) -> Params:
    """0 for weights that stay, and where the scores of the others begin."""
    units, masks = units_of(worth, seen.pattern), jax.tree.map(lambda m: m.astype(jnp.float32), seen.mask)
    # The mean of a group's flags: a group that is partly there, after a change of pattern, counts as kept.
    kept = [x > 0 for x in units_of(masks, seen.pattern).scores]
    total = jnp.stack([jnp.sum(k, dtype=jnp.int32) for k in kept])
    most = jnp.minimum(total, jnp.asarray(units.counts, jnp.int32) - total)
    number = jnp.clip(
        jnp.round(jnp.asarray(share, jnp.float32) * total.astype(jnp.float32)).astype(jnp.int32), 0, most
    )
    low, high = ordered_keys(units.scores), ordered_keys(units_of(fresh, seen.pattern).scores)
    # The integer above all keys for those that are out of question, and below all once it is turned round.
    gone, _ = smallest([jnp.where(k, x, ~(x & 0)) for k, x in zip(kept, low, strict=True)], number)
    back, _ = smallest([~jnp.where(k, x & 0, x) for k, x in zip(kept, high, strict=True)], number)
    old, new = [jnp.where(g, GONE, 0.0) for g in gone], [jnp.where(b, BACK, AWAY) for b in back]
    return units.spread(list(map(jnp.where, kept, old, new)))


def _from_zero(tree: Params) -> Params:
    """Moved up until nothing finite lies below zero; as they are where nothing does."""
    lows = [jnp.min(x, initial=0, where=jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    low = jnp.min(jnp.stack(lows))
    return jax.tree.map(lambda x: x - low.astype(x.dtype), tree)


sparse_evolution, rigl = SparseEvolution, Rigl
