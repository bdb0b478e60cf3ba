"""A spectral density as nodes and weights, and the curves that can be drawn from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class SpectralDensity(NamedTuple):
    """The distribution of eigenvalues, as the Gauss quadrature of every probe.

    Attributes:
        nodes: (probes, m) Ritz values, ascending, in loss per squared parameter.
        weights: (probes, m) the share of the spectrum at each node; every row sums to 1. Rows of zeros
            belong to probes that did not take place.
        num_probes: how many probes were finished.
        num_matvecs: how many products it took.
        dimension: the number of parameters, as a float: there may be more than an int32 can count.
    """

    nodes: Float[Array, "probes m"]
    weights: Float[Array, "probes m"]
    num_probes: Int[Array, ""]
    num_matvecs: Int[Array, ""]
    dimension: Float[Array, ""]

    def moment(self, power: int = 1) -> Float[Array, ""]:
        """The mean of λ^power over the spectrum: tr(A^power)/d."""
        return jnp.sum(self.weights * self.nodes**power) / jnp.maximum(self.num_probes, 1)

    def cumulative(self, grid: Float[Array, " n"]) -> Float[Array, " n"]:
        """The share of eigenvalues at or below each grid point; a staircase."""
        below = self.nodes[..., None] <= grid
        return jnp.sum(jnp.where(below, self.weights[..., None], 0), axis=(0, 1)) / jnp.maximum(
            self.num_probes, 1
        )

    def curve(
        self, num_points: int = 1000, *, bandwidth: float | None = None
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """The density smoothed by Gaussians, on a linear axis.

        Args:
            num_points: length of the grid.
            bandwidth: standard deviation of the Gaussians. By default the width of the bulk (from the 5 %
                to the 95 % quantile) over the number of nodes, at least 1/2000 of the whole range: it
                follows a rescaling of the loss, and outliers do not blur the bulk.

        Returns:
            `(grid, density)`; the density integrates to 1.
        """
        low, high = self._ends()
        width = self._bulk() / self.nodes.shape[1] if bandwidth is None else jnp.asarray(bandwidth)
        width = jnp.maximum(width, (high - low) / 2000) if bandwidth is None else width
        width = jnp.where(width > 0, width, jnp.maximum(jnp.abs(high), 1) * 1e-3)  # a single eigenvalue
        grid = jnp.linspace(low - 4 * width, high + 4 * width, num_points)
        return grid, self._smooth(grid, self.nodes, width)

    def signed_log_curve(
        self, num_points: int = 1000, *, threshold: float | None = None, bandwidth: float = 0.1
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """The density on a signed-logarithmic axis, where bulk and outliers are both visible.

        Args:
            num_points: length of the grid.
            threshold: eigenvalues well below it are shown linearly, those above it logarithmically. By
                default a thousandth of the largest absolute node.
            bandwidth: standard deviation of the Gaussians in units of u = asinh(λ / threshold), that is
                about the relative width of a far outlier.

        Returns:
            `(grid, density)`: eigenvalues λ, evenly spaced in u, and the share of eigenvalues per unit of u.
        """
        low, high = self._ends()
        top = jnp.maximum(jnp.abs(low), jnp.abs(high))
        unit = 1e-3 * jnp.where(top > 0, top, 1) if threshold is None else jnp.asarray(threshold)
        ends = jnp.arcsinh(low / unit) - 4 * bandwidth, jnp.arcsinh(high / unit) + 4 * bandwidth
        u = jnp.linspace(*ends, num_points)
        return jnp.sinh(u) * unit, self._smooth(u, jnp.arcsinh(self.nodes / unit), jnp.asarray(bandwidth))

    def _smooth(self, grid: Array, nodes: Array, width: Array) -> Float[Array, " n"]:
        bumps = jax.scipy.stats.norm.pdf(grid, nodes[..., None], width)
        return jnp.sum(self.weights[..., None] * bumps, axis=(0, 1)) / jnp.maximum(self.num_probes, 1)

    def _ends(self) -> tuple[Array, Array]:
        """The extremes over all probes."""
        took_place = self.weights > 0
        return (
            jnp.min(jnp.where(took_place, self.nodes, jnp.inf)),
            jnp.max(jnp.where(took_place, self.nodes, -jnp.inf)),
        )

    def _bulk(self) -> Array:
        order = jnp.argsort(self.nodes, axis=None)
        nodes, shares = self.nodes.reshape(-1)[order], jnp.cumsum(self.weights.reshape(-1)[order])
        quantiles = jnp.searchsorted(shares / shares[-1], jnp.array([0.05, 0.95], shares.dtype))
        low, high = nodes[jnp.minimum(quantiles, nodes.size - 1)]
        return high - low
