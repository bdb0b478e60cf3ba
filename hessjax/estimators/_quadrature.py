"""Gauss quadrature of the spectrum: nodes and weights, what they bound, and their smoothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers, _sharding, _tree
from hessjax._core._sharding import Shardings
from hessjax._core._types import Block, Scalar, Vector
from hessjax.estimators import _basis, _krylov
from hessjax.estimators._krylov import Krylov


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
    # `eigh` returns nodes within eps · ‖T‖; the factor is the same as for breakdowns.
    slack = 64 * jnp.finfo(nodes.dtype).eps * jnp.max(jnp.abs(nodes))
    there = weights > jnp.finfo(weights.dtype).eps
    up_to = jnp.cumsum(weights)
    # Running extremes, since a node of weight zero must not tighten what its neighbours bound.
    below = jax.lax.cummax(jnp.where(there, up_to - weights, 0))
    above = jax.lax.cummin(jnp.where(there, up_to, 1), reverse=True)
    certain = jnp.searchsorted(nodes + slack, grid, side="right")  # nodes at or below x for sure
    possible = jnp.searchsorted(nodes - slack, grid, side="right")
    return jnp.pad(below, (1, 0))[certain], jnp.pad(above, (0, 1), constant_values=1)[possible]


def sphere_deviation(
    dimension: Float[Array, ""], num_probes: Int[Array, ""], confidence: float | int | Float[Array, ""]
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
    return jnp.sqrt(log_odds / (jnp.maximum(num_probes, 1).astype(dimension.dtype) * (dimension + 2)))


def bumps(
    grid: Float[Array, " n"],
    nodes: Float[Array, "probes m"],
    weights: Float[Array, "probes m"],
    width: Scalar,
) -> Float[Array, "probes n"]:
    """A Gaussian for every node, of its weight; summed for each probe."""
    # In units of the width, whose square may leave float32.
    away = (grid[None, None] - nodes[..., None]) / width
    return jnp.sum(weights[..., None] * jax.scipy.stats.norm.pdf(away), axis=1) / width


def ends(nodes: Float[Array, "probes m"], weights: Float[Array, "probes m"]) -> tuple[Scalar, Scalar]:
    """The extremes over all probes."""
    there = weights > 0
    return jnp.min(jnp.where(there, nodes, jnp.inf)), jnp.max(jnp.where(there, nodes, -jnp.inf))


def standard_error(
    weights: Float[Array, "probes m"],
    values: Float[Array, "probes m"],
    took_place: Bool[Array, " probes"],
    dimension: Scalar,
) -> Scalar:
    """Of the mean over the probes of Σ w f, from the probes' own variances, widened where they are skewed."""
    means = jnp.sum(weights * values, axis=1, keepdims=True)
    # Of each probe: the variance of Σ w f is 2/d · Σ w (f − Σ w f)².
    deviations = jnp.where(took_place[:, None], jnp.sqrt(weights) * (values - means), 0)
    spread = _tree.norm(deviations)
    # √w c³ is (√w c)³/w: in units of the spread, so that no cube leaves float32.
    cubes = (deviations / jnp.where(spread > 0, spread, 1)) ** 3 / jnp.sqrt(
        jnp.where(weights > 0, weights, 1)
    )
    squared_skewness = 8 / dimension * jnp.sum(cubes) ** 2
    count = jnp.maximum(jnp.sum(took_place), 1).astype(spread.dtype)
    return jnp.sqrt(2 / dimension) * spread / count * jnp.sqrt(1 + squared_skewness / 10)


def bulk(nodes: Float[Array, "probes m"], weights: Float[Array, "probes m"]) -> Scalar:
    """The distance from the 5 % to the 95 % quantile."""
    # Quantiles of the mixture over all probes: each alone may miss an end of the bulk.
    order = jnp.argsort(nodes, axis=None)
    places, shares = nodes.reshape(-1)[order], jnp.cumsum(weights.reshape(-1)[order])
    quantiles = jnp.searchsorted(shares / shares[-1], jnp.array([0.05, 0.95], shares.dtype))
    low, high = places[jnp.minimum(quantiles, places.size - 1)]
    return high - low


class Quadrature(NamedTuple):
    """The Gauss quadrature of every probe under way; what is not there yet has weight 0, and sorts last."""

    nodes: Float[Array, "g m"]
    weights: Float[Array, "g m"]


class Recurrence(NamedTuple):
    """A Lanczos recurrence from g start vectors at once.

    Attributes:
        start: `(vectors, capacity, layouts) -> space`, for `capacity` steps; where the arrays lie.
        restart: `(space, vectors) -> space`, the same memory begun anew.
        rows: `(space) -> block`, what is to be multiplied next.
        extend: `(space, products) -> space`, one step.
        quadrature: `(space) -> Quadrature`.
    """

    start: Callable[[Block, int, Shardings], Any]
    restart: Callable[[Any, Block], Any]
    rows: Callable[[Any], Block]
    extend: Callable[[Any, Block], Any]
    quadrature: Callable[[Any], Quadrature]


# -- with a basis: one start vector at a time ------------------------------------------------------


def _restart_basis(space: Krylov, vectors: Block) -> Krylov:
    basis = _basis.write(space.basis, jnp.int32(0), _unit(_tree.row(vectors, 0)))
    return Krylov(basis, jnp.zeros_like(space.projected), jnp.zeros_like(space.size), space.asymmetry)


def _extend_basis(space: Krylov, products: Block) -> Krylov:
    return _krylov.extend(space, _tree.row(products, 0))


def quadrature_of_basis(space: Krylov) -> Quadrature:
    """As the space's first vector sees the spectrum."""
    values, vectors = _krylov.ritz(space)
    nodes, weights = _those_inside(values, vectors[0], jnp.arange(len(values), dtype=jnp.int32) < space.size)
    return Quadrature(nodes[None], weights[None])


with_basis = Recurrence(_krylov.start, _restart_basis, _krylov.pending, _extend_basis, quadrature_of_basis)


# -- with two vectors: any number of start vectors side by side -------------------------------------


class TwoVectors(NamedTuple):
    """The whole memory of g Lanczos recurrences.

    Attributes:
        row: the rows q to be multiplied next.
        back: −β · the rows before, what the recurrence adds to their products.
        diagonal: (g, m) of T.
        off_diagonal: (g, m) of T: the β after every step; 0 from a breakdown on.
        size: steps done.
    """

    row: Block
    back: Block
    diagonal: Float[Array, "g m"]
    off_diagonal: Float[Array, "g m"]
    size: Int[Array, ""]


def _start_two(vectors: Block, capacity: int, layouts: Shardings = ()) -> TwoVectors:
    num_rows = jax.tree.leaves(vectors)[0].shape[0]
    zeros = jnp.zeros((num_rows, capacity), _tree.accumulator_dtype(vectors))
    rows = _tree.row(vectors, 0)
    nothing = tuple(map(_sharding.zero_rows, [num_rows] * len(rows), rows, layouts or [None] * len(rows)))
    return TwoVectors(jax.vmap(_unit)(vectors), nothing, zeros, zeros, jnp.int32(0))


def _restart_two(space: TwoVectors, vectors: Block) -> TwoVectors:
    return _start_two(vectors, space.diagonal.shape[1])


def _extend_two(space: TwoVectors, products: Block) -> TwoVectors:
    """One step of the plain recurrence, in Paige's order: α of what is left when the row before is out.

    Orthogonality is lost as Ritz values converge and copies of them appear; they share the weight that one
    would have. After a breakdown the rows are zero.

    References:
        Paige (1972), Computational variants of the Lanczos method; Greenbaum (1989), Behavior of slightly
        perturbed Lanczos and conjugate-gradient recurrences.
    """
    step = jax.vmap(_step, in_axes=(0, 0, 0, 0, None, 0))
    row, back, diagonal, off = step(*space[:4], space.size, products)
    return TwoVectors(row, back, diagonal, off, space.size + 1)


def _step(
    row: Vector,
    back: Vector,
    diagonal: Float[Array, " m"],
    off: Float[Array, " m"],
    size: Int[Array, ""],
    product: Vector,
) -> tuple[Vector, Vector, Float[Array, " m"], Float[Array, " m"]]:
    # α from Aq − β · (row before), β as a norm: Paige's variant (2,7), with errors of order eps.
    residual = _tree.add_scaled(back, 1, product)
    alpha = _tree.inner(row, residual)
    residual = _tree.add_scaled(residual, -alpha, row)
    beta = _tree.norm(residual)
    diagonal = diagonal.at[size].set(alpha, mode="drop")
    # A bound of ‖T‖ in infinity norm: a breakdown is judged relative to the matrix, whatever its units.
    tiny = 64 * jnp.finfo(off.dtype).eps * (jnp.max(jnp.abs(diagonal)) + 2 * jnp.max(off))
    beta = jnp.where(beta > tiny, beta, 0)
    inverse = jnp.where(beta > 0, 1 / jnp.where(beta > 0, beta, 1), 0)
    off = off.at[size].set(beta, mode="drop")
    return _tree.scale(inverse, residual), _tree.scale(-beta, row), diagonal, off


def _quadrature_of_two(space: TwoVectors) -> Quadrature:
    return Quadrature(*jax.vmap(_gauss, in_axes=(0, 0, None))(space.diagonal, space.off_diagonal, space.size))


def _gauss(
    diagonal: Float[Array, " m"], off: Float[Array, " m"], size: Int[Array, ""]
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Nodes and weights of a tridiagonal T up to its first breakdown (Golub & Welsch 1969)."""
    # After β = 0 rows are zero, and what T holds there says nothing of A.
    unbroken = jnp.cumprod(jnp.where(off > 0, 1, 0))
    inside = (jnp.arange(len(off), dtype=jnp.int32) < size) & jnp.roll(unbroken, 1).at[0].set(1).astype(bool)
    off = jnp.where(inside[1:], off[:-1], 0)
    # Where T is not filled stands a number above all its eigenvalues, so that these sort last.
    above = 4 * jnp.max(jnp.abs(jnp.where(inside, diagonal, 0))) + 4 * jnp.max(off, initial=0)
    # Weights are squared first components of the eigenvectors: a dense `eigh` of a small T has both.
    T = jnp.diag(jnp.where(inside, diagonal, above)) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, vectors = _numbers.eigh(T)
    return _those_inside(
        values, vectors[0], jnp.arange(len(values), dtype=jnp.int32) < jnp.sum(inside, dtype=jnp.int32)
    )


without_basis = Recurrence(_start_two, _restart_two, lambda space: space.row, _extend_two, _quadrature_of_two)


def _those_inside(
    values: Float[Array, " m"], components: Float[Array, " m"], inside: Bool[Array, " m"]
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Nodes and weights; what is outside repeats the largest node, with weight 0."""
    largest = jnp.max(values, where=inside, initial=-jnp.inf)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return jnp.where(inside, values, largest), jnp.where(inside, components**2, 0)


def _unit(vector: Vector) -> Vector:
    return _tree.scale(1 / _tree.norm(vector), vector)
