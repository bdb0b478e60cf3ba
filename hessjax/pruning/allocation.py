"""How a budget of zeros is spread over the leaves, and which weights they hit: scores to masks."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._typing import Params
from hessjax.pruning.ranking import ordered_keys, smallest

Sparsity: TypeAlias = float | int | Float[Array, ""]
"""The fraction of zeros, in [0, 1): a number, checked, or a traced scalar, which cannot be."""

Allocation: TypeAlias = Callable[[Params, Sparsity], Params]
"""`(scores, sparsity) -> mask`: scores of any pytree shape to booleans of the same, True = kept."""


def global_threshold(*, floor: float | int = 0.05) -> Allocation:
    """One ranking over all leaves together: the lowest scores go, wherever they are.

    Exactly `round(sparsity · n)` of the n weights go (halves round to even, as Python's `round`), whatever
    the floors. The order is that of a stable argsort: of equal scores the one that comes first in the tree
    goes first.

    A leaf whose scores are small as a whole would lose every weight and cut the network in two, so that each
    leaf keeps its best few: at least one weight, and at least `floor` times the share it would keep under
    `uniform`. The floor bends the ranking only where it is reached.

    Args:
        floor: in [0, 1]. 1 gives every leaf the same sparsity up to rounding; 0 takes all floors away, and
            then a leaf can lose its last weight.

    Returns:
        `(scores, sparsity) -> mask`. It raises ValueError for a number outside [0, 1), or one that leaves
        fewer weights than the floors need. For a traced sparsity neither can be checked: the value is taken
        to the nearest end of [0, 1], and the floors win.

    Raises:
        ValueError: if `floor` lies outside [0, 1].

    Cost:
        Counting passes instead of a sort: 32 over float32 scores, twice that while some leaf is at its floor.
        Memory: two to four unsigned integers of the scores' width per weight, for the time of the ranking.

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow
        (2020), arXiv 2006.05467: layer collapse.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> scores = {"a": jnp.array([5.0, 6.0, 7.0, 8.0]), "b": jnp.array([1.0, 2.0, 3.0, 9.0])}
        >>> hj.global_threshold()(scores, 0.5)
        {'a': Array([False,  True,  True,  True], dtype=bool),
         'b': Array([False, False, False,  True], dtype=bool)}
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"`floor` must be in [0, 1], a share of what `uniform` would keep, got {floor}.")

    def allocate(scores: Params, sparsity: Sparsity) -> Params:
        check_sparsity(sparsity)
        leaves, treedef = jax.tree.flatten(scores)
        sizes = [leaf.size for leaf in leaves]
        zeros = num_zeros(sparsity, sum(sizes))
        caps = [size - _least(size, floor, sparsity) for size in sizes]
        _check_floors(zeros, caps, sizes, sparsity)
        most = jnp.stack([jnp.asarray(cap, jnp.int32) for cap in caps])
        pruned = _smallest_under_caps(ordered_keys(leaves), jnp.minimum(zeros, sum(caps)), most)
        return jax.tree.unflatten(treedef, [~leaf for leaf in pruned])

    return allocate


def uniform() -> Allocation:
    """A ranking of its own in every leaf: all of them equally sparse.

    Exactly `round(sparsity · n)` of a leaf's n weights go (halves round to even), but never its last one. Of
    equal scores the one that comes first goes first.

    Returns:
        `(scores, sparsity) -> mask`. It raises ValueError for a number outside [0, 1); a traced sparsity is
        taken to the nearest end of [0, 1].

    Cost:
        32 counting passes over float32 scores. Memory: as `global_threshold`.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> scores = {"a": jnp.array([5.0, 6.0, 7.0, 8.0]), "b": jnp.array([1.0, 2.0, 3.0, 9.0])}
        >>> hj.uniform()(scores, 0.5)
        {'a': Array([False, False,  True,  True], dtype=bool),
         'b': Array([False, False,  True,  True], dtype=bool)}
    """

    def allocate(scores: Params, sparsity: Sparsity) -> Params:
        check_sparsity(sparsity)
        leaves, treedef = jax.tree.flatten(scores)
        zeros = [jnp.minimum(num_zeros(sparsity, x.size), max(x.size - 1, 0)) for x in leaves]
        pruned = smallest(ordered_keys(leaves), jnp.stack(zeros))
        return jax.tree.unflatten(treedef, [~leaf for leaf in pruned])

    return allocate


def check_sparsity(sparsity: Any, note: str = "") -> None:
    """Raise a ValueError for a number outside [0, 1); traced values pass."""
    if isinstance(sparsity, jax.core.Tracer) or 0 <= sparsity < 1:
        return
    hint = f" For {sparsity:g} % write {sparsity / 100:g}." if 2 <= sparsity < 100 else ""
    raise ValueError(f"`sparsity` must be in [0, 1), the fraction of zeros, got {sparsity}{note}.{hint}")


def num_zeros(sparsity: Sparsity, size: int) -> Any:
    """`round(sparsity · size)`, halves to even, without the rounding of a float32 product.

    In float32 0.9 · 25,000,001 is off by more than one weight, so that a traced sparsity is written as a
    multiple of 2⁻³¹ (exact from 2⁻⁷ up, and within half a weight below) and multiplied in integers.
    """
    if not isinstance(sparsity, jax.Array):
        return round(float(sparsity) * size)
    inside = jnp.where(sparsity > 0, jnp.minimum(sparsity, 1), 0)
    if inside.dtype == jnp.float64:
        return jnp.round(inside * size).astype(jnp.int32)
    high, low = _product((inside.astype(jnp.float32) * 2.0**31).astype(jnp.uint32), size)
    quotient, rest = high * 2 + (low >> 31), low & jnp.uint32(2**31 - 1)
    up = (rest > 2**30) | ((rest == 2**30) & (quotient % 2 == 1))
    return quotient.astype(jnp.int32) + up.astype(jnp.int32)


def _product(a: Array, b: int) -> tuple[Array, Array]:
    """The 64 bits of a · b as two words, by the four products of 16-bit halves; a, b up to 2³¹."""
    a1, a0 = a >> 16, a & jnp.uint32(0xFFFF)
    b1, b0 = jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    middle = a1 * b0 + a0 * b1 + (a0 * b0 >> 16)
    return a1 * b1 + (middle >> 16), (middle << 16) | (a0 * b0 & jnp.uint32(0xFFFF))


def _least(size: int, floor: float | int, sparsity: Sparsity) -> Any:
    """How many weights a leaf of this size keeps whatever its scores."""
    if floor == 0 or size == 0:
        return 0
    share = floor * (1 - sparsity) * size + 1e-3  # 1 − s in binary falls a hair short of the share meant
    if not isinstance(sparsity, jax.Array):
        return max(1, math.floor(share))
    return jnp.maximum(1, jnp.floor(share).astype(jnp.int32))


def _check_floors(zeros: Any, caps: list[Any], sizes: list[int], sparsity: Sparsity) -> None:
    if isinstance(sparsity, jax.Array) or zeros <= sum(caps):
        return
    raise ValueError(
        f"`sparsity` must leave the {sum(sizes) - sum(caps)} weights that the floors of {len(sizes)} leaves "
        f"need, but {sparsity} leaves {sum(sizes) - zeros} of {sum(sizes)}: lower it, or let leaves lose all "
        "their weights by `global_threshold(floor=0)`."
    )


@jax.jit
def _smallest_under_caps(keys: list[Array], n: Array, caps: Int[Array, " leaves"]) -> list[Array]:
    """The n smallest, taking no more than its cap from any leaf."""
    free = smallest(keys, n)
    over = jnp.stack([jnp.sum(leaf, dtype=jnp.int32) for leaf in free]) > caps

    def capped() -> list[Array]:
        top = ~jnp.zeros((), keys[0].dtype)  # above every key, so never taken, as n <= sum(caps)
        open_ = smallest(keys, caps)
        return smallest([jnp.where(o, key, top) for o, key in zip(open_, keys, strict=True)], n)

    # Whatever the floors hold is kept by the free ranking already when no leaf exceeds its cap.
    return jax.lax.cond(jnp.any(over), capped, lambda: free)
