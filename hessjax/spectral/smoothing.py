"""From nodes and weights to a smooth curve: where it begins and ends, how wide the bulk is, the bumps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bumps(
    grid: Float[Array, " n"], nodes: Float[Array, "probes m"], weights: Float[Array, "probes m"], width: Array
) -> Float[Array, "probes n"]:
    """A Gaussian for every node, of its weight; summed for each probe."""
    return jnp.sum(weights[..., None] * jax.scipy.stats.norm.pdf(grid, nodes[..., None], width), axis=1)


def ends(nodes: Float[Array, "probes m"], weights: Float[Array, "probes m"]) -> tuple[Array, Array]:
    """The extremes over all probes."""
    there = weights > 0
    return jnp.min(jnp.where(there, nodes, jnp.inf)), jnp.max(jnp.where(there, nodes, -jnp.inf))


def bulk(nodes: Float[Array, "probes m"], weights: Float[Array, "probes m"]) -> Array:
    """The distance from the 5 % to the 95 % quantile."""
    order = jnp.argsort(nodes, axis=None)
    places, shares = nodes.reshape(-1)[order], jnp.cumsum(weights.reshape(-1)[order])
    quantiles = jnp.searchsorted(shares / shares[-1], jnp.array([0.05, 0.95], shares.dtype))
    low, high = places[jnp.minimum(quantiles, places.size - 1)]
    return high - low
