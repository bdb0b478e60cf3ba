"""The error of an approximation beside dense Frobenius norms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from tests.layers.cases import CASES
from tests.oracles import matrix_of

CATEGORICAL = hj.likelihoods.categorical


@pytest.fixture
def problem(x64):
    case = CASES["dense"]
    params, (x, _) = case.params(), case.batch(3)
    moments = hj.layers.moments(case.model_fn, params, [x], likelihood=CATEGORICAL)
    return params, hj.layers.kfac(moments), hj.fisher(case.model_fn, params, x, likelihood=CATEGORICAL)


def test_it_is_the_relative_frobenius_error(problem):
    params, K, F = problem
    found = hj.layers.quality(K, F, jax.random.key(0), params, num_probes=200)
    dense, exact = matrix_of(K, params), matrix_of(F, params)
    assert float(found.error) == pytest.approx(
        np.linalg.norm(dense - exact) / np.linalg.norm(exact), rel=0.05
    )
    ends = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(params))])
    squares = 0.0
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        block, ours = exact[start:end, start:end], dense[start:end, start:end]
        squares += np.linalg.norm(block) ** 2
        error = np.linalg.norm(ours - block) / np.linalg.norm(block)
        assert abs(found.errors[i] - error) <= max(5 * found.stderr[i], 1e-6)
        assert float(found.norms[i]) == pytest.approx(np.linalg.norm(block), rel=0.1)
    outside = 1 - squares / np.linalg.norm(exact) ** 2
    assert float(found.outside) == pytest.approx(outside, abs=0.05)
    assert found.num_matvecs == 200 * 4


def test_what_is_captured_of_eigenpairs(problem):
    params, K, F = problem
    pairs = hj.eigenpairs(F, jax.random.key(0), params, k=2, which="largest")
    found = hj.layers.quality(K, F, jax.random.key(0), params, num_probes=1, pairs=pairs)
    dense = matrix_of(K, params)
    vectors = np.concatenate([np.asarray(x).reshape(2, -1) for x in jax.tree.leaves(pairs.vectors)], axis=1)
    expected = np.einsum("ki,ij,kj->k", vectors, dense, vectors) / pairs.values
    np.testing.assert_allclose(found.captured, expected, rtol=1e-8)
    assert "Captured of the eigenpairs given:" in str(found)


def test_the_matrix_itself_has_no_error(problem):
    params, _, F = problem
    found = hj.layers.quality(F, F, jax.random.key(0), params)
    assert float(found.error) == 0
    assert not found.errors.any()


@pytest.mark.parametrize("unit", [1.0, 1e-24, 1e24])
def test_its_errors_have_no_units(unit):
    """Squares of small products leave float32, those of one leaf beside another's too."""
    sizes = {"a": jnp.array([3.0, 4.0]) * unit, "b": jnp.array([6.0]), "empty": jnp.zeros(0)}
    like = jax.tree.map(jnp.zeros_like, sizes)
    F = jax.tree_util.Partial(jax.tree.map, jnp.multiply, sizes)
    K = jax.tree_util.Partial(jax.tree.map, jnp.multiply, {**sizes, "a": sizes["a"].at[1].set(0)})
    found = hj.layers.quality(K, F, jax.random.key(0), like)
    np.testing.assert_allclose(found.errors, [0.8, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(found.norms, [5 * unit, 6, 0], rtol=1e-6)
    np.testing.assert_allclose(found.error, 4 * unit / np.hypot(5 * unit, 6), rtol=1e-6)


def test_bad_input_is_named(problem, untyped):
    params, K, F = problem
    with pytest.raises(TypeError, match="`pairs` must be an `Eigenpairs`"):
        hj.layers.quality(K, F, jax.random.key(0), params, pairs=jnp.ones(3))
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        hj.layers.quality(K, F, jax.random.key(0), params, num_probes=0)
