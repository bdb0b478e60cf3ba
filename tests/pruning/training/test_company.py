"""`prune` among other transformations: one table of companions, and what holds in the company of each."""

import pickle

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import hessjax as hj

STEPS = 6
RAMP = lambda t: 0.1 * jnp.minimum(t, 5)
KERNELS = ("body", "head")
HEAD_ALONE, BY_LEAF = {"body": "a", "head": "b"}, {"body": {"kernel": "a", "bias": "b"}, "head": "a"}


def pruned(inner, **arguments):
    return hj.prune(
        inner, hj.saliencies.magnitude(), RAMP, **{"every": 2, "start": 0, "stop": 6, **arguments}
    )


COMPANIONS = {
    "clip before": lambda wrap: optax.chain(optax.clip_by_global_norm(0.5), wrap(optax.adam(0.02))),
    "masked": lambda wrap: optax.masked(
        wrap(optax.adam(0.02)), {"body": {"kernel": True, "bias": False}, "head": True}
    ),
    "masked by prefix": lambda wrap: optax.masked(wrap(optax.adam(0.02)), {"body": True, "head": False}),
    "partition": lambda wrap: optax.partition({"a": wrap(optax.adam(0.02)), "b": optax.sgd(0.1)}, BY_LEAF),
    "partition by prefix": lambda wrap: optax.partition(
        {"a": wrap(optax.adam(0.02)), "b": optax.sgd(0.1)}, HEAD_ALONE
    ),
    "two in a partition": lambda wrap: optax.partition(
        {"a": wrap(optax.adam(0.02)), "b": wrap(optax.sgd(0.1))}, HEAD_ALONE
    ),
    "frozen": lambda wrap: optax.partition(
        {"a": wrap(optax.adam(0.02)), "b": optax.set_to_zero()}, HEAD_ALONE
    ),
    "steps of several": lambda wrap: optax.MultiSteps(wrap(optax.adam(0.02)), 2).gradient_transformation(),
    "several inside": lambda wrap: wrap(optax.MultiSteps(optax.adam(0.02), 2)),
    "if finite": lambda wrap: optax.apply_if_finite(wrap(optax.adam(0.02)), 3),
    "hyperparameters inside": lambda wrap: wrap(optax.inject_hyperparams(optax.adamw)(learning_rate=0.02)),
    "hyperparameters outside": lambda wrap: optax.inject_hyperparams(lambda rate: wrap(optax.adam(rate)))(
        rate=0.02
    ),
    "flat inside": lambda wrap: wrap(optax.flatten(optax.adam(0.02))),
    "schedule-free inside": lambda wrap: wrap(optax.contrib.schedule_free_sgd(0.1)),
    "ema inside": lambda wrap: wrap(optax.chain(optax.ema(0.9), optax.scale(-0.1))),
    "frozen inside": lambda wrap: wrap(
        optax.partition({"a": optax.adam(0.02), "b": optax.set_to_zero()}, BY_LEAF)
    ),
}
"""By what people put round `prune` and into it; `wrap` is `prune`, or nothing."""

UNDOING = {
    "decay": lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
    "clip": lambda tx: optax.chain(tx, optax.clip(1e-3)),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "scale": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "trust ratio": lambda tx: optax.chain(tx, optax.scale_by_trust_ratio()),
    "frozen": lambda tx: optax.chain(tx, optax.masked(optax.set_to_zero(), {"body": False, "head": True})),
    "schedule-free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
}
"""What changes the updates after `prune`."""


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return {
        "body": {"kernel": jax.random.normal(keys[0], (5, 6), dtype), "bias": jnp.full(6, 0.1, dtype)},
        "head": {"kernel": jax.random.normal(keys[1], (6, 4), dtype), "bias": jnp.zeros(4, dtype)},
    }


def gradients(t, like):
    """Of no loss, so that one leaf does not depend on another."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(100 + t), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(treedef, [jax.random.normal(k, x.shape, x.dtype) for k, x in pairs])


def train(update, params, state, steps, first=0):
    """After every update."""
    for t in range(first, first + steps):
        updates, state = update(gradients(t, params), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def by_pickle(tree):
    return pickle.loads(pickle.dumps(jax.device_get(tree)))


def by_msgpack(tree):
    return flax.serialization.from_bytes(tree, flax.serialization.to_bytes(tree))


@pytest.mark.parametrize("name", COMPANIONS)
def test_what_holds_in_every_company(name):
    """Exact zeros and counts, leaves that are not pruned as without it, the same from a saved state."""
    tx, plain = COMPANIONS[name](pruned), COMPANIONS[name](lambda inner: inner)
    params, update = make_params(), jax.jit(tx.update)
    half = None
    for t, (found, state) in enumerate(train(update, params, tx.init(params), STEPS)):
        mask, half = hj.mask_of(state, params), (found, state) if t == 2 else half
        if t > 0:
            assert_equal(jax.tree.map(lambda w, m: jnp.where(m, w, 0), found, mask), found)
        assert all(int(x) == 0 for x in _named("num_undone", state))
    for number, sparsity, state_mask in zip(
        _named("num_updates", state), _named("sparsity", state), _named("mask", state), strict=True
    ):
        leaves = jax.tree.leaves(state_mask)
        assert float(sparsity) == float(RAMP(number // 2 * 2))
        assert sum(int((~m).sum()) for m in leaves) == round(float(sparsity) * sum(m.size for m in leaves))
    *_, (alone, _) = train(jax.jit(plain.update), params, plain.init(params), STEPS)
    other = jax.tree.map(lambda m: m.ndim == 0, mask)
    chosen = lambda tree: [x for x, o in zip(*map(jax.tree.leaves, (tree, other)), strict=True) if o]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), chosen(found), chosen(alone))
    for restored in (by_pickle(half), by_msgpack(half)):
        *_, (again, last) = train(update, *restored, STEPS - 3, first=3)
        assert_equal((again, last), (found, state))


def _named(field, state):
    """A field of every state of `prune`."""
    is_state = lambda x: type(x).__name__ == "PruneState"
    nodes = jax.tree.leaves(state, is_leaf=is_state)
    return [getattr(x, field) for x in nodes if is_state(x)]


@pytest.mark.parametrize("name", UNDOING)
def test_what_undoes_zeros_is_told(name):
    tx, params = UNDOING[name](pruned(optax.sgd(0.1))), make_params()
    with pytest.raises(
        ValueError, match=r"`params` must be 0 where they are pruned, but \d+ of .*belongs inside"
    ):
        list(train(tx.update, params, tx.init(params), 7))
    *_, (_, state) = train(jax.jit(tx.update), params, tx.init(params), 7)
    assert _named("num_undone", state)[0] > 0
    with pytest.warns(UserWarning, match="pruned weights were not 0 in the params"):
        hj.mask_of(state)


def test_lookahead_is_told():
    """Its slow weights, which the fast ones are set to, know nothing of the mask."""
    tx = optax.lookahead(pruned(optax.sgd(0.1)), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(make_params())
    state = tx.init(params)
    with pytest.raises(ValueError, match="`params` must be 0 where they are pruned"):
        for t in range(6):
            updates, state = tx.update(gradients(t, params.fast), state, params)
            params = optax.apply_updates(params, updates)
