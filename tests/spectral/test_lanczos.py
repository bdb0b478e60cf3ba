import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj
from hessjax._drive import Carry, _absorb
from hessjax.spectral import krylov
from hessjax.spectral.lanczos import extend, ritz, start
from hessjax.spectral.probes import gaussian

KEY = jax.random.key(0)


def grown(matrix, steps, capacity=None):
    like = oracles.tree_like(len(matrix))
    matvec = oracles.matvec_of(matrix, like)
    space = start(gaussian(KEY, like), capacity or steps)
    step = jax.jit(lambda space: extend(space, matvec(krylov.read(space.basis, space.size))))
    for _ in range(steps):
        space = step(space)
    return space


def test_the_recurrence_holds_and_the_basis_is_orthonormal(x64):
    matrix, _ = oracles.symmetric(np.r_[np.linspace(0, 1, 95), 5, 6, 7, 8, 9])
    space = grown(matrix, 40)
    Q = np.concatenate([oracles.rows(chunk) for chunk in space.basis])
    np.testing.assert_allclose(Q @ Q.T, np.eye(41), atol=1e-13)
    np.testing.assert_allclose(Q[:40] @ matrix @ Q[:40].T, space.projected, atol=1e-13)
    residual = matrix @ Q[:40].T - Q[:40].T @ np.asarray(space.projected)
    np.testing.assert_allclose(residual, np.outer(Q[40], space.coupling), atol=1e-13)


def test_no_ghost_copies_of_the_outliers_in_float32():
    """10 outliers over a bulk of 490: without reorthogonalisation 80 steps give dozens of copies."""
    matrix, _ = oracles.symmetric(np.r_[np.linspace(0, 1, 490), np.linspace(10, 100, 10)])
    values, _ = ritz(grown(matrix.astype(np.float32), 80))
    above = np.asarray(values)[np.asarray(values) > 5]
    np.testing.assert_allclose(above, np.linspace(10, 100, 10), rtol=1e-5)


def test_an_invariant_subspace_is_left_by_a_fresh_direction(x64):
    """Three distinct eigenvalues: the Krylov space ends at 3, the multiplicities lie beyond it."""
    spectrum = np.repeat([1.0, 2.0, 5.0], [17, 2, 1])
    space = grown(oracles.symmetric(spectrum)[0], 20)
    np.testing.assert_allclose(ritz(space)[0], spectrum, atol=1e-12)


def test_restarts_keep_the_recurrence(x64):
    matrix, _ = oracles.symmetric(np.linspace(-1, 2, 80))
    like = oracles.tree_like(80)
    estimator = hj.lanczos(2, "both", basis_size=12)
    _, state = hj.run(estimator, oracles.matvec_of(matrix, like), KEY, like, max_matvecs=27)
    space = state.space
    n = int(space.size)
    Q = np.concatenate([oracles.rows(chunk) for chunk in space.basis])[: n + 1]
    np.testing.assert_allclose(Q @ Q.T, np.eye(n + 1), atol=1e-13)
    T, coupling = np.asarray(space.projected)[:n, :n], np.asarray(space.coupling)[:n]
    np.testing.assert_allclose(Q[:n] @ matrix @ Q[:n].T, T, atol=1e-13)
    np.testing.assert_allclose(matrix @ Q[:n].T - Q[:n].T @ T, np.outer(Q[n], coupling), atol=1e-13)


@pytest.mark.smoke
@pytest.mark.parametrize("which", ["both", "largest", "smallest", "magnitude"])
def test_the_right_pairs_in_the_right_order(x64, which):
    spectrum = np.r_[np.linspace(-0.5, 0.5, 50), -9, -3, 4, 6, 10]
    matrix, _ = oracles.symmetric(spectrum)
    like = oracles.tree_like(55)
    tol = hj.relative(1e-9)
    pairs, _ = hj.run(
        hj.lanczos(2, which, tol=tol), oracles.matvec_of(matrix, like), KEY, like, max_matvecs=200, tol=tol
    )
    want = {"both": [10, 6, -3, -9], "largest": [10, 6], "smallest": [-3, -9], "magnitude": [10, -9]}
    np.testing.assert_allclose(pairs.values, want[which], rtol=1e-8)
    V = oracles.rows(pairs.vectors)
    np.testing.assert_allclose(V @ V.T, np.eye(len(V)), atol=1e-12)
    true = np.linalg.norm(V @ matrix - np.asarray(pairs.values)[:, None] * V, axis=1)
    np.testing.assert_allclose(true, pairs.residuals, atol=1e-11)
    assert bool(pairs.converged.all())


def test_too_few_products_are_told_apart_from_an_answer(x64):
    like = oracles.tree_like(55)
    matvec = oracles.matvec_of(oracles.symmetric(np.linspace(0, 1, 55))[0], like)
    pairs, _ = hj.run(hj.lanczos(3), matvec, KEY, like, max_matvecs=2)
    assert np.isnan(pairs.values).sum() == 4
    assert not bool(pairs.converged.any())
    assert np.isinf(pairs.residuals).sum() == 4


def test_more_products_than_dimensions_change_nothing(x64):
    like = oracles.tree_like(9)
    spectrum = np.arange(9.0)
    matvec = oracles.matvec_of(oracles.symmetric(spectrum)[0], like)
    pairs, _ = hj.run(hj.lanczos(4), matvec, KEY, like, max_matvecs=25)
    np.testing.assert_allclose(pairs.values, [8, 7, 6, 5, 3, 2, 1, 0], atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="`which` must be one of 'both', .* got 'LM'"):
        hj.lanczos(2, "LM")
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        hj.lanczos(0)
    like = oracles.tree_like(9)
    identity = jax.tree_util.Partial(lambda v: v)
    with pytest.raises(
        ValueError, match=r"at most 9 pairs, the number of parameters, got 10 \(`which=\"both\"`"
    ):
        hj.eigenpairs(identity, KEY, like, k=5)
    with pytest.raises(ValueError, match="`basis_size` must be at least 6, .* got 4"):
        hj.eigenpairs(identity, KEY, like, k=2, basis_size=4)


def test_the_hessian_of_a_network(x64):
    params, batch = oracles.leaves(), oracles.batch(30)
    matvec = hj.hessian(oracles.loss_fn, params, batch, linearize=True)
    want = np.linalg.eigvalsh(oracles.dense_hessian(oracles.loss_fn, params, batch))[::-1]
    pairs = hj.eigenpairs(matvec, KEY, params, k=5, tol=1e-9)
    np.testing.assert_allclose(pairs.values, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e25])
def test_scale_invariance_from_tiny_losses_to_huge_ones(factor):
    """No absolute constant hides in it, and no square leaves float32's range."""
    spectrum = np.r_[np.linspace(0, 1, 50), -5, -4, 7, 9]
    matrix, _ = oracles.symmetric(spectrum)
    like = oracles.tree_like(54)
    plain, scaled = (
        hj.eigenpairs(oracles.matvec_of((c * matrix).astype(np.float32), like), KEY, like, k=2)
        for c in (1, factor)
    )
    np.testing.assert_allclose(scaled.values / factor, [9, 7, -4, -5], rtol=1e-4)
    assert int(plain.num_matvecs) == int(scaled.num_matvecs)


def test_a_step_needs_little_memory_beyond_its_state():
    """A basis is too large to have twice: not at a restart, and not to guard against a bad product."""
    like = jnp.zeros(4_000_000)
    estimator = hj.lanczos(5, basis_size=40)
    state = jax.eval_shape(estimator.init, KEY, like)
    carry = Carry(state, *(jax.ShapeDtypeStruct((), jnp.int32) for _ in range(2)))
    program = _absorb.lower(estimator.update, carry, (like,)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 * like.nbytes
