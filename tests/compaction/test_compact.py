"""Removing channels: the function stays, the arrays and the work shrink, nothing else goes."""

import functools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import linen as nn
from flax import nnx

import hessjax as hj
from hessjax.flax import linen_recalibrate
from hessjax.program._readings import READINGS


def random(shapes, seed=0):
    """Random weights for a tree of shapes; nothing drawn on the device, nothing compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.05 + 0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


def initial(module, x):
    variables = random(jax.eval_shape(module.init, jax.random.key(0), x))
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return variables


def images(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def zeroed(params, path, index):
    """The tree with leaf[index] = 0 at a path."""
    first, *rest = path.split("/")
    new = zeroed(params[first], "/".join(rest), index) if rest else params[first].at[index].set(0)
    return {**params, first: new}


def shape_of(small, path):
    return small.shapes[path][1]


class MLP(nn.Module):
    widths: tuple = (8, 6, 3)

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.gelu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


@pytest.fixture(scope="module")
def mlp():
    """A perceptron with two dead units (nothing goes in) and, behind them, one that nothing reads."""
    module, x = MLP(), images(5, 4)
    variables = initial(module, x)
    for leaf in ("kernel", "bias"):
        variables = zeroed(variables, f"params/Dense_0/{leaf}", (..., jnp.array([1, 2])))
    return module, zeroed(variables, "params/Dense_2/kernel", 3), x


def test_a_perceptron(mlp):
    module, variables, x = mlp
    small = hj.compact(module.apply, variables, x)
    assert [small.shapes[f"params/Dense_{i}/kernel"][1] for i in range(3)] == [(4, 6), (6, 5), (5, 3)]
    np.testing.assert_array_equal(small.kept["params/Dense_1/kernel"][0], [0, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(small.kept["params/Dense_2/kernel"][0], [0, 1, 2, 4, 5])
    assert small.difference < 1e-6
    assert small.check(MLP((6, 5, 3)).apply, x) < 1e-6
    assert small.before[0] == 8 * 5 + 6 * 9 + 3 * 7
    assert small.after == (6 * 5 + 5 * 7 + 3 * 6, 4 * small.after.weights, 5 * (4 * 6 + 6 * 5 + 5 * 3))
    assert "params/Dense_0/kernel  4×8    4×6" in str(small)
    renamed = small._replace(kept={"w[a]": {}}, shapes={"w[a]": ((4, 8), (4, 6))})
    assert "w[a]           4×8    4×6" in str(renamed)


def test_float64_to_rounding(x64, mlp):
    module, variables, x = mlp
    variables, x = jax.tree.map(lambda a: a.astype(jnp.float64), (variables, x))
    small = hj.compact(module.apply, variables, x)
    assert small.difference < 1e-14
    oracles.close(small.model_fn(small.params, x), module.apply(variables, x), rtol=1e-12)


def test_dead_units_are_followed_through_the_network():
    """Unit 0 of layer 2 reads unit 1 only, which reads nothing; unit 2 of layer 1 feeds only a dead one."""
    kernel = jnp.ones((3, 3))
    params = {
        "a": kernel.at[:, 1].set(0.0),
        "b": kernel.at[jnp.array([0, 2]), 0].set(0.0).at[2, jnp.array([0, 1])].set(0.0),
        "c": jnp.ones((3, 2)).at[2].set(0.0),
    }

    def model(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    small = hj.compact(model, params, jnp.ones((2, 3)))
    assert jax.tree.map(jnp.shape, small.params) == {"a": (3, 1), "b": (1, 1), "c": (1, 2)}
    assert small.difference < 1e-6


def test_nothing_to_remove_is_data():
    module, x = MLP(), images(5, 4)
    variables = initial(module, x)
    small = hj.compact(module.apply, variables, x)
    assert small.kept == {}
    assert small.before == small.after
    assert small.difference == 0.0
    oracles.close(small.params, variables, rtol=0, atol=0)


def test_a_layer_of_zeros_keeps_one_unit(mlp):
    module, variables, x = mlp
    dead = jax.tree.map(jnp.zeros_like, variables)
    small = hj.compact(module.apply, dead, x)
    assert [small.shapes[f"params/Dense_{i}/kernel"][1] for i in range(3)] == [(4, 1), (1, 1), (1, 3)]
    assert small.difference == 0.0


# -- convolutions ---------------------------------------------------------------------------------


class ConvNet(nn.Module):
    channels: int = 6
    hidden: int = 7

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(self.channels, (3, 3))(x)))
        x = nn.relu6(nn.Conv(self.channels, (3, 3), feature_group_count=self.channels)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        x = nn.silu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(3, name="out")(x)


def test_convolutions_batch_norm_depthwise_and_flattening():
    x = images(2, 8, 8, 3)
    variables = initial(ConvNet(), x)
    kernel = variables["params"]["hidden"]["kernel"].reshape(16, 6, 7).at[:, jnp.array([0, 4])].set(0)
    variables["params"]["hidden"]["kernel"] = kernel.reshape(96, 7)
    small = hj.compact(ConvNet().apply, variables, x)
    assert shape_of(small, "params/hidden/kernel") == (64, 7)
    assert shape_of(small, "params/Conv_0/kernel") == (3, 3, 3, 4)
    assert shape_of(small, "params/Conv_1/kernel") == (3, 3, 1, 4)
    assert shape_of(small, "batch_stats/BatchNorm_0/var") == (4,)
    assert small.difference < 1e-6
    assert small.check(ConvNet(4).apply, x) < 1e-6


def test_what_is_constant_stays_unless_dropped():
    """A filter of zeros still gives BatchNorm's offset."""
    x = images(2, 8, 8, 3)
    variables = initial(ConvNet(), x)
    for leaf in ("kernel", "bias"):
        variables = zeroed(variables, f"params/Conv_0/{leaf}", (..., 2))
    params = variables["params"]
    params["BatchNorm_0"]["bias"] = params["BatchNorm_0"]["bias"].at[2].set(3.0)
    params["Conv_1"]["kernel"] = jnp.abs(params["Conv_1"]["kernel"])
    assert hj.compact(ConvNet().apply, variables, x).kept == {}
    dropped = hj.compact(ConvNet().apply, variables, x, drop_constants=True)
    assert shape_of(dropped, "params/Conv_0/kernel") == (3, 3, 3, 5)
    assert dropped.difference > 1e-3
    for leaf in ("scale", "bias"):
        variables = zeroed(variables, f"params/BatchNorm_0/{leaf}", 2)
    variables = zeroed(variables, "params/Conv_1/bias", 2)
    gone = hj.compact(ConvNet().apply, variables, x)
    assert shape_of(gone, "params/Conv_0/kernel") == (3, 3, 3, 5)
    assert gone.difference < 1e-6


class Normalised(nn.Module):
    """BatchNorm behind every convolution, nothing padded."""

    channels: int = 6

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = nn.Conv(self.channels if x.shape[-1] == 3 else 4, (3, 3), padding="VALID")(x)
            x = nn.relu(nn.BatchNorm(not train)(x))
        return nn.Dense(2)(x.mean(axis=(1, 2)))


def test_recalibration_takes_up_what_is_dropped():
    x = images(4, 8, 8, 3)
    variables = zeroed(initial(Normalised(), x), "params/Conv_0/kernel", (..., 1))
    variables["params"]["BatchNorm_0"]["bias"] = jnp.ones(6)
    small = hj.compact(Normalised().apply, variables, x, drop_constants=True)
    assert small.difference > 1e-3
    full = linen_recalibrate(Normalised(), variables, [x], train=True)
    fewer = linen_recalibrate(Normalised(5), small.params, [x], train=True)
    oracles.close(Normalised(5).apply(fewer, x), Normalised().apply(full, x), rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """A stream that grows by zero padding, as in He et al.'s option A, and a block beside it."""

    stream: tuple = (6, 12)
    inner: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.stream[0], (3, 3))(x)
        y = nn.Conv(self.inner, (3, 3), 2)(x)
        y = nn.BatchNorm(use_running_average=True)(nn.Conv(self.stream[1], (3, 3))(nn.relu(y)))
        x = y + jnp.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(0, self.stream[1] - self.stream[0])])
        return nn.Dense(4)(nn.relu(x).mean(axis=(1, 2)))


def test_a_residual_stream_shrinks_where_all_readers_agree():
    x = images(2, 8, 8, 3)
    variables = initial(Residual(), x)
    variables = zeroed(variables, "params/Conv_2/kernel", (slice(None), slice(None), jnp.arange(4)))
    inner_only = hj.compact(Residual().apply, variables, x)
    assert inner_only.check(Residual(inner=4).apply, x) < 1e-6
    gone = jnp.array([1, 3, 7, 8, 11])  # two from the narrow stream, three from what is padded on
    variables = zeroed(variables, "params/Dense_0/kernel", gone)
    assert hj.compact(Residual().apply, variables, x).kept["params/Dense_0/kernel"][0].size == 9
    variables = zeroed(variables, "params/Conv_1/kernel", (slice(None), slice(None), jnp.array([1, 3])))
    small = hj.compact(Residual().apply, variables, x)
    assert shape_of(small, "params/Conv_0/kernel") == (3, 3, 3, 4)
    assert small.difference < 1e-6
    assert small.check(Residual((4, 7), 4).apply, x) < 1e-6


# -- attention ------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer's layer; the stream is normalised, so that only heads and hidden units can go."""

    heads: int = 4
    hidden: int = 10

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(self.heads, qkv_features=2 * self.heads, out_features=8)
        x = x + attention(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(8, name="down")(hidden)


def test_linen_heads_and_the_feed_forward_network():
    x = images(2, 3, 8)
    variables = initial(Block(), x)
    variables = zeroed(variables, "params/MultiHeadDotProductAttention_0/out/kernel", 1)
    variables = zeroed(variables, "params/down/kernel", jnp.array([0, 9]))
    small = hj.compact(Block().apply, variables, x)
    assert shape_of(small, "params/MultiHeadDotProductAttention_0/query/kernel") == (8, 3, 2)
    assert shape_of(small, "params/up/kernel") == (8, 8)
    assert small.difference < 1e-6
    assert small.check(Block(3, 8).apply, x) < 1e-6


def test_the_width_of_a_head_stays():
    """The products of queries and keys are divided by its square root, a number that hides in the code."""
    x = images(2, 3, 8)
    variables = initial(Block(), x)
    for leaf in ("kernel", "bias"):
        variables = zeroed(variables, f"params/MultiHeadDotProductAttention_0/query/{leaf}", (..., 0))
    small = hj.compact(Block().apply, variables, x)
    assert not any("query" in path or "key" in path for path in small.kept)


def test_nnx_heads():
    def attention(heads):
        return nnx.MultiHeadAttention(heads, 8, 2 * heads, decode=False, rngs=nnx.Rngs(0))

    def model_of(heads):
        graphdef, params, rest = nnx.split(attention(heads), nnx.Param, ...)
        return (lambda params, x: nnx.merge(graphdef, params, rest)(x)), params

    model_fn, params = model_of(4)
    params = jax.tree.map(jnp.asarray, params)
    params["out"]["kernel"][...] = params["out"]["kernel"][...].at[2].set(0)
    x = images(2, 3, 8)
    small = hj.compact(model_fn, params, x)
    assert shape_of(small, "value/kernel") == (8, 3, 2)
    assert small.difference < 1e-6
    assert small.check(model_of(3)[0], x) < 1e-6


def test_fused_and_reshaped_heads():
    """Query, key and value in one kernel, cut apart, and heads made by reshaping."""
    rng = np.random.default_rng(0)
    params = {"qkv": rng.normal(size=(6, 24)).astype("f"), "out": rng.normal(size=(8, 6)).astype("f")}
    params["out"][2:4] = 0  # the second of four heads of width 2

    def model(p, x):
        q, k, v = (part.reshape(*x.shape[:-1], -1, 2) for part in jnp.split(x @ p["qkv"], 3, axis=-1))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:-1], -1) @ p["out"]

    small = hj.compact(model, params, images(2, 3, 6))
    assert isinstance(small.params["qkv"], np.ndarray)
    np.testing.assert_array_equal(small.kept["out"][0], [0, 1, 4, 5, 6, 7])
    assert small.params["qkv"].shape == (6, 18)
    assert small.difference < 1e-6
    assert small.check(model, images(2, 3, 6)) < 1e-6


# -- operations -----------------------------------------------------------------------------------

W = jnp.ones((3, 6))
LIVE = jnp.array([0, 2, 3, 5])


def two_layers(between):
    """x @ in, something, @ out, where out reads 4 of 6 (or of what there is)."""

    def model(p, x):
        h = between(x @ p["in"])
        return h.reshape(len(x), -1) @ p["out"]

    return model


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (jax.checkpoint(jnp.tanh), 6),
        (lambda h: jnp.where(h > 0, h, 0.1 * h), 6),
        (lambda h: jnp.clip(h, -1, 1), 6),
        (lambda h: h[:, ::-1], 6),
        (lambda h: h[:, None, :].transpose(2, 0, 1).squeeze(-1).T, 6),
        (lambda h: jax.lax.optimization_barrier(h), 6),
        (lambda h: h * jnp.arange(2.0)[:, None] + jnp.ones((1, 6)), 6),
        (lambda h: jnp.cumsum(h, axis=0), 6),
        (lambda h: jax.vmap(jnp.sin)(h), 6),
        (lambda h: h[:, :6:2], 3),
        (lambda h: jnp.concatenate([h, -h], axis=1), 12),
        (lambda h: jnp.pad(h, [(0, 0), (3, 2)]), 11),
        (lambda h: jnp.broadcast_to(h[:, None], (2, 2, 6)), 12),
    ],
    ids=[
        "checkpoint", "where", "clip", "reverse", "transpose", "barrier", "constants", "cumsum", "vmap",
        "stride", "concatenate", "pad", "broadcast",
    ],
)  # fmt: skip
def test_operations_pass_what_they_must(between, width):
    rng = np.random.default_rng(3)
    out = rng.normal(size=(width, 2)).astype("f")
    reads = between(jnp.broadcast_to(jnp.arange(1.0, 7.0), (2, 6)) * 0.1)
    columns = np.round(np.asarray(reads)[1].reshape(-1), 4)
    rows = {c: i for i, c in enumerate(np.unique(np.abs(columns[columns != 0])))}
    out[[i for i, c in enumerate(columns) if rows.get(abs(c), 0) in (1, 4)]] = 0
    params = {"in": rng.normal(size=(3, 6)).astype("f"), "out": out}
    small = hj.compact(two_layers(between), params, images(2, 3))
    assert small.params["in"].shape[1] <= 4
    assert small.difference < 1e-6


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h - h.mean(axis=1, keepdims=True),
        lambda h: h / jnp.linalg.norm(h, axis=1, keepdims=True),
        jax.nn.softmax,
        lambda h: jnp.sort(h, axis=1),
        lambda h: h[:, jnp.array([0, 2, 1, 3, 4, 5])],
        lambda h: jnp.cumsum(h, axis=1),
        lambda h: jnp.fft.fft(h).real,
        lambda h: h * jnp.arange(6.0)[None],
        lambda h: jax.lax.cond(h.sum() > 0, jnp.sin, jnp.cos, h),
    ],
    ids=["mean", "norm", "softmax", "sort", "gather", "cumsum", "fft", "constants", "cond"],
)
def test_operations_that_count_or_are_not_understood_keep_all(between):
    params = {"in": images(3, 6), "out": images(6, 2).at[jnp.array([1, 4])].set(0)}
    small = hj.compact(two_layers(between), params, images(2, 3))
    assert small.kept == {}
    assert small.difference == 0


STACKED = {"w": images(3, 4, 4), "o": images(4, 2)}
PAIR = {"a": images(4, 8), "b": images(8, 3)}


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (lambda p, x: (x + jnp.tanh(x @ p["w"][0]) + jnp.tanh(x @ p["w"][2])) @ p["o"], STACKED),
        (lambda p, x: x @ p["w"][1:2].reshape(4, 4), STACKED),
        (lambda p, x: x @ (p["w"][1:2] * p["w"][2:3]).sum(0), STACKED),
        (lambda p, x: (x @ p["a"])[..., 2], PAIR),
        (lambda p, x: jax.nn.sigmoid((h := x @ p["a"])[..., :1]) * (h[..., 1:] @ p["b"][1:]), PAIR),
        (lambda p, x: sum(c * i for i, c in enumerate(jnp.split(x @ p["a"], 8, -1))), PAIR),
        (lambda p, x: sum(jnp.tanh(x @ p["a"])[..., i : i + 1] @ p["b"][i : i + 1] for i in range(8)), PAIR),
    ],
    ids=["layer", "row, reshaped", "product of rows", "column", "gate", "split in singles", "rank-one terms"],
)  # fmt: skip
def test_one_index_of_an_axis_is_remembered(model, params):
    """What has length 1 may be squeezed, reshaped or broadcast away: the index that it was must stay."""
    assert hj.compact(model, params, images(2, 5, 4)).difference < 1e-6


def test_a_dead_column_beside_one_that_is_taken_alone():
    params = {**PAIR, "a": PAIR["a"].at[:, jnp.array([2, 5])].set(0)}
    small = hj.compact(lambda p, x: (h := x @ p["a"])[..., 2:3] + h @ p["b"], params, images(2, 4))
    np.testing.assert_array_equal(small.kept["a"][1], [0, 1, 2, 3, 4, 6, 7])
    assert small.difference < 1e-6


def test_a_difference_beyond_rounding_is_refused(monkeypatch, mlp):
    """An operation misread, as if it gave zeros only."""
    module, variables, x = mlp

    def misread(constraints, operation, inputs):
        return [inputs[0]._replace(nonzero=np.zeros_like(inputs[0].nonzero))]

    monkeypatch.setitem(READINGS, "tanh", misread)
    with pytest.raises(RuntimeError, match=r"those of the full one to rounding, 3.5e-04, but on .*Dense_"):
        hj.compact(lambda p, x: jnp.tanh(module.apply(p, x[:, :4])) @ jnp.ones((3, 1)), variables, x)


def test_infinite_outputs_are_no_difference():
    params = {"w": images(4, 6).at[:, 1].set(0), "o": images(6, 3)}
    small = hj.compact(lambda p, x: jnp.log(jnp.tri(2, 3)) + x @ p["w"] @ p["o"], params, images(2, 4))
    assert small.kept["w"][1].size == 5
    assert small.difference < 1e-6


def test_multiply_adds_of_loops_at_the_smaller_widths():
    """Around a loop widths shrink, inside they stay, and its steps count each."""
    params = {"in": images(4, 6).at[:, 1].set(0), "out": images(6, 3), "step": images(3, 3)}

    def model(p, x):
        h = x @ p["in"] @ p["out"]
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["step"]), None), h, None, length=5)[0]

    small = hj.compact(model, params, images(2, 4))
    assert small.before.multiply_adds == 2 * (4 * 6 + 6 * 3) + 5 * 2 * 9
    assert small.after.multiply_adds == 2 * (4 * 5 + 5 * 3) + 5 * 2 * 9


def test_a_leaf_without_use_and_one_that_is_no_number(mlp):
    module, variables, x = mlp
    params = {**variables, "unused": np.zeros((3, 3)), "step": 7, "scale": 0.5, "key": jax.random.key(0)}

    def model(p, x):
        used = {"params": p["params"]}
        return module.apply(used, x) * p["scale"] * jnp.float32(p["step"] > 0) + jax.random.uniform(p["key"])

    small = hj.compact(model, params, x)
    assert shape_of(small, "unused") == (3, 3)
    assert shape_of(small, "params/Dense_1/kernel") == (6, 5)
    assert small.params["step"] == 7
    assert small.difference < 1e-6


@pytest.mark.promotes
def test_where_and_mixed_dtypes(mlp):
    module, variables, x = mlp
    variables = {"params": {**variables["params"]}}
    variables["params"]["Dense_0"] = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16), variables["params"]["Dense_0"]
    )
    small = hj.compact(module.apply, variables, x, where=["*/Dense_0/*", "*/Dense_1/kernel"])
    assert [small.shapes[f"params/Dense_{i}/kernel"][1] for i in range(3)] == [(4, 6), (6, 6), (6, 3)]
    assert small.params["params"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    assert small.difference < 1e-6


@pytest.mark.parametrize("wrap", oracles.CONTAINERS.values(), ids=oracles.CONTAINERS)
def test_any_container(wrap):
    params = wrap(
        {**oracles.leaves(), "a_bias": jnp.zeros(3), "d_kernel": jnp.ones((2, 3)).at[:, 1].set(0.0)}
    )

    def model(p, x):
        bias, _, scale, kernel = jax.tree.leaves(p)
        return (scale * jnp.tanh(x @ kernel + bias[None])) @ jnp.ones((len(bias), 1))

    small = hj.compact(model, params, jnp.ones((2, 2)))
    assert jax.tree.structure(small.params) == jax.tree.structure(params)
    assert small.difference < 1e-6


# -- what was made for the params -----------------------------------------------------------------


def trained(tx, params, steps=2):
    state = tx.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda p, s=step: 0.1 * p + s, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return state


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        optax.multi_transform({1: optax.adam(0.1), 2: optax.sgd(0.1)}, lambda p: jax.tree.map(jnp.ndim, p)),
        hj.prune(optax.adam(0.1), hj.saliencies.magnitude(), 0.2),
        optax.MultiSteps(hj.prune(optax.adam(0.1), hj.saliencies.magnitude(), 0.2), 2),
    ],
    ids=["adam", "momentum", "multi_transform", "prune", "MultiSteps"],
)  # fmt: skip
@pytest.mark.promotes
def test_an_optimizer_state_goes_on(mlp, tx):
    """Cut first or stepped first: the weights that are left move alike."""
    module, variables, x = mlp
    small, state = hj.compact(module.apply, variables, x), trained(tx, variables["params"])
    cut = small.shrink(state, under="params")
    assert jax.tree.structure(cut) == jax.tree.structure(state)
    want = jax.eval_shape(tx.init, small.params["params"])
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, want)
    oracles.close(small.shrink(variables), small.params, rtol=0, atol=0)


@pytest.mark.promotes
def test_the_cut_state_takes_the_same_steps(mlp):
    module, variables, x = mlp
    small, tx = hj.compact(module.apply, variables, x), optax.adam(0.1)
    params, fewer = variables["params"], small.params["params"]
    state = trained(tx, params)
    updates, _ = tx.update(params, state, params)
    fewer_updates, _ = tx.update(fewer, small.shrink(state, under="params"), fewer)
    oracles.close(fewer_updates, small.shrink(updates, under="params"), rtol=1e-6)


def test_stacks_and_factored_moments(mlp):
    module, variables, x = mlp
    small = hj.compact(module.apply, variables, x)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), variables)
    oracles.close(small.shrink(stacked), jax.tree.map(lambda a: jnp.stack([a, 2 * a]), small.params), rtol=0)
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    cut = small.shrink(trained(tx, variables["params"]), under="params")
    want = jax.eval_shape(tx.init, small.params["params"])
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, want)


def test_an_nnx_optimizer():
    model = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 2, rngs=nnx.Rngs(1)))
    model.layers[1].kernel[...] = model.layers[1].kernel[...].at[0].set(0)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    graphdef, params = nnx.split(model)
    small = hj.compact(lambda p, x: nnx.merge(graphdef, p)(x), params, images(2, 3))
    cut = small.shrink(nnx.as_pure(optimizer.opt_state))
    assert sorted({x.shape for x in jax.tree.leaves(cut)}) == [(), (2,), (3, 4), (4,), (4, 2)]


# -- bad input ------------------------------------------------------------------------------------


def test_bad_input(mlp):
    module, variables, x = mlp
    with pytest.raises(
        ValueError, match=r"`where` must match at least one leaf, but `\*/kernels` matches none"
    ):
        hj.compact(module.apply, variables, x, where="*/kernels")
    small = hj.compact(module.apply, variables, x)
    with pytest.raises(ValueError, match="`tree` must hold leaves at the paths of the params"):
        small.shrink({"other": jnp.ones(3)})
    odd = jax.tree.map(lambda a: jnp.ones((2, *a.shape[1:], 3)), variables)
    with pytest.raises(ValueError, match=r"params/Dense_0/bias has \(2, 3\) where .* had \(8,\)"):
        small.shrink(odd)
    with pytest.raises(ValueError, match="`params` must be like the compact params"):
        small.model_fn(variables, x)
    with pytest.raises(ValueError, match=r"must have the structure of `the compact model's outputs`"):
        small.check(lambda p, x: (x,), x)


def test_args_may_be_bound_and_params_frozen(mlp):
    module, variables, x = mlp
    model_fn = functools.partial(module.apply, capture_intermediates=False)
    small = hj.compact(model_fn, flax.core.freeze(variables), x)
    assert shape_of(small, "params/Dense_0/kernel") == (4, 6)


# -- after the patterns of `prune` ----------------------------------------------------------------


def test_pruned_channels_go_without_a_trace():
    """`channels()` clears what reads a channel: all that made it goes too, and the function stays."""
    x = images(2, 8, 8, 3)
    variables = initial(Residual(), x)
    where = ["Conv_1/kernel", "Conv_2/kernel"]
    pruned = hj.prune_once(
        variables["params"],
        hj.saliencies.magnitude(),
        0.5,
        pattern=hj.patterns.channels(),
        allocation=hj.allocations.uniform(),
        where=where,
    )
    small = hj.compact(Residual().apply, {**variables, "params": pruned.params}, x)
    assert shape_of(small, "params/Conv_2/kernel") == (3, 3, 4, 12)
    assert shape_of(small, "params/Conv_1/kernel") == (3, 3, 6, 4)  # its input is the stream, read elsewhere
    assert small.check(Residual(inner=4).apply, x) < 1e-6


def test_pruned_heads_go():
    x = images(2, 3, 8)
    variables = initial(Block(), x)
    pruned = hj.prune_once(
        variables["params"],
        hj.saliencies.magnitude(),
        0.5,
        pattern=hj.patterns.heads(),
        allocation=hj.allocations.uniform(),
        where="Multi*/kernel",
    )
    small = hj.compact(Block().apply, {"params": pruned.params}, x)
    assert shape_of(small, "params/MultiHeadDotProductAttention_0/out/kernel") == (2, 2, 8)
    assert small.check(Block(2).apply, x) < 1e-6


def test_training_goes_on_at_the_smaller_width():
    """A step of the full pruned network, then cut, is a step of the compact one."""
    x, sparsity = images(5, 4), {8: 0.5, 4: 0.0}
    params = initial(MLP(), x)["params"]

    def transformation(width):
        where, pattern = "Dense_1/kernel", hj.patterns.channels()
        return hj.prune(
            optax.adam(0.01), hj.saliencies.magnitude(), sparsity[width], pattern=pattern, where=where, stop=0
        )

    @functools.partial(jax.jit, static_argnums=0)
    def step(width, params, state):
        grads = jax.grad(lambda p: jnp.mean(MLP((width, 6, 3)).apply({"params": p}, x) ** 2))(params)
        updates, state = transformation(width).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(8, params, transformation(8).init(params))
    small = hj.compact(lambda p, x: MLP().apply({"params": p}, x), params, x)
    assert shape_of(small, "Dense_0/kernel") == (4, 4)
    assert small.shrink(hj.mask_of(state))["Dense_1"]["kernel"].all()
    full = step(8, params, state)
    fewer = step(4, small.params, small.shrink(state))
    params, state = (small.shrink(tree) for tree in full)
    oracles.close(fewer[0], params, rtol=1e-4, atol=1e-6)
    oracles.close(fewer[1]._replace(sparsity=0), state._replace(sparsity=0), rtol=1e-4, atol=1e-6)
