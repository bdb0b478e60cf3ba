"""Why zeros stay: every rule that holds some is named, and so is what would help."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

# A bias is added as people add it, without the axes of the batch.
pytestmark = pytest.mark.promotes

RNG = np.random.default_rng(0)
X, OUT, BIAS = (RNG.normal(size=shape).astype("f") for shape in ((2, 5, 4), (6, 3), (6,)))
IN = RNG.normal(size=(4, 6)).astype("f")
IN[:, 2] = 0
SQUARE = RNG.normal(size=(4, 6)).astype("f")
PARAMS = {"a": IN, "b": OUT, "c": BIAS, "d": SQUARE}


def normalised(h, stats):
    return jnp.tanh((h - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5))


STATS = {"mean": BIAS, "var": BIAS**2}
CASES = {
    "bias": (lambda p, x: (x @ p["a"] + p["c"]) @ p["b"], ("constant",), ()),
    "sum of squares": (
        lambda p, x: (h := x @ p["a"]) @ p["b"] / jnp.linalg.norm(h, axis=-1, keepdims=True),
        ("counted",),
        ("reduce_sum",),
    ),
    "queries and keys": (lambda p, x: x @ p["a"] @ (x @ p["d"]).swapaxes(1, 2), ("width",), ("dot_general",)),
    "sort": (lambda p, x: jnp.sort(x @ p["a"], -1) @ p["b"], ("index",), ("sort",)),
    "fft": (lambda p, x: jnp.fft.fft(x @ p["a"]).real @ p["b"], ("unread",), ("fft",)),
    "positions": (lambda p, x: x @ p["a"] * jnp.arange(1.0, 7) @ p["b"], ("array",), ("iota",)),
    "closed over": (lambda p, x: x @ p["a"] * BIAS @ p["b"], ("array",), ()),
    "stream": (lambda p, x: (x @ p["a"] + x @ p["d"]) @ p["b"], ("shared",), ()),
}


@pytest.mark.parametrize(("model", "reasons", "by"), CASES.values(), ids=CASES)
def test_each_reason_is_found(model, reasons, by):
    small = hj.compact(model, PARAMS, X)
    (obstacle,) = small.obstacles
    assert (small.kept, obstacle.reasons, obstacle.leaves, obstacle.indices) == ({}, reasons, ("a",), 1)
    assert set(by) <= set(obstacle.by)
    assert "zeros stay in 1 index (a): " in str(small)


def test_statistics_in_the_arguments():
    def model(p, x, stats):
        return normalised(x @ p["a"], stats) @ p["b"]

    (both,) = hj.compact(model, PARAMS, X, STATS).obstacles
    assert both.reasons == ("constant", "argument")
    assert both.by == ("args[1]['mean']", "args[1]['var']")
    (one,) = hj.compact(model, PARAMS, X, STATS, drop_constants=True).obstacles
    assert one.reasons == ("argument",)
    assert "in `params`" in str(one)
    inside = hj.compact(
        lambda p, x: model(p["w"], x, p["s"]), {"w": PARAMS, "s": STATS}, X, drop_constants=True
    )
    assert inside.shapes["w/a"] == ((4, 6), (4, 5))
    assert inside.obstacles == ()


def test_leaves_that_may_not_shrink():
    (obstacle,) = hj.compact(lambda p, x: x @ p["a"] @ p["b"], PARAMS, X, where="b").obstacles
    assert obstacle.reasons == ("where",)


def test_scattered_zeros_and_none():
    def model(p, x):
        return jnp.tanh(x @ p["d"] + p["c"]) @ p["b"]

    scattered = {**PARAMS, "d": SQUARE * (SQUARE > 0)}
    (obstacle,) = hj.compact(model, scattered, X).obstacles
    assert (obstacle.reasons, obstacle.leaves, obstacle.indices) == (("scattered",), ("d",), 0)
    assert "`hj.patterns.filters()`" in str(obstacle)
    assert hj.compact(model, PARAMS, X).obstacles == ()


def test_where_something_went_the_rest_is_still_explained():
    """A filter without a bias goes; one with a bias would with `drop_constants`."""
    weights = SQUARE.copy()
    weights[:, [1, 4]] = 0
    params = {**PARAMS, "d": weights, "c": BIAS * (np.arange(6) != 1)}
    small = hj.compact(lambda p, x: jnp.tanh(x @ p["d"] + p["c"]) @ p["b"], params, X)
    assert small.shapes["d"] == ((4, 6), (4, 5))
    (obstacle,) = small.obstacles
    assert (obstacle.reasons, obstacle.indices) == (("constant",), 1)
    assert jax.tree.leaves(hj.compact(lambda p, x: x @ p["a"] @ p["b"], PARAMS, X).obstacles) == []
