"""Movement pruning against a model with explicit scores and a straight-through mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import hessjax as hj


def seen(weights, grads=None, mask=None, step=1):
    return hj.saliencies.Context(weights, mask, jnp.int32(step), grads)


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {"one": rng.normal(size=(5, 8)), "two": rng.normal(size=(8, 3))}
    return jax.tree.map(jnp.asarray, params), jnp.asarray(rng.normal(size=(200, 16, 5)))


def loss(params, x):
    y = jnp.tanh(x @ params["one"]) @ params["two"]
    return jnp.mean((y - jnp.sin(2 * x[:, :3])) ** 2)


@jax.custom_vjp
def masked(w, scores, mask):
    return w * mask


masked.defvjp(
    lambda w, scores, mask: (w * mask, (w, mask)),
    lambda saved, g: (g * saved[1], g * saved[0], jnp.zeros_like(g)),
)
"""W⊙M with the gradient of M handed to S as it is: what the paper differentiates."""


def top(scores, sparsity):
    flat = np.asarray(scores).ravel()
    mask = np.ones(flat.size)
    mask[np.argsort(flat, kind="stable")[: round(sparsity * flat.size)]] = 0
    return jnp.asarray(mask.reshape(scores.shape))


def explicit_run(params, batches, weights_tx, scores_tx, mask_of, penalty=lambda S, t: 0.0):
    """Trains W and S by autodiff through a straight-through mask; yields the masked weights."""

    @functools.partial(jax.jit, static_argnums=3)
    def grads(both, M, x, t):
        def objective(both):
            W, S = both
            return loss(jax.tree.map(masked, W, S, M), x) + penalty(S, t)

        return jax.grad(objective)(both)

    W, S = params, jax.tree.map(jnp.zeros_like, params)
    states = weights_tx.init(W), scores_tx.init(S)
    M = mask_of(S, 0)
    for t, x in enumerate(batches):
        gW, gS = grads((W, S), M, x, 0)
        W_steps, w_state = weights_tx.update(gW, states[0], W)
        S_steps, s_state = scores_tx.update(gS, states[1], S)
        W, S, states = optax.apply_updates(W, W_steps), optax.apply_updates(S, S_steps), (w_state, s_state)
        M = mask_of(S, t + 1)
        yield jax.tree.map(jnp.multiply, W, M), S


def our_run(tx, params, batches):
    state = tx.init(params)

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for x in batches:
        params, state = step(params, state, x)
        yield params, state


def test_the_trajectory_is_that_of_an_explicit_straight_through_model(x64):
    params, batches = problem()
    weights_tx, scores_tx = optax.adamw(3e-3, weight_decay=1e-2), optax.adam(1e-2)
    sparsity = lambda t: 0.6 * min(max(t - 5, 0) / 100, 1)
    table = jnp.asarray([sparsity(t) for t in range(202)])
    tx = hj.prune(
        weights_tx,
        hj.saliencies.movement(scores_tx, start=jnp.zeros_like),
        lambda t: table[t],
        allocation=hj.allocations.uniform(),
        every=1,
    )
    reference = explicit_run(
        params, batches, weights_tx, scores_tx, lambda S, t: jax.tree.map(lambda s: top(s, sparsity(t)), S)
    )
    returned, before = 0, None
    for (expected, S), (found, state) in zip(reference, our_run(tx, params, batches), strict=True):
        oracles.close(found, expected, rtol=1e-12, atol=1e-12)
        oracles.close(state.saliency.scores, S, rtol=1e-12, atol=1e-12)
        mask = np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(state.mask)])
        returned += 0 if before is None else int((mask & ~before).sum())
        before = mask
    assert returned > 0, "a pruned weight must come back in this run"
    assert int((~before).sum()) == 38  # 24 of 40 and 14 of 24


def test_soft_movement_against_autodiff_of_the_penalty(x64):
    """λ · mean σ(S) over all scores, differentiated; M = σ(S) > τ straight through."""
    params, batches = problem(1)
    count = sum(x.size for x in params.values())
    weights_tx, scores_tx = optax.sgd(1e-2), optax.sgd(2.0)
    penalty = lambda S, t: 3.0 * sum(jnp.sum(jax.nn.sigmoid(s)) for s in S.values()) / count
    tx = hj.prune(
        weights_tx,
        hj.saliencies.soft_movement(3.0, scores_tx),
        hj.allocations.threshold(0.45, least=0.0),
        every=1,
    )
    above = lambda S, t: jax.tree.map(lambda s: (jax.nn.sigmoid(s) > 0.45).astype(s.dtype), S)
    reference = explicit_run(params, batches[:60], weights_tx, scores_tx, above, penalty)
    for (expected, S), (found, state) in zip(reference, our_run(tx, params, batches[:60]), strict=True):
        oracles.close(found, expected, rtol=1e-12, atol=1e-12)
        oracles.close(state.saliency.scores, S, rtol=1e-12, atol=1e-12)
    zeros = sum(int((p == 0).sum()) for p in found.values())
    assert 0 < zeros < count
    np.testing.assert_allclose(state.sparsity, zeros / count, rtol=1e-6)


def test_scores_may_start_at_the_magnitudes():
    """Without a gradient the ranking is that of magnitude; the training then moves it."""
    params = {"w": jnp.array([[0.1, -3.0, 2.0, 0.5]])}
    rule = hj.saliencies.movement(optax.sgd(1.0), start=jnp.abs)
    tx = hj.prune(optax.sgd(0.0), rule, 0.5, every=1)
    state = tx.init(params)
    np.testing.assert_array_equal(hj.mask_of(state)["w"], [[False, True, True, False]])
    _, state = tx.update({"w": jnp.array([[-25.0, 0.0, 0.0, 0.0]])}, state, params)
    np.testing.assert_array_equal(hj.mask_of(state)["w"], [[True, True, False, False]])


def test_from_magnitudes_every_leaf_counts_in_its_own_spread():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(1.0, 0.02, size=(30, 20)))
    scores = hj.saliencies.from_magnitudes(w)
    np.testing.assert_allclose(scores, np.abs(w) / np.std(np.asarray(w)), rtol=1e-6)
    np.testing.assert_allclose(hj.saliencies.from_magnitudes(1e3 * w), scores, rtol=1e-5)
    for flat in (jnp.full((2, 3), -2.0), jnp.asarray(-2.0), jnp.zeros((0, 3))):  # no spread to divide by
        np.testing.assert_array_equal(hj.saliencies.from_magnitudes(flat), jnp.abs(flat))


def test_scores_move_by_a_share_of_their_own_size(x64):
    """By default, and under LARS, the step of a leaf is −lr · ‖S‖ · x/‖x‖ with x = G⊙W, at any scale of G."""
    rng = np.random.default_rng(0)
    dense = {"a": jnp.asarray(rng.normal(size=(5, 4))), "b": jnp.asarray(10 * rng.normal(size=(3, 3)))}
    grads = {"a": jnp.asarray(1e-6 * rng.normal(size=(5, 4))), "b": jnp.asarray(rng.normal(size=(3, 3)))}
    lars = optax.lars(0.005, trust_coefficient=1.0, momentum=0.0)
    default, same = hj.saliencies.movement(), hj.saliencies.movement(lars, hj.saliencies.from_magnitudes)
    assert not jax.tree.leaves(default.init(dense).inner)  # scores are all that it remembers
    for rule in (default, same):
        state = rule.init(dense)
        after = rule.update(state, seen(dense, grads)).scores
        for name, before in state.scores.items():
            oracles.close(before, jnp.abs(dense[name]) / jnp.std(dense[name]))
            slope = grads[name] * dense[name]
            step = -0.005 * jnp.linalg.norm(before) * slope / jnp.linalg.norm(slope)
            oracles.close(after[name] - before, step)


def test_schedules_of_the_penalty_count_from_zero():
    rule = hj.saliencies.soft_movement(lambda t: jnp.where(t == 0, 0.0, 1.0), optax.sgd(1.0))
    dense = {"w": jnp.ones((1, 2))}
    zero = {"w": jnp.zeros((1, 2))}
    first = rule.update(rule.init(dense), seen(dense, zero))
    np.testing.assert_array_equal(first.scores["w"], 0.0)
    second = rule.update(first, seen(dense, zero))
    np.testing.assert_allclose(second.scores["w"], -0.25 / 2)


def test_scores_are_wide_and_selected_only():
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "bias": jnp.ones(2)}
    state = hj.prune(optax.sgd(0.1), hj.saliencies.movement(), 0.0).init(params)
    assert state.saliency.scores["kernel"].dtype == jnp.float32
    assert len(jax.tree.leaves(state.saliency.scores)) == 1


@pytest.mark.parametrize("least", [-0.1, 1.5])
def test_threshold_checks_its_floor(least):
    with pytest.raises(ValueError, match=r"`least` must be in \[0, 1\]"):
        hj.allocations.threshold(0.1, least=least)


def test_threshold_checks_its_level():
    with pytest.raises(ValueError, match="`level` must be a number or a schedule, got nan"):
        hj.allocations.threshold(float("nan"))


def test_a_threshold_above_all_scores_keeps_the_best_few():
    params = {"a": jnp.arange(1.0, 9.0).reshape(2, 4), "b": jnp.ones((2, 2))}
    tx = hj.prune(
        optax.sgd(0.0), hj.saliencies.magnitude(), hj.allocations.threshold(lambda t: 100.0, least=0.25)
    )
    state = tx.init(params)
    assert [int(m.sum()) for m in state.mask.values()] == [2, 1]
    np.testing.assert_array_equal(state.mask["a"][1], [False, False, True, True])
    np.testing.assert_allclose(state.sparsity, 9 / 12)


def test_a_threshold_spares_what_is_above_it_under_n_of_m():
    scores = {"w": jnp.array([[1.0, 1, 1, 1, 9, 9, 9, 9]])}
    tx = hj.prune(
        optax.sgd(0.0),
        hj.saliencies.magnitude(),
        hj.allocations.threshold(5.0, least=0.0),
        pattern=hj.patterns.n_of_m(2, 4, axis=1),
    )
    state = tx.init(scores)
    np.testing.assert_array_equal(state.mask["w"], [[False, False, True, True, True, True, True, True]])
    assert float(state.sparsity) == 0.25


def test_a_first_state_with_gates_or_scores_may_be_donated():
    key, params = jax.random.key(3), {"w": jnp.ones((4, 4))}
    rules = [
        hj.saliencies.hard_concrete(1.0, key, stop=5),
        hj.saliencies.movement(),
        hj.saliencies.movement(optax.adam(1e-2), start=lambda w: w),
    ]
    for rule in rules:
        tx = hj.prune(optax.sgd(0.1), rule, hj.allocations.threshold(-9.0), start=1)
        step = jax.jit(lambda s, p, tx=tx: tx.update(p, s, p)[1], donate_argnums=0)
        step(tx.init(params), params)
        step(tx.init(params), params)
    assert jax.random.uniform(key).shape == ()


@pytest.mark.parametrize("rule", ["movement", "soft_movement"])
def test_a_first_mask_is_not_left_to_rounding(rule):
    """Adam's first step is one size for all: networks trained side by side get the masks of each alone."""
    published = hj.saliencies.movement(optax.adam(1e-2), start=jnp.zeros_like)
    saliency = published if rule == "movement" else hj.saliencies.soft_movement(0.1)
    tx = hj.prune(optax.adam(1e-2), saliency, 0.5, every=1, start=1)
    keys = jax.random.split(jax.random.key(0), 4)
    params = jax.vmap(lambda k: {"one": jax.random.normal(k, (5, 8)), "two": jax.random.normal(k, (8, 3))})(
        keys
    )
    batches = jax.random.normal(jax.random.key(1), (3, 4, 16, 5))

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    together, states = params, jax.vmap(tx.init)(params)
    alone = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(4)]
    own = [tx.init(p) for p in alone]
    side_by_side, by_itself = jax.jit(jax.vmap(step)), jax.jit(step)
    for x in batches:
        together, states = side_by_side(together, states, x)
        for i in range(4):
            alone[i], own[i] = by_itself(alone[i], own[i], x[i])
            mine = jax.tree.map(lambda m, i=i: m[i], states.mask)
            jax.tree.map(np.testing.assert_array_equal, mine, own[i].mask)
    oracles.close(together, jax.tree.map(lambda *xs: jnp.stack(xs), *alone), rtol=1e-4, atol=1e-5)


def test_first_scores_of_one_size_are_ranked_by_their_slopes():
    weights = {"a": jnp.array([1.0, -2.0, 3.0, 0.5]), "b": jnp.array([2.0, 1.0])}
    grads = {"a": jnp.array([0.1, 0.2, -0.3, 0.4]), "b": jnp.array([0.05, -1.0])}
    now = seen(weights, grads)
    slopes = jax.tree.map(jnp.multiply, grads, weights)
    for optimizer in (optax.adam(1e-2), optax.sign_sgd(0.1), optax.lion(1e-3)):
        rule = hj.saliencies.movement(optimizer, start=jnp.zeros_like)
        state = rule.update(rule.init(weights), now)
        size = float(jnp.abs(state.scores["a"][0]))
        oracles.close(
            rule.scores(state, now), jax.tree.map(lambda s, size=size: -size * s, slopes), rtol=1e-5
        )
        # From the second gradient on, and in proportion to the slopes, S is what is ranked.
        state = rule.update(state, now)
        jax.tree.map(np.testing.assert_array_equal, rule.scores(state, now), state.scores)
    for optimizer in (optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)):
        rule = hj.saliencies.movement(optimizer, start=jnp.zeros_like)
        state = rule.update(rule.init(weights), now)
        jax.tree.map(np.testing.assert_array_equal, rule.scores(state, now), state.scores)
