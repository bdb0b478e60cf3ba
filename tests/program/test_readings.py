"""Which operations every leaf takes part in, and along which axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessjax.program._program import evaluate, execute
from hessjax.program._tracing import read
from hessjax.program._uses import uses


def array(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def used(fn, params, *args):
    """`{leaf: [(operation, operand, axes, trips)]}`"""
    found = uses(read(fn, params, *args))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {
        name.strip("[]'"): [(u.operation.name, u.operand, u.axes, u.trips) for u in each]
        for name, each in zip(names, found, strict=True)
    }


W, X, Q = array(3, 5), array(2, 3), array(3, 2, 4)


@pytest.mark.parametrize(
    ("fn", "w", "want"),
    [
        (lambda w, x: x @ w, W, ("dot_general", 1, ((0,), (1,)), 1)),
        (lambda w, x: w.T @ x.T, W, ("dot_general", 0, ((1,), (0,)), 1)),
        (lambda w, x: x @ (w.astype(jnp.bfloat16).astype("f") * jnp.tri(3, 5)), W,
         ("dot_general", 1, ((0,), (1,)), 1)),
        (lambda w, x: x @ (jnp.tri(3, 5) * w / jnp.linalg.norm(w)), W, ("dot_general", 1, ((0,), (1,)), 1)),
        (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), Q, ("dot_general", 1, ((0,), (1,), (2,)), 1)),
        (lambda w, x: x @ w.reshape(3, 8), Q, ("dot_general", 1, ((0,), (1, 2)), 1)),
        (lambda w, x: x @ w.reshape(8, 3).T, array(24), ("dot_general", 1, ((0,), (0,)), 1)),
        (lambda w, x: x @ w[1:2].squeeze(0), array(4, 3, 5), ("dot_general", 1, ((1,), (2,)), 1)),
        (lambda w, x: x[:, :1] @ w, array(1, 5), ("dot_general", 1, ((0,), (1,)), 1)),
        (lambda w, x: x + w[None], array(3), ("add", 1, ((), (0,)), 1)),
        (lambda w, x: w[x[:, 0].astype(int)], W, ("gather", 0, ((0,), (1,)), 1)),
        (lambda w, x: x @ jnp.sort(w, 0), W, ("dot_general", 1, None, 1)),
        (lambda w, x: jax.lax.map(lambda row: row @ w, x), W, ("dot_general", 1, ((0,), (1,)), 2)),
        (
            lambda w, x: jax.lax.scan(lambda h, s: (jnp.tanh(h @ s), None), x, w)[0],
            array(4, 3, 3),
            ("dot_general", 1, ((1,), (2,)), 4),
        ),
        (
            lambda w, x: jax.lax.scan(lambda s, row: (0.5 * s, row @ s), w, x)[1],
            W,
            ("scan", 0, ((0,), (1,)), 1),
        ),
        (
            lambda w, x: jax.lax.while_loop(lambda h: h.sum() < 1, lambda h: h @ w, x),
            array(3, 3),
            ("dot_general", 1, ((0,), (1,)), None),
        ),
        (
            lambda w, x: jax.lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: 0 * x, x),
            array(3, 3),
            ("dot_general", 1, ((0,), (1,)), 1),
        ),
        (
            lambda w, x: jax.lax.conv_general_dilated(
                x.reshape(1, 2, 3), w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            ),
            array(2, 3, 5),
            ("conv_general_dilated", 1, ((0,), (1,), (2,)), 1),
        ),
    ],
    ids=[
        "dense", "transposed", "cast, masked", "normalised", "heads", "heads, merged", "split, transposed",
        "cut", "axis of length 1", "bias", "gather", "sorted: not known", "map", "stacked over layers",
        "carried", "while", "cond", "convolution",
    ],
)  # fmt: skip
def test_a_leaf_is_followed_into_the_operation_that_it_enters(fn, w, want):
    assert used(fn, w, X)[""] == [want]


def test_no_axis_is_named_that_does_not_run_there():
    """An axis that meets another later stems from itself only; one merged and split again is what it was."""
    square = array(3, 3)
    assert used(lambda w, x: (x @ w, x @ (w + w.T)), square, X)[""] == [
        ("dot_general", 1, ((0,), (1,)), 1),
        ("dot_general", 1, ((0, 1), (0, 1)), 1),
    ]
    assert used(lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(3, 8).reshape(3, 2, 4)), Q, X)[""] == [
        ("dot_general", 1, ((0,), (1,), (2,)), 1)
    ]
    assert used(lambda w, x: x @ w.reshape(3, 2, 4).reshape(3, 8), array(3, 8), X)[""] == [
        ("dot_general", 1, ((0,), (1,)), 1)
    ]


@pytest.mark.parametrize(
    ("fn", "w", "axes"),
    [
        (lambda w, x: x @ w[x[0, 0].astype(int)], array(4, 3, 5), ((1,), (2,))),
        (lambda w, x: x @ w[jnp.array([2, 0, 1])], array(4, 5), ((0,), (1,))),
        (lambda w, x: x @ jnp.unstack(w)[1], array(2, 3, 5), ((1,), (2,))),
        (lambda w, x: x @ jnp.tile(w, (3, 2)), array(1, 4), ((0,), (1,))),
        (lambda w, x: x @ jnp.stack([w, w], 1).reshape(3, 8), array(3, 4), ((0,), (1,))),
    ],
    ids=["index", "gather", "unstack", "tile", "stack"],
)
def test_leaves_are_followed_through_indices_and_copies(fn, w, axes):
    (use,) = used(fn, w, X)[""]
    assert use[2] == (axes if use[0] == "dot_general" else ((0,), (1,), (2,)))


def test_every_leaf_of_a_layer_with_bias_scale_and_mask():
    params = {"bias": array(5), "kernel": W, "mask": jnp.ones((3, 5)), "scale": array(5), "unused": W}

    def model(p, x):
        h = jnp.tanh(x @ (p["kernel"] * p["mask"]) + p["bias"][None])
        return h / jnp.linalg.norm(h) * p["scale"][None]

    assert used(model, params, X) == {
        "kernel": [("dot_general", 1, ((0,), (1,)), 1)],
        "mask": [("dot_general", 1, ((0,), (1,)), 1)],
        "bias": [("add", 1, ((), (0,)), 1)],
        "scale": [("mul", 1, ((), (0,)), 1)],
        "unused": [],
    }


def test_what_enters_and_leaves_a_layer_gives_its_gradient():
    """Operands from the program, derivatives from zeros added to the results: all that K-FAC needs."""
    params = {"in": W, "out": array(5, 2)}

    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p["in"]) @ p["out"].reshape(5, 2) ** 2)

    program = read(loss, params, X)
    (first,), _ = uses(program)

    def tapped(tap):
        seen = []

        def apply(operation, inputs):
            outputs = execute(operation, inputs)
            if operation is not first.operation:
                return outputs
            seen.append(inputs[1 - first.operand])
            return [outputs[0] + tap]

        (value,) = evaluate(program.body, [*jax.tree.leaves(params), X], apply)
        return value, seen[0]

    gradient, inputs = jax.grad(tapped, has_aux=True)(jnp.zeros(first.operation.outputs[0].shape))
    np.testing.assert_allclose(inputs.T @ gradient, jax.grad(loss)(params, X)["in"], rtol=1e-5)
