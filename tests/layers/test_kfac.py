"""K-FAC and EKFAC beside dense Fisher matrices: exact where theory says so, nearest where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from tests.layers.cases import CASES, Case
from tests.oracles import close, flat, matrix_of

CATEGORICAL = hj.likelihoods.categorical
ONCE = ["dense", "experts", "vmapped", "scan", "remat", "moved", "rules of their own"]
"""Networks in which every leaf's matrix is used at one position of an example."""


def moments_of(case, batches, **options):
    return hj.layers.moments(case.model_fn, case.params(), batches, likelihood=CATEGORICAL, **options)


def dense_fisher(case, x, **options):
    params = case.params()
    return matrix_of(hj.fisher(case.model_fn, params, x, likelihood=CATEGORICAL, **options), params)


def blocks_of(matrix, kronecker):
    """The diagonal blocks of a dense matrix, in the order of a leaf's (stack, left, right)."""
    start = 0
    for leaf, moves in zip(kronecker.leaves, kronecker.func.moves, strict=True):
        size = int(np.prod(moves.shape))
        order = moves.apply(np.arange(start, start + size).reshape(moves.shape)).reshape(len(leaf.values), -1)
        yield leaf, [matrix[np.ix_(places, places)] for places in order]
        start += size


def eigenvectors(leaf, index):
    """Those of one matrix of a leaf's stack, as columns."""
    left, right = (
        np.eye(n) if u is None else np.asarray(u[index])
        for u, n in zip((leaf.left, leaf.right), leaf.values.shape[1:], strict=True)
    )
    return np.kron(left, right)


@pytest.mark.parametrize("name", ONCE)
def test_with_one_example_and_one_use_it_is_the_fisher_block(x64, name):
    case = CASES[name]
    x, _ = case.batch(1)
    K = hj.layers.kfac(moments_of(case, [x]))
    dense, exact = matrix_of(K, case.params()), dense_fisher(case, x)
    for (_, ours), (_, theirs) in zip(blocks_of(dense, K), blocks_of(exact, K), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("num", [1, 4])
def test_in_linear_networks_with_square_loss_it_is_the_fisher_block(x64, num):
    def model_fn(p, x):
        return (x @ p["u"]) @ p["v"] + p["b"][None]

    rng = np.random.default_rng(0)
    shapes = {"b": (2,), "u": (4, 3), "v": (3, 2)}
    params = {k: jnp.asarray(rng.normal(size=shape)) for k, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(num, 4)))
    options = {"likelihood": hj.likelihoods.gaussian}
    K = hj.layers.kfac(hj.layers.moments(model_fn, params, [x], **options))
    exact = matrix_of(hj.fisher(model_fn, params, x, **options), params)
    for (_, ours), (_, theirs) in zip(blocks_of(matrix_of(K, params), K), blocks_of(exact, K), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def embedded(p, x):
    return jnp.tanh(p["e"][x]).sum(axis=1) @ p["v"]


EKFAC_CASES = {**CASES, "embedding": Case(embedded, {"e": (3, 4), "v": (4, 2)}, (5,), vocab=3)}
"""With tokens that come more than once."""


@pytest.mark.parametrize("name", EKFAC_CASES)
def test_ekfac_has_the_fishers_own_diagonal_and_is_never_worse(x64, name):
    case = EKFAC_CASES[name]
    x, _ = case.batch(3)
    moments = moments_of(case, [x])
    K, E = hj.layers.kfac(moments), hj.layers.ekfac(moments, [x])
    exact = dense_fisher(case, x)
    for (leaf, blocks), before in zip(blocks_of(exact, E), K.leaves, strict=True):
        for index, block in enumerate(blocks):
            rotated = eigenvectors(leaf, index).T @ block @ eigenvectors(leaf, index)
            values = np.asarray(leaf.values[index]).ravel()
            np.testing.assert_allclose(values, np.diag(rotated), rtol=1e-9, atol=1e-12)
            errors = [
                np.linalg.norm(rotated - np.diag(np.ravel(v[index]))) for v in (leaf.values, before.values)
            ]
            assert errors[0] <= errors[1] + 1e-12
    np.testing.assert_allclose(E.trace(), np.trace(exact), rtol=1e-10)


@pytest.mark.parametrize("name", ["dense", "convolution", "scan", "tied embedding"])
def test_everything_that_is_read_off_is_that_of_the_matrix(x64, name):
    case = CASES[name]
    params, (x, _) = case.params(), case.batch(3)
    moments = moments_of(case, [x])
    for K in (hj.layers.kfac(moments), hj.layers.ekfac(moments, [x])):
        dense = matrix_of(K, params)
        np.testing.assert_allclose(dense, dense.T, atol=1e-14)
        np.testing.assert_allclose(K.trace(), np.trace(dense), rtol=1e-10)
        np.testing.assert_allclose(flat(K.diagonal()), np.diag(dense), rtol=1e-9, atol=1e-14)
        damped = dense + 0.1 * np.eye(len(dense))
        np.testing.assert_allclose(K.log_determinant(0.1), np.linalg.slogdet(damped)[1], rtol=1e-10)
        inverse = K.inverse(0.1)
        np.testing.assert_allclose(matrix_of(inverse, params), np.linalg.inv(damped), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(flat(inverse.diagonal()), np.diag(np.linalg.inv(damped)), rtol=1e-9)
        relative = K.inverse(hj.relative(2.0))
        shifted = dense + 2 * np.mean(np.diag(dense)) * np.eye(len(dense))
        np.testing.assert_allclose(matrix_of(relative, params), np.linalg.inv(shifted), rtol=1e-8, atol=1e-8)


def test_factored_damping_is_that_of_both_factors(x64):
    case = CASES["dense"]
    params, (x, _) = case.params(), case.batch(3)
    moments = moments_of(case, [x])
    inverse = matrix_of(hj.layers.kfac(moments).inverse(0.1, "factored"), params)
    left, right = (np.asarray(side[0]) for side in moments.of("w")[0])
    ratio = np.sqrt(np.trace(left) / len(left) / (np.trace(right) / len(right)))
    left, right = left + ratio * np.sqrt(0.1) * np.eye(4), right + np.sqrt(0.1) / ratio * np.eye(3)
    expected = np.kron(np.linalg.inv(left), np.linalg.inv(right))
    np.testing.assert_allclose(inverse[-12:, -12:], expected, rtol=1e-9)
    right = np.asarray(moments.of("b")[0].right[0])
    np.testing.assert_allclose(inverse[:3, :3], np.linalg.inv(right + 0.1 * np.eye(3)), rtol=1e-9)


def test_factored_inverses_are_read_off_as_others_are(x64):
    """With embeddings, whose one side is diagonal, and biases, which have a number for one."""
    case = CASES["tied embedding"]
    params, (x, _) = case.params(), case.batch(3)
    inverse = hj.layers.kfac(moments_of(case, [x])).inverse(0.1, "factored")
    dense = matrix_of(inverse, params)
    np.testing.assert_allclose(inverse.trace(), np.trace(dense), rtol=1e-10)
    np.testing.assert_allclose(flat(inverse.diagonal()), np.diag(dense), rtol=1e-9)
    np.testing.assert_allclose(inverse.log_determinant(), np.linalg.slogdet(dense)[1], rtol=1e-10)


def test_a_matrix_used_twice_has_the_nearest_product_to_both(x64):
    case = CASES["tied embedding"]
    x, _ = case.batch(3)
    moments = moments_of(case, [x])
    K = hj.layers.kfac(moments)
    uses = moments.of("e")
    total = sum(np.outer(np.diag(left[0]), right[0]) for left, right in uses)
    u, s, vt = np.linalg.svd(total)
    nearest = s[0] * np.outer(u[:, 0], vt[0])
    leaf = K.leaves[0]
    right = np.einsum("ij,j,kj->ik", leaf.right[0], leaf.sides[1][0], leaf.right[0])
    ours = np.outer(np.diag(leaf.sides[0][0]).ravel(), right.ravel())
    np.testing.assert_allclose(ours, nearest, rtol=1e-9, atol=1e-14)


def test_it_is_a_matvec_like_any_other(x64):
    case = CASES["dense"]
    params, (x, _) = case.params(), case.batch(3)
    K = hj.layers.kfac(moments_of(case, [x]))
    values = np.linalg.eigvalsh(matrix_of(K, params))
    pairs = hj.eigenpairs(K, jax.random.key(0), params, k=2, which="largest")
    np.testing.assert_allclose(pairs.values, values[:-3:-1], rtol=1e-6)
    jitted = jax.jit(lambda K, v: K(v))
    close(jitted(K, params), K(params), rtol=1e-10)


def test_it_knows_what_is_an_inverse(x64):
    case = CASES["dense"]
    x, _ = case.batch()
    moments = moments_of(case, [x])
    for K in (hj.layers.kfac(moments), hj.layers.ekfac(moments, [x])):
        inverse = K.inverse(0.1)
        found = [A.is_inverse for A in (K, inverse, inverse.inverse(0.1), jax.jit(lambda A: A)(inverse))]
        assert found == [False, True, False, True]


def test_other_moments_compile_nothing_anew(compilations):
    case = CASES["dense"]
    x, other = case.batch(3)[0], case.batch(3, seed=2)[0]
    first = hj.layers.kfac(moments_of(case, [x])).inverse(0.1)
    jax.block_until_ready(first(case.params()))
    before = len(compilations)
    second = hj.layers.kfac(moments_of(case, [other])).inverse(0.2)
    jax.block_until_ready(second(case.params()))
    assert len(compilations) == before


def test_a_damping_that_leaves_it_singular_is_refused(untyped):
    case = CASES["dense"]
    x, _ = case.batch(1)
    K = hj.layers.kfac(moments_of(case, [x]))
    with pytest.raises(ValueError, match=r"`damping` must make K \+ λI regular, got 0"):
        K.inverse(0.0)
    with pytest.raises(ValueError, match="at least 0"):
        K.inverse(-1.0)
    with pytest.raises(ValueError, match="`form` must be one of"):
        K.inverse(1.0, "diagonal")
    assert not np.isfinite(jax.jit(lambda K: K.inverse(0.0)(K.diagonal()))(K)["w"]).any()


def test_only_kfac_has_factored_damping(untyped):
    case = CASES["dense"]
    x, _ = case.batch(1)
    E = hj.layers.ekfac(moments_of(case, [x]), [x])
    with pytest.raises(ValueError, match='`form` must be "exact"'):
        E.inverse(1.0, "factored")
    with pytest.raises(TypeError, match="`moments` must be a `LayerMoments`"):
        hj.layers.kfac(x)
