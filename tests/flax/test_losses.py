"""Losses from linen and nnx models against closures written by hand."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.tree_util import Partial

import hessjax as hj
from hessjax.flax import linen_loss, linen_model, nnx_loss, nnx_model, nnx_recalibrate


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def dict_cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
        x = jnp.tanh(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, param_dtype=jnp.float64)(x)


class Nnx(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64)
        self.norm.mean.set_value(jnp.full(4, 0.3, jnp.float64))
        self.norm.var.set_value(jnp.full(4, 1.3, jnp.float64))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs, param_dtype=jnp.float64) for _ in range(2)])

    def __call__(self, x, scale=1.0):
        x = jnp.tanh(self.norm(self.first(x)))
        for block in self.blocks:
            x = self.dropout(block(x))
        return scale * x


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(6, 5))), jnp.asarray(rng.integers(0, 3, 6))


def variables(batch, seed=0):
    made = Linen().init(jax.random.key(seed), batch[0], train=False)
    shifted = jax.tree.map(lambda s: s.astype(jnp.float64) + 0.3, made["batch_stats"])
    return made["params"], {"batch_stats": shifted}


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, want)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float64)}


def compiled_once(function, *calls):
    """Calls `jit(function)` for every tuple of arguments and counts how often it was traced."""
    traces = []

    @jax.jit
    def counted(*args):
        traces.append(None)
        return function(*args)

    results = [counted(*args) for args in calls]
    assert len(traces) == 1, f"traced {len(traces)} times"
    return results


# -- linen ---------------------------------------------------------------------------------------


def test_linen_eval_is_the_handwritten_closure(batch):
    params, state = variables(batch)
    loss_fn = linen_loss(Linen(), cross_entropy, train=False)

    def by_hand(params):
        return cross_entropy(Linen().apply({"params": params, **state}, batch[0], train=False), batch)

    want = jax.value_and_grad(by_hand)(params)
    assert_same(jax.value_and_grad(loss_fn)(params, batch, state), want)
    assert_same(jax.jit(jax.value_and_grad(loss_fn))(params, batch, state), want)


def test_linen_train_uses_batch_statistics_and_the_fixed_key(batch):
    params, state = variables(batch)
    loss_fn = linen_loss(Linen(), cross_entropy, train=True)
    rngs = {"dropout": jax.random.key(7)}

    def by_hand(params):
        logits, _ = Linen().apply(
            {"params": params, **state}, batch[0], train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch)

    want = jax.value_and_grad(by_hand)(params)
    before = jax.tree.map(np.asarray, state)
    assert_same(jax.value_and_grad(loss_fn)(params, batch, state, rngs), want)
    assert_same(jax.jit(jax.value_and_grad(loss_fn))(params, batch, state, rngs), want)
    assert_same(state, before)
    other = loss_fn(params, batch, state, {"dropout": jax.random.key(8)})
    assert not np.allclose(other, want[0])


def test_linen_curvature_is_that_of_the_handwritten_closure(batch):
    params, state = variables(batch)
    loss_fn = linen_loss(Linen(), cross_entropy, train=False)

    def by_hand(params):
        return cross_entropy(Linen().apply({"params": params, **state}, batch[0], train=False), batch)

    vector = jax.tree.map(jnp.cos, params)
    got = jax.jvp(lambda p: jax.grad(loss_fn)(p, batch, state), (params,), (vector,))[1]
    assert_same(got, jax.jvp(jax.grad(by_hand), (params,), (vector,))[1])


def test_linen_loss_made_again_is_equal_and_does_not_retrace(batch):
    losses = [linen_loss(Linen(), cross_entropy, train=False) for _ in range(3)]
    assert losses[0] == losses[1]
    assert hash(losses[0]) == hash(losses[1])
    assert losses[0] != linen_loss(Linen(), cross_entropy, train=True)
    calls = [
        (Partial(f, *variables(batch, seed)[:1]), batch, variables(batch)[1]) for seed, f in enumerate(losses)
    ]
    values = compiled_once(lambda f, *args: f(*args), *calls)
    assert len({float(value) for value in values}) == 3


def test_inputs_by_key_by_function_and_whole(batch):
    params, state = variables(batch)
    want = linen_loss(Linen(), cross_entropy, train=False)(params, batch, state)
    named = {"image": batch[0], "label": batch[1]}
    by_key = linen_loss(Linen(), dict_cross_entropy, inputs="image", train=False)
    by_function = linen_loss(Linen(), dict_cross_entropy, inputs=lambda b: b["image"], train=False)
    assert_same(by_key(params, named, state), want)
    assert_same(by_function(params, named, state), want)


def test_several_inputs_are_positional_arguments(batch):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(2)(x) - y

    x, y = jnp.ones((4, 3)), jnp.full((4, 2), 2.0)
    params = Two().init(jax.random.key(0), x, y)["params"]
    loss_fn = linen_loss(Two(), lambda outputs, batch: outputs.mean(), inputs=("x", "y"))
    want = Two().apply({"params": params}, x, y).mean()
    np.testing.assert_allclose(loss_fn(params, {"y": y, "x": x}), want)


def test_bare_array_is_taken_whole():
    x = jnp.ones((4, 3))
    params = nn.Dense(3).init(jax.random.key(0), x)["params"]
    loss_fn = linen_loss(nn.Dense(3), lambda outputs, batch: ((outputs - batch) ** 2).mean())
    want = ((nn.Dense(3).apply({"params": params}, x) - x) ** 2).mean()
    np.testing.assert_allclose(loss_fn(params, x), want)


def test_linen_containers_and_further_collections(batch):
    """A FrozenDict, a collection that is only read, one that is written, and one that is sown."""

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.variable("constants", "scale", lambda: jnp.full((), 2.0))
            calls = self.variable("cache", "calls", lambda: jnp.zeros((), jnp.int32))
            calls.value += 1
            self.sow("intermediates", "x", x)
            return scale.value * nn.Dense(3, param_dtype=jnp.float64)(x)

    made = Counted().init(jax.random.key(0), batch[0])
    params, state = made.pop("params"), {name: made[name] for name in ("constants", "cache")}
    loss_fn = linen_loss(Counted(), cross_entropy)
    want = cross_entropy(2 * nn.Dense(3).apply({"params": params["Dense_0"]}, batch[0]), batch)
    for kind in (dict, flax.core.freeze):
        given = flax.core.freeze(params) if kind is not dict else params
        value, grads = jax.value_and_grad(loss_fn)(given, batch, kind(state))
        np.testing.assert_allclose(value, want, rtol=1e-12)
        assert jax.tree.structure(grads) == jax.tree.structure(given)
    with pytest.raises(ValueError, match=r"(?s)`state` must hold every collection.*constants"):
        loss_fn(params, batch, {"cache": state["cache"]})
    with pytest.raises(ValueError, match=r'`params` must be the module\'s own, `variables\["params"\]`'):
        loss_fn({"params": params}, batch, state)


@pytest.mark.parametrize("train", [False, True])
def test_linen_missing_state_is_named(batch, train):
    params, _ = variables(batch)
    loss_fn = linen_loss(Linen(), cross_entropy, train=train)
    with pytest.raises(ValueError, match=r"(?s)`state` must hold every collection.*batch_stats"):
        loss_fn(params, batch, rngs={"dropout": jax.random.key(0)})


def test_linen_missing_dropout_key_is_named(batch):
    params, state = variables(batch)
    with pytest.raises(
        ValueError, match=r'(?s)`rngs` must hold a fixed key.*Dropout_0 needs PRNG for "dropout"'
    ):
        linen_loss(Linen(), cross_entropy, train=True)(params, batch, state)


def test_inputs_missing_from_the_batch_are_named(batch):
    params, state = variables(batch)
    named = {"image": batch[0], "label": batch[1]}
    with pytest.raises(ValueError, match=r"`inputs` must say .*keys \['image', 'label'\].* got 0"):
        linen_loss(Linen(), dict_cross_entropy, train=False)(params, named, state)


def test_modules_with_lists_and_dicts_are_told_apart_by_what_is_in_them():
    class Wide(nn.Module):
        features: list
        scales: dict

    def make(width, scale):
        return linen_loss(nn.Sequential([nn.Dense(width), Wide([4, 4], {"x": scale})]), cross_entropy)

    assert make(3, 1) == make(3, 1)
    assert hash(make(3, 1)) == hash(make(3, 1))
    assert make(3, 1) != make(4, 1)
    assert make(3, 1) != make(3, 2)


def test_unhashable_parts_are_named():
    class Frozen(nn.Module):
        table: jax.Array

    with pytest.raises(TypeError, match="`module` must be hashable"):
        linen_loss(Frozen(jnp.ones(3)), cross_entropy)
    with pytest.raises(TypeError, match="`scales` must be hashable"):
        linen_loss(Linen(), cross_entropy, scales=[1, 2])


# -- nnx -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nnx_is_the_handwritten_closure(batch, mode):
    model = Nnx(0)
    loss_fn, params, state = nnx_loss(model, cross_entropy, mode=mode, scale=2.0)
    twin = Nnx(0)
    getattr(twin, mode)()
    graphdef, weights, rest = nnx.split(twin, nnx.Param, ...)

    def by_hand(weights):
        return cross_entropy(nnx.merge(graphdef, weights, rest, copy=True)(batch[0], scale=2.0), batch)

    value, grads = jax.value_and_grad(by_hand)(weights)
    want = value, nnx.as_pure(grads)
    assert_same(jax.value_and_grad(loss_fn)(params, batch, state), want)
    assert_same(jax.jit(jax.value_and_grad(loss_fn))(params, batch, state), want)
    assert_same(jax.value_and_grad(loss_fn)(weights, batch, rest)[0], value)


def test_nnx_leaves_the_model_as_it_is(batch):
    model = Nnx(0)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    loss_fn, params, state = nnx_loss(model, cross_entropy)
    loss_fn(params, batch, state)
    after = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    assert_same(after, before)
    assert model.dropout.deterministic is False


def test_nnx_loss_of_a_new_checkpoint_does_not_retrace(batch):
    made = [nnx_loss(Nnx(seed), cross_entropy, mode="train") for seed in range(3)]
    assert made[0].loss_fn == made[1].loss_fn
    assert made[0].loss_fn != nnx_loss(Nnx(0), cross_entropy).loss_fn
    calls = [(Partial(loss_fn, params), batch, state) for loss_fn, params, state in made]
    values = compiled_once(lambda f, *args: f(*args), *calls)
    assert len({float(value) for value in values}) == 3


def test_changed_params_go_back_into_the_nnx_model(batch):
    model = Nnx(0)
    loss_fn, params, state = nnx_loss(model, cross_entropy)
    changed = jax.tree.map(lambda w: w + 0.1, params)
    nnx.update(model, changed)
    model.eval()
    assert_same(cross_entropy(model(batch[0]), batch), loss_fn(changed, batch, state))


class Tied(nnx.Module):
    """A Param in two places, a module in two places."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)
        self.inner = nnx.Linear(4, 4, rngs=rngs, param_dtype=jnp.float64)
        self.again = self.inner
        self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64)
        self.norm.mean.set_value(jnp.full(4, 0.3, jnp.float64))
        self.norm.var.set_value(jnp.full(4, 1.3, jnp.float64))
        self.renorm = self.norm
        self.transposed = self.first.kernel

    def __call__(self, x):
        x = self.again(jnp.tanh(self.norm(self.inner(self.first(x)))))
        return (x @ self.transposed[...].T)[:, :3]


@pytest.mark.parametrize("graph", [True, False])
def test_nnx_tied_modules_are_one_leaf_in_graph_and_tree_mode(batch, graph):
    model = Tied(0)
    with nnx.set_graph_mode(graph):
        loss_fn, params, state = nnx_loss(model, cross_entropy)
        grads = jax.grad(loss_fn)(params, batch, state)
        stats = nnx_recalibrate(model, [batch])
    assert len(jax.tree.leaves(params)) == 6
    model.eval()
    want = nnx.as_pure(nnx.grad(lambda model: cross_entropy(model(batch[0]), batch))(model))
    assert_same(grads, want)
    hidden = model.inner(model.first(batch[0]))
    np.testing.assert_allclose(stats["norm"]["mean"][...], hidden.mean(axis=0), rtol=1e-6)


def test_nnx_params_agree_with_those_of_flax_and_of_the_optimizer(batch):
    """`nnx_loss`, `nnx.as_pure`, gradients and Adam's second moments: one structure."""
    model = Tied(0)
    optimizer = nnx.Optimizer(model, optax.adam(0.1, b2=0.9), wrt=nnx.Param)
    grads = nnx.grad(lambda model: cross_entropy(model(batch[0]), batch))(model)
    optimizer.update(model, grads)
    loss_fn, params, state = nnx_loss(model, cross_entropy)
    D = hj.adam_preconditioner(optimizer, b2=0.9)
    structure = jax.tree.structure(params)
    assert structure == jax.tree.structure(nnx.as_pure(nnx.state(model, nnx.Param)))
    assert structure == jax.tree.structure(nnx.as_pure(grads)) == jax.tree.structure(D)
    assert jax.tree.structure(state) == jax.tree.structure(nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param))))
    assert_same(D, jax.tree.map(lambda g: jnp.abs(g) + 1e-8, nnx.as_pure(grads)))
    for given in (optimizer.opt_state, nnx.state(optimizer), nnx.as_pure(nnx.state(optimizer))):
        assert_same(hj.adam_preconditioner(given, b2=0.9), D)
    A = hj.preconditioned(hj.hessian(loss_fn, params, batch, state), D)
    assert jax.tree.structure(A(params)) == structure


def test_nnx_params_in_any_of_flax_s_containers(batch):
    """Variables, arrays, plain dicts: the same loss, and gradients like the params that were given."""
    model = Nnx(0)
    loss_fn, params, state = nnx_loss(model, cross_entropy)
    want = loss_fn(params, batch, state)
    variables = nnx.state(model, nnx.Param)
    for given in (params, variables, nnx.to_pure_dict(variables)):
        for rest in (state, nnx.state(model, nnx.Not(nnx.Param)), nnx.to_pure_dict(state)):
            value, grads = jax.value_and_grad(loss_fn)(given, batch, rest)
            np.testing.assert_allclose(value, want, rtol=1e-12)
        assert jax.tree.structure(grads) == jax.tree.structure(given)
        product = hj.hessian(loss_fn, given, batch, state)(given)
        assert jax.tree.structure(product) == jax.tree.structure(given)


def test_nnx_dropout_without_a_key_is_named(batch):
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
    loss_fn, params, state = nnx_loss(model, cross_entropy, mode="train")
    with pytest.raises(ValueError, match=r"no `rngs` argument was provided to Dropout"):
        loss_fn(params, (jnp.ones((4, 2)), jnp.zeros(4, int)), state)


def test_nnx_params_of_another_model_are_refused(batch):
    loss_fn, params, state = nnx_loss(Nnx(0), cross_entropy)
    params.pop("first")
    with pytest.raises(ValueError, match="`params` and `state` must be those of `nnx_loss`"):
        loss_fn(params, batch, state)
    with pytest.raises(ValueError, match="`params` and `state` must be those of `nnx_loss`"):
        loss_fn(nnx_loss(Nnx(0), cross_entropy).params, batch)


@pytest.mark.usefixtures("untyped")
def test_nnx_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`model` must hold .* but Dropout has none"):
        nnx_loss(nnx.Dropout(0.5), cross_entropy)
    with pytest.raises(ValueError, match="`mode` must be one of 'eval', 'train', got 'test'"):
        nnx_loss(Nnx(0), cross_entropy, mode="test")
    for wrong in (nn.Dense(2), jnp.tanh, nnx.Linear, nnx.state(Nnx(0))):
        with pytest.raises(TypeError, match="`model` must be an `nnx.Module`, made with its `rngs`, got "):
            nnx_loss(wrong, cross_entropy)


# -- models for Gauss-Newton products --------------------------------------------------------------


def cross_entropy_of_all(logits, batch, *_):
    return cross_entropy(logits, batch)


def test_model_functions_give_the_outputs_that_the_losses_see(batch):
    params, state = variables(batch)
    model_fn = linen_model(Linen(), train=False)
    assert model_fn == linen_model(Linen(), train=False) != linen_model(Linen(), train=True)
    assert_same(
        model_fn(params, batch, state), Linen().apply({"params": params, **state}, batch[0], train=False)
    )
    loss_fn = linen_loss(Linen(), cross_entropy, train=False)
    assert_same(cross_entropy(model_fn(params, batch, state), batch), loss_fn(params, batch, state))
    made = nnx_model(Nnx(0), mode="train", scale=2.0)
    again = nnx_loss(Nnx(0), cross_entropy, mode="train", scale=2.0)
    assert made.model_fn == nnx_model(Nnx(1), mode="train", scale=2.0).model_fn
    assert_same((made.params, made.state["norm"]), (again.params, again.state["norm"]))
    outputs = made.model_fn(made.params, batch, made.state)
    assert_same(cross_entropy(outputs, batch), again.loss_fn(again.params, batch, again.state))


def test_their_ggn_is_their_fisher_and_compiles_once(batch, compilations):
    """Softmax cross-entropy: the two are one matrix, from linen and from nnx."""
    model_fn = linen_model(Linen(), train=False)
    checkpoints = [(model_fn, *variables(batch, seed)) for seed in range(2)]
    checkpoints += [nnx_model(Nnx(seed)) for seed in range(2)]
    for i, (model_fn, params, state) in enumerate(checkpoints):
        vector = jax.tree.map(jnp.cos, params)
        del compilations[:]
        ggn = hj.ggn(model_fn, cross_entropy_of_all, params, batch, state)(vector)
        fisher = hj.fisher(model_fn, params, batch, state, likelihood=hj.likelihoods.categorical)(vector)
        assert i % 2 == 0 or not compilations
        assert_same(ggn, fisher)


@pytest.mark.usefixtures("untyped")
def test_what_a_model_function_refuses_is_named(batch):
    params, _ = variables(batch)
    with pytest.raises(ValueError, match=r"(?s)`state` must hold every collection.*batch_stats"):
        linen_model(Linen(), train=False)(params, batch)
    with pytest.raises(TypeError, match="`scales` must be hashable"):
        linen_model(Linen(), scales=[1, 2])
    with pytest.raises(ValueError, match="`mode` must be one of 'eval', 'train'"):
        nnx_model(Nnx(0), mode="test")
