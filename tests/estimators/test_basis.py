import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj
from hessjax.estimators import _basis


@pytest.fixture(autouse=True, params=[0, _basis.WHOLE], ids=["in chunks", "whole"])
def chunks(request, monkeypatch):
    """Small bases are one chunk; here they are also cut as large ones are."""
    monkeypatch.setattr(_basis, "WHOLE", request.param)
    return request.param == 0


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


def test_a_small_basis_is_one_chunk_and_a_large_one_is_cut(chunks):
    like = jax.ShapeDtypeStruct((_basis.WHOLE // 41 + 1 if not chunks else 3,), jnp.float32)
    basis = jax.eval_shape(lambda: _basis.allocate(like, 41))
    assert [len(chunk) for chunk in basis] == [16, 16, 9]
    if not chunks:
        small = jax.eval_shape(lambda: _basis.allocate(jax.ShapeDtypeStruct((25_000,), jnp.float32), 41))
        assert [len(chunk) for chunk in small] == [41]


def test_lanczos_finds_the_same_pairs(chunks, x64):
    # Of sizes that no other test has: what is compiled for them is for these chunks.
    matrix, _ = oracles.symmetric(np.geomspace(0.1, 9, 61))
    A, like = oracles.matvec_of(matrix, oracles.tree_like(61)), oracles.tree_like(61)
    size = 23 + chunks
    pairs = hj.eigenpairs(A, jax.random.key(0), like, 4, basis_size=size, tol=hj.relative(1e-11))
    assert pairs.converged.all()
    assert pairs.num_matvecs > size  # restarted
    want = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(pairs.values, [*want[:-5:-1], *want[3::-1]], rtol=1e-9)


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
