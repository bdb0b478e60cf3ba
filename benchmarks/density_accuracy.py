"""How near is the spectral density to the truth, and do its bounds hold it?"""

from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import table
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import hessjax as hj

PRODUCTS = 80
ROUNDING = 1e-5
"""An eigenvalue counts as where it is, give or take this share of the range: products are in float32."""


def measure(quick: bool) -> table.Measured:
    problem, runs = trained(20 if quick else 300), 8 if quick else 100
    matvec = hj.hessian(problem.loss_fn, problem.params, *problem.args)
    spectrum = dense_spectrum(problem)
    figures: list[table.Figure] = []
    raw: dict[str, Any] = {"smallest": float(spectrum[0]), "largest": float(spectrum[-1])}
    for name, reorthogonalise in (("a basis", True), ("two vectors", False)):
        densities = densities_of(matvec, problem.params, runs, reorthogonalise)
        distances = [wasserstein(density, spectrum) / np.ptp(spectrum) for density in densities]
        outside = [not contained(density, spectrum) for density in densities]
        figures += figures_of(name, np.array(distances), outside, len(spectrum))
        raw[name] = {"distances": distances, "outside": outside}
    return figures, raw


def trained(steps: int) -> models.Problem:
    """64-16-10 on scikit-learn's digits, 1210 weights, after some steps of Adam on all of them."""
    digits = load_digits()
    batch = (jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target))
    sizes = {"first": (64, 16), "last": (16, 10)}
    params = {
        name: {"kernel": models.normal(seed, shape) / np.sqrt(shape[0]), "bias": jnp.zeros(shape[1])}
        for seed, (name, shape) in enumerate(sizes.items())
    }
    adam = optax.adam(1e-2)

    @jax.jit
    def step(_: int, carry: Any) -> Any:
        params, state = carry
        updates, state = adam.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, _ = jax.lax.fori_loop(0, steps, step, (params, adam.init(params)))
    return models.Problem(loss_fn, params, (batch,))


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Cross-entropy of a smooth two-layer network."""
    hidden = jnp.tanh(batch[0] @ params["first"]["kernel"] + params["first"]["bias"])
    return models.cross_entropy(hidden @ params["last"]["kernel"] + params["last"]["bias"], batch)


def dense_spectrum(problem: models.Problem) -> np.ndarray:
    """All eigenvalues, in float64."""
    with jax.enable_x64(True):
        params, (images, labels) = jax.tree.map(np.asarray, (problem.params, problem.args[0]))
        flat, unravel = ravel_pytree(jax.tree.map(np.float64, params))
        grad = jax.grad(lambda v: problem.loss_fn(unravel(v), (images.astype(np.float64), labels)))
        column = jax.jit(lambda v, e: jax.jvp(grad, (v,), (e,))[1])
        matrix = np.stack([column(flat, e) for e in np.eye(flat.size)])
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


def densities_of(matvec: Any, like: Any, runs: int, reorthogonalise: bool) -> list[Any]:
    """One density a seed, each from one probe."""

    @jax.jit
    def all_runs(matvec: Any, keys: jax.Array) -> Any:
        estimate = lambda key: hj.spectral_density(  # noqa: E731
            matvec, key, like, 1, PRODUCTS, reorthogonalise=reorthogonalise, on_device=True
        )
        return jax.lax.map(estimate, keys)

    stacked = jax.device_get(all_runs(matvec, jax.random.split(jax.random.key(0), runs)))
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(runs)]


def wasserstein(density: Any, spectrum: np.ndarray) -> float:
    """W₁: the area between the two staircases."""
    nodes, weights = density.nodes[0].astype(float), density.weights[0].astype(float)
    places = np.concatenate([nodes, spectrum])
    order = np.argsort(places)
    steps = np.concatenate([weights / weights.sum(), np.full(len(spectrum), -1 / len(spectrum))])
    between = np.abs(np.cumsum(steps[order]))[:-1]
    return float(np.sum(between * np.diff(places[order])))


def contained(density: Any, spectrum: np.ndarray) -> bool:
    """Whether the true staircase is within the bounds everywhere: beside all its steps, and all of theirs."""
    gap = ROUNDING * np.ptp(spectrum)
    places = np.concatenate([density.nodes[0], spectrum])
    grid = np.sort(np.concatenate([places - gap, places, places + gap])).astype(np.float32)
    lower, upper = map(np.asarray, density.bounds(grid))
    below, above = (np.searchsorted(spectrum, grid + x, "right") / len(spectrum) for x in (-gap, gap))
    return bool(np.all((lower <= above + 1e-6) & (upper >= below - 1e-6)))


def figures_of(name: str, distances: np.ndarray, outside: list[bool], size: int) -> list[table.Figure]:
    low, median, high = (float(x) for x in 100 * np.quantile(distances, [0.25, 0.5, 0.75]))
    note = f"{size} eigenvalues, one probe, {len(outside)} seeds; worst {100 * distances.max():.2g} %"
    near = f"W₁ from the true spectrum after {PRODUCTS} products, with {name}"
    held = f"runs whose 95 % bounds leave the truth out, with {name}"
    return [
        table.Figure(near, median, "% of the range", 1.0, (low, high), note),
        table.Figure(held, 100 * float(np.mean(outside)), "%", 5.0),
    ]


if __name__ == "__main__":
    table.main(__doc__, measure)
