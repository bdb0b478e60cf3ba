"""The map: what every leaf takes part in, how often, in which loops; why a leaf is not covered."""

import jax
import jax.numpy as jnp
import pytest

import hessjax as hj
from tests.layers.cases import CASES

WORDS = {
    "dense": {"w": "dense 4 → 3", "b": "bias 3", "v": "dense 3 → 2"},
    "scale and bias": {"scale": "scale 4", "shift": "bias 4"},
    "heads": {"q": "dense 3 → 4", "o": "dense 4 → 3"},
    "experts": {"w": "einsum 2 × (2 → 3)", "b": "bias 6"},
    "convolution": {
        "k": "conv 3×2, 2 → 4, stride 2×1",
        "g": "conv 2×2, 4 → 6, dilation 1×2, 2 groups",
    },
    "transposed convolution": {"k": "conv 3, 2 → 3, input dilation 2"},
    "tied embedding": {"e": "embedding 5 → 3; dense 3 → 5"},
}


def leaf(found, path):
    return next(leaf for leaf in found.leaves if leaf.path == path)


@pytest.mark.parametrize("name", CASES)
def test_all_leaves_of_these_networks_are_covered(name):
    case = CASES[name]
    found = hj.layers.coverage(case.model_fn, case.params(), case.batch()[0])
    assert found.covered == tuple(case.shapes)
    for path, words in WORDS.get(name, {}).items():
        assert "; ".join(leaf(found, path).uses) == words


def test_loops_and_how_often_they_run():
    for name, path, times, loops in [
        ("scan", "w", 2, ("scan of 2",)),
        ("recurrent", "w", 4, ("scan of 4",)),
        ("nested scans", "w", 4, ("scan of 2",)),
        ("repeated", "w", 2, ()),
    ]:
        case = CASES[name]
        found = leaf(hj.layers.coverage(case.model_fn, case.params(), case.batch()[0]), path)
        assert (found.times, found.loops) == (times, loops)


def powered(p, x):
    return x @ p["w"] ** 2


def stopped(p, x):
    return x @ jax.lax.stop_gradient(p["w"])


def branched(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x)


def counted(p, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ p["w"]), (0, x))[1]


def carried(p, x):
    return x @ jax.lax.scan(lambda w, _: (w * x.sum(), None), p["w"], None, length=2)[0]


def unused(p, x):
    return x


def added(p, x):
    return jnp.mean(x @ p["w"]) + jnp.sum(p["w"] ** 2)


def cut(p, x):
    return x[:, :2] @ p["w"][:2]


def paired(p, x):
    return x @ p["w"] + x[:, :1] * p["w"].reshape(1, 9)[:, :3]


def differently(p, x):
    return x @ p["w"] + (x[:, None] @ p["w"].reshape(3, 3))[:, 0] + (x[:, :1] @ p["w"].reshape(1, 9))[:, :3]


def masked(p, x):
    return x @ (p["w"] * MASK)


MASK = jnp.tri(3)


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def own(p, x):
    return own_product(x, p["w"])


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (powered, "goes through `integer_pow` first"),
        (stopped, "goes through `stop_gradient` first"),
        (branched, "is used inside `cond`"),
        (counted, "is used inside `while`"),
        (carried, "is carried by a loop"),
        (unused, "takes no part in the outputs"),
        (added, "goes through"),
        (cut, "goes through `slice` first"),
        (differently, "is used with its axes paired in different ways"),
        (masked, "is joined with what is the same for all examples by `mul`"),
        (own, "enters `custom_vjp_call"),
    ],
)
def test_why_a_leaf_is_not_covered(fn, reason):
    found = hj.layers.coverage(fn, {"w": jnp.ones((3, 3))}, jnp.ones((2, 3)))
    assert not found.covered
    assert reason in found.reasons["w"], found.reasons["w"]
    assert "0 of 1 leaves are covered, 0 of 9 weights." in str(found)


def test_shapes_are_enough():
    case = CASES["convolution"]
    shapes = jax.eval_shape(case.params), jax.eval_shape(lambda: case.batch()[0])
    assert hj.layers.coverage(case.model_fn, *shapes).covered == ("b", "g", "k")


def test_bad_calls(untyped):
    with pytest.raises(ValueError, match="must begin with the batch"):
        hj.layers.coverage(powered, {"w": jnp.ones((3, 3))})
    with pytest.raises(TypeError, match="real floating-point leaves"):
        hj.layers.coverage(powered, {"w": jnp.ones((3, 3), int)}, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="`fn` must be a function"):
        hj.layers.coverage("model", {"w": jnp.ones((3, 3))}, jnp.ones((2, 3)))
