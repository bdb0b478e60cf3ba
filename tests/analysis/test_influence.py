"""Influence against dense inverses and exact retraining; what does not fit is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def model_fn(params, batch):
    return jnp.tanh(batch[0] @ params["in"]) @ params["out"]


def output_loss(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=1))


def loss_fn(params, batch):
    return output_loss(model_fn(params, batch), batch)


def params_of(*shape, dtype=None):
    rng = np.random.default_rng(0)
    inside, width, outside = shape
    numbers = {"in": rng.normal(size=(inside, width)) / 2, "out": rng.normal(size=(width, outside)) / 2}
    return {name: jnp.asarray(x, dtype) for name, x in numbers.items()}


def data(count, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(count, width)), dtype) for width in (3, 2))


def cut(batch, size):
    count = len(batch[0])
    return [jax.tree.map(lambda x, a=a: x[a : a + size], batch) for a in range(0, count, size)]


def dense(params, train, query, matrix):
    rows = [oracles.rows(hj.per_example_grads(loss_fn, params, batch)) for batch in (query, train)]
    return -rows[0] @ np.linalg.solve(matrix, rows[1].T)


@pytest.fixture
def problem(x64):
    params, train, query = params_of(3, 4, 2), data(11), data(5, seed=1)
    A = hj.ggn(model_fn, output_loss, params, train)
    return params, train, query, A, oracles.matrix_of(A, params) + 0.3 * np.eye(20)


@pytest.mark.smoke
@pytest.mark.parametrize("microbatch", [None, 2])
def test_scores_are_those_of_the_dense_inverse(problem, microbatch):
    params, train, query, A, matrix = problem
    inverse = functools.partial(hj.solve, A, damping=0.3, max_matvecs=60, tol=1e-12)
    options = {"inverse": inverse, "by_leaf": True, "microbatch": microbatch}
    found = hj.influence(loss_fn, params, cut(train, 4), cut(query, 3), **options)
    want = dense(params, train, query, matrix)
    np.testing.assert_allclose(found.scores, want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sum(found.leaves.values()), found.scores, rtol=1e-12)
    assert list(found.leaves) == ["in", "out"]
    each = [float(loss_fn(params, jax.tree.map(lambda x, i=i: x[i : i + 1], query))) for i in range(5)]
    np.testing.assert_allclose(found.losses, each, rtol=1e-12)
    assert found.residuals.shape == (5,)
    assert np.all(found.residuals < 1e-10)
    np.testing.assert_allclose(found.removed(), -want / 10, rtol=1e-8, atol=1e-12)
    order = np.argsort(want, axis=1)
    np.testing.assert_array_equal(found.helpful(3), order[:, :3])
    np.testing.assert_array_equal(found.harmful(2), order[:, :-3:-1])
    assert "#" in str(found)


def test_a_leaf_alone_has_its_own_part(problem):
    params, train, query, _, _ = problem
    found = hj.influence(loss_fn, params, [train], [query], inverse=None, by_leaf=True)
    grads = [hj.per_example_grads(loss_fn, params, batch)["out"].reshape(-1, 8) for batch in (query, train)]
    np.testing.assert_allclose(found.leaves["out"], -grads[0] @ grads[1].T, rtol=1e-12)


def test_every_kind_of_inverse(problem):
    params, train, query, _, _ = problem
    grads = hj.per_example_grads(loss_fn, params, train)
    G, unravel = oracles.rows(grads), functools.partial(oracles.tree_of, like=params)
    moments = hj.layers.moments(model_fn, params, [train], likelihood=hj.likelihoods.gaussian)
    K = hj.layers.kfac(moments)
    EK = hj.layers.ekfac(moments, [train])
    inverses = {
        "inverse_fisher": (hj.inverse_fisher(grads, 0.3), G.T @ G / 11 + 0.3 * np.eye(20)),
        "K-FAC": (K.inverse(0.3), oracles.matrix_of(K, params) + 0.3 * np.eye(20)),
        "EKFAC": (EK.inverse(0.3), oracles.matrix_of(EK, params) + 0.3 * np.eye(20)),
        "a function": (lambda v: jax.tree.map(lambda x: x / 2, v), 2 * np.eye(20)),
        "none": (None, np.eye(20)),
        "on the host": (lambda v: unravel(oracles.flat(v) / 2), 2 * np.eye(20)),
    }
    for inverse, matrix in inverses.values():
        found = hj.influence(loss_fn, params, [train], [query], inverse=inverse)
        np.testing.assert_allclose(found.scores, dense(params, train, query, matrix), rtol=1e-8, atol=1e-10)
        assert found.residuals is None
        own = hj.self_influence(loss_fn, params, cut(train, 4), inverse=inverse)
        want = np.diag(dense(params, train, train, matrix))
        np.testing.assert_allclose(own.scores, want, rtol=1e-8, atol=1e-10)
    assert own.helpful(2).tolist() == np.argsort(want)[:2].tolist()
    assert "left out" in str(own)


def test_leave_one_out_of_ridge_regression_is_exact(x64):
    rng = np.random.default_rng(0)
    x, y, q = rng.normal(size=(40, 3)), rng.normal(size=40), rng.normal(size=(6, 3))
    ridge = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2 + 0.05 * jnp.sum(w**2)
    output = lambda w, batch: jnp.mean(batch[0] @ w)

    def fit(x, y):
        return np.linalg.solve(x.T @ x / len(x) + 0.1 * np.eye(3), x.T @ y / len(x))

    w = jnp.asarray(fit(x, y))
    H = hj.hessian(ridge, w, (x, y))
    train, query = [(jnp.asarray(x), jnp.asarray(y))], [(jnp.asarray(q), jnp.zeros(6))]
    inverse = functools.partial(hj.solve, H, tol=1e-12)
    found = hj.influence(ridge, w, train, query, inverse=inverse, query_fn=output)
    exact = np.stack([q @ (fit(np.delete(x, i, 0), np.delete(y, i)) - w) for i in range(40)], axis=1)
    assert np.corrcoef(found.removed().ravel(), exact.ravel())[0, 1] > 0.99
    np.testing.assert_allclose(found.removed(), exact, atol=0.15 * np.abs(exact).max())


def weighted_loss(params, batch):
    x, y, w = batch
    return jnp.sum(w * jnp.sum((model_fn(params, (x, y)) - y) ** 2, axis=1)) / jnp.sum(w)


def test_padding_is_not_there_and_weight_zero_has_no_influence(problem):
    params, train, query, _, _ = problem
    whole = hj.influence(loss_fn, params, [train], [query], inverse=None)
    with_weights = lambda batch, w: (*batch, w)
    filled = [hj.batches(cut(x, 4), with_weights=with_weights) for x in (train, query)]
    for weights in (None, lambda batch: batch[2]):
        found = hj.influence(weighted_loss, params, *filled, inverse=None, weights=weights)
        np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-10)
        assert found.weights.tolist() == [1.0] * 11
    x, y = train
    w = jnp.ones(11).at[3].set(0).at[5].set(2)
    batches = [*cut((x.at[3].set(jnp.nan), y, w), 4), (x[:2], y[:2], jnp.zeros(2))]
    found = hj.influence(
        weighted_loss, params, batches, [(*query, jnp.ones(5))], inverse=None, weights=lambda batch: batch[2]
    )
    there = np.array([i for i in range(11) if i != 3])
    np.testing.assert_allclose(found.scores[:, there], np.asarray(whole.scores)[:, there], rtol=1e-9)
    assert not np.any(found.scores[:, [3, 11, 12]])
    np.testing.assert_allclose(found.weights, [*w, 0, 0], rtol=1e-6)
    assert set(map(int, found.helpful(10).ravel())) <= {*there.tolist()}
    np.testing.assert_allclose(
        found.removed()[:, 5], -2 * np.asarray(whole.scores)[:, 5] / (11 - 2), rtol=1e-6
    )


@pytest.mark.parametrize("name", oracles.CONTAINERS)
def test_influence_of_any_container_in_low_precision(name):
    params = oracles.CONTAINERS[name](oracles.leaves(dtype=jnp.bfloat16))
    batch = jax.tree.map(lambda x: x.astype(jnp.float32), oracles.batch())
    found = hj.influence(oracles.loss_fn, params, [batch], [batch], inverse=None, by_leaf=True)
    assert found.scores.dtype == jnp.float32
    np.testing.assert_allclose(found.scores, np.asarray(found.scores).T, rtol=1e-5)
    assert len(found.leaves) == 4


def test_train_examples_that_are_not_finite_are_data():
    params, (x, y) = params_of(3, 4, 2), data(6)
    train = (x.at[1].set(jnp.nan), y)
    found = hj.influence(loss_fn, params, [train], [data(2, seed=1)], inverse=None)
    assert np.isnan(found.scores).any(axis=0).tolist() == [False, True, *[False] * 4]
    assert "1 example are not finite" in str(found) or "1 example" in str(found)
    own = hj.self_influence(loss_fn, params, [(x.at[0].set(jnp.nan), y)], inverse=lambda v: v)
    assert np.isnan(own.scores).tolist() == [True, *[False] * 5]
    assert 0 not in own.helpful(5)


OTHER = {"in": jnp.ones((3, 5)), "out": jnp.ones((5, 2))}
REFUSED = {
    "a query that is not finite": (
        lambda p: {"query": [data(3), (data(2)[0].at[1].set(jnp.nan), data(2)[1])]},
        "`query` must have a finite loss for every example, .* 1 of 2, the first number 4",
    ),
    "a query without a gradient": (
        lambda p: {"query": [data(2)], "query_fn": lambda p, b: jnp.sqrt(jnp.sum((0 * p["in"]) ** 2))},
        "`query` must have a finite gradient",
    ),
    "K-FAC of another network": (
        lambda p: {"inverse": hj.layers.kfac(hj.layers.moments(
            model_fn, OTHER, [data(4)], likelihood=hj.likelihoods.gaussian)).inverse(1.0)},
        r"`inverse` must have the structure of `params`, but\n  in: shape \(3, 5\)",
    ),
    "K-FAC itself": (
        lambda p: {"inverse": hj.layers.kfac(hj.layers.moments(
            model_fn, p, [data(4)], likelihood=hj.likelihoods.gaussian))},
        "`inverse` must multiply by the inverse of a matrix, got the matrix itself, .*Kronecker.*`.inverse",
    ),
    "EKFAC itself": (
        lambda p: {"inverse": hj.layers.ekfac(hj.layers.moments(
            model_fn, p, [data(4)], likelihood=hj.likelihoods.gaussian), [data(4)])},
        "`inverse` must multiply by the inverse of a matrix, got the matrix itself, .*Kronecker.*`.inverse",
    ),
    "a Fisher of another network": (
        lambda p: {"inverse": hj.inverse_fisher(hj.per_example_grads(loss_fn, OTHER, data(4)), 1.0)},
        "`inverse` must have the structure of `params`",
    ),
    "a Hessian": (
        lambda p: {"inverse": hj.hessian(loss_fn, p, data(4))},
        "`inverse` must multiply by the inverse of a matrix",
    ),
    "a function of other vectors": (
        lambda p: {"inverse": lambda v: jnp.ones(3)}, r"`inverse\(vector\)` must have the structure of "
    ),
    "a solver of other vectors": (
        lambda p: {"inverse": functools.partial(hj.solve, hj.hessian(loss_fn, OTHER, data(4)))},
        "`inverse` must take vectors like `params`, but it raised",
    ),
    "an inverse of NaN": (
        lambda p: {"inverse": lambda v: jax.tree.map(lambda x: x / 0, v)},
        "`inverse` must give finite vectors, got NaN or infinity in in, out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named_before_the_data_is_read(name):
    made, words = REFUSED[name]
    params = params_of(3, 4, 2)
    options = {"query": [data(2)], "inverse": None, **made(params)}
    query = options.pop("query")
    with pytest.raises((TypeError, ValueError), match=words):
        hj.influence(loss_fn, params, never_opened, query, **options)


def never_opened():
    raise AssertionError("the training data must not be opened")
    yield


def test_bars_count_queries_and_batches(capsys):
    params = params_of(3, 4, 2)
    batches = hj.batches(cut(data(11), 4), with_weights=lambda batch, w: (*batch, w))
    options = {"inverse": lambda v: v, "microbatch": 2, "progress": True}
    asked = weighted_loss, params, batches
    shown = hj.influence(*asked, [(*data(5, seed=1), jnp.ones(5))], **options)
    assert {"5/5", "3/3", "queries", "batches"} <= set(capsys.readouterr().out.split())
    hj.self_influence(*asked, **options)
    assert "3/3" in capsys.readouterr().out.split()
    quiet = hj.influence(*asked, [(*data(5, seed=1), jnp.ones(5))], **{**options, "progress": False})
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(shown.scores, quiet.scores)


def test_empty_sources_and_too_many_examples():
    params = params_of(3, 4, 2)
    with pytest.raises(ValueError, match="`train` must hold at least one batch"):
        hj.influence(loss_fn, params, [], [data(2)], inverse=None)
    with pytest.raises(ValueError, match="`query` must hold at least one batch"):
        hj.influence(loss_fn, params, [data(2)], [], inverse=None)
    with pytest.raises(TypeError, match="`query` must be an iterable of batches"):
        hj.influence(loss_fn, params, [data(2)], data(2)[0], inverse=None)
    found = hj.influence(loss_fn, params, [data(4)], [data(2)], inverse=None)
    with pytest.raises(ValueError, match="`k` must be at most 4, the number of training examples, got 5"):
        found.helpful(5)
    with pytest.raises(TypeError, match="`params` must not be traced"):
        jax.jit(lambda p: hj.influence(loss_fn, p, [data(2)], [data(2)], inverse=None))(params)


def test_other_params_and_batches_compile_nothing(compilations):
    def run(seed):
        params = jax.tree.map(lambda x: x + seed, params_of(3, 4, 2))
        return hj.influence(loss_fn, params, cut(data(8, seed), 4), [data(4, seed + 1)], inverse=None)

    run(0)
    before = len(compilations)
    run(2)
    assert len(compilations) == before
