import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from hessjax.estimators._krylov import extend, pending, ritz, start
from hessjax.estimators.probes import gaussian

KEY = jax.random.key(0)


def grown(matrix, steps, width=1, capacity=None):
    like = oracles.tree_like(len(matrix))
    matvec = oracles.matvec_of(matrix, like)
    block = jax.vmap(lambda key: gaussian(key, like))(jax.random.split(KEY, width))
    space = start(block, capacity or steps)
    step = jax.jit(lambda space: extend(space, matvec(jax.tree.map(lambda x: x[0], pending(space)))))
    for _ in range(steps):
        space = step(space)
    return space


@pytest.mark.parametrize("width", [1, 3])
def test_the_recurrence_holds_and_the_basis_is_orthonormal(x64, width):
    matrix, _ = oracles.symmetric(np.r_[np.linspace(0, 1, 95), 5, 6, 7, 8, 9])
    oracles.check_recurrence(grown(matrix, 40, width), matrix)


def test_no_ghost_copies_of_the_outliers_in_float32():
    """10 outliers over a bulk of 490: without reorthogonalisation 80 steps give dozens of copies."""
    matrix, _ = oracles.symmetric(np.r_[np.linspace(0, 1, 490), np.linspace(10, 100, 10)])
    values, _ = ritz(grown(matrix.astype(np.float32), 80))
    above = np.asarray(values)[np.asarray(values) > 5]
    np.testing.assert_allclose(above, np.linspace(10, 100, 10), rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 7])
def test_an_invariant_subspace_is_left_by_a_fresh_direction(x64, width):
    """Three distinct eigenvalues: the Krylov space ends early, the multiplicities lie beyond it."""
    spectrum = np.repeat([1.0, 2.0, 5.0], [17, 2, 1])
    space = grown(oracles.symmetric(spectrum)[0], 20, width)
    np.testing.assert_allclose(ritz(space)[0], spectrum, atol=1e-12)


def test_vectors_to_start_from_that_depend_on_each_other(x64):
    matrix, _ = oracles.symmetric(np.linspace(-1, 2, 30))
    like, matvec = jnp.zeros(30), oracles.matvec_of(matrix, jnp.zeros(30))
    vector = gaussian(KEY, like)
    space = start(jnp.stack([vector, 2 * vector, jnp.zeros(30)]), 12)
    for _ in range(9):
        space = extend(space, matvec(pending(space)[0]))
    oracles.check_recurrence(space, matrix)
