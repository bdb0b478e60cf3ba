"""The contract of scores; scores of one rule with the moves of another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj


def test_magnitude_scores_selected_leaves_only():
    rule = hj.saliencies.magnitude()
    dense = {"a": jnp.array([[-2.0, 1.0]]), "b": optax.MaskedNode()}
    seen = hj.saliencies.Context(dense, dense, jnp.int32(1))
    scores = rule.scores(rule.update(rule.init(dense), seen), seen)
    assert scores["a"].tolist() == [[2.0, 1.0]]
    assert scores["b"] == optax.MaskedNode()


def test_magnitude_keeps_the_dtype():
    weights = {"a": jnp.ones((1, 1), jnp.bfloat16)}
    scores = hj.saliencies.magnitude().scores((), hj.saliencies.Context(weights, weights, jnp.int32(0)))
    assert scores["a"].dtype == jnp.bfloat16


A = optax.adam(0.1)
KEY = jax.random.key(3)
SETTINGS = {
    "magnitude": hj.saliencies.magnitude,
    "random": lambda: hj.saliencies.random(KEY),
    "gradient": lambda: hj.saliencies.gradient(0.5),
    "movement": hj.saliencies.movement,
    "movement with settings": lambda: hj.saliencies.movement(A, start=hj.saliencies.from_magnitudes),
    "soft_movement": lambda: hj.saliencies.soft_movement(2.0),
    "hard_concrete": lambda: hj.saliencies.hard_concrete(1.0, KEY, stop=3),
    "static": lambda: hj.saliencies.static({"w": jnp.arange(4.0)}),
    "sparse_evolution": lambda: hj.saliencies.sparse_evolution(0.3, KEY),
    "rigl": lambda: hj.saliencies.rigl(0.3, score=hj.saliencies.gradient()),
    "compensated": lambda: hj.saliencies.compensated(hj.saliencies.random(KEY), by=hj.saliencies.obs()),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_settings_are_equal_and_share_compiled_code(name):
    rule, same = SETTINGS[name](), SETTINGS[name]()
    assert rule == same
    assert hash(rule) == hash(same)
    assert repr(rule) == repr(same)
    traces = []

    @jax.jit
    def first_state(rule, weights):
        traces.append(rule)
        return rule.init(weights)

    for each in (rule, same):
        first_state(each, {"w": jnp.ones(4)})
    assert len(traces) == 1


def test_other_settings_are_not_equal():
    assert hj.saliencies.gradient(0.5) != hj.saliencies.gradient(0.6)
    assert hj.saliencies.random(KEY) != hj.saliencies.random(jax.random.key(4))
    assert hj.saliencies.movement(optax.sgd(1.0)) != hj.saliencies.movement()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (hj.saliencies.magnitude(), "magnitude()"),
        (hj.saliencies.gradient(0.5), "gradient(decay=0.5)"),
        (hj.saliencies.rigl(0.3), "rigl(fraction=0.3, score=magnitude())"),
        (
            hj.saliencies.compensated(hj.saliencies.gradient(), by=hj.saliencies.obd()),
            "compensated(choose=gradient(decay=0.9), by=",
        ),
    ],
)
def test_the_settings_can_be_read(rule, text):
    assert repr(rule).startswith(text)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("saliency", lambda rule: hj.prune(optax.sgd(0.1), rule, 0.5)),
        ("saliency", lambda rule: hj.prune_once({"w": jnp.ones((2, 2))}, rule, 0.5)),
        ("saliency", lambda rule: hj.prune_once({"w": jnp.ones((2, 2))}, [rule], 0.5)),
        ("score", lambda rule: hj.saliencies.rigl(0.3, score=rule)),
        ("score", lambda rule: hj.saliencies.sparse_evolution(0.3, jax.random.key(0), score=rule)),
        ("choose", lambda rule: hj.saliencies.compensated(rule, by=hj.saliencies.obs())),
        ("by", lambda rule: hj.saliencies.compensated(hj.saliencies.magnitude(), by=rule)),
    ],
)
def test_what_is_no_saliency_is_refused(name, call):
    for wrong in (hj.saliencies.magnitude, hj.saliencies.obs, None):  # parentheses are missing
        with pytest.raises(TypeError, match=name):
            call(wrong)


@pytest.mark.parametrize("rule", ["movement", "soft_movement", "hard_concrete"])
def test_what_is_no_optimizer_or_penalty_is_refused(rule):
    given = {
        "movement": {},
        "soft_movement": {"penalty": 1.0},
        "hard_concrete": {"penalty": 1.0, "key": jax.random.key(0), "stop": 2},
    }[rule]
    make = getattr(hj.saliencies, rule)
    with pytest.raises(TypeError, match="optimizer"):
        make(**given, optimizer=0.1)
    for penalty in (-1.0, float("nan")) if "penalty" in given else ():
        with pytest.raises(ValueError, match="`penalty` must be a finite number"):
            make(**{**given, "penalty": penalty})


def test_what_a_rule_of_ones_own_has_left_out_is_named():
    class Empty(hj.saliencies.Saliency):
        pass

    weights = {"w": jnp.ones((1, 4))}
    with pytest.raises(NotImplementedError, match=r"Empty must have a method `scores\(state, seen\)`"):
        hj.prune_once(weights, Empty(), 0.5)


def test_the_mask_is_the_first_rules_and_the_move_the_seconds():
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (4, 3))}
    grads = {"w": jax.random.normal(jax.random.key(1), (20, 4, 3))}
    rule = hj.saliencies.compensated(hj.saliencies.magnitude(), by=hj.saliencies.obs(damping=0.1))
    found = hj.prune_once(params, rule, 0.5, grads_fn=lambda p: grads)
    by_magnitude = hj.prune_once(params, hj.saliencies.magnitude(), 0.5)
    np.testing.assert_array_equal(found.mask["w"], by_magnitude.mask["w"])
    G, w = np.asarray(grads["w"]).reshape(20, 12), np.asarray(params["w"]).ravel()
    inverse = np.linalg.inv(G.T @ G / 20 + 0.1 * np.eye(12))
    gone = np.flatnonzero(~np.asarray(found.mask["w"]).ravel())
    inner = np.linalg.solve(inverse[np.ix_(gone, gone)], w[gone])
    np.testing.assert_allclose(found.params["w"].ravel(), w - inverse[:, gone] @ inner, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(found.predicted_increase, w[gone] @ inner / 2, rtol=1e-4)


def test_movement_with_compensation_trains():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 3))}
    rule = hj.saliencies.compensated(
        hj.saliencies.movement(optax.sgd(1.0)), by=hj.saliencies.obs(num_grads=8)
    )
    tx = hj.prune(optax.sgd(0.05), rule, 0.5, every=5, start=10)
    state, x = tx.init(params), jax.random.normal(jax.random.key(1), (64, 6))
    step = jax.jit(lambda p, s: tx.update(jax.grad(lambda p: jnp.mean((x @ p["w"] - 1) ** 2))(p), s, p))
    for _ in range(12):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert int((params["w"] == 0).sum()) == 9
    assert np.isfinite(state.predicted_increase)


def test_a_rule_that_moves_nothing_is_refused():
    with pytest.raises(ValueError, match="`by` must be a saliency that moves the kept weights"):
        hj.saliencies.compensated(hj.saliencies.movement(), by=hj.saliencies.magnitude())
