"""Saliencies from the mean gradient, and at random."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj


def seen(weights, grads=None, mask=None, step=1):
    return hj.saliencies.Context(weights, mask, jnp.int32(step), grads)


def test_the_running_mean_is_a_weighted_mean_from_the_first_gradient_on():
    rule, rng = hj.saliencies.gradient(decay=0.8), np.random.default_rng(0)
    dense, grads = {"w": jnp.asarray(rng.normal(size=(3, 2)))}, rng.normal(size=(5, 3, 2))
    state = rule.init(dense)
    for k in range(1, 6):
        state = rule.update(state, seen(dense, {"w": jnp.asarray(grads[k - 1])}))
        weights = 0.8 ** np.arange(k)[::-1]
        mean = np.tensordot(weights / weights.sum(), grads[:k], axes=1)
        np.testing.assert_allclose(state.mean["w"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        rule.scores(state, seen(dense))["w"], np.abs(mean * dense["w"]), rtol=1e-5, atol=1e-6
    )


def test_it_predicts_the_first_order_change():
    """Removing the lowest-scored weight of a linear loss changes it by exactly its score."""
    slope = jnp.array([[0.5, -2.0, 0.1]])
    params = {"w": jnp.array([[1.0, 0.1, 3.0]])}
    grads_fn = lambda p: {"w": slope[None]}
    loss = lambda p: jnp.sum(p["w"] * slope)
    pruned = hj.prune_once(params, hj.saliencies.gradient(), 1 / 3, grads_fn=grads_fn, loss_fn=loss)
    assert float(pruned.params["w"][0, 1]) == 0
    np.testing.assert_allclose(abs(pruned.realised_increase), 0.2, rtol=1e-6)


def test_decay_outside_its_range():
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\)"):
        hj.saliencies.gradient(1.0)


def test_random_masks_are_nested_and_uniform():
    params = {"a": jnp.ones((50, 40)), "b": jnp.ones((30, 20))}
    masks = [hj.prune_once(params, hj.saliencies.random(jax.random.key(3)), s).mask for s in (0.3, 0.6)]
    for k in params:
        assert not np.any(np.asarray(masks[1][k]) & ~np.asarray(masks[0][k]))
    n = params["a"].size
    share = float((~masks[1]["a"]).mean())
    assert abs(share - 0.6) < 4 * np.sqrt(0.24 / n)
    other = hj.prune_once(params, hj.saliencies.random(jax.random.key(4)), 0.6).mask
    assert not np.array_equal(other["a"], masks[1]["a"])


def test_random_in_training_keeps_its_mask():
    params = {"w": jnp.ones((10, 10))}
    tx = hj.prune(optax.sgd(0.1, momentum=0.9), hj.saliencies.random(jax.random.key(0)), 0.5, every=1)
    state = tx.init(params)
    first = hj.mask_of(state)["w"]
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(hj.mask_of(state)["w"], first)


FROM_ZERO = hj.saliencies.movement(start=jnp.zeros_like)
NEEDING = [hj.saliencies.gradient(), FROM_ZERO, hj.saliencies.soft_movement(1.0)]


@pytest.mark.parametrize("rule", [*NEEDING, hj.saliencies.movement()])
def test_rules_that_need_gradients_say_so_at_one_go(rule):
    with pytest.raises(ValueError, match="`grads_fn` must be given for a saliency that needs gradients"):
        hj.prune_once({"w": jnp.ones((2, 2))}, rule, 0.5)


@pytest.mark.parametrize("rule", NEEDING)
def test_rules_that_need_gradients_say_so_in_training(rule):
    with pytest.raises(ValueError, match="`start` must be at least 1"):
        hj.prune(optax.sgd(0.1), rule, 0.5).init({"w": jnp.ones((2, 2))})


def test_recomputed_gradients_replace_the_old_ones():
    """The second step ranks by the gradient where it stands, not by a mean with the first one."""
    first, second = jnp.array([[[1.0, 5.0, 2.0]]]), jnp.array([[[0.0, 1.0, 3.0]]])
    grads_fn = lambda p: {"w": jnp.where(jnp.any(p["w"] == 0), second, first)}
    found = hj.prune_once(
        {"w": jnp.ones((1, 3))}, hj.saliencies.gradient(), 2 / 3, grads_fn=grads_fn, recomputes=2
    )
    np.testing.assert_array_equal(found.params["w"], [[0.0, 0.0, 1.0]])
