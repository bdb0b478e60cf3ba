"""L0 gates against a model with explicit gates, and their law."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(5)


def seen(weights, grads=None, mask=None, step=1):
    return hj.saliencies.Context(weights, mask, jnp.int32(step), grads)


def gate(log_alpha, u):
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) * 1.5)
    return jnp.clip(s * 1.2 - 0.1, 0, 1)


def resting(log_alpha):
    return jnp.clip(jax.nn.sigmoid(log_alpha) * 1.2 - 0.1, 0, 1)


def loss(params, x):
    y = jnp.tanh(x @ params["one"]) @ params["two"]
    return jnp.mean((y - jnp.sin(2 * x[:, :3])) ** 2)


def test_the_trajectory_is_that_of_explicit_gates(x64):
    """W and log α trained by autodiff through z(log α, u) with the same u, 40 steps, then at rest."""
    rng = np.random.default_rng(0)
    W = {"one": jnp.asarray(rng.normal(size=(5, 6))), "two": jnp.asarray(rng.normal(size=(6, 3)))}
    batches = jnp.asarray(rng.normal(size=(50, 16, 5)))
    params, lam, stop = W, 0.4, 40
    tx = hj.prune(
        optax.adam(1e-2),
        hj.saliencies.hard_concrete(lam, KEY, optax.adam(0.2), stop=stop, start_open=0.6),
        hj.allocations.threshold(0.0, least=0.0),
        start=stop,
        stop=stop,
    )
    state = tx.init(params)
    step = jax.jit(lambda params, state, x: tx.update(jax.grad(loss)(params, x), state, params))

    shift = 2 / 3 * np.log(1 / 11)
    alpha = jax.tree.map(lambda w: jnp.full(w.shape, np.log(0.6 / 0.4) + shift), W)

    def objective(W, alpha, u, x):
        z = {k: jnp.ones_like(W[k]) if u is None else gate(alpha[k], u[k]) for k in W}
        chance = sum(jnp.sum(jax.nn.sigmoid(a - shift)) for a in alpha.values()) / 48
        return loss({k: W[k] * z[k] for k in W}, x) + lam * chance

    w_tx, a_tx, u = optax.adam(1e-2), optax.adam(0.2), None
    w_state, a_state = w_tx.init(W), a_tx.init(alpha)
    grad = jax.jit(jax.grad(objective, argnums=(0, 1)))
    for t, x in enumerate(batches, 1):
        updates, state = step(params, state, x)
        params = optax.apply_updates(params, updates)
        if t > stop:
            mask = {k: resting(alpha[k]) for k in W}
            gW = jax.grad(lambda W, m=mask, x=x: loss({k: W[k] * m[k] for k in W}, x))(W)
        else:
            gW, gA = grad(W, alpha, u, x)
            steps, a_state = a_tx.update(gA, a_state, alpha)
            alpha = optax.apply_updates(alpha, steps)
        steps, w_state = w_tx.update(gW, w_state, W)
        W = optax.apply_updates(W, steps)
        keys = jax.random.split(jax.random.fold_in(KEY, t), 2)
        draw = lambda key, a: jax.random.uniform(key, a.shape, a.dtype, minval=1e-6, maxval=1 - 1e-6)
        u = {k: draw(key, alpha[k]) for k, key in zip(W, keys, strict=True)}
        z = {k: gate(alpha[k], u[k]) if t < stop else resting(alpha[k]) for k in W}
        oracles.close(params, {k: W[k] * z[k] for k in W}, rtol=1e-11, atol=1e-12)
        oracles.close(state.saliency.log_alpha, alpha, rtol=1e-11, atol=1e-12)
    zeros = {k: np.asarray(params[k] == 0) for k in params}
    np.testing.assert_array_equal(zeros["one"], ~np.asarray(hj.mask_of(state)["one"]))
    assert 0 < sum(z.sum() for z in zeros.values()) < 48


def test_the_share_of_open_gates_is_its_probability():
    """P(z > 0) = σ(log α − β log(−γ/ζ)): 20,000 gates within four standard errors."""
    rule = hj.saliencies.hard_concrete(0.0, KEY, optax.sgd(0.0), stop=10, start_open=0.3)
    dense = {"w": jnp.ones((100, 200))}
    state = rule.update(rule.init(dense), seen(dense, jax.tree.map(jnp.zeros_like, dense)))
    share = float(jnp.mean(state.open["w"] > 0))
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 20_000)
    again = rule.update(state, seen(dense, jax.tree.map(jnp.zeros_like, dense)))
    assert not np.array_equal(again.open["w"], state.open["w"])


def test_a_number_for_the_sparsity_is_exact():
    params = {"w": jax.random.normal(jax.random.key(1), (8, 8))}
    rule = hj.saliencies.hard_concrete(1.0, KEY, optax.adam(0.1), stop=5)
    tx = hj.prune(optax.sgd(0.1), rule, 0.75, start=5, stop=5)
    state = tx.init(params)
    for i in range(7):
        grads = {"w": jax.random.normal(jax.random.key(10 + i), (8, 8))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert int(hj.mask_of(state)["w"].sum()) == 16
    assert int((params["w"] == 0).sum()) >= 48


@pytest.mark.parametrize(
    ("kwargs", "name"), [({"stop": 0}, "stop"), ({"stop": 1, "start_open": 1.0}, "start_open")]
)
def test_bad_input(kwargs, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        hj.saliencies.hard_concrete(1.0, KEY, **kwargs)


def test_gates_need_their_dense_weights():
    with pytest.raises(ValueError, match="`regrow` must be True"):
        hj.prune(optax.sgd(0.1), hj.saliencies.hard_concrete(1.0, KEY, stop=3), 0.5, regrow=False)


def test_open_gates_are_ranked_by_log_alpha():
    rule = hj.saliencies.hard_concrete(1.0, KEY, stop=5)
    state = rule.init({"w": jnp.ones((2, 3))})
    log_alpha = {"w": jnp.array([[9.0, 8.0, 7.0], [6.0, 5.0, 4.0]])}
    scores = rule.scores(state._replace(log_alpha=log_alpha), seen(None))["w"].ravel()
    assert (np.diff(scores) < 0).all()


def test_narrow_params_under_wide_gates_keep_their_dtype():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    tx = hj.prune(optax.adam(0.1), hj.saliencies.hard_concrete(1.0, KEY, stop=3), 0.5, start=3, stop=3)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (found, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=4)
    assert found["w"].dtype == jnp.bfloat16
    assert int((found["w"] == 0).sum()) >= 8
