"""How near to the trace do as many products come, by each estimator?"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import table
from jax.tree_util import Partial

import hessjax as hj

BUDGETS = (60, 120, 240)
METHODS = {"Hutchinson": None, "Hutch++": hj.estimators.hutchpp, "XTrace": hj.estimators.xtrace}

PUBLISHED = {
    ("flat", "Hutchinson"): (1.2e-3, 1.1e-3, 6.2e-4),
    ("flat", "Hutch++"): (2.8e-3, 2.0e-3, 1.6e-3),
    ("flat", "XTrace"): (2.1e-3, 1.3e-3, 1.1e-3),
    ("i⁻²", "Hutchinson"): (1.0e-1, 6.6e-2, 4.4e-2),
    ("i⁻²", "Hutch++"): (1.4e-3, 3.3e-4, 9.5e-5),
    ("i⁻²", "XTrace"): (7.8e-4, 2.1e-4, 5.3e-5),
}
"""Mean relative errors over 100 trials, d = 1000, at the three budgets (arXiv 2301.07825)."""


def spectra(d: int) -> dict[str, np.ndarray]:
    """The eigenvalues of that paper's six problems."""
    i = np.arange(1.0, d + 1)
    steps = {f"50 ones, then {low:g}": np.where(i <= 50, 1.0, low) for low in (1e-3, 1e-8)}
    return {"flat": np.linspace(1, 3, d), "i⁻²": i**-2, "0.9ⁱ": 0.9**i, "0.7ⁱ": 0.7**i, **steps}


def measure(quick: bool) -> table.Measured:
    d, trials, budgets = (200, 10, BUDGETS[:1]) if quick else (1000, 100, BUDGETS)
    with jax.enable_x64(True):
        # Random signs see the eigenvectors: these must not lie along the axes.
        rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))
        raw = {
            problem: {
                method: [mean_error(rotation, values, make, budget, trials) for budget in budgets]
                for method, make in METHODS.items()
            }
            for problem, values in spectra(d).items()
        }
    figures = [
        figure_of(problem, method, budget, error, published)
        for problem, methods in raw.items()
        for method, errors in methods.items()
        for budget, error, published in zip(
            budgets, errors, PUBLISHED.get((problem, method), (None,) * 3), strict=False
        )
    ]
    return figures, raw


def mean_error(rotation: np.ndarray, values: np.ndarray, make: Any, budget: int, trials: int) -> float:
    """The mean relative error over many keys."""
    matrix = jnp.asarray((rotation * values) @ rotation.T)
    keys = jax.random.split(jax.random.key(0), trials)
    estimates = estimates_of(make, budget, matrix, keys)
    return float(np.mean(np.abs(np.asarray(estimates) - values.sum())) / values.sum())


@functools.partial(jax.jit, static_argnums=(0, 1))
def estimates_of(make: Any, budget: int, matrix: jax.Array, keys: jax.Array) -> jax.Array:
    like, matvec = jnp.zeros(len(matrix), matrix.dtype), Partial(jnp.matmul, matrix)

    def one(key: jax.Array) -> jax.Array:
        return hj.trace(matvec, key, like, budget, estimator=make, on_device=True).mean

    return jax.lax.map(one, keys, batch_size=25)


def figure_of(problem: str, method: str, budget: int, error: float, published: float | None) -> table.Figure:
    """As a multiple of the published error where there is one; the new methods are held to theirs."""
    name = f"{method}, {problem}, {budget} products"
    if published is None:
        return table.Figure(name, error, "relative error")
    bar = None if method == "Hutchinson" else 1.2
    return table.Figure(name, error / published, "× the published error", bar, note=f"{error:.2g}")


if __name__ == "__main__":
    table.main(__doc__, measure)
