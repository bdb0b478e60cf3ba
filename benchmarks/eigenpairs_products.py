"""How many products do the ten largest eigenvalues of a network take, against deflated power iteration?"""

from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import table

import hessjax as hj

ACCURACY = 1e-4
"""Relative error allowed in every eigenvalue."""


def measure(quick: bool) -> table.Measured:
    k, steps = (3, 30) if quick else (10, 500)
    problem = models.trained_on_digits((8,) if quick else (32,), steps)
    matvec = hj.hessian(problem.loss_fn, problem.params, *problem.args, linearize=True)
    spectrum = np.linalg.eigvalsh(models.dense(matvec, problem.params))[::-1]
    truth = spectrum[:k]
    pairs = hj.eigenpairs(matvec, jax.random.key(0), problem.params, k, "largest", max_matvecs=1000)
    again = warm(problem, pairs, k)
    power = deflated_power_iteration(spectrum, k, np.random.default_rng(0))
    error = float(np.max(np.abs(np.asarray(pairs.values) / truth - 1)))
    note = f"{int(pairs.num_matvecs)} products against {power}; d = {problem.num_params:,}"
    figures = [
        table.Figure("products, over power iteration's", int(pairs.num_matvecs) / power, "×", 0.2, note=note),
        table.Figure("largest relative error of the values", error, "", ACCURACY, note=f"k = {k}"),
        table.Figure("products 5 training steps later", again / int(pairs.num_matvecs), "×", note=f"{again}"),
    ]
    return figures, {"truth": truth.tolist(), "values": np.asarray(pairs.values).tolist(), "power": power}


def warm(problem: models.Problem, pairs: Any, k: int) -> int:
    """Products for the same pairs five steps of gradient descent later, from the old vectors."""
    params, grad = problem.params, jax.jit(jax.grad(problem.loss_fn))
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grad(params, *problem.args))
    matvec = hj.hessian(problem.loss_fn, params, *problem.args, linearize=True)
    later = hj.eigenpairs(
        matvec, jax.random.key(1), params, k, "largest", max_matvecs=1000, start=pairs.vectors
    )
    assert bool(jnp.all(later.converged))
    return int(later.num_matvecs)


def deflated_power_iteration(spectrum: np.ndarray, k: int, rng: np.random.Generator) -> int:
    """Products of power iteration for one eigenvalue after the other.

    Told the truth, it stops as soon as a value is right, and the eigenvectors before are taken out exactly:
    no method could be so good. In the basis of the eigenvectors the matrix is diagonal, and a normal start
    is normal there too.
    """
    count = 0
    for i, value in enumerate(spectrum[:k]):
        vector, quotient = rng.normal(size=len(spectrum)), np.inf
        vector[:i] = 0
        while abs(quotient / value - 1) > ACCURACY:
            vector /= np.linalg.norm(vector)
            product, count = spectrum * vector, count + 1
            quotient, vector = vector @ product, product
    return count


if __name__ == "__main__":
    table.main(__doc__, measure)
