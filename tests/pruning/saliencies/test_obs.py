"""Optimal brain surgeon against the dense quadratic problem it solves."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import CONTAINERS, leaves, rows

import hessjax as hj
from hessjax._core._types import Relative
from hessjax.pruning.saliencies._saliency import Context

SIZE = 10
EVERYWHERE = lambda path, leaf: True


def problem(num_grads=6, seed=0, dtype=None):
    """Params of 10 weights in four leaves (one empty, one scalar), and gradients."""
    rng = np.random.default_rng(seed)
    params = leaves(seed, dtype)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(num_grads, *x.shape)), dtype), params)
    return params, grads


def seen(params, grads, mask=None):
    mask = jax.tree.map(lambda x: jnp.full_like(x, True, dtype=bool), params) if mask is None else mask
    return Context(params, mask, jnp.int32(1), per_example_grads=grads)


def vector(tree):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def dense_fisher(grads, damping, block_size=None):
    """F + λI in full; outside the blocks zero."""
    G = rows(grads)
    F = G.T @ G / len(G)
    lam = damping.factor * np.trace(F) / len(F) if isinstance(damping, Relative) else damping
    if block_size is not None:
        names = [
            (i, j // block_size) for i, leaf in enumerate(jax.tree.leaves(grads)) for j in range(leaf[0].size)
        ]
        F = F * np.array([[a == b for a in names] for b in names])
    return F + lam * np.eye(len(F))


def kkt(A, w, pruned, slope=None):
    """The minimum of g·δ + ½ δᵀAδ with δ = −w on the pruned weights, with its multipliers; and its value."""
    n, g = len(w), np.zeros(len(w)) if slope is None else slope
    E = np.eye(n)[pruned]
    system = np.block([[A, E.T], [E, np.zeros((len(pruned), len(pruned)))]])
    move = np.linalg.solve(system, np.concatenate([-g, -w[pruned]]))[:n]
    return move, g @ move + move @ A @ move / 2


def flags(params, pruned):
    flat = np.ones(SIZE, bool)
    flat[list(pruned)] = False
    ends = np.cumsum([x.size for x in jax.tree.leaves(params)])[:-1]
    parts = np.split(flat, ends)
    shaped = [jnp.asarray(p.reshape(x.shape)) for p, x in zip(parts, jax.tree.leaves(params), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), shaped)


def move(rule, params, grads, pruned, active=()):
    """δ and the predicted increase for the pruned set; `active` are those gone before."""
    mask = flags(params, {*pruned, *active})
    moved, rise = rule.compensate(rule.init(params), seen(params, grads, flags(params, active)), mask)
    return np.where(vector(mask), vector(moved), 0) - vector(params), float(rise)


# -- oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 4, 100])
@pytest.mark.parametrize("num_grads", [1, 6, 30])
def test_the_joint_move_is_the_constrained_minimum(x64, num_grads, block_size):
    params, grads = problem(num_grads)
    A, w = dense_fisher(grads, 0.05, block_size), vector(params)
    for pruned in ([3], [0, 3, 5, 9], list(range(SIZE))):
        got, rise = move(hj.saliencies.obs("joint", 0.05, block_size), params, grads, pruned)
        want, least = kkt(A, w, pruned)
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
        inverse = np.linalg.inv(A)[np.ix_(pruned, pruned)]
        np.testing.assert_allclose(rise, least, rtol=1e-8)
        np.testing.assert_allclose(rise, w[pruned] @ np.linalg.solve(inverse, w[pruned]) / 2, rtol=1e-8)


@pytest.mark.parametrize("num_grads", [3, 30])
def test_with_a_gradient_the_newton_step_is_part_of_the_minimum(x64, num_grads):
    params, grads = problem(num_grads)
    rule, w, pruned = hj.saliencies.wood_taylor("joint", hj.relative(0.1)), vector(params), [1, 4, 8]
    A, g = dense_fisher(grads, hj.relative(0.1)), rows(grads).mean(0)
    got, rise = move(rule, params, grads, pruned)
    want, least = kkt(A, w, pruned, g)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(rise, least, rtol=1e-8)
    inverse = np.linalg.inv(A)
    u = w - inverse @ g
    scores = vector(rule.scores(rule.init(params), seen(params, grads)))
    np.testing.assert_allclose(scores, u**2 / np.diag(inverse) / 2, rtol=1e-8)
    formula = -inverse @ g - inverse[:, pruned] @ np.linalg.solve(inverse[np.ix_(pruned, pruned)], u[pruned])
    np.testing.assert_allclose(got, formula, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block_size", [None, 4])
def test_single_scores_and_summed_moves(x64, block_size):
    params, grads = problem()
    A, w, pruned = dense_fisher(grads, 0.05, block_size), vector(params), [0, 3, 5]
    inverse = np.linalg.inv(A)
    rule = hj.saliencies.obs("summed", 0.05, block_size)
    scores = vector(rule.scores(rule.init(params), seen(params, grads)))
    np.testing.assert_allclose(scores, w**2 / np.diag(inverse) / 2, rtol=1e-8)
    want = -sum(inverse[:, q] * w[q] / inverse[q, q] for q in pruned)
    want[pruned] = -w[pruned]
    got, rise = move(rule, params, grads, pruned)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(rise, got @ A @ got / 2, rtol=1e-8)
    stays, rise = move(hj.saliencies.obs("none", 0.05, block_size), params, grads, pruned)
    np.testing.assert_array_equal(stays, np.where(np.isin(np.arange(SIZE), pruned), -w, 0))
    np.testing.assert_allclose(rise, stays @ A @ stays / 2, rtol=1e-8)


@pytest.mark.parametrize(("num_grads", "block_size"), [(6, None), (30, None), (6, 4)])
def test_greedy_goes_one_by_one(x64, num_grads, block_size):
    """Scores are the costs of a loop that inverts the rest anew after every weight, made monotone."""
    params, grads = problem(num_grads)
    A, w = dense_fisher(grads, 0.05, block_size), vector(params)
    rule = hj.saliencies.obs("greedy", 0.05, block_size)
    scores = vector(rule.scores(rule.init(params), seen(params, grads)))
    groups = [range(SIZE)] if block_size is None else [range(3), [3], range(4, 8), range(8, 10)]
    for group in groups:
        group = list(group)
        block, left, u = A[np.ix_(group, group)], list(range(len(group))), w[group].copy()
        so_far = 0.0
        while left:
            inverse = np.linalg.inv(block[np.ix_(left, left)])
            costs = u[left] ** 2 / np.diag(inverse) / 2
            first = int(np.argmin(costs))
            so_far = max(so_far, costs[first])
            np.testing.assert_allclose(scores[group[left[first]]], so_far, rtol=1e-8)
            u[left] -= inverse[:, first] * u[left[first]] / inverse[first, first]
            left.pop(first)


def test_brain_damage_is_half_w_squared_times_the_diagonal(x64):
    params, grads = problem()
    rule = hj.saliencies.obd(batch_size=3)
    scores = vector(rule.scores(rule.init(params), seen(params, grads)))
    want = 3 * vector(params) ** 2 * (rows(grads) ** 2).mean(0) / 2
    np.testing.assert_allclose(scores, want, rtol=1e-12)
    got, rise = move(rule, params, grads, [2, 7])
    assert np.flatnonzero(got).tolist() == [2, 7]
    np.testing.assert_allclose(rise, want[[2, 7]].sum(), rtol=1e-12)


def test_the_diagonal_is_that_of_inverse_fisher(x64):
    params, grads = problem(4)
    for block_size in (None, 4):
        diagonal = hj.inverse_fisher(grads, hj.relative(0.1), block_size).diagonal()
        rule = hj.saliencies.obs("joint", hj.relative(0.1), block_size)
        scores = rule.scores(rule.init(params), seen(params, grads))
        jax.tree.map(
            lambda s, w, d: np.testing.assert_allclose(s, w**2 / d / 2, rtol=1e-8), scores, params, diagonal
        )


# -- what must hold ------------------------------------------------------------------------------


def test_no_move_of_a_set_costs_less_than_the_joint_one(x64):
    """Every set of three of ten weights: joint <= summed and joint <= none in the predicted increase."""
    params, grads = problem(4)
    rules = [hj.saliencies.obs(update, 0.05) for update in ("joint", "summed", "none")]
    for pruned in itertools.islice(itertools.combinations(range(SIZE), 3), 0, 120, 5):
        joint, summed, none = (move(rule, params, grads, pruned)[1] for rule in rules)
        assert joint <= summed * (1 + 1e-12)
        assert joint <= none * (1 + 1e-12)


def chosen(update, params, grads, number):
    rule = hj.saliencies.obs(update, 0.05)
    scores = rule.scores(rule.init(params), seen(params, grads))
    pruned = np.argsort(vector(scores), kind="stable")[:number]
    return move(hj.saliencies.obs("joint", 0.05), params, grads, pruned)[1]


def test_greedy_sets_are_near_the_best_of_all(x64):
    """Against all 210 sets of four: greedy on average nearer than the four lowest single scores.

    It is no law: one cheap weight after the other can lead astray, and the single scores can be lucky.
    """
    ratios = []
    for seed in range(12):
        params, grads = problem(4, seed)
        A, w = dense_fisher(grads, 0.05), vector(params)
        best = min(kkt(A, w, list(pruned))[1] for pruned in itertools.combinations(range(SIZE), 4))
        greedy, single = (chosen(update, params, grads, 4) for update in ("greedy", "joint"))
        assert best <= min(greedy, single) * (1 + 1e-9)
        ratios.append((greedy / best, single / best))
    greedy, single = np.array(ratios).T
    assert np.exp(np.log(greedy).mean()) < np.exp(np.log(single).mean())
    assert np.median(greedy) < 1.01


def test_weights_gone_before_do_not_disturb(x64):
    """As if they were not in the problem at all."""
    params, grads = problem()
    gone, pruned = [1, 5, 6], [2, 9]
    left = [i for i in range(SIZE) if i not in gone]
    A = dense_fisher(grads, 0.05)[np.ix_(left, left)]
    want, least = kkt(A, vector(params)[left], [left.index(q) for q in pruned])
    got, rise = move(hj.saliencies.obs("joint", 0.05), params, grads, pruned, gone)
    np.testing.assert_allclose(got[left], want, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(rise, least, rtol=1e-8)
    for update in ("joint", "greedy"):
        rule = hj.saliencies.obs(update, 0.05)
        scores = vector(rule.scores(rule.init(params), seen(params, grads, flags(params, gone))))
        assert np.flatnonzero(np.isneginf(scores)).tolist() == gone


@pytest.mark.parametrize("update", ["joint", "none"])
def test_a_weight_that_comes_back_is_made_up_for_too(x64, update):
    params, grads = problem()
    rule, w, live = hj.saliencies.obs(update, 0.05), vector(params), [i for i in range(SIZE) if i != 1]
    context = seen(params, grads, flags(params, [1, 8]))
    moved, rise = rule.compensate(rule.init(params), context, flags(params, [1, 3, 5]))
    A, signed = dense_fisher(grads, 0.05)[np.ix_(live, live)], np.where(np.arange(SIZE) == 8, -w, w)[live]
    changed = [live.index(i) for i in (3, 5, 8)]
    want, least = kkt(A, signed, changed)
    if update == "none":
        want = np.where(np.isin(np.arange(len(live)), changed), -signed, 0)
        least = want @ A @ want / 2
    free = [0, 2, 4, 6, 7, 9]
    np.testing.assert_allclose((vector(moved) - w)[free], want[[live.index(i) for i in free]], rtol=1e-8)
    np.testing.assert_allclose(vector(moved)[[1, 3, 5, 8]], w[[1, 3, 5, 8]])
    np.testing.assert_allclose(rise, least, rtol=1e-8)


def test_without_any_gradient_the_scores_rank_by_magnitude():
    params, grads = problem()
    grads = jax.tree.map(jnp.zeros_like, grads)
    rule = hj.saliencies.obs()
    scores = vector(rule.scores(rule.init(params), seen(params, grads)))
    assert np.argsort(scores).tolist() == np.argsort(np.abs(vector(params))).tolist()
    got, rise = move(rule, params, grads, [3])
    assert np.flatnonzero(got).tolist() == [3]
    assert abs(rise) < 1e-10


def test_gradients_of_batches_are_scaled(x64):
    params, grads = problem()
    scaled = jax.tree.map(lambda g: g * np.sqrt(5), grads)
    got = move(hj.saliencies.obs("joint", 0.05, batch_size=5), params, grads, [0, 4])
    want = move(hj.saliencies.obs("joint", 0.05), params, scaled, [0, 4])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-10)


def test_float32_and_narrow_params_are_near_float64():
    params, grads = problem(6)
    with jax.enable_x64(True):
        wide, grads64 = (jax.tree.map(lambda x: x.astype(jnp.float64), t) for t in (params, grads))
        want, _ = move(hj.saliencies.obs("joint", hj.relative(0.01)), wide, grads64, [0, 4, 8])
    got, _ = move(hj.saliencies.obs("joint", hj.relative(0.01)), params, grads, [0, 4, 8])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    mixed = {**params, "d_kernel": params["d_kernel"].astype(jnp.bfloat16)}
    rule = hj.saliencies.obs()
    moved, _ = rule.compensate(rule.init(mixed), seen(mixed, grads), flags(mixed, [0, 4]))
    assert moved["d_kernel"].dtype == jnp.bfloat16
    assert moved["a_bias"].dtype == jnp.float32


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
def test_any_container(wrap):
    params, grads = problem()
    rule = hj.saliencies.obs("joint", 0.05)
    want = rule.scores(rule.init(params), seen(params, grads))
    got = rule.scores(rule.init(wrap(params)), seen(wrap(params), wrap(grads)))
    np.testing.assert_array_equal(vector(got), vector(want))
    assert jax.tree.structure(got) == jax.tree.structure(wrap(params))


# -- in training ---------------------------------------------------------------------------------


def linear_problem():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8))
    return jnp.asarray(X, jnp.float32), {
        "w": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        "b": jnp.zeros(3),
    }


def squares(params, x):
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"][None] - jnp.tanh(x[:, :3])) ** 2, axis=1))


def run(tx, steps, jit=True, per_example=False):
    x, params = linear_problem()

    def step(params, state, x):
        extra = {"per_example_grads": hj.per_example_grads(squares, params, x)} if per_example else {}
        updates, state = tx.update(jax.grad(squares)(params, x), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state, step = tx.init(params), jax.jit(step) if jit else step
    for t in range(steps):
        params, state = step(params, state, x[t % 10 * 4 : t % 10 * 4 + 4])
        yield t + 1, params, state


@pytest.mark.parametrize("jit", [True, False])
def test_a_ring_of_training_gradients_moves_the_kept_weights(jit):
    tx = hj.prune(optax.sgd(0.0), hj.saliencies.obs(num_grads=3, batch_size=4), 0.5, start=5, every=4, stop=9)
    x, before = linear_problem()
    seen = [jax.grad(squares)(before, x[t * 4 : t * 4 + 4]) for t in range(5)]
    block = {"w": jnp.stack([g["w"] for g in seen[2:]])}
    for t, params, state in run(tx, 9, jit):
        zeros = int((params["w"] == 0).sum())
        assert zeros == (0 if t < 5 else 12)
        if t == 5:
            want = hj.prune_once(
                {"w": before["w"]}, hj.saliencies.obs(batch_size=4), 0.5, grads_fn=lambda p: block
            )
            np.testing.assert_allclose(params["w"], want.params["w"], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state.predicted_increase, want.predicted_increase, rtol=1e-4)
            assert not np.allclose(params["w"][params["w"] != 0], before["w"][params["w"] != 0])
            after = params["w"]
    np.testing.assert_array_equal(params["w"], after)  # the mask step at 9 finds nothing new to prune


def test_gradients_may_be_handed_over_at_every_update():
    tx = hj.prune(optax.adam(0.01), hj.saliencies.wood_taylor(block_size=8), 0.5, start=2, every=3)
    _, params, state = list(run(tx, 6, per_example=True))[-1]
    assert int((params["w"] == 0).sum()) == 12
    assert np.isfinite(float(state.predicted_increase))


def test_nothing_can_be_pruned_before_a_gradient():
    _, params = linear_problem()
    with pytest.raises(
        ValueError, match="`start` must be at least 1 for a saliency that needs gradients, got 0"
    ):
        hj.prune(optax.sgd(0.1), hj.saliencies.obs(num_grads=4), 0.5).init(params)
    schedule = optax.polynomial_schedule(0.0, 0.5, 3, 4)
    *_, (_, params, _) = run(
        hj.prune(optax.sgd(0.1), hj.saliencies.obs(num_grads=4), schedule, every=2), 4, jit=False
    )
    assert int((params["w"] == 0).sum()) == 12


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": "best"}, "`update` must be one of 'joint', 'greedy', 'summed', 'none', got 'best'."),
        ({"damping": 0.0}, "`damping` must be positive and finite, got 0.0"),
        ({"damping": jnp.float32(-1.0)}, "`damping` must be positive and finite, got -1.0"),
        ({"block_size": 0}, "`block_size` must be at least 1, got 0."),
        ({"num_grads": 0}, "`num_grads` must be at least 1, got 0."),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hj.saliencies.obs(**arguments)


def test_dampings_may_be_arrays_and_traced():
    rules = [hj.saliencies.obs(damping=x) for x in (0.5, np.float64(0.5), jnp.float32(0.5))]
    assert rules[0] == rules[1] == rules[2]
    assert len(set(map(hash, rules))) == 1
    params, grads = problem()

    def scores(damping):
        rule = hj.saliencies.obs(damping=damping)
        return rule.scores(rule.init(params), seen(params, grads))

    chex.assert_trees_all_close(jax.jit(scores)(0.5), scores(0.5), rtol=1e-6)


def test_a_block_of_another_shape_is_named():
    params, grads = problem()
    rule = hj.saliencies.obs()
    for block, message in (
        (jax.tree.map(lambda g: g[:0], grads), "`per_example_grads` must hold at least one gradient"),
        (jax.tree.map(lambda g: g[0], grads), "`per_example_grads` must"),
        (jax.tree.map(lambda g: g[..., None], grads), "`per_example_grads` must have the structure of"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.scores(rule.init(params), seen(params, block))


def test_no_gradient_at_all_is_named():
    params, grads = problem()
    none = jax.tree.map(lambda g: g[:0], grads)
    with pytest.raises(ValueError, match="must hold at least one gradient, got none"):
        hj.prune_once(params, hj.saliencies.obs(), 0.5, grads_fn=lambda _: none, where=EVERYWHERE)


def test_gradients_are_needed():
    params, _ = problem()
    with pytest.raises(ValueError, match="`per_example_grads` must be given"):
        hj.saliencies.obs().scores(hj.saliencies.obs().init(params), seen(params, None))


def test_brain_damage_predicts_a_finite_increase_at_every_step(x64):
    """The sum over what goes at that step, gone weights not counted again."""
    params, grads = problem(12)
    found = hj.prune_once(
        params,
        hj.saliencies.obd(),
        0.7,
        grads_fn=lambda p: grads,
        recomputes=3,
        where=EVERYWHERE,
        allocation=hj.allocations.global_threshold(floor=0.0),
    )
    w, squares = vector(params), np.mean(rows(grads) ** 2, axis=0)
    gone = vector(found.params) == 0
    np.testing.assert_allclose(found.predicted_increase, np.sum((w**2 * squares / 2)[gone]), rtol=1e-10)
    assert len(found.steps) == 3
