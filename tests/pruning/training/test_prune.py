"""The laws of pruning during training, for any inner optimizer and any container."""

import dataclasses
import pickle

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import hessjax as hj
from hessjax.pruning.saliencies._saliency import Context

SCHEDULE = optax.polynomial_schedule(0.0, 0.8, 3, 9)

INNER = {
    "sgd": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(0.02),
    "adamw": lambda: optax.adamw(0.02, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "ema": lambda: optax.chain(optax.scale_by_adam(), optax.ema(0.9), optax.scale(-0.02)),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.02)),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.02), 3),
}


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "one": {"kernel": jax.random.normal(keys[0], (5, 7), dtype), "bias": jnp.full(7, 0.1, dtype)},
        "two": {"kernel": jax.random.normal(keys[1], (7, 3), dtype), "bias": jnp.zeros(3, dtype)},
        "scale": jnp.ones((), dtype),
        "empty": jnp.zeros((0, 2), dtype),
    }


def loss(params, x):
    h = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"][None])
    y = (h @ params["two"]["kernel"] + params["two"]["bias"][None]) * params["scale"]
    return jnp.mean((y - jnp.sin(x[:, :3])) ** 2).astype(jnp.float32)


GRAD = jax.jit(jax.grad(loss))


def batch(step, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(100 + step), (16, 5), dtype)


def stepper(tx, loss=loss, jit=True):
    def step(params, state, x):
        grads = jax.grad(loss)(params, x) if jit else GRAD(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step) if jit else step


def train(tx, params, steps, state=None, first=0, jit=False):
    """Yields (T, params, state) after every update. Without `jit` by default: nothing to compile per test."""
    state, step = tx.init(params) if state is None else state, stepper(tx, jit=jit)
    for t in range(first, first + steps):
        params, state = step(params, state, batch(t, params["scale"].dtype))
        yield t + 1, params, state


def last(run):
    return list(run)[-1][1:]


def kernels(params):
    return [np.asarray(params["one"]["kernel"]), np.asarray(params["two"]["kernel"])]


def num_zeros(params):
    return sum(int((k == 0).sum()) for k in kernels(params))


def assert_trees_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# -- an oracle ------------------------------------------------------------------------------------


def test_oracle_of_dense_weights_and_argsort_masks(x64):
    """80 steps of sgd with momentum in numpy: W dense, M by argsort, G taken at W⊙M by hand."""
    rng = np.random.default_rng(0)
    X, Y, W = rng.normal(size=(30, 6)), rng.normal(size=(30, 4)), rng.normal(size=(6, 4))
    params, start = {"w": jnp.asarray(W)}, W.copy()

    def sparsity(t):
        return 0.75 * (1 - (1 - t / 60) ** 3) if t < 60 else 0.75

    def mask_at(t, W):
        mask = np.ones(W.size, bool)
        mask[np.argsort(np.abs(W).ravel(), kind="stable")[: round(sparsity(t) * W.size)]] = False
        return mask.reshape(W.shape)

    table = jnp.asarray([sparsity(t) for t in range(81)])
    tx = hj.prune(
        optax.sgd(0.05, momentum=0.9),
        hj.saliencies.magnitude(),
        lambda t: table[t],
        every=7,
        start=3,
        stop=64,
    )
    state = tx.init(params)
    step = stepper(tx, lambda p, _: jnp.mean(jnp.sum((X @ p["w"] - Y) ** 2, axis=1)))
    M, V, returned = np.ones(W.shape, bool), np.zeros_like(W), 0
    for t in range(1, 81):
        params, state = step(params, state, 0.0)
        V = 0.9 * V + M * (2 / 30 * X.T @ (X @ (W * M) - Y))
        W = W - 0.05 * V
        if (3 <= t <= 64 and (t - 3) % 7 == 0) or t == 64:
            old, M = M, mask_at(t, W)
            returned += int((M & ~old).sum())
        np.testing.assert_array_equal(hj.mask_of(state)["w"], M)
        np.testing.assert_allclose(params["w"], W * M, rtol=1e-11, atol=1e-13)
    assert returned > 0, "the run must contain a weight that comes back"
    assert not np.array_equal(W, start)


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INNER)
def test_zeros_are_exact_and_as_many_as_asked(name):
    tx = hj.prune(INNER[name](), hj.saliencies.magnitude(), SCHEDULE, every=4, start=2, stop=9)
    expected = 0
    for t, params, state in train(tx, make_params(), 12, jit=name in ("sgd", "accumulated")):
        if t in (2, 6, 9):
            expected = round(float(SCHEDULE(t)) * 56)
        mask = hj.mask_of(state)
        assert num_zeros(params) == expected, t
        assert_trees_equal([k != 0 for k in kernels(params)], kernels(mask))
    assert expected == round(0.8 * 56)  # the last mask step is `stop`, although (9 - 2) % 4 != 0


@pytest.mark.promotes
@pytest.mark.parametrize("name", sorted(INNER.keys() - {"accumulated"}))
def test_without_zeros_it_is_the_inner_optimizer_bit_for_bit(name):
    """Operation for operation; under `jit` XLA may contract a·b + c in one program and not in the other."""
    plain, pruned = INNER[name](), hj.prune(INNER[name](), hj.saliencies.magnitude(), 0.0, every=3)
    params = params_ = make_params()
    state, state_ = plain.init(params), pruned.init(params)
    for t in range(4):
        grads = GRAD(params, batch(t))
        updates, state = plain.update(grads, state, params)
        updates_, state_ = pruned.update(grads, state_, params_)
        params, params_ = optax.apply_updates(params, updates), optax.apply_updates(params_, updates_)
    assert_trees_equal(params, params_)


@pytest.mark.promotes
@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "ema"])
def test_other_leaves_train_as_if_prune_were_not_there(name):
    """Given the same gradients: the inner optimizer alone, on the other leaves alone."""
    params = make_params()
    tx, alone = hj.prune(INNER[name](), hj.saliencies.magnitude(), 0.7, every=2), INNER[name]()
    others = {"one": params["one"]["bias"], "two": params["two"]["bias"], "scale": params["scale"]}
    state, other_state = tx.init(params), alone.init(others)
    for t in range(6):
        grads = GRAD(params, batch(t))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        picked = {"one": grads["one"]["bias"], "two": grads["two"]["bias"], "scale": grads["scale"]}
        other_updates, other_state = alone.update(picked, other_state, others)
        others = optax.apply_updates(others, other_updates)
    assert_trees_equal(
        others, {"one": params["one"]["bias"], "two": params["two"]["bias"], "scale": params["scale"]}
    )


def test_narrow_params_land_exactly():
    dtype = jnp.bfloat16
    tx = hj.prune(optax.adamw(0.02), hj.saliencies.magnitude(), 0.7, every=3)
    for _, params, state in train(tx, make_params(dtype), 7):
        assert num_zeros(params) == round(0.7 * 56)
        assert params["one"]["kernel"].dtype == dtype == state.dense["one"]["kernel"].dtype


def test_float64_params_land_exactly(x64):
    tx = hj.prune(optax.adamw(0.02), hj.saliencies.magnitude(), 0.7, every=3)
    params, state = last(train(tx, make_params(jnp.float64), 7))
    assert num_zeros(params) == round(0.7 * 56)
    # A kept weight is its dense copy, to the last bit.
    mask = hj.mask_of(state)
    for p, m, d in zip(kernels(params), kernels(mask), kernels(state.dense), strict=True):
        np.testing.assert_array_equal(p, np.where(m, d, 0))


@pytest.mark.promotes
def test_an_update_narrower_than_the_params_still_cancels():
    to_bf16 = optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype(jnp.bfloat16), u))
    tx = hj.prune(optax.chain(optax.sgd(0.1), to_bf16), hj.saliencies.magnitude(), 0.5)
    params, _ = last(train(tx, make_params(), 3))
    assert num_zeros(params) == 28


def test_a_pruned_weight_can_come_back_from_its_dense_copy():
    tx = hj.prune(optax.sgd(0.0), hj.saliencies.magnitude(), lambda t: jnp.where(t < 2, 0.5, 0.0), every=1)
    params = {"w": jnp.array([[0.1, -0.2, 3.0, 4.0]])}
    state = tx.init(params)
    step = stepper(tx, lambda p, _: jnp.sum(p["w"]))
    thin, state = step(params, state, 0.0)
    assert thin["w"].tolist() == [[0.0, 0.0, 3.0, 4.0]]
    back, _ = step(thin, state, 0.0)
    assert_trees_equal(back, params)


def test_masked_gradients_reach_inner_and_dense_weights_decay():
    def check(updates, state, params=None):
        return jax.tree.map(lambda g, p: g - 0.5 * p, updates, params), state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), check)
    tx = hj.prune(spy, hj.saliencies.magnitude(), 0.5, start=0, stop=0)
    params = {"w": jnp.array([[1.0, 8.0]])}
    state = tx.init(params)
    for want in (0.5, 0.25):  # halved by decay, untouched by the gradient
        updates, state = tx.update({"w": jnp.array([[7.0, 0.0]])}, state, params)
        params = optax.apply_updates(params, updates)
        assert params["w"][0, 0] == 0.0
        assert state.dense["w"][0, 0] == want


def test_the_mask_of_step_zero_acts_from_the_first_update():
    for t, params, _ in train(
        hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5, stop=0), make_params(), 3
    ):
        assert num_zeros(params) == 28, t
    run = train(hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5, start=2, every=5), make_params(), 3)
    assert [num_zeros(p) for _, p, _ in run] == [0, 28, 28]


def test_a_finished_network_keeps_its_zeros():
    """stop=0 on params that are sparse already is training under a fixed mask."""
    sparse, _ = last(train(hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5), make_params(), 2))
    tuned, _ = last(train(hj.prune(optax.adam(0.1), hj.saliencies.magnitude(), 0.5, stop=0), sparse, 4))
    assert_trees_equal([k == 0 for k in kernels(sparse)], [k == 0 for k in kernels(tuned)])


@pytest.mark.parametrize("allocation", [hj.allocations.global_threshold(), hj.allocations.uniform()])
def test_jit_is_eager(allocation):
    tx = hj.prune(optax.adamw(0.02), hj.saliencies.magnitude(), SCHEDULE, allocation=allocation, every=2)
    runs = (train(tx, make_params(), 10), train(tx, make_params(), 10, jit=True))
    for (_, params, state), (_, params_, state_) in zip(*runs, strict=True):
        assert_trees_equal(hj.mask_of(state), hj.mask_of(state_))
        assert num_zeros(params) == num_zeros(params_)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, params_)


def test_nothing_compiles_after_the_first_step(compilations):
    tx = hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), SCHEDULE, every=2)
    batches = [batch(t) for t in range(6)]
    params, step = make_params(), stepper(tx)
    params, state = step(params, tx.init(params), batches[0])
    del compilations[:]
    for x in batches:
        params, state = step(params, state, x)
    assert not compilations


@pytest.mark.parametrize(
    "options",
    [{"saliency": hj.saliencies.magnitude()}, {"saliency": hj.saliencies.obs(num_grads=2), "start": 1}],
)
def test_params_and_state_may_be_donated_together(options):
    tx = hj.prune(optax.sgd(0.1), sparsity=0.5, **options)
    params = {"w": jnp.arange(6.0).reshape(2, 3)}

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for init in (tx.init, jax.jit(tx.init)):
        fresh = jax.tree.map(jnp.copy, params)
        thin, _ = jax.jit(step, donate_argnums=(0, 1))(fresh, init(fresh))
        assert int((thin["w"] == 0).sum()) == 3


def test_memory_is_one_copy_and_one_byte_per_pruned_weight():
    state = hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5).init(make_params())
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held == 56 * (4 + 1) + 4 * 4  # and four scalars


# -- other transformations round it ---------------------------------------------------------------


def test_inside_a_chain():
    tx = optax.chain(
        optax.clip_by_global_norm(0.1), hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5)
    )
    params, state = last(train(tx, make_params(), 3))
    assert num_zeros(params) == 28
    assert int((~kernels(hj.mask_of(state))[0]).sum() + (~kernels(hj.mask_of(state))[1]).sum()) == 28


@pytest.mark.promotes
def test_inside_multisteps_it_counts_emitted_updates():
    tx = optax.MultiSteps(hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5, start=2, every=2), 3)
    zeros = [num_zeros(params) for _, params, _ in train(tx, make_params(), 9, jit=True)]
    assert zeros == [0] * 5 + [28] * 4


def test_a_rejected_update_changes_nothing():
    tx = optax.apply_if_finite(hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5), 3)
    params, state = last(train(tx, make_params(), 2, jit=True))
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, state = tx.update(bad, state, params)
    assert_trees_equal(optax.apply_updates(params, updates), params)
    assert int(optax.tree.get(state, "num_nan")) == 0


def test_blocks_of_gradients_pass_optax_masked():
    """Which has one hole for a whole subtree, where the block has leaves; what does not fit is named."""
    params = {"a": {"w": jnp.arange(1.0, 5.0).reshape(2, 2)}, "b": {"w": jnp.ones((2, 2))}}
    block = jax.tree.map(lambda x: jnp.ones((3, *x.shape)), params)
    rule = hj.prune(optax.sgd(0.1), hj.saliencies.obs(damping=1.0), 0.5, every=1, start=1)
    tx = optax.masked(rule, {"a": True, "b": False})
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, per_example_grads=block)
    alone, _ = rule.update(
        {"a": params["a"]},
        rule.init({"a": params["a"]}),
        {"a": params["a"]},
        per_example_grads={"a": block["a"]},
    )
    assert_trees_equal(updates["a"], alone["a"])
    with pytest.raises(ValueError, match="`per_example_grads` must have the structure of `params`"):
        rule.update(params, rule.init(params), params, per_example_grads={"a": block["a"]})


def test_an_average_of_params_is_masked_by_mask_of():
    tx, average = (
        hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), SCHEDULE, every=2, stop=9),
        make_params(),
    )
    for _, params, state in train(tx, make_params(), 9):  # noqa: B007 (the last state is read below)
        average = optax.incremental_update(params, average, 0.5)
    thin = jax.tree.map(lambda p, m: jnp.where(m, p, 0), average, hj.mask_of(state))
    assert num_zeros(thin) == num_zeros(params) == round(float(SCHEDULE(9)) * 56)
    assert_trees_equal(thin["one"]["bias"], average["one"]["bias"])


# -- saliencies of one's own ----------------------------------------------------------------------


class MovingProduct(hj.saliencies.Saliency):
    """−Σ G⊙W with G taken at all positions: movement scores without an optimizer of their own."""

    def init(self, weights):
        return jax.tree.map(jnp.zeros_like, weights)

    def update(self, state, seen):
        return jax.tree.map(lambda s, g, w: s - g * w, state, seen.grads, seen.weights)

    def scores(self, state, seen):
        return state


@dataclasses.dataclass(frozen=True)
class Rule(hj.saliencies.Saliency):
    """Scores by a function of what a saliency sees."""

    function: object

    def scores(self, state, seen):
        return self.function(seen)


def test_a_stateful_saliency_sees_all_gradients_and_dense_weights():
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b": jnp.ones(2)}
    tx = hj.prune(optax.sgd(0.0), MovingProduct(), 0.5, start=1, every=1)
    state, grads = tx.init(params), {"w": jnp.array([[-1.0, 5.0, -2.0, 5.0]]), "b": jnp.ones(2)}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert params["w"].tolist() == [[1.0, 0.0, 3.0, 0.0]]
    assert state.saliency["w"].tolist() == [[2.0, -20.0, 12.0, -40.0]]


def test_extra_arguments_reach_inner_and_gradients_of_examples_the_saliency():
    given = Rule(lambda seen: jax.tree.map(lambda rows: jnp.sum(rows, axis=0), seen.per_example_grads))

    def scaled(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), scaled)
    tx = hj.prune(inner, given, 0.5, start=1, every=1)
    params = {"w": jnp.ones((1, 4)), "b": jnp.ones(2)}
    block = {"w": jnp.array([[[4.0, 0.0, 3.0, 0.0]], [[0.0, 1.0, 0.0, 2.0]]]), "b": jnp.ones((2, 2))}
    updates, _ = tx.update(params, tx.init(params), params, factor=2.0, per_example_grads=block)
    assert optax.apply_updates(params, updates)["w"].tolist() == [[3.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("jit", [False, True])
def test_a_function_for_the_gradients_of_examples_is_called_at_mask_steps_only(jit):
    """At the params of the loop, and the same as the block itself, for every `prune` in a nest."""
    calls = []

    def block(params):
        jax.debug.callback(lambda: calls.append(1))
        return jax.tree.map(lambda w: jnp.stack([w, jnp.sin(9 * w)]), params)

    params = {"v": jnp.linspace(1.0, 2.0, 6).reshape(2, 3), "w": jnp.linspace(2.0, 3.0, 6).reshape(2, 3)}
    inner = hj.prune(optax.sgd(0.1), hj.saliencies.obd(), 0.5, where="v", start=2, every=2)
    tx = hj.prune(inner, hj.saliencies.obd(), 0.5, where="w", start=2, every=2)
    update = jax.jit(tx.update, static_argnames="per_example_grads") if jit else tx.update
    found, state, given, other = params, tx.init(params), params, tx.init(params)
    for t in range(1, 5):
        updates, state = update(jax.tree.map(jnp.cos, found), state, found, per_example_grads=block)
        rows = jax.tree.map(lambda w: jnp.stack([w, jnp.sin(9 * w)]), given)
        changes, other = tx.update(jax.tree.map(jnp.cos, given), other, given, per_example_grads=rows)
        found, given = optax.apply_updates(found, updates), optax.apply_updates(given, changes)
        jax.effects_barrier()
        assert len(calls) == 2 * (t // 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, given)
    assert [int((w == 0).sum()) for w in jax.tree.leaves(found)] == [3, 3]


def test_a_saliency_sees_what_it_should():
    """T, the mask in force, and at a mask step the weights after the optimizer's step; others are holes."""
    seen_at = []

    def scores(seen):
        seen_at.append(seen)
        return seen.weights

    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]]), "b": jnp.ones(2)}
    pattern = hj.patterns.n_of_m(1, 2, axis=1)
    tx = hj.prune(optax.sgd(1.0), Rule(scores), 0.5, every=1, pattern=pattern)
    state = tx.init(params)
    tx.update(params, state, params)
    first, then = seen_at[0], seen_at[-1]
    assert (int(first.step), int(then.step)) == (0, 1)
    assert first.grads is None
    assert first.mask["w"].all()
    assert then.mask["w"].tolist() == [[True, False, True, False]]
    assert then.grads["w"].tolist() == params["w"].tolist()
    assert then.weights["w"].tolist() == [[0.0, 3.0, 0.0, 1.0]]
    assert then.per_example_grads is None
    # With the whole tree beside it, which says what the axes of the leaves mean.
    assert (first.pattern.pattern, then.pattern.pattern) == (pattern, pattern)
    for tree in (then.weights, then.mask, then.grads):
        assert tree["b"] == optax.MaskedNode()


def test_an_allocation_may_be_a_plain_function():
    first_row = lambda scores, sparsity, pattern: jax.tree.map(lambda s: s > s[1:].max(), scores)
    params = {"w": jnp.array([[4.0, 9.0], [2.0, 3.0]])}
    state = hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5, allocation=first_row).init(params)
    assert hj.mask_of(state)["w"].tolist() == [[True, True], [False, False]]


def test_nan_scores_rank_lowest_and_are_counted():
    odd = Rule(lambda seen: jax.tree.map(jnp.sqrt, seen.weights))
    params = {"w": jnp.array([[1.0, -2.0, 3.0, -4.0]])}
    state = hj.prune(optax.sgd(0.1), odd, 0.5).init(params)
    assert hj.mask_of(state)["w"].tolist() == [[True, False, True, False]]
    assert int(state.num_nan) == 2
    assert float(state.sparsity) == 0.5


# -- saving ---------------------------------------------------------------------------------------


def test_saved_and_restored_state_gives_the_same_trajectory():
    tx = hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), SCHEDULE, every=2, stop=9)
    want = last(train(tx, make_params(), 9))
    params, state = last(train(tx, make_params(), 5))

    def as_pickle(tree):
        return pickle.loads(pickle.dumps(jax.device_get(tree)))

    def as_msgpack(tree):
        return flax.serialization.from_bytes(tree, flax.serialization.to_bytes(tree))

    for save_and_restore in (as_pickle, as_msgpack):
        params_, state_ = save_and_restore((params, state))
        assert_trees_equal(last(train(tx, params_, 4, state=state_, first=5)), want)


# -- loops of others ------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(7)(x)))


@pytest.mark.promotes
def test_a_linen_train_state_loop():
    def fit(tx):
        net = Net()
        state = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), batch(0)), tx=tx)

        @jax.jit
        def step(state, x):
            grads = jax.grad(lambda p: jnp.mean(state.apply_fn(p, x) ** 2))(state.params)
            return state.apply_gradients(grads=grads)

        for t in range(4):
            state = step(state, batch(t))
        return state

    fit(optax.adam(0.02))
    state = fit(hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5))
    by_path = {row.path: row for row in hj.summary(state.params).rows}
    assert by_path["params/Dense_0/kernel"].nonzeros + by_path["params/Dense_1/kernel"].nonzeros == 28
    assert_trees_equal(
        hj.mask_of(state)["params"]["Dense_0"]["kernel"], state.params["params"]["Dense_0"]["kernel"] != 0
    )


@pytest.mark.promotes
def test_an_nnx_optimizer_loop():
    def fit(tx):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(5, 7, rngs=rngs), nnx.tanh, nnx.Linear(7, 3, rngs=rngs))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            grads = nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model)
            optimizer.update(model, grads)

        for t in range(4):
            step(model, optimizer, batch(t))
        return model, optimizer

    fit(optax.adam(0.02))
    model, optimizer = fit(hj.prune(optax.adam(0.02), hj.saliencies.magnitude(), 0.5))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    assert sum(int((x == 0).sum()) for x in jax.tree.leaves(params) if x.ndim == 2) == 28
    masked = jax.tree.map(
        lambda p, m: jnp.where(m, p, 0), params, nnx.as_pure(hj.mask_of(optimizer.opt_state))
    )
    assert_trees_equal(masked, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    kernel: jax.Array
    bias: jax.Array


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w, b: {"kernel": w, "bias": b},
        lambda w, b: flax.core.freeze({"layer": {"kernel": w, "bias": b}}),
        lambda w, b: (w, [b, None]),
        lambda w, b: nnx.State({"kernel": nnx.Param(w), "bias": nnx.Param(b)}),
        Weights,
        lambda w, b: w,
    ],
    ids=["dict", "FrozenDict", "tuple", "nnx.State", "dataclass", "array"],
)
def test_any_container(wrap):
    params = wrap(jnp.arange(-6.0, 6.0).reshape(3, 4), jnp.zeros(4))
    tx = hj.prune(optax.adam(0.1), hj.saliencies.magnitude(), 0.5)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert max(int((x == 0).sum()) for x in jax.tree.leaves(new)) == 6
    assert_trees_equal(new, jax.tree.map(lambda p, m: jnp.where(m, p, 0), new, hj.mask_of(state)))


def test_where_chooses_by_path_or_predicate():
    for where, pruned in [("one/*", ["one/bias", "one/kernel"]), (lambda path, x: x.ndim == 0, ["scale"])]:
        params = make_params()
        state = hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5, where=where).init(params)
        held = [row.path for row in hj.summary(state.dense).rows]
        assert held == pruned


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.2}, r"`sparsity` must be in \[0, 1\), the fraction of zeros, got 1.2"),
        ({"sparsity": 80}, r"For 80 % write 0.8"),
        ({"sparsity": float("nan")}, r"`sparsity` must be in \[0, 1\)"),
        ({"every": 0}, r"`every` must be at least 1, .* got 0"),
        ({"start": -1}, r"`start` must be at least 0, .* got -1"),
        ({"start": 7, "stop": 3}, r"`stop` must not lie before `start`, which is 7, got 3"),
        ({"every": 2**31}, r"`every` must be below 2\*\*31 - 1, .* got 2147483648"),
        ({"start": 2**40}, r"`start` must be below 2\*\*31 - 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), **{"sparsity": 0.5, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": np.float32(2)}, "every"),
        ({"start": 1e3}, "start"),
        ({"stop": "7"}, "stop"),
        ({"dense_dtype": jnp.int32}, "`dense_dtype` must be a floating-point dtype"),
        ({"dense_dtype": "wide"}, "`dense_dtype` must be a floating-point dtype .* got 'wide'"),
        ({"dense_dtype": jnp.complex64}, "`dense_dtype` must be a floating-point dtype"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5, **arguments)


def make(**arguments):
    return hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), **{"sparsity": 0.5, **arguments})


def test_init_checks_what_it_is_given():
    params = make_params()
    with pytest.raises(ValueError, match="`where` must match at least one leaf"):
        make(where="*/kernels").init(params)
    with pytest.raises(TypeError, match="table: int32"):
        make().init({**params, "table": jnp.zeros((3, 3), jnp.int32)})
    with pytest.raises(
        ValueError, match="`sparsity` must leave the 2 weights that the floors of 2 leaves need"
    ):
        make(sparsity=0.99).init({"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_dense_weights_must_hold_the_params(dtype):
    with pytest.raises(ValueError, match="`dense_dtype` must hold all that the params hold, .* float32, got"):
        make(dense_dtype=dtype).init(make_params())
    with pytest.raises(ValueError, match="got float64: set `jax_enable_x64`"):
        make(dense_dtype=jnp.float64)


@pytest.mark.parametrize("value", [jnp.nan, -0.1, 1.5])
def test_a_schedule_that_goes_astray_between_the_steps_that_init_tries(value):
    """An error, or inside `jit` what it gave in the state, and zeros as near as can be."""
    tx = make(sparsity=lambda t: jnp.where(t == 3, value, 0.25), every=1)
    params = make_params()
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\), .* at step 3"):
        last(train(tx, params, 3))
    params, state = last(train(tx, params, 3, jit=True))
    np.testing.assert_array_equal(state.sparsity, jnp.float32(value))
    assert num_zeros(params) == (54 if value > 1 else 0)  # the floors keep two


def test_a_threshold_that_is_no_number():
    for level in (lambda t: jnp.where(t == 1, jnp.nan, 0.1), lambda t: jnp.float32(jnp.nan)):
        with pytest.raises(ValueError, match="`level` must give numbers, got NaN from the schedule"):
            make(sparsity=hj.allocations.threshold(level), every=1).init(make_params())
    tx = make(sparsity=hj.allocations.threshold(lambda t: jnp.where(t == 3, jnp.nan, 0.5)), every=1)
    with pytest.raises(ValueError, match="got NaN from the schedule at step 3"):
        last(train(tx, make_params(), 3))
    params, state = last(train(tx, make_params(), 3, jit=True))
    assert bool(jnp.isnan(state.sparsity))
    assert num_zeros(params) == 0
    with pytest.raises(ValueError, match="`level` must be a number or a schedule, got inf"):
        hj.allocations.threshold(float("inf"))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_weight_that_no_update_can_make_zero(bad):
    """NaN and infinities stay what they are whatever is added: said, or counted inside `jit`."""
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4).at[0, 1].set(bad), "b": jnp.ones(2)}
    keep = {"w": jnp.ones((2, 4), bool).at[0, 1].set(False)}
    tx = hj.prune(optax.sgd(0.1), hj.saliencies.static(keep), 1 / 8)
    with pytest.raises(
        FloatingPointError, match="`params` must be finite where they are pruned, but 1 of w is"
    ):
        tx.init(params)
    state = jax.jit(tx.init)(params)
    assert int(state.num_undone) == 1
    _, state = jax.jit(tx.update)(params, state, params)
    with pytest.warns(UserWarning, match="1 pruned weights were not 0"):
        hj.mask_of(state)
    with pytest.raises(ValueError, match="`params` must be 0 where they are pruned, but 1 of w is not"):
        tx.update(params, state, params)
    pruned = hj.prune_once(params, hj.saliencies.static(keep), 1 / 8)
    np.testing.assert_array_equal(pruned.params["w"], params["w"].at[0, 1].set(0))


ZERO_INIT = {"one": {"kernel": jnp.zeros((5, 3))}, "two": {"kernel": jnp.arange(1.0, 16.0).reshape(3, 5)}}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"allocation": hj.allocations.global_threshold(floor=0)},
        {"sparsity": hj.allocations.threshold(0.0)},
    ],
)
def test_a_leaf_that_begins_at_zero_and_goes_at_once_is_told(arguments):
    with pytest.warns(
        UserWarning, match=r"takes 1[45] of the 15 weights of one/kernel, whose scores are all 0"
    ):
        make(**arguments).init(ZERO_INIT)


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": 5},
        {"allocation": hj.allocations.uniform()},
        {"allocation": hj.allocations.erdos_renyi()},
        {"sparsity": optax.linear_schedule(0.0, 0.5, 9)},
    ],
)
def test_a_leaf_that_begins_at_zero_and_stays_is_not(arguments):
    make(**arguments).init(ZERO_INIT)


def test_counters_stay_at_their_end():
    """Mask steps rest there, and nothing begins anew; gradients still go round their ring."""
    end = jnp.iinfo(jnp.int32).max
    tx = hj.prune(
        optax.sgd(0.1), hj.saliencies.movement(optax.sgd(0.1)), lambda t: jnp.where(t > 0, 0.5, 0.0), every=1
    )
    params, state = make_params(), tx.init(make_params())
    near = jnp.int32(end - 2)
    state = state._replace(num_updates=near, saliency=state.saliency._replace(num_updates=near))
    for t in range(4):
        before = state.mask
        updates, state = tx.update(GRAD(params, batch(t)), state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.num_updates) == int(state.saliency.num_updates) == end
    assert_trees_equal(before, state.mask)
    ring = hj.saliencies.obs(num_grads=3, damping=1.0)
    weights = {"w": jnp.ones((2, 2))}
    remembered, places = ring.init(weights)._replace(num_seen=near), []
    for _ in range(5):
        places.append(int(remembered.num_seen) % 3)
        seen = Context(weights, weights, near, weights)
        remembered = ring.update(remembered, seen)
    assert places == [2, 0, 1, 2, 0]


@pytest.mark.parametrize("traced", [False, True])
def test_a_schedule_that_leaves_its_range(traced):
    tx = make(sparsity=optax.linear_schedule(0.0, 1.1, 100), every=10)
    init = jax.jit(tx.init) if traced else tx.init
    with pytest.raises(ValueError, match=r"got 1.1\d* from the schedule at step 160"):
        init(make_params())
    make(sparsity=optax.linear_schedule(0.0, 1.1, 100), every=10, stop=80).init(make_params())


def test_update_checks_what_it_is_given():
    tx, params = make(), make_params()
    state = tx.init(params)
    with pytest.raises(
        ValueError, match=r"`params` must be given: write `tx.update\(grads, state, params\)`"
    ):
        tx.update(params, state)
    short = {k: v for k, v in params.items() if k != "scale"}
    with pytest.raises(
        ValueError, match=r"`grads` must have the structure of `params`, but\n  scale: missing"
    ):
        tx.update(short, state, params)


def test_mask_of_needs_one_mask_for_every_leaf():
    with pytest.raises(ValueError, match="found none in tuple"):
        hj.mask_of(optax.adam(0.1).init(make_params()))
    state = make().init(make_params())
    with pytest.raises(ValueError, match="found two for the same"):
        hj.mask_of((state, state))
