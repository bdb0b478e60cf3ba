"""`prune` among other transformations: one table of companions, and what holds in the company of each."""

import pickle

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import hessjax as hj

pytestmark = pytest.mark.promotes  # transformations of optax that run by themselves

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


@pytest.mark.parametrize("period", [2, 7])
def test_what_undoes_zeros_now_and_then_is_told_inside_jit(period):
    """Between mask steps, and after the last, when `prune` makes zeros again at the next update."""
    tx, params = pruned(optax.sgd(0.1), every=1), make_params()
    state, update, dense = tx.init(params), jax.jit(tx.update), params
    for t in range(31 * period):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        params = dense if t > 8 and t % period == 0 else params
    assert int(state.num_undone) > 0


def test_between_counts_no_weights_are_copied():
    """XLA copies what is read out of order and then overwritten: of the arrays a loop donates, nothing."""
    for regrow in (True, False):
        tx, params = pruned(optax.sgd(0.1), regrow=regrow), make_params()
        step = lambda p, s, g, tx=tx: tx.update(g, s, p)
        whole = lambda *args, step=step: (optax.apply_updates(args[0], (found := step(*args))[0]), found[1])
        compiled = jax.jit(whole, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
        entry = compiled.as_text().split("ENTRY")[1]
        assert not [line for line in entry.splitlines() if "5,6]" in line and " copy(" in line]


def test_lookahead_is_told():
    """Its slow weights, which the fast ones are set to, know nothing of the mask."""
    tx = optax.lookahead(pruned(optax.sgd(0.1)), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(make_params())
    state = tx.init(params)
    with pytest.raises(ValueError, match="`params` must be 0 where they are pruned"):
        list(train(lambda g, *rest: tx.update(g.fast, *rest), params, state, 6))


def test_masks_of_prefix_trees():
    """A scalar for every leaf that is not pruned, within subtrees too; both masks where two have one."""
    params = make_params()
    tx, sizes = pruned(optax.sgd(0.1)), {"body": {"kernel": 30, "bias": 1}, "head": {"kernel": 1, "bias": 1}}
    outer = COMPANIONS["masked by prefix"](pruned)
    state = outer.init(params)
    assert jax.tree.map(jnp.shape, hj.mask_of(state))["head"] == ()
    assert jax.tree.map(jnp.size, hj.mask_of(state, params)) == sizes
    of_train_state = hj.mask_of(TrainState.create(apply_fn=None, params=params, tx=outer))
    assert jax.tree.structure(of_train_state) == jax.tree.structure(params)
    both = hj.mask_of(optax.partition({"a": tx, "b": tx}, HEAD_ALONE).init(params))
    assert both["body"]["kernel"].shape == (5, 6)
    assert both["head"]["kernel"].shape == (6, 4)
    with pytest.raises(
        ValueError, match=r"`opt_state` must be that .* of these `params`, but\n  body/kernel"
    ):
        hj.mask_of(state, {"body": {"kernel": jnp.ones((2, 2))}, "head": 0.0})
    with pytest.raises(ValueError, match="found two for the same"):
        hj.mask_of((state, state))
    abstract = hj.mask_of(jax.eval_shape(tx.init, params))
    assert abstract["body"]["kernel"].shape == (5, 6)


def test_a_function_for_the_gradients_of_examples_under_a_mask():
    """It would see a part of the params: said so; one that takes the loop's own works."""
    params = make_params()
    block = lambda tree: jax.tree.map(lambda w: jnp.stack([w, jnp.sin(9 * w)]), tree)
    rule = hj.prune(optax.sgd(0.1), hj.saliencies.obd(), 0.5, start=1, every=1)
    tx = optax.masked(rule, {"body": True, "head": False})
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, per_example_grads=lambda _: block(params))
    expected, _ = tx.update(params, state, params, per_example_grads=block(params))
    assert_equal(updates, expected)
    needs_all = lambda tree: block({"head": tree["head"], "kernel": tree["head"]["kernel"]})
    with pytest.raises(ValueError, match="`per_example_grads` was called with a part of the params"):
        tx.update(params, state, params, per_example_grads=needs_all)


# -- dtypes, and whole ensembles ------------------------------------------------------------------


HYPERPARAMETERS = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("dtype", "dense_dtype", "inner"),
    [
        (jnp.bfloat16, None, HYPERPARAMETERS),
        (jnp.bfloat16, jnp.float32, HYPERPARAMETERS),
        (jnp.bfloat16, jnp.float32, optax.adam(0.02)),
        (jnp.float16, jnp.float32, HYPERPARAMETERS),
    ],
)
def test_a_scan_carries_narrow_params(dtype, dense_dtype, inner):
    """No dtype changes between updates, whatever the first leaf's is."""
    params, tx = make_params(dtype), pruned(inner, dense_dtype=dense_dtype)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(gradients(0, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(6))
    zeros = [int((params[k]["kernel"] == 0).sum()) for k in KERNELS]
    assert sum(zeros) == round(0.5 * 54)
    assert int(state.num_undone) == 0
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_an_ensemble_is_its_members():
    tx, members = pruned(optax.adam(0.02)), [make_params(), jax.tree.map(jnp.sin, make_params())]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    update = jax.jit(jax.vmap(tx.update))
    grads = lambda t: gradients(t, members[0])
    state = jax.vmap(tx.init)(stacked)
    for t in range(3):
        updates, state = update(jax.tree.map(lambda g: jnp.stack([g, g]), grads(t)), state, stacked)
        stacked = optax.apply_updates(stacked, updates)
    for i, member in enumerate(members):
        *_, (expected, _) = train(jax.jit(tx.update), member, tx.init(member), 3)
        found = jax.tree.map(lambda x, i=i: x[i], stacked)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


# -- saving ---------------------------------------------------------------------------------------


def by_orbax(tree, path):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)
    with ocp.StandardCheckpointer() as saver:
        return saver.restore(path, tree)


def test_gates_go_on_from_any_checkpoint(tmp_path):
    """Draws included: a random key is nothing that serializers know, and none is in the state."""
    rule = hj.saliencies.hard_concrete(1.0, jax.random.key(3), stop=20)
    tx = hj.prune(optax.adam(0.02), rule, hj.allocations.threshold(0.0), start=20, stop=20)
    params, update = make_params(), jax.jit(tx.update)
    runs = list(train(update, params, tx.init(params), 6))
    for restored in (by_pickle(runs[2]), by_msgpack(runs[2]), by_orbax(runs[2], tmp_path / "half")):
        *_, again = train(update, *restored, 3, first=3)
        assert_equal(again, runs[-1])


FOREIGN = {
    "restored without a target": lambda tx, p: flax.serialization.to_state_dict(tx.init(p)),
    "a tuple": lambda tx, p: tuple(tx.init(p)),
    "another optimizer's": lambda tx, p: optax.adam(0.1).init(p),
    "none": lambda tx, p: None,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_state_is_refused(name):
    params, tx = make_params(), pruned(optax.adam(0.02))
    with pytest.raises(ValueError, match="`state` must hold the state of a `hessjax.prune`.*`tx.init"):
        tx.update(params, FOREIGN[name](tx, params), params)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (lambda: hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5), "inner"),
        (lambda: hj.prune(optax.adam(0.1), hj.saliencies.movement(), 0.0), "saliency"),
        (lambda: hj.prune(optax.adam(0.1), hj.saliencies.magnitude(), 0.5, regrow=False), "dense"),
    ],
)
def test_the_state_of_another_kind_of_prune_is_refused(other, field):
    params = make_params()
    rule = hj.saliencies.soft_movement(1.0) if field != "saliency" else hj.saliencies.gradient()
    tx = hj.prune(optax.adam(0.1), rule, 0.0, dense_dtype=jnp.float32)
    with pytest.raises(ValueError, match=f"`state` must be that of this `hessjax.prune`.*`{field}`"):
        tx.update(params, other().init(params), params)


def test_a_state_of_other_params_is_refused():
    params, tx = make_params(), pruned(optax.adam(0.02))
    state = tx.init(params)
    others = {**params, "head": {**params["head"], "kernel": jnp.ones((6, 9))}}
    with pytest.raises(ValueError, match=r"head/kernel: \(6, 4\) in the state, \(6, 9\) in the params"):
        tx.update(others, state, others)
    with pytest.raises(ValueError, match=r"body/kernel: \(5, 6\) in the state, missing in the params"):
        tx.update({"head": params["head"]}, state, {"head": params["head"]})
