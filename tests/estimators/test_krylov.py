import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from hessjax.estimators import _basis
from hessjax.estimators._krylov import extend, pending, ritz, start
from hessjax.estimators.probes import gaussian


def filled(d, count, capacity, seed=0):
    """A basis with `count` orthonormal rows, stale rubbish after them, and the rows as a matrix."""
    like = oracles.tree_like(d)
    rows, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    unravel = jax.flatten_util.ravel_pytree(like)[1]
    basis = _basis.allocate(like, capacity)
    for i in range(capacity):
        row = rows[:, i % d] if i < count else np.full(d, 7.0)
        basis = _basis.write(basis, jnp.int32(i), unravel(jnp.asarray(row)))
    return basis, rows[:, :count].T, unravel


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 40])
def test_project_out_is_dense_projection_and_ignores_what_is_not_filled(x64, count):
    basis, Q, unravel = filled(50, count, 41)
    vector = np.random.default_rng(1).normal(size=50)
    left, components = _basis.project_out(basis, jnp.int32(count), unravel(jnp.asarray(vector)))
    np.testing.assert_allclose(components[:count], Q @ vector, rtol=1e-12, atol=1e-14)
    assert not components[count:].any()
    want = vector - Q.T @ (Q @ vector)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(left)[0], want, rtol=1e-11, atol=1e-13)


def test_read_and_write_across_chunks(x64):
    basis, Q, _ = filled(50, 40, 41)
    for i in (0, 15, 16, 31, 32, 39):
        row = jax.flatten_util.ravel_pytree(_basis.read(basis, jnp.int32(i)))[0]
        np.testing.assert_array_equal(row, Q[i])
    np.testing.assert_array_equal(
        jax.flatten_util.ravel_pytree(_basis.read(basis, jnp.int32(40)))[0], np.full(50, 7.0)
    )


def test_a_vector_almost_in_the_span_is_orthogonal_all_the_same(x64):
    basis, Q, unravel = filled(50, 20, 41)
    inside = Q.T @ np.random.default_rng(2).normal(size=20)
    outside = 1e-10 * np.random.default_rng(3).normal(size=50)
    got = _basis.orthogonalise(
        basis, jnp.int32(20), unravel(jnp.asarray(inside + outside)), jnp.float64(1e-14)
    )
    vector = jax.flatten_util.ravel_pytree(got.vector)[0]
    np.testing.assert_allclose(Q @ vector, 0, atol=1e-14)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert float(got.norm) == pytest.approx(np.linalg.norm(outside - Q.T @ (Q @ outside)), rel=1e-4)


def test_a_vector_in_the_span_gives_way_to_a_fresh_direction(x64):
    basis, Q, unravel = filled(50, 20, 41)
    inside = Q.T @ np.random.default_rng(2).normal(size=20)
    got = _basis.orthogonalise(basis, jnp.int32(20), unravel(jnp.asarray(inside)), jnp.float64(1e-12))
    vector = jax.flatten_util.ravel_pytree(got.vector)[0]
    assert float(got.norm) == 0
    np.testing.assert_allclose(got.components[:20], Q @ inside, rtol=1e-12)
    np.testing.assert_allclose(Q @ vector, 0, atol=1e-14)
    assert np.linalg.norm(vector) == pytest.approx(1)


@pytest.mark.parametrize("strip", [7, 2**16])
def test_combine_and_rotate_are_products(x64, strip, monkeypatch):
    monkeypatch.setattr(_basis, "STRIP", strip)
    basis, Q, _ = filled(50, 40, 40)
    C = np.random.default_rng(4).normal(size=(19, 40))
    np.testing.assert_allclose(
        oracles.rows(_basis.combine(basis, jnp.asarray(C))), C @ Q, rtol=1e-11, atol=1e-13
    )
    rotated = np.concatenate([oracles.rows(chunk) for chunk in _basis.rotate(basis, jnp.asarray(C))])
    np.testing.assert_allclose(rotated[:19], C @ Q, rtol=1e-11, atol=1e-13)
    assert not rotated[19:].any()


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
