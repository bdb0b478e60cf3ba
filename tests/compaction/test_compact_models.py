"""What common models are made of: each block shrinks by what is dead in it, or says why it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj


def array(*shape, zeros=(), seed=0):
    """Random weights, zero at `(axis, indices)`."""
    values = 0.3 * np.random.default_rng([seed, *shape]).normal(size=shape)
    for axis, indices in zeros:
        np.moveaxis(values, axis, 0)[list(indices)] = 0
    return values.astype("f")


X = array(2, 5, 4, seed=1)
IN, OUT = array(4, 6), array(6, 3, zeros=[(0, [2])])
TOKENS = jnp.array([0, 1, 1, 0, 2])


def shapes(model, params, *args, **options):
    """`{leaf: shape}` of what became smaller; the outputs are the same to rounding at two batch sizes."""
    small = hj.compact(model, params, *args, **options)
    assert small.difference < 1e-5 or options.get("drop_constants")
    more = [jnp.concatenate([x, x]) for x in args]
    if small.kept and not options:
        full, fewer = jax.jit(model)(params, *more), jax.jit(small.model_fn)(small.params, *more)
        np.testing.assert_allclose(full, fewer, rtol=1e-4, atol=1e-5)
    return {path: after for path, (before, after) in small.shapes.items() if before != after}


def conv(x, kernel, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    options = {"dimension_numbers": layout, "feature_group_count": groups}
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)


# -- operations between two matrices --------------------------------------------------------------

FIVE, THREE_OF_SIX = {"a": (4, 5), "b": (5, 3)}, {"a": (4, 4), "b": (2, 3)}
PASSING = {
    "scan": lambda h: jax.lax.scan(lambda c, _: (jnp.tanh(c), None), h, None, 2)[0],
    "scan over": lambda h: jax.lax.scan(lambda c, row: (c + row, c), h[:, 0] * 0, h.swapaxes(0, 1))[1],
    "map": lambda h: jax.lax.map(jnp.tanh, h),
    "fori": lambda h: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c) * i, h),
    "while": lambda h: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, h))[1],
    "cond": lambda h: jax.lax.cond(X[0, 0, 0] > 0, jnp.tanh, lambda h: 2 * h, h),
    "switch": lambda h: jax.lax.switch(len(h) % 2, [jnp.tanh, lambda h: -h], h),
    "associative scan": lambda h: jax.lax.associative_scan(jnp.add, h, axis=1),
    "unstack, stack": lambda h: jnp.stack(jnp.unstack(h, axis=1)[::-1], axis=1),
    "sort the tokens": lambda h: jnp.sort(h, axis=1),
    "top k of the tokens": lambda h: jax.lax.top_k(h.swapaxes(1, 2), 2)[0].swapaxes(1, 2),
    "gather tokens": lambda h: h[:, TOKENS],
    "take along": lambda h: jnp.take(h, TOKENS, axis=1, mode="fill", fill_value=0),
    "scatter": lambda h: h.at[:, 0].set(0.0).at[:, TOKENS].add(h),
    "segment sum": lambda h: jax.vmap(lambda h: jax.ops.segment_sum(h, TOKENS, 3))(h),
    "cache": lambda h: jax.lax.dynamic_update_slice(jnp.zeros((len(h), 9, 6)), h, (0, TOKENS[1], 0)),
    "dynamic slice": lambda h: jax.lax.dynamic_slice_in_dim(h, TOKENS[1], 2, axis=1),
    "cumprod": lambda h: jnp.cumprod(h, axis=1),
    "product": lambda h: jnp.prod(h, axis=1),
    "repeated": lambda h: jnp.tile(h, (1, 2, 1)),
}


@pytest.mark.parametrize("between", PASSING.values(), ids=PASSING)
def test_what_leaves_channels_alone_lets_them_go(between):
    assert shapes(lambda p, x: between(x @ p["a"]) @ p["b"], {"a": IN, "b": OUT}, X) == FIVE


WIDENING = {
    "tile": (lambda h: jnp.tile(h, 2), [2, 8]),
    "interleave": (lambda h: jnp.stack([h, -h], -1).reshape(*h.shape[:-1], -1), [4, 5]),
    "pairs": (lambda h: jnp.concatenate([h, h[..., ::-1]], -1), [2, 9]),
    "repeat": (lambda h: jnp.repeat(h, 2, axis=-1), [4, 5]),
}


@pytest.mark.parametrize(("between", "rows"), WIDENING.values(), ids=WIDENING)
def test_copies_of_a_channel_go_together(between, rows):
    all_zero = {"a": IN, "b": array(12, 3, zeros=[(0, rows)])}
    assert shapes(lambda p, x: between(x @ p["a"]) @ p["b"], all_zero, X) == {"a": (4, 5), "b": (10, 3)}
    one_zero = {"a": IN, "b": array(12, 3, zeros=[(0, rows[:1])])}
    assert shapes(lambda p, x: between(x @ p["a"]) @ p["b"], one_zero, X) == {}


STAYING = {
    "top k of the channels": lambda h: jnp.tile(jax.lax.top_k(h, 2)[0], 3),
    "argmax": lambda h: h * jnp.argmax(h, -1, keepdims=True).astype(h.dtype),
    "gathered by data": lambda h: jnp.take_along_axis(h, (h > 0).astype(int), -1),
    "unstack": lambda h: jnp.stack([i * c for i, c in enumerate(jnp.unstack(h, axis=-1))], -1),
    "loop until": lambda h: jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h + 1, h),
    "filled in": lambda h: jnp.take(h, TOKENS + 4, axis=1, mode="fill", fill_value=2.0) @ jnp.eye(6),
    "adds up in a loop": lambda h: jax.lax.scan(lambda c, _: (jnp.cumsum(c, -1), None), h, None, 2)[0],
    "order in a loop": lambda h: jax.lax.scan(lambda c, _: (c[..., ::-1], None), h, None, 1)[0],
}


@pytest.mark.parametrize("between", STAYING.values(), ids=STAYING)
def test_what_counts_or_orders_channels_keeps_them(between):
    assert shapes(lambda p, x: between(x @ p["a"]) @ p["b"], {"a": IN, "b": OUT}, X) == {}


# -- layers in a stack ----------------------------------------------------------------------------


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w["a"] + w["c"]) @ w["b"], None), x, p)[0]


def counted(p, x):
    def layer(i, h):
        a, b, c = (jnp.asarray(p[name])[i] for name in "abc")
        return h + jnp.tanh(h @ a + c) @ b

    return jax.lax.fori_loop(0, 3, layer, x)


def unrolled(p, x):
    for a, b, c in zip(p["a"], p["b"], p["c"], strict=True):
        x = x + jnp.tanh(x @ a + c) @ b
    return x


@pytest.mark.parametrize("model", [scanned, counted, unrolled])
@pytest.mark.promotes
def test_a_stack_shrinks_by_what_is_dead_in_all_layers(model):
    params = {"a": array(3, 4, 6), "b": array(3, 6, 4, zeros=[(1, [1, 5])]), "c": array(3, 6)}
    want = {"a": (3, 4, 4), "b": (3, 4, 4), "c": (3, 4)}
    assert shapes(model, params, X) == want
    params["b"][1, 5] = 1.0  # alive in one layer
    assert shapes(model, params, X)["b"] == (3, 5, 4)


def lstm(p, x):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ p["w"] + h @ p["u"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return ((h := jax.nn.sigmoid(o) * jnp.tanh(c)), c), h

    start = (jnp.zeros((len(x), 6)), jnp.zeros((len(x), 6)))
    return jax.lax.scan(step, start, x.swapaxes(0, 1))[1] @ p["o"]


def test_units_of_a_recurrent_network():
    """Those that nothing but themselves reads, and those that are zero at every step."""
    unread = {"w": array(4, 24), "u": array(6, 24, zeros=[(0, [1])]), "o": array(6, 3, zeros=[(0, [1])])}
    assert shapes(lstm, unread, X) == {"w": (4, 20), "u": (5, 20), "o": (5, 3)}
    silent = {"w": array(4, 24, zeros=[(1, [14])]), "u": array(6, 24, zeros=[(1, [14])]), "o": array(6, 3)}
    assert shapes(lstm, silent, X) == {"w": (4, 20), "u": (5, 20), "o": (5, 3)}
    read_by_itself_and_another = {**unread, "u": array(6, 24)}
    assert shapes(lstm, read_by_itself_and_another, X) == {}


# -- experts, attention, groups of channels -------------------------------------------------------


def by_weight(p, x):
    hidden = jax.nn.relu(jnp.einsum("btd,edh->ebth", x, p["up"]))
    return jnp.einsum("bte,ebth,ehd->btd", jax.nn.softmax(x @ p["router"]), hidden, p["down"])


def by_index(p, x):
    chosen = jnp.argmax(x @ p["router"], -1)
    hidden = jax.nn.relu(jnp.einsum("btd,btdh->bth", x, p["up"][chosen]))
    return jnp.einsum("bth,bthd->btd", hidden, p["down"][chosen])


def by_group(p, x):
    tokens = x.reshape(-1, 4)
    chosen = jnp.argmax(tokens @ p["router"], -1)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=3)
    hidden = jax.nn.relu(jax.lax.ragged_dot(tokens[order], p["up"], sizes))
    return jnp.zeros_like(tokens).at[order].set(jax.lax.ragged_dot(hidden, p["down"], sizes))


@pytest.mark.parametrize("model", [by_weight, by_index, by_group])
def test_experts_shrink_by_what_is_dead_in_all(model):
    params = {"router": array(4, 3), "up": array(3, 4, 8, zeros=[(2, [0, 5])]), "down": array(3, 8, 4)}
    assert shapes(model, params, X) == {"up": (3, 4, 6), "down": (3, 6, 4)}
    params["up"][1, :, 5] = 1.0
    assert shapes(model, params, X) == {"up": (3, 4, 7), "down": (3, 7, 4)}


def rotated(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 10 ** jnp.arange(half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def grouped_query(p, tokens):
    """A language model: tied embeddings, rotated queries and keys, two query heads for every key head."""
    h = p["e"][tokens]
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    q, k, v = rotated(q), jnp.repeat(rotated(k), 2, axis=2), jnp.repeat(v, 2, axis=2)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    return (h + jnp.einsum("bhqk,bkhd,hdo->bqo", weights, v, p["o"])) @ p["e"].T


@pytest.mark.promotes
def test_grouped_heads_and_a_tied_embedding():
    tokens = jnp.array([[1, 2, 3], [4, 5, 0]])
    params = {"e": array(7, 8), "q": array(8, 4, 4), "k": array(8, 2, 4), "v": array(8, 2, 4)}
    group = {**params, "o": array(4, 4, 8, zeros=[(0, [2, 3])])}
    smaller = {"q": (8, 2, 4), "k": (8, 1, 4), "v": (8, 1, 4), "o": (2, 4, 8)}
    assert shapes(grouped_query, group, tokens) == smaller
    one_of_two = {**params, "o": array(4, 4, 8, zeros=[(0, [2])])}
    assert shapes(grouped_query, one_of_two, tokens) == {}
    stream = {**params, "e": array(7, 8, zeros=[(1, [3])]), "o": array(4, 4, 8, zeros=[(2, [3])])}
    stream |= {name: array(*params[name].shape, zeros=[(0, [3])]) for name in "qkv"}
    assert shapes(grouped_query, stream, tokens) == {
        "e": (7, 7), "q": (7, 4, 4), "k": (7, 2, 4), "v": (7, 2, 4), "o": (4, 4, 7),
    }  # fmt: skip


def test_groups_of_channels():
    def model(p, x):
        return conv(jnp.tanh(conv(jnp.tanh(conv(x, p["a"])), p["b"], 8 // p["b"].shape[2])), p["c"])

    x = array(2, 4, 4, 2)
    params = {"a": array(3, 3, 2, 8), "b": array(3, 3, 4, 8)}

    def without(*rows):
        return shapes(model, {**params, "c": array(3, 3, 8, 2, zeros=[(2, rows)])}, x)

    assert without(1, 5) == {"b": (3, 3, 4, 6), "c": (3, 3, 6, 2)}  # the same in both groups
    assert without(1, 6) == {}
    assert without(4, 5, 6, 7) == {"a": (3, 3, 2, 4), "b": (3, 3, 4, 4), "c": (3, 3, 4, 2)}  # a whole group


def test_depthwise_with_several_outputs_each():
    def model(p, x):
        return conv(jnp.tanh(conv(conv(x, p["a"]), p["b"], 3)), p["c"])

    params = {"a": array(1, 1, 2, 3), "b": array(3, 3, 1, 6), "c": array(1, 1, 6, 2, zeros=[(2, [2, 3])])}
    want = {"a": (1, 1, 2, 2), "b": (3, 3, 1, 4), "c": (1, 1, 4, 2)}
    assert shapes(model, params, array(2, 4, 4, 2)) == want


def test_pixel_shuffle_and_transposed_convolutions():
    def model(p, x):
        up = jax.lax.conv_transpose(x, p["up"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        fine = up.reshape(len(x), 8, 8, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 16, 16, 3)
        return conv(fine, p["out"])

    params = {"up": array(2, 2, 2, 12), "out": array(1, 1, 3, 2, zeros=[(2, [1])])}
    assert shapes(model, params, array(2, 4, 4, 2)) == {"up": (2, 2, 2, 8), "out": (1, 1, 2, 2)}
