"""Linen and nnx modules at smaller widths: the compact model's function, by their own code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import hessjax as hj
from hessjax.flax import linen_loss, linen_model, linen_resized, nnx_model, nnx_resized

RNG = np.random.default_rng(0)


def images(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def randomised(tree):
    """Every array redrawn, its variances positive."""

    def draw(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        values = 0.05 + 0.3 * RNG.normal(size=x.shape)
        return jnp.asarray(np.abs(values) if "var" in jax.tree_util.keystr(path) else values, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def zeroed(tree, *places):
    """Zeros at `(end of the path, axis, indices)`."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}
    for end, axis, indices in places:
        hit = [path for path in leaves if path.endswith(end)]
        assert hit, (end, [*leaves])
        for path in hit:
            first = jnp.moveaxis(leaves[path], axis, 0)
            leaves[path] = jnp.moveaxis(first.at[jnp.array(indices)].set(0), 0, axis)
    return jax.tree.unflatten(structure, leaves.values())


def prunable(module, x):
    """Random variables in the shapes of the module's."""
    return randomised(jax.eval_shape(module.init, jax.random.key(0), x))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x)))
        x = nn.Conv(8, (3, 3), feature_group_count=8)(x)
        x = nn.ConvTranspose(6, (2, 2), (2, 2), transpose_kernel=True)(nn.relu(x))
        x = nn.relu(nn.Conv(10, (3, 3), feature_group_count=2)(x))
        return nn.DenseGeneral((2, 3))(x.mean(axis=(1, 2)))


class Recurrent(nn.Module):
    cell: type = nn.LSTMCell

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(self.cell(8))(x)[:, -1])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(4, qkv_features=8, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x))), None


class Encoder(nn.Module):
    """Tokens, layers in a scan, a head tied to the embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return embed.attend(scanned()(embed(tokens), None)[0])


TOKENS = jnp.array([[1, 2, 3], [4, 5, 0]])
LINEN = {
    "convolutions": (
        ConvNet(),
        images(2, 4, 4, 3),
        [("Conv_1/kernel", -1, [2]), ("Conv_1/bias", 0, [2]), ("DenseGeneral_0/kernel", 0, [0, 5])],
        {"Conv_2": 8},
    ),
    "a group": (
        ConvNet(),
        images(2, 4, 4, 3),
        [("DenseGeneral_0/kernel", 0, [0, 1, 2, 3, 4])],
        {"ConvTranspose_0": 3, "Conv_2": 5},
    ),
    "lstm": (
        Recurrent(),
        images(2, 5, 4),
        [(f"{gate}/kernel", -1, [2, 3]) for gate in ("ig", "hg")] + [("hg/bias", 0, [2, 3])],
        {"LSTMCell_0": 6},
    ),
    "optimized lstm": (
        Recurrent(nn.OptimizedLSTMCell),
        images(2, 5, 4),
        [(f"{gate}/kernel", 0, [2]) for gate in ("hi", "hf", "hg", "ho", "Dense_0")],
        {"OptimizedLSTMCell_0": 7},
    ),
    "gru": (
        Recurrent(nn.GRUCell),
        images(2, 5, 4),
        [(f"{gate}/kernel", 0, [2]) for gate in ("hr", "hz", "hn", "Dense_0")],
        {"GRUCell_0": 7},
    ),
    "scanned layers": (
        Encoder(),
        TOKENS,
        [("out/kernel", 1, [1]), ("down/kernel", 1, [0, 7])],
        {"query": (3, 2), "up": 14},
    ),
}


@pytest.mark.parametrize(("module", "x", "zeros", "want"), LINEN.values(), ids=LINEN)
def test_a_linen_module_at_smaller_widths(module, x, zeros, want):
    variables = zeroed(prunable(module, x), *zeros)
    small = hj.compact(module.apply, variables, x)
    narrow = linen_resized(module, small.params, x)
    features = {w.layer.split("/")[-1]: w.after for w in narrow.widths if w.field == "features"}
    for layer, width in want.items():
        assert features.get(layer) == width
    assert small.kept
    assert small.check(narrow.apply, x) < 1e-6
    more = jnp.concatenate([x, x[:1]])
    got, wanted = jax.jit(lambda v, w, x: (narrow.apply(v, x), module.apply(w, x)))(
        small.params, variables, more
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def mean_square(outputs, batch):
    return optax.l2_loss(outputs - 1).mean()


def test_it_goes_wherever_a_module_goes():
    """Losses and models, training mode, mutable collections; two of them of equal parts are equal."""
    x = images(4, 4, 4, 3)
    variables = zeroed(prunable(ConvNet(), x), ("DenseGeneral_0/kernel", 0, [0, 1, 2, 3, 4]))
    small = hj.compact(ConvNet().apply, variables, x)
    narrow = linen_resized(ConvNet(), small.params, x)
    loss_fn = linen_loss(narrow, mean_square, train=False)
    assert loss_fn == linen_loss(linen_resized(ConvNet(), small.params, x), mean_square, train=False)
    state = {"batch_stats": small.params["batch_stats"]}
    grads = jax.grad(loss_fn)(small.params["params"], x, state)
    full = jax.grad(linen_loss(ConvNet(), mean_square, train=False))(
        variables["params"], x, {"batch_stats": variables["batch_stats"]}
    )
    wanted = small.shrink(full, under="params")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, wanted)
    outputs, new = narrow.apply(small.params, x, train=True, mutable=["batch_stats"])
    assert outputs.shape == (4, 2, 3)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert linen_model(narrow)(small.params["params"], x, state).shape == (4, 2, 3)


class Positions(nn.Module):
    """Width 6 is written into its code."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x) + self.param("positions", nn.initializers.normal(), (5, 6))
        return nn.Dense(2)(x)


def test_a_linen_layer_of_fixed_width_is_named():
    x = images(2, 5, 4)
    variables = zeroed(prunable(Positions(), x), ("Dense_1/kernel", 0, [1]))
    small = hj.compact(Positions().apply, variables, x)
    with pytest.raises(ValueError, match=r'code of one fixes it: .*"positions".*\(5, 5\)'):
        linen_resized(Positions(), small.params, x)


@pytest.mark.parametrize("wrong", ["module", "variables", "collections"])
def test_what_is_no_module_or_no_variables_is_named(wrong):
    net, x = nn.Dense(2), jnp.ones((1, 3))
    variables = net.init(jax.random.key(0), x)
    given = {
        "module": (nn.Dense, variables, "`module` must be a"),
        "variables": (net, hj.compact(net.apply, variables, x), "`variables` must be a mapping"),
        "collections": (net, variables["params"], "`variables` must be a mapping"),
    }
    module, tree, message = given[wrong]
    with pytest.raises(TypeError, match=message):
        linen_resized(module, tree, x)


# -- nnx ------------------------------------------------------------------------------------------


class NnxConvNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.deep = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.up, self.last = nnx.ConvTranspose(8, 4, (2, 2), (2, 2), rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.deep(nnx.relu(self.norm(self.first(x)))))
        return self.last(nnx.relu(self.up(x)).mean((1, 2)))


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(11, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 8, 8, decode=False, rngs=rngs)
        self.hidden, self.last = nnx.Linear(8, 16, rngs=rngs), nnx.LinearGeneral(16, (2, 3), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.last(nnx.gelu(self.hidden(x + self.attention(self.norm(x)))))


class NnxRecurrent(nnx.Module):
    def __init__(self, cell, rngs):
        self.rnn, self.last = nnx.RNN(cell(4, 8, rngs=rngs), rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.rnn(x)[:, -1])


def rngs():
    return nnx.Rngs(0)


NNX = {
    "convolutions": (
        lambda: NnxConvNet(rngs()),
        images(2, 4, 4, 3),
        [("up/kernel", -2, [1, 5]), ("last/kernel", 0, [2])],
        lambda m: (m.first.out_features, m.norm.num_features, m.deep.feature_group_count, m.up.out_features),
        (6, 6, 6, 3),
    ),
    "attention": (
        lambda: NnxEncoder(rngs()),
        TOKENS,
        [("attention/out/kernel", 0, [1]), ("last/kernel", 0, [3, 4])],
        lambda m: (m.attention.num_heads, m.attention.qkv_features, m.hidden.out_features),
        (3, 6, 14),
    ),
    "lstm": (
        lambda: NnxRecurrent(nnx.OptimizedLSTMCell, rngs()),
        images(2, 5, 4),
        [("dense_h/kernel", 0, [2]), ("last/kernel", 0, [2])],
        lambda m: (m.rnn.cell.hidden_features, m.last.in_features),
        (7, 7),
    ),
    "gru": (
        lambda: NnxRecurrent(nnx.GRUCell, rngs()),
        images(2, 5, 4),
        [("dense_h/kernel", 0, [2]), ("last/kernel", 0, [2])],
        lambda m: (m.rnn.cell.hidden_features, m.rnn.cell.in_features),
        (7, 4),
    ),
}


@pytest.mark.parametrize(("build", "x", "zeros", "sizes", "want"), NNX.values(), ids=NNX)
def test_an_nnx_model_at_smaller_widths(build, x, zeros, sizes, want):
    model = build()
    model_fn, params, state = nnx_model(model)
    full = zeroed(randomised({"params": params, "state": state}), *zeros)
    small = hj.compact(lambda v, x: model_fn(v["params"], (x,), v["state"]), full, x)
    narrow = nnx_resized(model, small.params["params"], small.params["state"])
    assert sizes(narrow) == want
    narrow_fn, *held = nnx_model(narrow)
    assert small.check(lambda v, x: narrow_fn(v["params"], (x,), v["state"]), x) < 1e-6
    more = jnp.concatenate([x, x[:1]])
    wanted = jax.jit(model_fn)(full["params"], (more,), full["state"])
    np.testing.assert_allclose(jax.jit(narrow_fn)(held[0], (more,), held[1]), wanted, rtol=1e-4, atol=1e-5)
    assert sizes(model) != want  # the full one is left as it is


class Fixed(nnx.Module):
    def __init__(self, rngs):
        self.width, self.last = 6, nnx.Linear(6, 2, rngs=rngs)
        self.kernel = nnx.Param(images(4, 6))

    def __call__(self, x):
        return self.last((x @ self.kernel[...]).reshape(-1, self.width))


def test_an_nnx_module_of_fixed_width_is_named():
    model = Fixed(rngs())
    model_fn, params, _ = nnx_model(model)
    small = hj.compact(model_fn, zeroed(params, ("last/kernel", 0, [1])), images(2, 4))
    with pytest.raises(
        ValueError, match=r"Fixed \(Fixed\) holds `width` = 6, the old size of an axis of `kernel`"
    ):
        nnx_resized(model, small.params)
    with pytest.raises(ValueError, match=r"parts of the model's arrays, but other has \(3,\)"):
        nnx_resized(model, {"other": jnp.ones(3)})
