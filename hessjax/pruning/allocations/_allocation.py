"""How a budget of zeros is spread over the leaves, and which weights they hit: scores to masks."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hessjax._core import _tree
from hessjax._core._counting import Total, count_where, total
from hessjax._core._messages import checked_function, checked_number, shown, uncalled
from hessjax._core._types import Params, settings
from hessjax.pruning._ranking import Sparsity, check_sparsity, num_zeros, num_zeros_in_all, smallest
from hessjax.pruning._units import Units, units_of
from hessjax.pruning.patterns._pattern import Pattern, Patterns, unstructured

_ALONE = unstructured()


class Allocation:
    """How zeros are spread: `(scores, sparsity, pattern=unstructured()) -> mask`.

    An allocation of your own is a frozen dataclass, whose fields are its settings, that inherits from this
    class, or a plain function of the same arguments.
    """

    def __call__(self, scores: Params, sparsity: Sparsity, pattern: Patterns = _ALONE) -> Params:
        """A tree of booleans like the scores, True = kept.

        Args:
            scores: floating-point arrays; the lowest go first.
            sparsity: the fraction of zeros asked for, a number or a traced scalar.
            pattern: which weights go together.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method `__call__`.")


AllocationRule: TypeAlias = Allocation | Callable[[Params, Any, Patterns], Params]
"""An allocation, or a plain function like one."""


def check_allocation(allocation: Any) -> None:
    """Raise a TypeError for what is no allocation, and no function like one."""
    if callable(allocation) and not isinstance(allocation, (type, Pattern)):
        checked_function("allocation", allocation, "(scores, sparsity, pattern) -> mask")
        return
    hint = uncalled(allocation)
    if isinstance(allocation, str):
        hint = f": write `hessjax.allocations.{allocation}()`" if allocation.isidentifier() else ""
    if type(allocation).__name__ == "Threshold":
        hint = ": it takes the place of `sparsity`"
    raise TypeError(
        "`allocation` must be an `Allocation`, such as `uniform()`, or a function "
        f"`(scores, sparsity, pattern) -> mask`, got {shown(allocation)}{hint}."
    )


def allocated(allocation: AllocationRule, scores: Params, sparsity: Any, pattern: Patterns) -> Params:
    """The mask of an allocation, which may be any function: a tree like the scores."""
    check_allocation(allocation)
    mask = allocation(scores, sparsity, pattern)
    _tree.check_like(mask, scores, "allocation(scores, sparsity, pattern)", "scores")
    return mask


@settings()
class GlobalThreshold(Allocation):
    """One ranking over all leaves together: the lowest scores go, wherever they are.

    Exactly `round(sparsity · n)` of the n weights go (halves round to even, as Python's `round`), whatever
    the floors; of groups that go as a whole, ranked by their mean score, as many as that number holds: where
    the next one is too large, smaller ones further on take its place. The order is that of a stable argsort:
    of equal scores the one that comes first in the tree goes first.

    A leaf whose scores are small as a whole would lose every weight and cut the network in two, so that each
    leaf keeps its best few: at least one, and at least `floor` times the share it would keep under
    `uniform`. The floor bends the ranking only where it is reached.

    For a traced sparsity nothing can be checked: the value is taken to the nearest end of [0, 1], and the
    floors win.

    Args:
        floor: in [0, 1]. 1 gives every leaf the same sparsity up to rounding; 0 takes all floors away, and
            then a leaf can lose its last weight.

    Raises:
        ValueError: if `floor` lies outside [0, 1]; by the ranking, for a sparsity outside [0, 1), or one that
            leaves fewer weights than the floors or the pattern need.

    Cost:
        Counting passes instead of a sort: 32 over float32 scores, twice that while some leaf is at its floor.
        Memory: two to four unsigned integers of the scores' width per weight, for the time of the ranking.

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow
        (2020), arXiv 2006.05467: layer collapse.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> scores = {"a": jnp.array([5.0, 6.0, 7.0, 8.0]), "b": jnp.array([1.0, 2.0, 3.0, 9.0])}
        >>> hj.allocations.global_threshold()(scores, 0.5)
        {'a': Array([False,  True,  True,  True], dtype=bool),
         'b': Array([False, False, False,  True], dtype=bool)}
    """

    _: dataclasses.KW_ONLY
    floor: float | int = 0.05

    def __post_init__(self) -> None:
        check_floor(self.floor)

    def __call__(self, scores: Params, sparsity: Sparsity, pattern: Patterns = _ALONE) -> Params:
        """The mask of one ranking."""
        return rank_globally(units_of(scores, pattern), sparsity, self.floor)


@settings()
class Uniform(Allocation):
    """A ranking of its own in every leaf: all of them equally sparse.

    Exactly `round(sparsity · n)` of a leaf's n weights go (halves round to even), or as many groups as that
    number holds, but never its last one. Of equal scores the one that comes first goes first.

    A traced sparsity is taken to the nearest end of [0, 1].

    Raises:
        ValueError: by the ranking, for a sparsity outside [0, 1), or above what the pattern lets go.

    Cost:
        32 counting passes over float32 scores. Memory: as `global_threshold`.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> scores = {"a": jnp.array([5.0, 6.0, 7.0, 8.0]), "b": jnp.array([1.0, 2.0, 3.0, 9.0])}
        >>> hj.allocations.uniform()(scores, 0.5)
        {'a': Array([False, False,  True,  True], dtype=bool),
         'b': Array([False, False,  True,  True], dtype=bool)}
    """

    def __call__(self, scores: Params, sparsity: Sparsity, pattern: Patterns = _ALONE) -> Params:
        """The mask of a ranking in every leaf."""
        check_sparsity(sparsity)
        units = units_of(scores, pattern)
        return rank_each(units, [num_zeros(sparsity, n) for n in units.num_weights], sparsity)


def check_floor(floor: float | int) -> None:
    """Raise an error for a share that is none."""
    if not 0 <= checked_number("floor", floor) <= 1:
        raise ValueError(f"`floor` must be in [0, 1], a share of what `uniform` would keep, got {floor}.")


# -- rankings ------------------------------------------------------------------------------------


def rank_globally(units: Units, sparsity: Sparsity, floor: float | int) -> Params:
    """The mask of one ranking over all units."""
    check_sparsity(sparsity)
    kept = [_least(count, floor, sparsity) for count in units.counts]
    caps = [smaller(count - k, most) for count, k, most in zip(units.counts, kept, units.most, strict=True)]
    if not isinstance(sparsity, jax.Array):
        allowed = sum(cap * size for cap, size in zip(caps, units.sizes, strict=True))
        _check_floors(num_zeros(sparsity, sum(units.num_weights)), allowed, units, sparsity)
    most = jnp.stack([jnp.asarray(cap, jnp.int32) for cap in caps])
    zeros = num_zeros_in_all(sparsity, sum(units.num_weights))
    zeros = zeros.least(total(most * jnp.asarray(units.sizes, jnp.int32)))
    pruned = _smallest_under_caps(units.keys(), zeros, most, tuple(units.sizes))
    return units.spread([~flags for flags in pruned])


def rank_each(units: Units, zeros: list[Any], sparsity: Sparsity) -> Params:
    """The mask of a ranking in every leaf, for so many zeros in each."""
    caps = caps_of(units)
    for number, size, most, path in zip(zeros, units.sizes, units.most, units.paths, strict=True):
        if not isinstance(number, jax.Array) and number // size > most:
            raise ValueError(_too_sparse(sparsity, f"{', '.join(path)} loses at most {most * size} weights"))
    whole = [jnp.minimum(n // size, cap) for n, size, cap in zip(zeros, units.sizes, caps, strict=True)]
    pruned, _ = smallest(units.keys(), jnp.stack([jnp.asarray(n, jnp.int32) for n in whole]))
    return units.spread([~flags for flags in pruned])


def caps_of(units: Units) -> list[int]:
    """How many units of every leaf may go if one at least stays."""
    return [min(most, max(count - 1, 0)) for count, most in zip(units.counts, units.most, strict=True)]


def check_most(units: Units, sparsity: Sparsity) -> None:
    """Raise a ValueError if the pattern lets fewer weights go than are asked for."""
    total, most = sum(units.num_weights), sum(map(math.prod, zip(units.most, units.sizes, strict=True)))
    if not isinstance(sparsity, jax.Array) and num_zeros(sparsity, total) > most:
        raise ValueError(_too_sparse(sparsity, f"of {total} weights at most {most} go"))


def smaller(a: Any, b: float | int) -> Any:
    """The smaller of a number that may be traced and one that is not."""
    return jnp.minimum(a, b) if isinstance(a, jax.Array) else min(a, b)


def _least(count: int, floor: float | int, sparsity: Sparsity) -> Any:
    """How many units of so many stay whatever their scores."""
    if floor == 0 or count == 0:
        return 0
    share = floor * (1 - sparsity) * count + 1e-3  # 1 − s in binary falls a hair short of the share meant
    if not isinstance(sparsity, jax.Array):
        return max(1, math.floor(share))
    return jnp.maximum(1, jnp.floor(share).astype(jnp.int32))


def _check_floors(zeros: int, allowed: int, units: Units, sparsity: Sparsity) -> None:
    """Raise a ValueError if the floors let fewer weights go than are asked for."""
    # By less than a group whole groups may miss any number: that is rounding, and no error.
    if zeros <= allowed or max(units.sizes) > zeros - allowed:
        return
    check_most(units, sparsity)
    total = sum(units.num_weights)
    raise ValueError(
        f"`sparsity` must leave the {total - allowed} weights that the floors of {len(units.counts)} leaves "
        f"need, but {sparsity} leaves {total - zeros} of {total}: lower it, or let leaves lose all "
        "their weights by `global_threshold(floor=0)`."
    )


def _too_sparse(sparsity: Sparsity, what: str) -> str:
    return f"`sparsity` must be within what `pattern` allows, got {sparsity}: under it {what}. Lower it."


# Compiled once: outside `jit`, `cond` would compile its branches at every call.
@functools.partial(jax.jit, static_argnames="sizes")
def _smallest_under_caps(
    keys: list[Array], n: Total, caps: Int[Array, " leaves"], sizes: tuple[int, ...]
) -> list[Array]:
    """The smallest that count for n at most, taking no more than its cap from any leaf."""
    free, numbers = _smallest_that_fit(keys, n, sizes)

    def capped() -> list[Array]:
        top = ~jnp.zeros((), keys[0].dtype)  # above every key, so never taken, as n <= sum(caps · sizes)
        open_, _ = smallest(keys, caps)
        return _smallest_that_fit(
            [jnp.where(o, key, top) for o, key in zip(open_, keys, strict=True)], n, sizes
        )[0]

    # Whatever the floors hold is kept by the free ranking already when no leaf exceeds its cap.
    return jax.lax.cond(jnp.any(numbers > caps), capped, lambda: free)


def _smallest_that_fit(
    keys: list[Array], n: Total, sizes: tuple[int, ...]
) -> tuple[list[Array], Int[Array, " leaves"]]:
    """The smallest up to the first that does not fit into n, then smaller units that still do; how many."""
    if set(sizes) == {1}:
        return smallest(keys, n)
    weights = jnp.asarray(sizes, jnp.int32)
    taken, numbers = smallest(keys, n, weights)
    top = ~jnp.zeros((), keys[0].dtype)
    # Behind the first that does not fit only smaller ones can: one more ranking for every size.
    for limit in sorted(set(sizes), reverse=True)[1:]:
        left = n.minus(total(numbers * weights))
        fitting = [i for i, size in enumerate(sizes) if size <= limit]
        places = jnp.asarray(fitting)
        open_ = [jnp.where(taken[i], top, keys[i]) for i in fitting]
        # Asked for more than there is, `smallest` would mark those at `top` too.
        most = total(count_where(lambda _, k: [k < top], open_)[0] * weights[places])
        more, added = smallest(open_, left.least(most), weights[places])
        numbers = numbers.at[places].add(added)
        for i, flags in zip(fitting, more, strict=True):
            taken[i] |= flags
    return taken, numbers


global_threshold, uniform = GlobalThreshold, Uniform
