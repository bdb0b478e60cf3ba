import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj
from hessjax._core._sharding import UNKNOWN
from hessjax._run._estimator import Carry, absorb

KEY = jax.random.key(0)


@pytest.mark.parametrize("block_size", [1, 3])
def test_restarts_keep_the_recurrence(x64, block_size):
    matrix, _ = oracles.symmetric(np.linspace(-1, 2, 80))
    like = oracles.tree_like(80)
    estimator = hj.estimators.lanczos(2, "both", basis_size=13, block_size=block_size)
    _, state = hj.run(estimator, oracles.matvec_of(matrix, like), KEY, like, max_matvecs=27)
    assert int(state.space.size) < 13
    oracles.check_recurrence(state.space, matrix)


@pytest.mark.parametrize("on_device", [False, True])
def test_repeated_eigenvalues_are_found_as_often_as_they_are_there(x64, on_device):
    """A threefold largest and a clustered smallest: one vector sees each once, a block of three all."""
    spectrum = np.r_[np.linspace(0, 1, 70), 5, 5, 5, 4, -2, -2 - 1e-7, -2 - 2e-7]
    matvec = oracles.matvec_of(oracles.symmetric(spectrum)[0], like := oracles.tree_like(77))
    pairs = hj.eigenpairs(matvec, KEY, like, 4, block_size=3, basis_size=30, tol=1e-9, on_device=on_device)
    np.testing.assert_allclose(pairs.values, [5, 5, 5, 4, 0, -2, -2 - 1e-7, -2 - 2e-7], atol=1e-8)
    assert bool(pairs.converged.all())
    V = oracles.rows(pairs.vectors)
    np.testing.assert_allclose(V @ V.T, np.eye(8), atol=1e-8)


def test_a_block_that_does_not_divide_the_dimension(x64):
    matvec = oracles.matvec_of(oracles.symmetric(np.arange(10.0))[0], like := oracles.tree_like(10))
    pairs = hj.eigenpairs(matvec, KEY, like, 5, block_size=4, tol=1e-10)
    np.testing.assert_allclose(pairs.values, np.arange(10.0)[::-1], atol=1e-10)


def test_a_warm_start_saves_products_and_misses_nothing(x64):
    rng, like = np.random.default_rng(1), oracles.tree_like(300)
    spectrum = np.r_[np.abs(rng.normal(size=290)), np.linspace(5, 50, 10)]
    matrix, vectors = oracles.symmetric(spectrum)
    noise = rng.normal(size=(300, 300)) * 0.005
    moved = matrix + noise + noise.T + 60 * np.outer(vectors[:, 0], vectors[:, 0])  # a new largest one
    settings = {"k": 1, "which": "largest", "tol": hj.relative(1e-3)}
    old = hj.eigenpairs(oracles.matvec_of(matrix, like), KEY, like, **settings)
    cold = hj.eigenpairs(oracles.matvec_of(matrix + noise + noise.T, like), KEY, like, **settings)
    warm = hj.eigenpairs(
        oracles.matvec_of(matrix + noise + noise.T, like), KEY, like, **settings, start=old.vectors
    )
    np.testing.assert_allclose(warm.values, cold.values, rtol=1e-5)
    assert int(warm.num_matvecs) < int(cold.num_matvecs)
    surprise = hj.eigenpairs(oracles.matvec_of(moved, like), KEY, like, **settings, start=old.vectors)
    np.testing.assert_allclose(surprise.values, np.linalg.eigvalsh(moved)[-1:], rtol=1e-5)


def test_a_start_with_pairs_that_were_never_found(x64, compilations):
    like = oracles.tree_like(40)
    matvec = oracles.matvec_of(oracles.symmetric(np.arange(40.0))[0], like)
    first, _ = hj.run(hj.estimators.lanczos(3, "largest"), matvec, KEY, like, max_matvecs=2)
    empty = jax.tree.map(lambda x: x * jnp.nan, first.vectors)
    found = [
        hj.run(hj.estimators.lanczos(3, "largest", start=v), matvec, KEY, like, max_matvecs=40)[0]
        for v in (first.vectors, empty)
    ]
    for pairs in found:
        np.testing.assert_allclose(pairs.values, [39, 38, 37], rtol=1e-8)
    del compilations[:]
    hj.run(hj.estimators.lanczos(3, "largest", start=first.vectors), matvec, KEY, like, max_matvecs=40)
    assert not compilations


@pytest.mark.smoke
@pytest.mark.parametrize("which", ["both", "largest", "smallest", "magnitude"])
def test_the_right_pairs_in_the_right_order(x64, which):
    spectrum = np.r_[np.linspace(-0.5, 0.5, 50), -9, -3, 4, 6, 10]
    matrix, _ = oracles.symmetric(spectrum)
    like = oracles.tree_like(55)
    tol = hj.relative(1e-9)
    pairs, _ = hj.run(
        hj.estimators.lanczos(2, which, tol=tol),
        oracles.matvec_of(matrix, like),
        KEY,
        like,
        max_matvecs=200,
        tol=tol,
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
    pairs, _ = hj.run(hj.estimators.lanczos(3), matvec, KEY, like, max_matvecs=2)
    assert np.isnan(pairs.values).sum() == 4
    assert not bool(pairs.converged.any())
    assert np.isinf(pairs.residuals).sum() == 4


def test_more_products_than_dimensions_change_nothing(x64):
    like = oracles.tree_like(9)
    spectrum = np.arange(9.0)
    matvec = oracles.matvec_of(oracles.symmetric(spectrum)[0], like)
    pairs, _ = hj.run(hj.estimators.lanczos(4), matvec, KEY, like, max_matvecs=25)
    np.testing.assert_allclose(pairs.values, [8, 7, 6, 5, 3, 2, 1, 0], atol=1e-12)


@pytest.mark.usefixtures("untyped")
def test_bad_input():
    with pytest.raises(ValueError, match="`which` must be one of 'both', .* got 'LM'"):
        hj.estimators.lanczos(2, "LM")
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        hj.estimators.lanczos(0)
    like = oracles.tree_like(9)
    identity = jax.tree_util.Partial(lambda v: v)
    with pytest.raises(
        ValueError, match=r"at most 9 pairs, the number of parameters, got 10 \(`which=\"both\"`"
    ):
        hj.eigenpairs(identity, KEY, like, k=5)
    with pytest.raises(ValueError, match="`basis_size` must be at least 6, .* got 4"):
        hj.eigenpairs(identity, KEY, like, k=2, basis_size=4)
    with pytest.raises(ValueError, match="`tol` must be a number or `relative"):
        hj.estimators.lanczos(tol=None)
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        hj.estimators.lanczos(block_size=0)
    with pytest.raises(ValueError, match="`block_size` must be at most 9, .* got 12"):
        hj.eigenpairs(identity, KEY, like, k=2, block_size=12)
    with pytest.raises(ValueError, match="`start` must be a block of at least one vector, got none"):
        hj.eigenpairs(lambda v: v, KEY, jnp.zeros(9), k=1, start=jnp.zeros((0, 9)))
    with pytest.raises(ValueError, match="`start\\[0\\]` must have the structure of `like`"):
        hj.eigenpairs(identity, KEY, like, k=2, start=jnp.ones((2, 9)))


def test_the_hessian_of_a_network(x64):
    params, batch = oracles.leaves(), oracles.batch(30)
    matvec = hj.hessian(oracles.loss_fn, params, batch, linearize=True)
    want = np.linalg.eigvalsh(oracles.dense_hessian(oracles.loss_fn, params, batch))[::-1]
    pairs = hj.eigenpairs(matvec, KEY, params, k=5, tol=1e-9)
    np.testing.assert_allclose(pairs.values, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 3])
def test_scale_invariance_from_tiny_losses_to_huge_ones(block_size):
    """No absolute constant hides in it, and no square leaves float32's range.

    Up to rounding errors, that is: LAPACK brings a T that is small or large to a size of its own.
    """
    spectrum = np.r_[np.linspace(0, 1, 50), -5, -4, 7, 9]
    matrix = oracles.symmetric(spectrum)[0].astype(np.float32)
    like = oracles.tree_like(54)

    def found(factor):
        matvec = oracles.matvec_of((factor * matrix).astype(np.float32), like)
        return hj.eigenpairs(matvec, KEY, like, k=2, block_size=block_size)

    plain = found(1)
    for factor in (2.0**-80, 1e-25, 2.0**-60, 1e-12, 2.0**60, 1e25, 2.0**80):
        scaled = found(factor)
        np.testing.assert_allclose(scaled.values / factor, [9, 7, -4, -5], rtol=1e-4)
        np.testing.assert_allclose(scaled.residuals / factor, plain.residuals, atol=1e-4)
        assert bool(scaled.converged.all())
        assert int(plain.num_matvecs) == int(scaled.num_matvecs)


@pytest.mark.parametrize("which", ["largest", "magnitude"])
def test_residuals_of_any_magnitude(which):
    """Far from convergence as well: what is left of a product is neither lost nor infinite."""
    matrix = oracles.symmetric(np.linspace(1, 9, 54))[0].astype(np.float32)
    like = oracles.tree_like(54)

    def found(factor):
        matvec = oracles.matvec_of((factor * matrix).astype(np.float32), like)
        return hj.run(hj.estimators.lanczos(2, which), matvec, KEY, like, max_matvecs=6)[0]

    plain = found(1)
    assert float(plain.residuals.min()) > 0.1
    for factor in (2.0**-80, 2.0**80):
        scaled = found(factor)
        np.testing.assert_allclose(scaled.values / factor, plain.values, rtol=1e-5)
        np.testing.assert_allclose(scaled.residuals / factor, plain.residuals, rtol=1e-3)
        assert not bool(scaled.converged.any())


def test_a_step_needs_little_memory_beyond_its_state():
    """A basis is too large to have twice: not at a restart, and not to guard against a bad product."""
    like = jnp.zeros(4_000_000)
    estimator = hj.estimators.lanczos(5, basis_size=40)
    state = jax.eval_shape(estimator.init, KEY, like)
    carry = Carry(state, *(jax.ShapeDtypeStruct((), jnp.int32) for _ in range(2)))
    program = absorb.lower(estimator, UNKNOWN, *carry, (like,)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 * like.nbytes


class TestNarrowBasis:
    """Vectors kept in bfloat16, sums taken in float32."""

    SPECTRUM = np.concatenate([np.linspace(-1, 1, 294), [100, 60, 30, 20, -8, -5]]).astype(np.float32)

    def mixed(self, n=300):
        u = np.random.default_rng(0).normal(size=n).astype(np.float32)
        return jax.tree_util.Partial(
            reflected, jnp.asarray(self.SPECTRUM), jnp.asarray(u / np.linalg.norm(u))
        )

    @pytest.mark.parametrize("basis_size", [40, 12], ids=["once", "restarted"])
    def test_values_keep_their_digits_and_residuals_are_true(self, basis_size):
        options = {"basis_dtype": jnp.bfloat16, "basis_size": basis_size, "tol": 0.0, "max_matvecs": 36}
        pairs = hj.eigenpairs(self.mixed(), KEY, jnp.zeros(300), 2, **options)
        np.testing.assert_allclose(pairs.values, [100, 60, -5, -8], rtol=1e-4)
        assert np.all(pairs.residuals < 2e-3 * 100)
        np.testing.assert_allclose(jnp.linalg.norm(pairs.vectors, axis=1), 1, rtol=1e-5)
        # What the recurrence says of itself is never less than what is there.
        estimator = hj.estimators.lanczos(2, basis_dtype=jnp.bfloat16, basis_size=basis_size)
        said, state = hj.run(estimator, self.mixed(), KEY, jnp.zeros(300), max_matvecs=36)
        assert np.all(said.residuals >= 0.99 * pairs.residuals)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.space.basis))

    def test_a_tolerance_that_rounding_hides_is_not_met_in_silence(self):
        options = {"tol": hj.relative(1e-6), "max_matvecs": 30, "basis_dtype": jnp.bfloat16}
        pairs = hj.eigenpairs(self.mixed(), KEY, jnp.zeros(300), 1, **options)
        assert not np.any(pairs.converged)

    def test_other_dtypes_are_refused(self):
        for dtype in (jnp.float16, "narrow", jnp.float32, 3):
            with pytest.raises(ValueError, match="`basis_dtype` must be None or `jnp.bfloat16`, got"):
                hj.estimators.lanczos(2, basis_dtype=dtype)


def reflected(spectrum, u, v):
    v = v - 2 * u * jnp.vdot(u, v)
    product = spectrum * v
    return product - 2 * u * jnp.vdot(u, product)
