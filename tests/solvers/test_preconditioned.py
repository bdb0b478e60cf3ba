"""Preconditioned conjugate gradients beside numpy, and beside those without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree

import hessjax as hj

KEY = jax.random.key(0)
PCG = hj.estimators.conjugate_gradient


def problem(eigenvalues, dampings=1.0):
    """A matvec with these eigenvalues, a right-hand side, an approximate inverse, and all in full."""
    like = oracles.tree_like(len(eigenvalues))
    matrix, vectors = oracles.symmetric(eigenvalues)
    near = (vectors / (np.asarray(eigenvalues) * dampings)) @ vectors.T
    b = np.random.default_rng(1).normal(size=len(eigenvalues))
    return oracles.matvec_of(matrix, like), oracles.matvec_of(near, like), ravel_pytree(like)[1](b), matrix, b


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("damping", [0.0, 0.7, -0.5])
def test_it_solves_what_numpy_solves(x64, damping):
    A, P, rhs, matrix, b = problem(np.geomspace(1, 1e3, 30), np.linspace(0.5, 2, 30))
    solution = hj.solve(
        A, rhs, damping, method=functools.partial(PCG, preconditioner=P), tol=hj.relative(1e-12)
    )
    expected = np.linalg.solve(matrix + damping * np.eye(30), b)
    np.testing.assert_allclose(flat(solution.x), expected, rtol=1e-8, atol=1e-10)
    assert solution.converged


def test_with_the_inverse_it_takes_one_step(x64):
    A, P, rhs, matrix, b = problem(np.geomspace(1, 1e6, 30))
    found, _ = hj.run(PCG(rhs, preconditioner=P), A, KEY, rhs, max_matvecs=1)
    np.testing.assert_allclose(flat(found.x), np.linalg.solve(matrix, b), rtol=1e-6)
    assert found.converged


def test_without_scaling_it_is_conjugate_gradients(x64):
    A, _, rhs, _, _ = problem(np.geomspace(0.1, 9, 12))
    identity = jax.tree_util.Partial(lambda v: v)
    for count in (1, 3, 6):
        ours, _ = hj.run(PCG(rhs, 0.3, preconditioner=identity), A, KEY, rhs, max_matvecs=count)
        plain, _ = hj.run(hj.estimators.conjugate_gradient(rhs, 0.3), A, KEY, rhs, max_matvecs=count)
        oracles.close(ours.x, plain.x, rtol=1e-8)
        np.testing.assert_allclose(ours.residual, plain.residual, rtol=1e-7)


def test_from_a_vector_to_start_from_it_takes_that_product_and_then_fewer(x64):
    A, P, rhs, matrix, b = problem(np.geomspace(1, 1e6, 30))
    start = jax.tree.map(lambda x: 3 + x, rhs)
    found, _ = hj.run(PCG(rhs, start=start, preconditioner=P), A, KEY, rhs, max_matvecs=2)
    np.testing.assert_allclose(flat(found.x), np.linalg.solve(matrix, b), rtol=1e-6)
    assert found.converged


def test_negative_curvature_ends_it_at_the_last_good_iterate(x64):
    A, _, rhs, _, _ = problem([-1.0, *np.linspace(1, 9, 9)])
    identity = jax.tree_util.Partial(lambda v: v)
    solution = hj.solve(A, rhs, method=functools.partial(PCG, preconditioner=identity), max_matvecs=20)
    assert solution.negative_curvature
    assert not solution.converged
    assert float(solution.curvature) < 0
    turned = jax.tree_util.Partial(lambda v: jax.tree.map(jnp.negative, v))
    found, _ = hj.run(PCG(rhs, preconditioner=turned), A, KEY, rhs, max_matvecs=3)
    assert np.isnan(found.residual)  # that is not positive definite


def test_zero_has_the_solution_zero(x64):
    A, P, rhs, _, _ = problem(np.linspace(1, 9, 9))
    zero = jax.tree.map(jnp.zeros_like, rhs)
    solution = hj.solve(A, zero, method=functools.partial(PCG, preconditioner=P))
    assert not flat(solution.x).any()
    assert solution.converged


def test_kfac_saves_half_of_the_products():
    keys = jax.random.split(KEY, 4)
    params = {"u": jax.random.normal(keys[0], (8, 12)) / 3, "v": jax.random.normal(keys[1], (12, 4)) / 3}
    x = jax.random.normal(keys[2], (256, 8)) * jnp.geomspace(0.1, 10, 8)[None]
    model_fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]
    options = {"likelihood": hj.likelihoods.categorical}
    F = hj.fisher(model_fn, params, x, **options)
    P = hj.layers.kfac(hj.layers.moments(model_fn, params, [x], **options)).inverse(1e-4)
    rhs = jax.tree.map(lambda p: jax.random.normal(keys[3], p.shape), params)
    tol = hj.relative(1e-3)
    plain, _ = hj.run(hj.estimators.conjugate_gradient(rhs, 1e-4, tol=tol), F, KEY, rhs, max_matvecs=300)
    ours, _ = hj.run(PCG(rhs, 1e-4, preconditioner=P, tol=tol), F, KEY, rhs, max_matvecs=150)
    assert not plain.converged
    assert ours.converged
