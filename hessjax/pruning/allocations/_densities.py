"""Allocations with a sparsity of its own for every leaf: by shape, as given, by curvature."""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core._axes import Axes, stacked
from hessjax._core._counting import Total, total
from hessjax._core._messages import checked_number, shown
from hessjax._core._types import Params, settings
from hessjax.pruning._ranking import Sparsity, check_sparsity, num_zeros, num_zeros_in_all
from hessjax.pruning._units import Member, Units, units_of
from hessjax.pruning.allocations._allocation import (
    Allocation,
    caps_of,
    check_floor,
    check_most,
    rank_each,
    rank_globally,
    smaller,
)
from hessjax.pruning.patterns._fitting import fits_of
from hessjax.pruning.patterns._pattern import Patterns, unstructured

_ALONE = unstructured()


@settings()
class ErdosRenyi(Allocation):
    """Every leaf keeps a share in proportion to (sum of its axes) / (product of its axes), at most all.

    Large matrices become sparser than small ones, so that what stays grows with the number of neurons rather
    than of their pairs. In total `round(sparsity · n)` weights go, as far as groups and patterns let them.

    In every leaf there is a ranking of its own.

    Cost:
        As `uniform`.

    References:
        Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity
        (2018), arXiv 1707.04780. Evci et al., Rigging the lottery (2019), arXiv 1911.11134: with the kernel's
        axes, as here.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> scores = {"large": jnp.ones((8, 8)), "small": jnp.ones((2, 8))}
        >>> mask = hj.allocations.erdos_renyi()(scores, 0.5)
        >>> [int(leaf.sum()) for leaf in mask.values()]
        [25, 15]
    """

    def __call__(self, scores: Params, sparsity: Sparsity, pattern: Patterns = _ALONE) -> Params:
        """The mask of a ranking in every leaf."""
        check_sparsity(sparsity)
        units = units_of(scores, pattern)
        check_most(units, sparsity)
        sizes = np.asarray(units.num_weights)
        zeros = num_zeros_in_all(sparsity, int(sizes.sum()))
        each = _by_shares(jnp.asarray(_shares(units), jnp.float32), sizes, zeros)
        caps = jnp.asarray(
            [cap * size for cap, size in zip(caps_of(units), units.sizes, strict=True)], jnp.int32
        )
        return rank_each(units, list(_within_caps(each, caps, zeros)), sparsity)


def _shares(units: Units) -> np.ndarray:
    """(sum of the axes) / (product of the axes) of a layer; of what is tied, of both sums over all."""
    fans = [sum(sum(member.axes.fan) for member in members) for members in units.members]
    return np.array([fan / max(number, 1) for fan, number in zip(fans, units.num_weights, strict=True)])


def _by_shares(shares: Float[Array, " leaves"], sizes: np.ndarray, zeros: Total) -> Array:
    """The zeros of every leaf, with densities min(1, ε · share) and ε such that they add up."""
    numbers = jnp.asarray(sizes, jnp.float32)
    kept = Total.of(int(sizes.sum())).minus(zeros).rounded()

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = jnp.sum(jnp.minimum(1, middle * shares) * numbers) >= kept
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # At this ε the leaf of the smallest share keeps all its weights, and so does every other.
    top = 1 / jnp.min(jnp.where(numbers > 0, shares, jnp.inf))
    # What is kept rises with ε, so that halving finds it; 40 times is more than float32 resolves.
    _, epsilon = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(top), top))
    return jnp.round((1 - jnp.minimum(1, epsilon * shares)) * numbers).astype(jnp.int32)


def _within_caps(each: Array, caps: Array, zeros: Total) -> Array:
    """Within the caps, and adding up: what is missing or over goes to the leaves with the largest caps."""
    each = jnp.minimum(each, caps)

    def one(missing: Total, i: Array) -> tuple[Total, Array]:
        # No leaf holds 2³¹, so that the nearest integer below that is as good as the number itself.
        moved = jnp.clip(missing.plus(Total.of(each[i])).clipped(), 0, caps[i])
        return missing.minus(Total.of(moved - each[i])), moved

    order = jnp.argsort(-caps)
    _, moved = jax.lax.scan(one, zeros.minus(total(each)), order)
    return each.at[order].set(moved)


@settings()
class Explicit(Allocation):
    """The sparsity of every leaf as given, where `sparsity` itself gets to what they come to in total.

    On the way there, and for a `sparsity` below that total, all are scaled down alike; in every
    leaf there is a ranking of its own.

    Args:
        sparsities: by glob over paths, the first that matches; a leaf that none matches stays dense. A layer
            that a leaf stacks has a path of its own, `blocks/Dense_0/kernel[2]`.

    Raises:
        ValueError: for a sparsity outside [0, 1), or if all of them are 0; by the ranking, for a `sparsity`
            above the total, with the total, and for a glob that matches no leaf.

    Cost:
        As `uniform`.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> scores = {"first": jnp.arange(4.0), "last": jnp.arange(4.0)}
        >>> hj.allocations.explicit({"first": 0.25, "*": 0.75})(scores, 0.5)
        {'first': Array([False,  True,  True,  True], dtype=bool),
         'last': Array([False, False, False,  True], dtype=bool)}
    """

    sparsities: Mapping[str, float | int] | tuple[tuple[str, float | int], ...]

    def __post_init__(self) -> None:
        pairs = _pairs(self.sparsities)  # a mapping does not hash, and the first glob counts
        object.__setattr__(self, "sparsities", pairs)
        for path, value in pairs:
            if not 0 <= checked_number(f"sparsities[{path!r}]", value) < 1:
                raise ValueError(f"`sparsities` must be in [0, 1), got {value} for `{path}`.")
        if not any(value for _, value in pairs):
            raise ValueError("`sparsities` must ask for zeros in at least one leaf, got none.")

    def __repr__(self) -> str:
        return f"explicit(sparsities={dict(self.sparsities)})"

    def __call__(self, scores: Params, sparsity: Sparsity, pattern: Patterns = _ALONE) -> Params:
        """The mask of a ranking in every leaf."""
        check_sparsity(sparsity)
        units = units_of(scores, pattern)
        levels, sizes = _levels(dict(self.sparsities), units), units.num_weights
        total = sum(level * n for level, n in zip(levels, sizes, strict=True)) / sum(sizes)
        if not isinstance(sparsity, jax.Array) and round((sparsity - total) * sum(sizes)) > len(sizes):
            raise ValueError(
                f"`sparsity` must be at most {total:.6g}, what the `sparsities` of `explicit` come to in "
                f"total, got {sparsity}."
            )
        # One factor for all leaves; never beyond what was asked for, which rounding of the factor could be.
        share = sparsity / total
        scaled = [smaller(share * level, level) for level in levels]
        return rank_each(units, [num_zeros(s, n) for s, n in zip(scaled, sizes, strict=True)], sparsity)


def _pairs(sparsities: Any) -> tuple[tuple[str, float | int], ...]:
    try:
        pairs = dict(sparsities)
    except (TypeError, ValueError):
        pairs = {0: None}
    if not all(isinstance(glob, str) for glob in pairs):
        raise TypeError(f"`sparsities` must be a mapping `glob -> sparsity`, got {shown(sparsities)}.")
    return tuple(pairs.items())


def _levels(sparsities: Mapping[str, float | int], units: Units) -> list[float]:
    members = [member for group in units.members for member in group]
    for glob in sparsities:
        if not any(_matches(member, glob) for member in members):
            raise ValueError(
                f"`sparsities` must match leaves that are pruned, but `{glob}` matches none of: "
                f"{', '.join(member.path for member in members)}."
            )
    return [
        next((value for glob, value in sparsities.items() if _matches(group[0], glob)), 0.0)
        for group in units.members
    ]


def _matches(member: Member, glob: str) -> bool:
    """Whether a glob is of this leaf, or names this layer of it, `blocks/Dense_0/kernel[2]`."""
    return glob == member.path or fnmatch.fnmatchcase(member.axes.path, glob)


@settings(arrays=("curvature",))
class ByCurvature(Allocation):
    """One ranking over all leaves, each leaf's scores times the root of its curvature per weight.

    With `magnitude()` this ranks by w² · tr(H_l)/n_l: what a weight costs in the quadratic model whose
    diagonal is constant in each leaf. Layers that are flat lose more, layers that are steep keep more.

    Args:
        curvature: for every leaf that is pruned, by its path, its mean curvature per weight, tr(H_l)/n_l, or
            its largest eigenvalue: `{path: part.mean / n}` from `trace_by_leaf`. A `trace_by_leaf` result's
            `.leaves` holds `Estimate`s of whole traces: they are divided by the number of weights here. For a
            leaf that stacks layers, one of its own for each will do: `blocks/Dense_0/kernel[0]`, ...
        floor: as in `global_threshold`.

    Raises:
        TypeError: if `curvature` is not a mapping.
        ValueError: if `floor` lies outside [0, 1]. By the ranking, for a leaf without a curvature, or whose
            curvature is not positive and finite, as a trace can be away from a minimum: use a Gauss–Newton
            matrix.

    Cost:
        As `global_threshold`.

    References:
        Dong et al., HAWQ-V2: Hessian aware trace-weighted quantization (2019), arXiv 1911.03852: the mean
        trace as a layer's sensitivity.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> scores = {"flat": jnp.array([3.0, 4.0]), "steep": jnp.array([1.0, 2.0])}
        >>> hj.allocations.by_curvature({"flat": 0.01, "steep": 1.0})(scores, 0.5)
        {'flat': Array([False,  True], dtype=bool), 'steep': Array([False,  True], dtype=bool)}
    """

    curvature: Mapping[str, Any]
    _: dataclasses.KW_ONLY
    floor: float | int = 0.05

    def __post_init__(self) -> None:
        check_floor(self.floor)
        if not isinstance(self.curvature, Mapping):
            raise TypeError(f"`curvature` must be a mapping `path -> number`, got {shown(self.curvature)}.")

    def __call__(self, scores: Params, sparsity: Sparsity, pattern: Patterns = _ALONE) -> Params:
        """The mask of one ranking."""
        leaves, treedef = jax.tree.flatten(scores)
        axes = [fit.axes for fit in fits_of(pattern, scores)]
        # The root, as magnitudes are squared in the quadratic model ½ h w².
        factors = [self._factor(found) for found in axes]
        scaled = [x * jnp.asarray(f, x.dtype) for x, f in zip(leaves, factors, strict=True)]
        return rank_globally(units_of(jax.tree.unflatten(treedef, scaled), pattern), sparsity, self.floor)

    def _factor(self, axes: Axes) -> Any:
        """What the scores of a leaf are multiplied by; those of each layer that it stacks, if given."""
        names, number = axes.layer_names(), math.prod(axes.layer)
        if axes.path in self.curvature or not any(name in self.curvature for name in names):
            return _root(self.curvature, axes.path, math.prod(axes.shape))
        roots = [jnp.asarray(_root(self.curvature, name, number)) for name in names]
        return stacked([jnp.broadcast_to(root, axes.layer) for root in roots], axes)


def _root(curvature: Mapping[str, Any], path: str, size: int) -> Any:
    """The root of the curvature per weight of a leaf."""
    if path not in curvature:
        raise ValueError(
            f"`curvature` must have an entry for every leaf that is pruned, but {path} is missing; it has "
            f"{', '.join(curvature)}."
        )
    value = curvature[path]
    value = value.mean / size if hasattr(value, "stderr") else value
    # Not before: leaves that are not pruned may have any curvature.
    if not isinstance(value, jax.core.Tracer) and not 0 < float(value) < float("inf"):
        raise ValueError(
            f"`curvature` must be positive and finite, got {float(value):.3g} for {path}: take the traces "
            "of a Gauss-Newton matrix, which has no negative ones."
        )
    return jnp.sqrt(value)


erdos_renyi, explicit, by_curvature = ErdosRenyi, Explicit, ByCurvature
