"""Counts against those made by hand, through the layers and the control flow of real models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import hessjax as hj
from hessjax._core import _tree
from hessjax.program._products import NO_LEAF
from hessjax.program._products import multiply_adds as multiply_adds_of
from hessjax.program._tracing import read


def multiply_adds(model_fn, params, *args):
    counts = multiply_adds_of(read(model_fn, params, *args)).by_leaf
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
        lambda w, x: x @ (w.astype(jnp.bfloat16) * jnp.eye(3, dtype=jnp.bfloat16)),
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
    counts = multiply_adds(lambda p, x: (x @ p["one"] + p["bias"]) @ p["two"], params, X[:1])
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


def test_summary_multiplies_by_the_density():
    params = {"kernel": jnp.ones((4, 5)).at[:3].set(0), "bias": jnp.ones(5)}
    result = hj.summary(params, lambda p, x: x @ p["kernel"] + p["bias"], jnp.ones((2, 4)))
    assert (result.total.multiply_adds, result.total.multiply_adds_left) == (40, 10)
    assert [row.multiply_adds for row in result.rows] == [0, 40]
    assert str(result).splitlines()[0].split()[3:8] == ["Nonzero", "Mult-adds", "Left", "Rows", "%"]
    assert hj.summary(params).total.multiply_adds is None
