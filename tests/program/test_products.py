"""Multiply-adds against those counted by hand, through the layers and the control flow of real models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax._core import _tree
from hessjax.program._products import NO_LEAF
from hessjax.program._products import multiply_adds as work_of
from hessjax.program._tracing import read


def multiply_adds(model_fn, params, *args):
    counts = work_of(read(model_fn, params, *args)).by_leaf
    return {path: counts[i] for i, path in enumerate(_tree.leaf_paths(params))}


def kernels(counts):
    return {path.removeprefix("params/"): n for path, n in counts.items() if n}


def of_module(module, *args):
    variables = jax.eval_shape(module.init, jax.random.key(0), *args)
    return kernels(multiply_adds(module.apply, variables, *args))


IMAGE = jax.ShapeDtypeStruct((2, 8, 6, 3), jnp.float32)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Conv(5, (3, 3)), 2 * 8 * 6 * 5 * 9 * 3),
        (nn.Conv(5, (3, 3), strides=2, padding="VALID"), 2 * 3 * 2 * 5 * 9 * 3),
        (nn.Conv(6, (3, 3), feature_group_count=3), 2 * 8 * 6 * 6 * 9),
        (nn.ConvTranspose(5, (2, 2), strides=(2, 2)), 2 * 16 * 12 * 5 * 4 * 3 // 4),
        (nn.Dense(7), 2 * 8 * 6 * 3 * 7),
        (nn.Dense(7, dtype=jnp.bfloat16), 2 * 8 * 6 * 3 * 7),
        (nn.Embed(4, 3), None),
    ],
)
def test_layers_by_hand(layer, count):
    if count is None:
        assert of_module(layer, jax.ShapeDtypeStruct((2, 8), jnp.int32)) == {}
    else:
        assert of_module(layer, IMAGE) == {"kernel": count}


def test_attention_counts_its_weights_only():
    counts = of_module(nn.MultiHeadDotProductAttention(2), jax.ShapeDtypeStruct((4, 9, 6), jnp.float32))
    assert counts == {f"{name}/kernel": 4 * 9 * 36 for name in ("key", "out", "query", "value")}


def test_recurrent_layers_count_every_step():
    counts = of_module(nn.RNN(nn.SimpleCell(5)), jax.ShapeDtypeStruct((4, 9, 6), jnp.float32))
    assert counts == {"cell/h/kernel": 4 * 9 * 25, "cell/i/kernel": 4 * 9 * 30}


W, X = jnp.ones((3, 3)), jnp.ones((2, 3))


@pytest.mark.parametrize(
    "model_fn",
    [
        lambda w, x: x @ w,
        lambda w, x: (w.T @ x.T).T,
        lambda w, x: x.astype(jnp.bfloat16) @ (w.astype(jnp.bfloat16) * jnp.eye(3, dtype=jnp.bfloat16)),
        lambda w, x: x @ (w / jnp.linalg.norm(w)),
        jax.jit(lambda w, x: x @ w),
        jax.checkpoint(lambda w, x: x @ w),
        lambda w, x: jax.vmap(lambda row: jnp.dot(row, w))(x),
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x[:1] @ w + x),
        lambda w, x: jax.lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ w), (0, x)),
        lambda w, x: x[:, :1] @ w[:1] + x[:, 1:] @ w[1:],
        lambda w, x: jax.lax.scan(lambda _, row: (0, row @ w), 0, x)[1],
        lambda w, x: jax.lax.scan(lambda h, column: (h + x @ column, None), jnp.zeros(2), w.T)[0],
        lambda w, x: (x @ w) * (x @ x.T)[0, 0],
    ],
    ids=["plain", "transposed", "cast and masked", "normalised", "jit", "checkpoint", "vmap", "cond", "while",
         "cut", "scan over data", "scan over weights", "products of data"],
)  # fmt: skip
def test_eighteen_wherever_the_weights_go(model_fn):
    assert multiply_adds(model_fn, W, X) == {".": 18}


def test_a_bias_of_the_shape_of_the_data_stays_a_bias():
    params = {"bias": jnp.ones(3), "one": W, "two": W}
    counts = multiply_adds(lambda p, x: (x @ p["one"] + p["bias"][None]) @ p["two"], params, X[:1])
    assert counts == {"bias": 0, "one": 9, "two": 9}


def test_a_product_of_weights_counts_for_the_largest():
    params = {"down": jnp.ones((8, 2)), "up": jnp.ones((2, 5))}
    counts = multiply_adds(lambda p, x: x @ (p["down"] @ p["up"]), params, jnp.ones((3, 8)))
    assert counts == {"down": 8 * 2 * 5 + 3 * 8 * 5, "up": 0}


def test_of_the_weights_that_a_branch_chooses_the_largest_counts():
    params = {"a_large": jnp.ones((3, 3)), "b_small": jnp.ones(3)}

    def model(p, x):
        chosen = jax.lax.cond(True, lambda: p["a_large"], lambda: jnp.diag(p["b_small"]))
        return x @ chosen

    assert multiply_adds(model, params, X) == {"a_large": 18, "b_small": 0}


def test_compact_and_summary_count_alike():
    module, x = nn.ConvTranspose(5, (2, 2), strides=(2, 2)), jnp.ones((2, 8, 6, 3))
    variables = module.init(jax.random.key(0), x)
    want = hj.summary(variables, module.apply, x).total.multiply_adds
    assert want == 2 * 16 * 12 * 5 * 4 * 3 // 4
    assert hj.compact(module.apply, variables, x).before.multiply_adds == want


def lstm(params, x):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ params["w"] + h @ params["u"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), h

    zeros = jnp.zeros((len(x), 6))
    return jax.lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[1] @ params["o"]


@pytest.mark.parametrize(
    ("model_fn", "count"),
    [
        (lstm, 2 * 5 * (4 + 6) * 24 + 2 * 5 * 6 * 3),
        (lambda p, x: jax.lax.map(lambda r: jax.nn.relu(r @ p["w"]) @ p["v"], x), 2 * 5 * (4 * 24 + 24 * 3)),
        (lambda p, x: jax.lax.fori_loop(0, 7, lambda i, h: h @ p["s"], x), 7 * 2 * 5 * 4 * 4),
        (lambda p, x: jax.lax.scan(lambda h, s: (h @ s, None), x, jnp.stack([p["s"]] * 3))[0], 3 * 160),
        (lambda p, x: jax.lax.ragged_dot(x.reshape(10, 4), p["e"], jnp.array([4, 3, 3])), 10 * 4 * 8),
        (lambda p, x: jax.lax.scan(lambda h, _: (h @ p["s"], None), x, None, length=0)[0], 0),
    ],
    ids=["LSTM", "map", "fori", "scan over weights", "ragged_dot", "scan of no step"],
)
def test_compact_and_summary_count_loops_by_hand(model_fn, count):
    rng, x = np.random.default_rng(0), jnp.ones((2, 5, 4))
    shapes = {"e": (3, 4, 8), "o": (6, 3), "s": (4, 4), "u": (6, 24), "v": (24, 3), "w": (4, 24)}
    params = {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}
    assert hj.summary(params, model_fn, x).total.multiply_adds == count
    work = work_of(read(model_fn, params, x))
    assert (work.total, work.notes) == (count, ())


def test_ragged_sums_and_batches():
    """Rows in groups cost the same as without; of a contracted axis, each group has its share."""
    dot_numbers = {"contracted": (((0,), (0,)), ((), ())), "batch": (((2,), (1,)), ((0,), (0,)))}
    for kind, dot in dot_numbers.items():
        numbers = jax.lax.RaggedDotDimensionNumbers(dot, [0], [])
        shapes = {"contracted": ((10, 4), (10, 8)), "batch": ((3, 5, 4), (3, 4, 8))}[kind]
        sizes = {"contracted": (3,), "batch": (3,)}[kind]
        work = work_of(
            read(
                lambda w, x, n, numbers=numbers: jax.lax.ragged_dot_general(x, w, n, numbers),
                jax.ShapeDtypeStruct(shapes[1], jnp.float32),
                jax.ShapeDtypeStruct(shapes[0], jnp.float32),
                jax.ShapeDtypeStruct(sizes, jnp.int32),
            )
        )
        assert work.total == {"contracted": 10 * 4 * 8, "batch": 3 * 5 * 4 * 8}[kind]


def test_what_is_not_known_is_named():
    def loop(w, x):
        return jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, x)

    def solve(w, x):
        return jax.lax.custom_linear_solve(lambda v: w @ v, x[0], lambda matvec, b: matvec(b))

    def branches(w, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    (step,) = (result := hj.summary({"w": W}, lambda p, x: loop(p["w"], x), X)).notes
    assert step.startswith("a `while` loop counts as one step")
    assert result.total.multiply_adds == 18
    assert step in " ".join(line.strip() for line in str(result).splitlines())
    assert work_of(read(branches, W, X)).by_leaf == {0: 36}
    assert work_of(read(branches, W, X)).notes == ("a `cond` counts as its most expensive branch",)
    assert work_of(read(solve, W, X)).notes == ("what `custom_linear_solve` does inside is not counted",)
    assert hj.compact(loop, W, X).notes == result.notes  # W multiplies sums by 3: it ends


def test_one_branch_counts_not_the_best_of_each():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 5)), "c": jnp.ones((5, 3))}

    def model(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: x @ p["b"] @ p["c"])

    assert multiply_adds(model, params, X) == {"a": 0, "b": 30, "c": 30}


def test_products_of_data_belong_to_no_leaf():
    work = work_of(read(lambda w, x: x @ x.T @ (x @ w), W, X))
    assert work.by_leaf == {0: 18, NO_LEAF: 12 + 12}


def test_summary_multiplies_by_the_density():
    params = {"kernel": jnp.ones((4, 5)).at[:3].set(0), "bias": jnp.ones(5)}
    result = hj.summary(params, lambda p, x: x @ p["kernel"] + p["bias"][None], jnp.ones((2, 4)))
    assert (result.total.multiply_adds, result.total.multiply_adds_left) == (40, 10)
    assert [row.multiply_adds for row in result.rows] == [0, 40]
    assert str(result).splitlines()[0].split()[3:8] == ["Nonzero", "Mult-adds", "Left", "Rows", "%"]
    assert hj.summary(params).total.multiply_adds is None
