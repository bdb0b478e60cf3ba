"""The compact model as a function: other batches, derivatives, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

# A bias is added as people add it, without the axes of the batch.
pytestmark = pytest.mark.promotes

RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.normal(size=(4, 6)), "b": RNG.normal(size=(6, 3)), "c": np.zeros(6)}
PARAMS = {name: x.astype("f") for name, x in PARAMS.items()}
PARAMS["a"][:, 2] = 0
X = RNG.normal(size=(5, 4)).astype("f")


def model(p, x):
    return jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"]


@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (2, 3, 4), (4,)])
def test_arguments_of_any_shape(shape):
    small, x = hj.compact(model, PARAMS, X), RNG.normal(size=shape).astype("f")
    for fn in (small.model_fn, jax.jit(small.model_fn)):
        np.testing.assert_allclose(fn(small.params, x), model(PARAMS, x), rtol=1e-5, atol=1e-6)


def test_it_is_traced_once_for_each_shape():
    traces = []

    def counting(p, x):
        traces.append(x.shape)
        return model(p, x)

    small = hj.compact(counting, PARAMS, X)
    traces.clear()
    for x in (X, X[:2], X[2:4], X):
        small.model_fn(small.params, x)
    assert traces == [(5, 4), (2, 4)]  # `compact` itself asked for exact products


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_products_are_as_exact_as_is_asked_for(precision):
    """On a GPU the default rounds to ten bits: what compares asks for more, what is deployed need not."""
    small = hj.compact(model, PARAMS, X)
    with jax.default_matmul_precision(precision):
        small_program, program = (
            jax.make_jaxpr(small.model_fn)(small.params, X),
            jax.make_jaxpr(model)(PARAMS, X),
        )
    asked = lambda jaxpr: [e.params["precision"] for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert asked(small_program) == asked(program.jaxpr)


def test_gradients_are_the_models_own_at_zero_too():
    """Units of zeros lie exactly where a ReLU has no derivative: jax's own rule says 0, max(x, 0) a half."""
    small = hj.compact(model, PARAMS, X)
    assert small.shapes["c"] == ((6,), (5,))
    want = jax.grad(lambda p: model(p, 0 * X).sum())(small.params)
    got = jax.grad(lambda p: small.model_fn(p, 0 * X).sum())(small.params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), got, want)
    want = small.shrink(jax.grad(lambda p: (model(p, X) ** 2).sum())(PARAMS))
    got = jax.grad(lambda p: (small.model_fn(p, X) ** 2).sum())(small.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_rules_that_are_no_part_of_the_program_are_not_dropped_in_silence():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))
    small = hj.compact(lambda p, x: rounded(x @ p["a"]) @ p["b"], PARAMS, X)
    assert small.model_fn(small.params, X).shape == (5, 3)
    with pytest.raises(NotImplementedError, match=r"computes rounded without the derivative"):
        jax.grad(lambda p: small.model_fn(p, X).sum())(small.params)


def test_a_shape_that_needs_what_went():
    """With many rows a product over the batch, with one a sum of what it has: other indices are read."""

    def by_rows(p, x):
        return x @ p["a"] @ (p["b"] if len(x) > 1 else p["b"] + 1)

    params = {**PARAMS, "a": PARAMS["a"] + 1, "b": PARAMS["b"].copy()}
    params["b"][1] = 0
    small = hj.compact(by_rows, params, X)
    assert small.shapes["a"] == ((4, 6), (4, 5))
    with pytest.raises(ValueError, match=r"`args` must leave the params as they were cut, .*\(1, 4\)"):
        small.model_fn(small.params, X[:1])


def test_each_output_is_held_to_its_own_size(monkeypatch):
    """A small output beside a large one, and a whole number, are not hidden by it."""
    from hessjax.program._readings import READINGS

    def misread(constraints, operation, inputs):
        return [inputs[0]._replace(nonzero=np.zeros_like(inputs[0].nonzero))]

    monkeypatch.setitem(READINGS, "tanh", misread)
    with pytest.raises(RuntimeError, match=r"they differ in the output small by"):
        hj.compact(lambda p, x: {"large": 1e6 * x, "small": 1e-3 * jnp.tanh(x @ p["a"]) @ p["b"]}, PARAMS, X)
    with pytest.raises(RuntimeError, match=r"they differ at \d+% of the entries"):
        hj.compact(lambda p, x: jnp.argmax(jnp.tanh(x @ p["a"]) @ p["b"] - x[:, :3], -1), PARAMS, X)


def test_a_network_that_amplifies_rounding_is_not_refused():
    weights = {"w": np.random.default_rng(1).normal(size=(8, 64, 64)).astype("f")}
    weights["w"][:, :, 3] = 0

    def chaotic(p, x):
        return jax.lax.scan(lambda h, w: (jnp.sin(9 * h @ w), None), x, p["w"])[0][:, :8]

    x = np.random.default_rng(2).normal(size=(4, 64)).astype("f")
    params = {**weights, "first": np.eye(64, dtype="f"), "last": np.eye(64, dtype="f")[:, :8]}
    small = hj.compact(lambda p, x: chaotic(p, x @ p["first"]) @ p["last"][:8], params, x)
    assert small.difference < 0.1
