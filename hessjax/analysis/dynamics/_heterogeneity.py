"""How unlike the curvature of the leaves is: Jensen–Shannon distances between their spectral densities."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core._messages import checked_count, shown
from hessjax._core._results import Estimate, by_shapes, is_known, is_single, with_error
from hessjax._core._tables import Column, Row, Table, printable
from hessjax._core._types import Scalar
from hessjax.analysis.dynamics._noise import check_positive
from hessjax.estimators._density import SpectralDensity
from hessjax.estimators._quadrature import bumps


@printable
class Heterogeneity(NamedTuple):
    """How far the spectra of the leaves are from each other.

    Attributes:
        mean: the mean distance of all pairs, between 0 and 1, with its standard error over the probes;
            infinite with one probe.
        leaves: by path, the mean distance of a leaf from all others.
        distances: (leaves, leaves) of every pair, in the order of `leaves`.
    """

    mean: Estimate
    leaves: dict[str, Float[Array, ""]]
    distances: Float[Array, "leaves leaves"]

    def _table(self) -> Table | str:
        if not (is_known(self) and is_single(self.mean.num_samples)):
            return by_shapes(self)
        rows = [Row((path, f"{float(x):.3f}")) for path, x in self.leaves.items()]
        note = f"Mean distance {with_error(*self.mean[:2])}."
        return Table((Column("Leaf", "name"), Column("Distance from others")), tuple(rows), notes=(note,))


def heterogeneity(
    densities: Mapping[str, SpectralDensity], *, bandwidth: Any = 0.3, num_points: int = 512
) -> Heterogeneity:
    """How unlike the leaves' spectra are: the mean Jensen–Shannon distance between their densities.

    One learning rate suits all leaves where it is small; where it is large, as in transformers, plain
    gradient descent falls behind optimizers that have a rate for each weight. The distance of two densities
    is √(JS / ln 2), from 0 to 1, with JS = KL(p ‖ m)/2 + KL(q ‖ m)/2 and m their mean. Densities are taken
    on one axis for all, u = asinh(λ/λ₀) with λ₀ a thousandth of the largest eigenvalue, and smoothed there:
    nothing is rescaled leaf by leaf, for one leaf ten times as sharp as another is what is asked about.

    Args:
        densities: what `spectral_density_by_leaf` gives; at least two, with as many probes and products each.
        bandwidth: of the Gaussians, in units of u: the factor between eigenvalues that count as alike.
            Narrower than the nodes are apart, spectra that are the same would seem to differ.
        num_points: of the grid, which must not be wider apart than the bandwidth.

    Returns:
        A `Heterogeneity`. With few probes it is biased upwards, for their scatter is a difference too.

    Raises:
        TypeError: `densities` are no mapping of `SpectralDensity`.
        ValueError: fewer than two, or of unlike shapes; `bandwidth` is not positive; too few
            points for it.

    Cost:
        No products; leaves² · probes · points operations.

    References:
        Zhang, Chen, Ding et al. (2024), Why transformers need Adam: a Hessian perspective, arXiv 2402.16788.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"a": v["a"], "b": 100 * v["b"], "c": v["c"]})
        >>> like = {"a": jnp.zeros(9), "b": jnp.zeros(9), "c": jnp.zeros(9)}
        >>> densities = hj.spectral_density_by_leaf(A, jax.random.key(0), like, 2, 4)
        >>> found = hj.dynamics.heterogeneity(densities)
        >>> {path: round(float(x), 2) for path, x in found.leaves.items()}
        {'a': 0.5, 'b': 1.0, 'c': 0.5}
    """
    _check(densities)
    check_positive("bandwidth", bandwidth)
    num_points = _checked_points(num_points, bandwidth)
    leaves = list(densities.values())
    nodes, weights = (jnp.stack(x) for x in ([x.nodes for x in leaves], [x.weights for x in leaves]))
    mean, distances = _compared(num_points, nodes, weights, leaves[0].num_probes, bandwidth)
    others = jnp.sum(distances, axis=1) / (len(leaves) - 1)
    return Heterogeneity(mean, dict(zip(densities, others, strict=True)), distances)


def _check(densities: Any) -> None:
    if not isinstance(densities, Mapping):
        raise TypeError(
            "`densities` must be a mapping from paths to densities, as `hessjax.spectral_density_by_leaf` "
            f"gives it, got {shown(densities)}."
        )
    for path, density in densities.items():
        if not isinstance(density, SpectralDensity):
            raise TypeError(
                f"`densities` must hold `SpectralDensity`s only, got {shown(density)} for {path!r}."
            )
    if len(densities) < 2:
        raise ValueError(f"`densities` must be of at least two leaves, got {len(densities)}.")
    shapes = {jnp.shape(density.nodes) for density in densities.values()}
    if len(shapes) > 1 or len(shapes.pop()) != 2:
        raise ValueError(
            "`densities` must have nodes of one shape, (probes, products), from one call of "
            f"`spectral_density_by_leaf`, got {[jnp.shape(x.nodes) for x in densities.values()]}."
        )


def _checked_points(num_points: Any, bandwidth: Any) -> int:
    """The number of points, if no Gaussian falls between two of them."""
    number = checked_count("num_points", num_points, 16)
    if isinstance(bandwidth, jax.core.Tracer):
        return number
    # The axis ends 4 bandwidths beyond ± asinh(1000), where the largest eigenvalue may lie.
    least = 1 + math.ceil(2 * (math.asinh(1000) + 4 * float(bandwidth)) / float(bandwidth))
    if number < least:
        raise ValueError(
            f"`num_points` must be at least {least} for a bandwidth of {float(bandwidth):g}, got {number}: "
            "Gaussians would fall between the points."
        )
    return number


def _compared(
    num_points: int,
    nodes: Float[Array, "leaves probes m"],
    weights: Float[Array, "leaves probes m"],
    num_probes: Int[Array, ""],
    bandwidth: Any,
) -> tuple[Estimate, Float[Array, "leaves leaves"]]:
    return _jitted(nodes, weights, num_probes, jnp.asarray(bandwidth, nodes.dtype), num_points)


def _distances(
    nodes: Float[Array, "leaves probes m"],
    weights: Float[Array, "leaves probes m"],
    num_probes: Int[Array, ""],
    bandwidth: Scalar,
    num_points: int,
) -> tuple[Estimate, Float[Array, "leaves leaves"]]:
    probes = _on_grid(nodes, weights, bandwidth, num_points)
    leaves, count = probes.shape[:2]
    totals = jnp.sum(probes, axis=1)
    distances = jax.lax.map(lambda p: jax.vmap(lambda q: _distance(p, q))(totals), totals)
    pairs = leaves * (leaves - 1) / 2
    mean = jnp.sum(jnp.triu(distances, 1)) / pairs
    number = jnp.minimum(num_probes, count)

    def without(place: Int[Array, "2"]) -> Scalar:
        """The change of the mean if a probe of a leaf is left out."""
        leaf, probe = place
        others = jax.vmap(lambda q: _distance(totals[leaf] - probes[leaf, probe], q))(totals)
        there = jnp.arange(leaves, dtype=jnp.int32) != leaf
        return jnp.sum(jnp.where(there, others - distances[leaf], 0)) / pairs

    places = jnp.stack(jnp.meshgrid(*map(jnp.arange, (leaves, count)), indexing="ij"), -1).reshape(-1, 2)
    changes = jax.lax.map(without, places.astype(jnp.int32)).reshape(leaves, count)
    # The leaves' probes are independent of each other: their jackknife variances add up.
    n = jnp.maximum(number, 2).astype(mean.dtype)
    inside = jnp.arange(count, dtype=jnp.int32)[None] < number
    centred = jnp.where(inside, changes - jnp.sum(jnp.where(inside, changes, 0), 1, keepdims=True) / n, 0)
    stderr = jnp.sqrt((n - 1) / n * jnp.sum(centred**2))
    return Estimate(mean, jnp.where(number > 1, stderr, jnp.inf), number), distances


_jitted = jax.jit(_distances, static_argnums=4)


def _on_grid(nodes: Array, weights: Array, bandwidth: Scalar, num_points: int) -> Float[Array, "l p n"]:
    """The smoothed density of every probe, on an axis that is linear near 0 and logarithmic beyond."""
    there = weights > 0
    nodes = jnp.where(there, nodes, 0)
    top = jnp.max(jnp.abs(nodes))
    places = jnp.arcsinh(nodes / (1e-3 * jnp.where(top > 0, top, 1)))
    low, high = (jnp.min(places) - 4 * bandwidth, jnp.max(places) + 4 * bandwidth)
    grid = jnp.linspace(low, high, num_points)
    return jax.lax.map(lambda leaf: bumps(grid, leaf[0], leaf[1], bandwidth), (places, weights))


def _distance(p: Float[Array, " n"], q: Float[Array, " n"]) -> Scalar:
    """√(JS / ln 2) of two densities on a grid, of any scale."""
    p, q = p / jnp.sum(p), q / jnp.sum(q)
    mean = (p + q) / 2
    divergence = (_relative_entropy(p, mean) + _relative_entropy(q, mean)) / 2
    return jnp.sqrt(jnp.clip(divergence / jnp.log(jnp.asarray(2, p.dtype)), 0, 1))


def _relative_entropy(p: Array, m: Array) -> Scalar:
    there = p > 0
    ratio = jnp.where(there, p, 1) / jnp.where(there, m, 1)
    return jnp.sum(jnp.where(there, p * jnp.log(ratio), 0))
