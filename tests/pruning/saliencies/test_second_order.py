"""What sets of weights cost, against the dense formula and brute force over subsets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import rows

import hessjax as hj
from hessjax._fisher import _scores
from hessjax.pruning.patterns._patterns import Along
from hessjax.pruning.saliencies._saliency import Context

DAMPING = 0.05


def problem(num_grads=7, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 6), "b": (6, 2)}
    params = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    grads = {k: jnp.asarray(rng.normal(size=(num_grads, *s)), dtype) for k, s in shapes.items()}
    return params, grads


def inverse(grads, block_size=None):
    """(F + λI)⁻¹ in full, without coupling between blocks."""
    G = rows(grads)
    F = G.T @ G / len(G)
    if block_size is not None:
        sizes = [leaf[0].size for leaf in jax.tree.leaves(grads)]
        names = [(i, j // block_size) for i, n in enumerate(sizes) for j in range(n)]
        F = F * np.array([[a == b for a in names] for b in names])
    return np.linalg.inv(F + DAMPING * np.eye(len(F)))


def cost(inv, w, Q):
    return w[Q] @ np.linalg.solve(inv[np.ix_(Q, Q)], w[Q]) / 2


def seen(params, grads, pattern, mask=None):
    mask = jax.tree.map(lambda x: jnp.full_like(x, True, dtype=bool), params) if mask is None else mask
    return Context(params, mask, jnp.int32(1), None, grads, pattern)


def scores(params, grads, pattern, block_size=None):
    rule = hj.saliencies.obs(damping=DAMPING, block_size=block_size)
    found = rule.scores(rule.init(params), seen(params, grads, pattern))
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(found)])


def flat(params):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(params)])


def indices(params, pattern):
    """The sets of a pattern as lists of places in the flat vector."""
    start, found = 0, []
    for leaf in jax.tree.leaves(params):
        places = start + np.arange(leaf.size).reshape(leaf.shape)
        found += [list(map(int, row)) for row in pattern.group(jnp.asarray(places))]
        start += leaf.size
    return found


@pytest.mark.parametrize(
    "pattern", [hj.patterns.filters(), hj.patterns.rows(), hj.patterns.blocks((2, 2))], ids=lambda p: p.name
)
@pytest.mark.parametrize("block_size", [None, 5, 100])
@pytest.mark.parametrize("num_grads", [2, 7, 40])
def test_the_scores_of_a_group_add_up_to_the_set_formula(x64, pattern, block_size, num_grads):
    params, grads = problem(num_grads)
    inv, w, found = inverse(grads, block_size), flat(params), scores(params, grads, pattern, block_size)
    for Q in indices(params, pattern):
        np.testing.assert_allclose(found[Q].sum(), cost(inv, w, Q), rtol=1e-8)
        assert np.ptp(found[Q]) < 1e-10


def test_tied_leaves_are_one_set(x64):
    params, grads = problem()
    params, grads = {"a": params["a"], "b": params["b"][:4]}, {"a": grads["a"], "b": grads["b"][:, :4]}
    found = scores(params, grads, Along(0, "rows()", tie="together"))
    inv, w = inverse(grads), flat(params)
    for i in range(4):
        Q = [*range(6 * i, 6 * i + 6), *range(24 + 2 * i, 26 + 2 * i)]
        np.testing.assert_allclose(found[Q].sum(), cost(inv, w, Q), rtol=1e-8)


def test_weights_gone_before_count_for_nothing(x64):
    params, grads = problem()
    gone = np.zeros(36, bool)
    gone[[0, 1, 7, 30]] = True
    masked = jax.tree.map(lambda x, m: jnp.where(m, 0, x), params, unflat(gone, params))
    rule = hj.saliencies.obs(damping=DAMPING)
    mask = jax.tree.map(jnp.logical_not, unflat(gone, params))
    found = flat(rule.scores(rule.init(params), seen(masked, grads, hj.patterns.rows(), mask)))
    G = rows(grads) * ~gone
    inv, w = np.linalg.inv(G.T @ G / len(G) + DAMPING * np.eye(36)), flat(masked)
    for Q in indices(params, hj.patterns.rows()):
        left = [q for q in Q if not gone[q]]
        np.testing.assert_allclose(found[left].sum(), cost(inv, w, left), rtol=1e-8)
    assert np.isneginf(found[gone]).all()


def unflat(vector, like):
    ends = np.cumsum([x.size for x in jax.tree.leaves(like)])[:-1]
    parts = np.split(vector, ends)
    shaped = [jnp.asarray(p.reshape(x.shape)) for p, x in zip(parts, jax.tree.leaves(like), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), shaped)


def test_n_of_m_weights_go_one_after_the_other(x64):
    """The sum over those that go is the cost of their set, and no other pair of the four is much cheaper."""
    params, grads = problem(12, seed=3)
    params, grads = {"b": params["a"]}, {"b": grads["a"]}
    found, inv, w = scores(params, grads, hj.patterns.n_of_m(2, 4)), inverse(grads), flat(params)
    regrets = []
    for Q in indices(params, hj.patterns.n_of_m(2, 4)):
        first, second = np.array(Q)[np.argsort(found[Q], kind="stable")[:2]]
        single = w[Q] ** 2 / (2 * np.diag(inv)[Q])
        np.testing.assert_allclose(found[first], single.min(), rtol=1e-8)
        increments = cost(inv, w, [first, second]) - single.min()
        np.testing.assert_allclose(found[second], max(increments, single.min()), rtol=1e-8)
        best = min(cost(inv, w, list(pair)) for pair in itertools.combinations(Q, 2))
        regrets.append(cost(inv, w, [first, second]) / best)
    assert min(regrets) >= 1 - 1e-9
    assert np.median(regrets) < 1.01


def test_the_group_that_goes_is_the_cheapest_of_all(x64):
    """Brute force over filters: realised on the quadratic loss itself, with the joint move."""
    params, grads = problem(20, seed=5)
    params, grads = {"a": params["a"]}, {"a": grads["a"]}
    pruned = hj.prune_once(
        params,
        hj.saliencies.obs(damping=DAMPING),
        1 / 6,
        grads_fn=lambda p: grads,
        pattern=hj.patterns.filters(),
    )
    inv, w = inverse(grads), flat(params)
    costs = [cost(inv, w, Q) for Q in indices(params, hj.patterns.filters())]
    gone = np.flatnonzero(~np.asarray(pruned.mask["a"]).any(axis=0))
    assert list(gone) == [int(np.argmin(costs))]
    np.testing.assert_allclose(pruned.predicted_increase, min(costs), rtol=1e-8)


def test_float32_is_near_float64(x64):
    params, grads = problem(30)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    for pattern in (hj.patterns.filters(), hj.patterns.n_of_m(1, 2)):
        np.testing.assert_allclose(scores(*narrow, pattern), scores(params, grads, pattern), rtol=2e-4)


def test_equal_patterns_share_what_is_compiled(compilations):
    params, grads = problem()
    others = jax.tree.map(lambda x: 2 * x, params)
    rows = {"a": Along(1, "channels", tie="both"), "b": Along(0, "rows", tie="both")}
    scores(params, grads, rows)
    first = len(compilations)
    scores(others, grads, dict(rows))
    assert len(compilations) == first


def test_more_blocks_than_can_be_told_apart_are_refused(monkeypatch):
    monkeypatch.setattr(_scores, "_NUMBERED", 5)
    params, grads = problem()
    with pytest.raises(ValueError, match="`block_size` must make at most 5 blocks"):
        scores(params, grads, hj.patterns.filters(), block_size=3)
