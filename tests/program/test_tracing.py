"""Programs read from every form that jax writes them in: the same operations, the same numbers."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax.program._products import multiply_adds
from hessjax.program._program import evaluate, execute
from hessjax.program._tracing import read

W, X = jnp.arange(9.0).reshape(3, 3) / 9 - 0.4, jnp.arange(6.0).reshape(2, 3) / 6
FLAGS = ("jax_remat3", "jax_scan3", "jax_custom_vjp3", "jax_custom_jvp3")


@contextlib.contextmanager
def flags(*names):
    """These of jax's flags for the newer forms of its primitives on."""
    absent = [name for name in names if not hasattr(jax.config, name)]
    if absent:
        pytest.skip(f"jax {jax.__version__} has no {', '.join(absent)}")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name in names:
            jax.config.update(name, True)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def with_own_jvp(w, x):
    @jax.custom_jvp
    def product(x, w):
        return jnp.sin(x @ w)

    product.defjvp(lambda primals, tangents: (product(*primals), tangents[0] @ primals[1]))
    return product(x, w)


def with_own_vjp(w, x):
    @jax.custom_vjp
    def product(x, w):
        return jnp.sin(x @ w)

    product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    return product(x, w)


def twice(step):
    return lambda w, x: jax.lax.scan(lambda h, _: (step(w, h), h.sum()), x, None, length=2)


MODELS = {
    "plain": lambda w, x: x @ w + 1,
    "nested jit": lambda w, x: jax.jit(lambda x: jax.jit(jnp.matmul)(x, w))(x),
    "remat": lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x),
    "custom_jvp": with_own_jvp,
    "custom_vjp": with_own_vjp,
    "derivative of remat": lambda w, x: jax.grad(
        lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ w).sum())(x)
    )(x),
    "derivative of custom_vjp": lambda w, x: jax.grad(lambda x: with_own_vjp(w, x).sum())(x),
    "custom_vjp in remat in scan": twice(lambda w, h: jax.checkpoint(lambda h: with_own_vjp(w, h))(h)),
    "scan, closed over": lambda w, x: jax.lax.scan(lambda c, row: (c + 1.0, row @ w), 0.0, x),
    "scan, over weights": lambda w, x: jax.lax.scan(lambda h, v: (h + x @ v, h * v[0]), jnp.zeros(2), w.T),
    "scan, carried weights": lambda w, x: jax.lax.scan(lambda v, row: (v * 0.5, row @ v), w, x),
    "scan in scan": twice(lambda w, h: jax.lax.scan(lambda h, v: (h + v, None), h @ w, w[:, None])[0]),
    "map": lambda w, x: jax.lax.map(lambda row: row @ w, x),
    "fori": lambda w, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w) + i.astype(h.dtype), x),
    "while": lambda w, x: jax.lax.while_loop(
        lambda c: (c[0] < 2) & (w[0, 0] < 9), lambda c: (c[0] + 1, c[1] @ w), (0, x)
    ),
    "cond": lambda w, x: jax.lax.cond(x.sum() > w.sum(), lambda: x @ w, lambda: x),
    "switch": lambda w, x: jax.lax.switch(1, [lambda x: x, lambda x: x @ w, jnp.sin], x),
    "constants": lambda w, x: (x + np.ones((2, 3), "f")) @ jnp.eye(3) @ w,
    "outputs that are inputs and numbers": lambda w, x: (w, 1.0, x @ w, x),
}  # fmt: skip


def check(model):
    """The program gives what the function gives, without calls in it, and nothing that has no use."""
    program = read(model, W, X)
    want, got = jax.tree.leaves(model(W, X)), evaluate(program.body, [W, X], execute)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    left = {operation.name for body in bodies(program.body) for operation in body.operations}
    assert not left & {"jit", "pjit", "remat2", "custom_jvp_call", "custom_vjp_call", "call_hi_primitive"}
    return program


def bodies(body):
    inner = [deep for operation in body.operations for each in operation.bodies for deep in bodies(each)]
    return [body, *inner]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_program_computes_what_the_function_does(model):
    check(model)


@pytest.mark.parametrize("flag", FLAGS)
def test_the_newer_forms_of_jax_read_the_same(flag):
    plain = [multiply_adds(read(model, W, X)) for model in MODELS.values()]
    with flags(flag):
        assert [multiply_adds(read(model, W, X)) for model in MODELS.values()] == plain


def test_the_newer_forms_of_jax_compute_the_same():
    with flags(*(name for name in FLAGS if hasattr(jax.config, name))):
        for name in ("custom_vjp in remat in scan", "scan, closed over", "scan in scan", "fori"):
            check(MODELS[name])


def test_compact_reads_through_the_newer_forms():
    """Two of six hidden units go, through remat and a custom derivative; a scan's weights stay whole."""
    params = {"in": jnp.ones((3, 6)).at[:, 1].set(0), "out": jnp.ones((6, 3)).at[4].set(0), "step": W}

    def model(p, x):
        h = jax.checkpoint(lambda x: jnp.tanh(with_own_vjp(p["in"], x)))(x) @ p["out"]
        return jax.lax.scan(lambda h, _: (h @ p["step"], None), h, None, length=2)[0]

    plain = hj.compact(model, params, X)
    with flags(*(name for name in FLAGS if hasattr(jax.config, name))):
        newer = hj.compact(model, params, X)
    for small in (plain, newer):
        assert {path: list(axes) for path, axes in small.kept.items()} == {"in": [1], "out": [0]}
        np.testing.assert_array_equal(small.kept["in"][1], [0, 2, 3, 5])
        assert small.difference < 1e-6
        assert (small.after, small.notes) == (plain.after, ())
    assert plain.after.multiply_adds == 2 * (3 * 4 + 4 * 3) + 2 * 2 * 9


def test_loops_carry_what_they_carry():
    """Consts, state, what is scanned over: told apart by shapes, whatever a version of jax names them."""

    def model(w, x):
        return jax.lax.scan(lambda c, row: ((c[0] @ w, c[1] + row), row @ w), (x, jnp.zeros(3)), x)

    (scan,) = (o for o in read(model, W, X).body.operations if o.name == "scan")
    assert [v.shape for v in scan.inputs] == [(3, 3), (2, 3), (3,), (2, 3)]
    assert (scan.carried, scan.trips) == (range(1, 3), 2)
    assert [source is None for source in scan.bodies[0].sources] == [False, True, True, False]
    assert [v.shape for v in scan.bodies[0].outputs] == [(2, 3), (3,), (3,)]


def test_dead_code_is_not_read():
    program = read(lambda p, x: (x @ p["used"], x @ p["unused"])[0], {"unused": W, "used": W}, X)
    assert program.used == [False, True]
    assert [o.name for o in program.body.operations] == ["dot_general"]


def test_reading_runs_and_compiles_nothing(compilations):
    def explode(x):
        raise AssertionError("executed")

    def model(w, x):
        y = jax.pure_callback(explode, jax.ShapeDtypeStruct((2, 3), jnp.float32), x)
        jax.debug.callback(explode, y)
        return jax.lax.map(lambda row: row @ w, y)

    shapes = (jax.ShapeDtypeStruct((3, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32))
    before = len(compilations)
    work = multiply_adds(read(model, *shapes))
    assert len(compilations) == before
    assert work.total == 18
    assert work.notes == ("what `pure_callback` does inside is not counted",)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this jax has no mutable arrays")
def test_mutable_arrays_are_read_whole_or_named():
    def whole(w, x):
        state = jax.new_ref(x)
        state[...] = state[...] @ w
        return state[...] + 1

    def part(w, x):
        state = jax.new_ref(x)
        state[0] = w[0]
        return state[...]

    assert [o.name for o in check(whole).body.operations] == ["dot_general", "add"]
    with pytest.raises(NotImplementedError, match=r"mutable arrays whole, .* got `swap` on Ref"):
        read(part, W, X)


def test_a_model_without_outputs_is_named():
    with pytest.raises(TypeError, match="`model_fn` must return arrays, got none"):
        hj.compact(lambda p, x: None, {"w": jnp.ones((2, 2))}, jnp.ones(2))
