"""Scores of one rule, moves of another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj


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
