"""`inverse_fisher` and optimal brain surgeon say the same of the same gradients; too weak a damping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import hessjax as hj
from hessjax.pruning.saliencies._saliency import Context

EVERYWHERE = lambda path, leaf: True


def problem(count, dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    params = {"a": jnp.asarray(rng.normal(size=(4, 6)), dtype), "b": jnp.asarray(rng.normal(size=3), dtype)}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(count, *x.shape)), dtype), params)
    return params, grads


def seen(params, grads, pattern=hj.patterns.unstructured(), mask=None):  # noqa: B008
    mask = jax.tree.map(lambda x: jnp.full_like(x, True, dtype=bool), params) if mask is None else mask
    return Context(params, mask, jnp.int32(1), per_example_grads=grads, pattern=pattern)


def close(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), got, want)


@pytest.mark.parametrize("block_size", [None, 6])
@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("damping", [0.05, hj.relative(0.1)])
def test_both_say_the_same(x64, block_size, count, damping):
    """Diagonal and single scores, apply and the move for one weight, blocks and what sets cost."""
    params, grads = problem(count)
    inverse = hj.inverse_fisher(grads, damping, block_size, batch_size=3)
    rule = hj.saliencies.obs("joint", damping, block_size, batch_size=3)
    scores = rule.scores(rule.init(params), seen(params, grads))
    close(scores, jax.tree.map(lambda w, d: w**2 / d / 2, params, inverse.diagonal()))

    column = inverse.apply(jax.tree.map(jnp.zeros_like, params) | {"b": jnp.array([0.0, 1.0, 0.0])})
    factor = params["b"][1] / column["b"][1]
    mask = seen(params, grads).mask | {"b": jnp.array([True, False, True])}
    moved, increase = rule.compensate(rule.init(params), seen(params, grads), mask)
    want = jax.tree.map(lambda w, c: w - factor * c, params, column)
    close(moved, want | {"b": want["b"].at[1].set(params["b"][1])})  # which keeps its dense copy
    np.testing.assert_allclose(increase, scores["b"][1], rtol=1e-10)

    rows = {"a": params["a"]}, {"a": grads["a"]}
    blocks = hj.inverse_fisher(rows[1], damping, block_size, batch_size=3).blocks(0)
    blocks = (
        blocks if block_size else blocks.reshape(4, 6, 4, 6).diagonal(axis1=0, axis2=2).transpose(2, 0, 1)
    )
    costs = rule.scores(rule.init(rows[0]), seen(*rows, hj.patterns.rows()))["a"].sum(axis=1)
    close(
        costs,
        jnp.einsum("bi,bi->b", params["a"], jnp.linalg.solve(blocks, params["a"][..., None])[..., 0]) / 2,
    )


@pytest.mark.parametrize("update", ["joint", "greedy", "summed"])
@pytest.mark.parametrize(("block_size", "count"), [(None, 6), (6, 40), (6, 3)])
def test_too_weak_a_damping_is_an_error_as_of_inverse_fisher(update, block_size, count):
    params, grads = problem(count, jnp.float32)
    where = "the whole network" if block_size is None else "block 0 of a"
    with pytest.raises(ValueError, match="`damping` must be about .* got 1.0e-30") as error:
        hj.inverse_fisher(grads, 1e-30, block_size)
    assert where in str(error.value)
    rule = hj.saliencies.obs(update, 1e-30, block_size)
    with pytest.raises(ValueError, match="`damping` must be about .* got 1.0e-30") as error:
        hj.prune_once(params, rule, 0.5, grads_fn=lambda p: grads, where=EVERYWHERE)
    assert where in str(error.value)
    mask = {"a": params["a"] > 0, "b": params["b"] > 0}
    with pytest.raises(ValueError, match="`damping` must be about"):
        rule.compensate(rule.init(params), seen(params, grads), mask)


def test_inside_jit_such_a_block_scores_nan_and_does_not_move():
    """`num_nan` counts its weights; those that stay keep their values; nothing is promised."""
    params, grads = problem(40, jnp.float32)
    grads["a"] = 1e6 * jnp.ones_like(grads["a"])  # one gradient, again and again
    rule = hj.saliencies.obs("joint", 1e-3, 6)
    mask = jax.tree.map(lambda x: x > 0, params)

    @jax.jit
    def traced(params, grads):
        context = seen(params, grads)
        return rule.scores(rule.init(params), context), rule.compensate(rule.init(params), context, mask)

    scores, (moved, increase) = traced(params, grads)
    assert np.isnan(scores["a"]).all()
    assert np.isfinite(scores["b"]).all()
    np.testing.assert_array_equal(moved["a"], params["a"])
    assert not np.allclose(moved["b"], params["b"])
    assert np.isnan(increase)

    tx = hj.prune(optax.sgd(0.0), rule, 0.25, start=1, where=EVERYWHERE)

    @jax.jit
    def step(params, state):
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = tx.update(mean, state, params, per_example_grads=grads)
        return optax.apply_updates(params, updates), state

    after, state = step(params, tx.init(params))
    assert int(state.num_nan) == 24
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_gradients_that_are_not_finite_name_the_leaf():
    params, grads = problem(4)
    grads["b"] = grads["b"].at[1].set(jnp.nan)
    rule = hj.saliencies.obs(block_size=6)
    with pytest.raises(ValueError, match=r"the gradients that make the Fisher must be finite, .* in b\."):
        rule.scores(rule.init(params), seen(params, grads))


def test_repeated_gradients_with_a_pivot_of_nothing_but_rounding_are_refused():
    """Whatever the vector that the inverse is measured with shows: it can be good by luck."""
    rows = np.zeros((32, 16))
    rows[:, 0] = 1e-3 * np.random.default_rng(0).normal(size=32)
    rows = jnp.asarray(rows, jnp.float32)
    with pytest.raises(ValueError, match="`damping` must be about"):
        hj.inverse_fisher(rows, hj.relative(2.5e-6), 16)
    inverse = jax.jit(lambda rows: hj.inverse_fisher(rows, hj.relative(2.5e-6), 16))(rows)
    assert np.isinf(inverse.residuals[0]).all()
    assert hj.inverse_fisher(rows, hj.relative(0.01), 16).accurate


def test_weights_that_are_not_there_count_for_nothing(x64):
    """Neither in F nor in what a damping is relative to."""
    params, grads = problem(6)
    mask = {"a": jnp.arange(24).reshape(4, 6) % 3 > 0, "b": jnp.array([True, True, False])}
    rule = hj.saliencies.obs("joint", hj.relative(0.1), None)
    scores = rule.scores(rule.init(params), seen(params, grads, mask=mask))
    left = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(mask)])
    G = oracles.rows(grads)[:, left]
    F = G.T @ G / len(G)
    inverse = np.linalg.inv(F + 0.1 * np.trace(F) / len(F) * np.eye(len(F)))
    flat = [
        np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(t)])[left] for t in (scores, params)
    ]
    np.testing.assert_allclose(flat[0], flat[1] ** 2 / np.diag(inverse) / 2, rtol=1e-10)
