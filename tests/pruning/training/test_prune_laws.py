"""The laws of pruning over saliency × pattern × allocation × inner optimizer, and the options of `prune`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

SALIENCIES = {
    "magnitude": hj.saliencies.magnitude,
    "movement": lambda: hj.saliencies.movement(optax.adam(0.1)),
    "soft_movement": lambda: hj.saliencies.soft_movement(1.0, optax.adam(0.1)),
    "gradient": hj.saliencies.gradient,
    "random": lambda: hj.saliencies.random(jax.random.key(7)),
    "obd": lambda: hj.saliencies.obd(num_grads=4),
    "obs": lambda: hj.saliencies.obs(num_grads=4),
    "static": lambda: hj.saliencies.static(make_params()),
    "sparse_evolution": lambda: hj.saliencies.sparse_evolution(0.3, jax.random.key(7)),
    "rigl": lambda: hj.saliencies.rigl(0.3),
}
PATTERNS = {
    "unstructured": hj.patterns.unstructured(),
    "2:4": hj.patterns.n_of_m(2, 4),
    "blocks": hj.patterns.blocks((4, 2)),
    "filters": {"one": hj.patterns.filters(), "two": hj.patterns.rows()},
}
ALLOCATIONS = {
    "global": hj.allocations.global_threshold(),
    "uniform": hj.allocations.uniform(),
    "erdos_renyi": hj.allocations.erdos_renyi(),
    "explicit": hj.allocations.explicit({"*": 0.5}),
    "by_curvature": hj.allocations.by_curvature({"one": 1.0, "two": 0.5}),
}
INNER = {
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adamw": lambda: optax.adamw(0.02, weight_decay=0.1),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.02), 2),
    "clipped lion": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.lion(0.01)),
}
COLUMNS = [
    (s, p, a, i)
    for n, s in enumerate(SALIENCIES)
    for m, p in enumerate(PATTERNS)
    if (n + m) % 2 == 0
    for a, i in [(list(ALLOCATIONS)[(n + m) % 5], list(INNER)[(n + 2 * m) % 4])]
]
"""Every saliency with two patterns, allocations and optimizers in turn."""

RAMP = lambda t: 0.05 * jnp.minimum(t, 10)
UNIT = {"unstructured": 1, "2:4": 1, "blocks": 8, "filters": 8}


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return {
        "bias": jnp.full(6, 0.1, dtype),
        "one": jax.random.normal(keys[0], (8, 6), dtype),
        "two": jax.random.normal(keys[1], (4, 8), dtype).T.reshape(8, 4),
    }


def loss(params, x):
    h = jnp.tanh(x @ params["one"] + params["bias"][None])
    y = jnp.concatenate([h, x[:, :2]], axis=1) @ params["two"]
    return jnp.mean((y - jnp.sin(x[:, :4])) ** 2).astype(jnp.float32)


def train(tx, params, steps, first=0, state=None):
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, t):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), (16, 8), params["one"].dtype)
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for t in range(first, first + steps):
        params, state = step(params, state, t)
        yield params, state


def num_zeros(params):
    return sum(int((params[k] == 0).sum()) for k in ("one", "two"))


@pytest.mark.parametrize(("saliency", "pattern", "allocation", "inner"), COLUMNS)
def test_zeros_are_exact_counted_and_patterned(saliency, pattern, allocation, inner):
    schedule = lambda t: jnp.where(t >= 3, 0.5, 0.0)
    tx = hj.prune(
        INNER[inner](),
        SALIENCIES[saliency](),
        schedule,
        allocation=ALLOCATIONS[allocation],
        pattern=PATTERNS[pattern],
        every=3,
        start=1,
        stop=6,
    )
    for params, state in train(tx, make_params(), 7):
        mask = hj.mask_of(state)
        for k in ("one", "two"):
            np.testing.assert_array_equal(np.asarray(params[k]) != 0, mask[k])
    zeros, asked = num_zeros(params), 40
    assert asked - 2 * UNIT[pattern] < zeros <= asked
    for k, found in zip(("one", "two"), (params["one"], params["two"]), strict=True):
        kept = np.asarray(found) != 0
        if pattern == "2:4":
            assert (kept.reshape(2, 4, -1).sum(axis=1) == 2).all()
        if pattern == "blocks":
            counts = kept.reshape(2, 4, -1, 2).sum(axis=(1, 3))
            assert set(np.unique(counts)) <= {0, 8}
        if pattern == "filters":
            counts = kept.sum(axis=0 if k == "one" else 1)
            assert set(np.unique(counts)) <= {0, kept.shape[0 if k == "one" else 1]}
    assert bool((params["bias"] != 0).all())
    assert int(state.num_nan) == 0


@pytest.mark.parametrize("saliency", ["magnitude", "movement", "gradient"])
def test_without_regrowth_masks_are_nested_and_nothing_dense_is_kept(saliency):
    schedule = optax.linear_schedule(0.0, 0.75, 12)
    tx = hj.prune(INNER["momentum"](), SALIENCIES[saliency](), schedule, every=2, regrow=False)
    before = None
    for params, state in train(tx, make_params(), 14):
        assert state.dense is None
        mask = np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(state.mask)])
        assert before is None or not np.any(mask & ~before)
        np.testing.assert_array_equal(
            np.concatenate([(params[k] != 0).ravel() for k in ("one", "two")]), mask
        )
        before = mask
    assert int((~before).sum()) == 60


def test_without_regrowth_the_trajectory_is_that_of_a_static_mask():
    """Mask at step 0, then the optimizer on masked gradients alone."""
    params, inner = make_params(), optax.adam(0.02)
    tx = hj.prune(inner, hj.saliencies.magnitude(), 0.5, regrow=False)
    mask = hj.mask_of(tx.init(params))
    expected, state = params, inner.init(params)
    for t, (found, _) in enumerate(train(tx, params, 5)):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), (16, 8))
        at = params if t == 0 else expected
        grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), jax.grad(loss)(at, x), mask)
        updates, state = inner.update(grads, state, expected)
        expected = jax.tree.map(lambda p, u, m: jnp.where(m, p + u, 0), expected, updates, mask)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_straight_through_moves_the_pruned_dense_weights():
    params = {"w": jnp.array([[1.0, 3.0]])}
    grads = {"w": jnp.array([[10.0, 1.0]])}
    dense = {}
    for through in (False, True):
        tx = hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5, every=100, straight_through=through)
        _, state = tx.update(grads, tx.init(params), params)
        dense[through] = np.asarray(state.dense["w"])
    np.testing.assert_allclose(dense[False], [[1.0, 2.9]], rtol=1e-6)
    np.testing.assert_allclose(dense[True], [[0.0, 2.9]], rtol=1e-6, atol=1e-6)


def test_float32_dense_weights_under_bfloat16_params():
    """Steps too small for bfloat16 add up; the params are the rounded masked copy."""
    params = {"one": jnp.full((8, 6), 1.0, jnp.bfloat16).at[0].set(0.25)}
    tx = hj.prune(optax.sgd(1e-4), hj.saliencies.magnitude(), 0.125, dense_dtype=jnp.float32)
    state = tx.init(params)
    for _ in range(100):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert params["one"].dtype == jnp.bfloat16
    assert state.dense["one"].dtype == jnp.float32
    np.testing.assert_allclose(state.dense["one"][1:], 0.99, rtol=1e-5)
    np.testing.assert_array_equal(params["one"][1:], jnp.asarray(0.99, jnp.bfloat16))
    np.testing.assert_array_equal(params["one"][0], 0)
    plain = hj.prune(optax.sgd(1e-4), hj.saliencies.magnitude(), 0.125)
    stuck = {"one": jnp.full((8, 6), 1.0, jnp.bfloat16)}
    updates, _ = plain.update(jax.tree.map(jnp.ones_like, stuck), plain.init(stuck), stuck)
    np.testing.assert_array_equal(optax.apply_updates(stuck, updates)["one"][1:], 1.0)


def test_float64_dense_copies_give_the_float64_run(x64):
    """With a wider dense copy the run of the wide weights is followed to the rounding of the gradients."""
    params = make_params(jnp.float64)
    tx = hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5, every=2)
    *_, (expected, _) = train(tx, params, 6)
    same = hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5, every=2, dense_dtype=jnp.float64)
    *_, (found, _) = train(same, params, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_two_prunes_nest_and_their_masks_join():
    params = make_params()
    inner = hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5, where="one", every=2)
    tx = hj.prune(
        inner, hj.saliencies.movement(), lambda t: jnp.where(t > 1, 0.25, 0.0), where="two", every=3
    )
    *_, (params, state) = train(tx, params, 7)
    assert int((params["one"] == 0).sum()) == 24
    assert int((params["two"] == 0).sum()) == 8
    mask = hj.mask_of(state)
    np.testing.assert_array_equal(mask["one"], params["one"] != 0)
    np.testing.assert_array_equal(mask["two"], params["two"] != 0)
    assert mask["bias"].shape == ()


@pytest.mark.parametrize("saliency", ["movement", "obs"])
def test_training_goes_on_from_a_saved_state(saliency):
    tx = hj.prune(optax.adam(0.02), SALIENCIES[saliency](), RAMP, every=2, start=1)
    params = make_params()
    whole = list(train(tx, params, 8))
    half, state = whole[3]
    saved = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (half, state))
    *_, (found, _) = train(tx, saved[0], 4, first=4, state=saved[1])
    jax.tree.map(np.testing.assert_array_equal, found, whole[-1][0])


def test_a_scan_is_the_loop():
    tx = hj.prune(optax.adam(0.02), hj.saliencies.movement(), RAMP, pattern=hj.patterns.n_of_m(2, 4), every=2)
    params = make_params()

    def step(carry, t):
        params, state = carry
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), (16, 8))
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    (found, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(6)))((params, tx.init(params)))
    *_, (expected, _) = train(tx, params, 6)
    assert num_zeros(found) == num_zeros(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
