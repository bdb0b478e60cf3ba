"""Bounds on a cumulative spectral density: what the quadratures leave open, and what the probes do."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def quadrature_bounds(
    nodes: Float[Array, " m"], weights: Float[Array, " m"], grid: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """What a Gauss quadrature says of the cumulative function Ψ of its measure (Chebyshev–Markov–Stieltjes).

    At a node θ_j there are polynomials of degree 2m − 2 above and below the step 1{x ≤ θ_j} that agree with
    it at all other nodes. The quadrature integrates them exactly, hence

        Σ_{i<j} w_i ≤ Ψ(θ_j−) ≤ Ψ(θ_j) ≤ Σ_{i≤j} w_i,

    and between θ_j and θ_{j+1} Ψ lies from Σ_{i<j} w_i to Σ_{i≤j+1} w_i. Two concessions to rounding: a node
    within 64 ε ‖T‖ of x counts as on the side of x that makes the bounds wider, and so does a node of weight
    zero (after a breakdown), which is left out.

    Args:
        nodes: (m,) ascending.
        weights: (m,) not negative, of sum 1.
        grid: (n,) where Ψ is asked for.

    Returns:
        `(lower, upper)`, each (n,).

    References:
        Szegő (1975), Orthogonal Polynomials, §3.41; Chen, Trogdon & Ubaru (2021), arXiv 2105.06595, §3.
    """
    slack = 64 * jnp.finfo(nodes.dtype).eps * jnp.max(jnp.abs(nodes))
    there = weights > jnp.finfo(weights.dtype).eps
    up_to = jnp.cumsum(weights)
    below = jax.lax.cummax(jnp.where(there, up_to - weights, 0))
    above = jax.lax.cummin(jnp.where(there, up_to, 1), reverse=True)
    certain = jnp.searchsorted(nodes + slack, grid, side="right")  # nodes at or below x for sure
    possible = jnp.searchsorted(nodes - slack, grid, side="right")
    return jnp.pad(below, (1, 0))[certain], jnp.pad(above, (0, 1), constant_values=1)[possible]


def sphere_deviation(
    dimension: Array, num_probes: Array, confidence: float | int | Array
) -> Float[Array, ""]:
    """How far the mean of the probes' cumulative functions is from the true one, for all x at once.

    For v uniform on the sphere and k of d eigenvalues at or below x, Ψ(x) is the sum of k of the d squared
    components: Beta(k/2, (d−k)/2), of mean k/d, and sub-Gaussian with variance proxy 1/(2(d+2)) (Marchal &
    Arbel 2017). So the mean of n of them is off by more than t with probability at most 2 exp(−n(d+2)t²),
    and there are fewer than d values of k to take a union over:

        P(sup_x |⟨Ψ⟩ − Φ| > t) ≤ 2 d exp(−n (d+2) t²).

    Args:
        dimension: d.
        num_probes: n.
        confidence: one minus that probability.

    Returns:
        t.

    References:
        Chen, Trogdon & Ubaru (2021), arXiv 2105.06595, Theorem 1.
    """
    log_odds = jnp.log(2 * dimension) - jnp.log(1 - jnp.asarray(confidence, dimension.dtype))
    return jnp.sqrt(log_odds / (jnp.maximum(num_probes, 1) * (dimension + 2)))
