import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.tree_util import Partial

import hessjax as hj

MODES = ["forward-over-reverse", "reverse-over-reverse", "reverse-over-forward"]
WAYS = [(mode, linearize) for mode in MODES for linearize in (False, True)][:-1]


@pytest.mark.smoke
@pytest.mark.parametrize(("mode", "linearize"), WAYS)
def test_every_mode_is_the_dense_hessian(x64, mode, linearize):
    params, batch = oracles.leaves(), oracles.batch()
    matvec = hj.hessian(oracles.loss_fn, params, batch, mode=mode, linearize=linearize)
    want = oracles.dense_hessian(oracles.loss_fn, params, batch)
    np.testing.assert_allclose(oracles.matrix_of(matvec, params), want, rtol=1e-10, atol=1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("linearize", [False, True])
@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_every_container(x64, container, linearize):
    params, batch = oracles.CONTAINERS[container](oracles.leaves()), oracles.batch()
    matvec = hj.hessian(oracles.loss_fn, params, batch, linearize=linearize)
    vector = jax.tree.map(lambda leaf: leaf + 1, params)
    product = matvec(vector)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    want = oracles.dense_hessian(oracles.loss_fn, params, batch) @ jax.flatten_util.ravel_pytree(vector)[0]
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(product)[0], want, rtol=1e-10, atol=1e-12)


def test_identities(x64):
    params, batch = oracles.leaves(), oracles.batch()
    matvec = hj.hessian(oracles.loss_fn, params, batch)
    u, v = oracles.leaves(1), oracles.leaves(2)
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    np.testing.assert_allclose(dot(u, matvec(v)), dot(matvec(u), v), rtol=1e-12)
    both = matvec(jax.tree.map(lambda x, y: 2 * x - y, u, v))
    apart = jax.tree.map(lambda x, y: 2 * x - y, matvec(u), matvec(v))
    oracles.close(both, apart, rtol=1e-11, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, hj.hvp(oracles.loss_fn, params, v, batch), matvec(v))


@pytest.mark.parametrize("linearize", [False, True])
def test_jit_equals_eager_and_float32_is_near_float64(x64, linearize):
    params, batch, vector = oracles.leaves(), oracles.batch(), oracles.leaves(3)
    matvec = hj.hessian(oracles.loss_fn, params, batch, linearize=linearize)
    eager = matvec(vector)
    jitted = jax.jit(lambda matvec, vector: matvec(vector))(matvec, vector)
    made_inside = jax.jit(lambda p, b, v: hj.hessian(oracles.loss_fn, p, b, linearize=linearize)(v))(
        params, batch, vector
    )
    for other in (jitted, made_inside):
        oracles.close(eager, other, rtol=1e-12, atol=1e-13)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (params, batch, vector))
    short = hj.hessian(oracles.loss_fn, *single[:2], linearize=linearize)(single[2])
    oracles.close(short, eager, rtol=2e-5, atol=1e-5)


def test_mixed_dtypes_come_back_as_they_went_in():
    params = oracles.leaves()
    params["d_kernel"] = params["d_kernel"].astype(jnp.bfloat16)
    product = hj.hessian(oracles.loss_fn, params, oracles.batch())(oracles.leaves(1))
    assert jax.tree.map(lambda x: x.dtype, product) == jax.tree.map(lambda x: x.dtype, params)
    want = hj.hessian(oracles.loss_fn, oracles.leaves(), oracles.batch())(oracles.leaves(1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.3), product, want)


@pytest.mark.smoke
@pytest.mark.parametrize("linearize", [False, True])
def test_new_params_and_batches_compile_nothing(compilations, linearize):
    apply = jax.jit(lambda matvec, vector: matvec(vector))
    vector, batches = oracles.leaves(5), [oracles.batch(seed=i) for i in range(3)]
    points = [oracles.leaves(i) for i in range(3)]
    for i, (params, batch) in enumerate(zip(points, batches, strict=True)):
        matvec = hj.hessian(oracles.loss_fn, params, batch, linearize=linearize)
        jax.block_until_ready((matvec(vector), apply(matvec, vector)))
        if i == 0:
            del compilations[:]
    assert not compilations


def test_a_loss_that_carries_arrays_is_a_pytree(compilations):
    def scaled(factor, params, batch):
        return factor * oracles.loss_fn(params, batch)

    vector, batch, factor = oracles.leaves(1), oracles.batch(), jnp.float32(5)
    one, three = (
        hj.hessian(Partial(scaled, jnp.float32(f)), oracles.leaves(), oracles.batch())(vector) for f in (1, 3)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(3 * x, y, rtol=1e-5), one, three)
    del compilations[:]
    hj.hessian(Partial(scaled, factor), oracles.leaves(), batch)(vector)
    assert not compilations


@jax.custom_vjp
def square(x):
    return x**2


square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))


def test_custom_vjp_is_refused_with_the_way_out():
    loss = lambda w: jnp.sum(square(w) ** 2)
    w = jnp.array([1.0, 2.0])
    for mode in ("forward-over-reverse", "reverse-over-forward"):
        with pytest.raises(TypeError, match="use `hessian.*mode='reverse-over-reverse'"):
            hj.hessian(loss, w, mode=mode)(w)
    np.testing.assert_allclose(hj.hessian(loss, w, mode="reverse-over-reverse")(w), 12 * w**3)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda w: w**2, r"float32\[2\]"),
        (lambda w: (jnp.sum(w), {}), "a tuple"),
        (lambda w: jnp.sum(w).astype(int), r"int32\[\]"),
        (lambda w: 1.0, "a float"),
    ],
)
@pytest.mark.parametrize("linearize", [False, True])
def test_a_loss_that_is_not_one_real_number(loss, got, linearize):
    w = jnp.ones(2)
    with pytest.raises(TypeError, match="`loss_fn` must return one real number.*got " + got):
        hj.hessian(loss, w, linearize=linearize)(w)


def test_params_that_are_not_real_floats():
    params = {"w": jnp.ones(2), "steps": jnp.zeros((), int), "phase": jnp.ones(3, complex)}
    with pytest.raises(TypeError, match=r"(?s)phase: complex64\[3\].*steps: int32\[\]"):
        hj.hessian(lambda p: jnp.sum(p["w"]), params)
    with pytest.raises(TypeError, match="name: a str"):
        hj.hessian(lambda p: 0.0, {"name": "x", "w": jnp.ones(2)})
    with pytest.raises(ValueError, match="at least one number"):
        hj.hessian(lambda p: 0.0, {})


@pytest.mark.parametrize("linearize", [False, True])
def test_a_vector_of_another_structure_lists_every_leaf(linearize):
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 3)), "d": jnp.ones(())}}
    matvec = hj.hessian(lambda p: jnp.sum(p["a"]) ** 2, params, linearize=linearize)
    message = r"(?s)b/d: missing.*x: not in `params`.*b/c: shape \(3, 2\), must be \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        matvec({"a": jnp.ones(2), "b": {"c": jnp.ones((3, 2))}, "x": jnp.ones(1)})
    with pytest.raises(ValueError, match="the containers do not"):
        hj.hessian(lambda p: p[0] * p[1], (1.0, 2.0), linearize=linearize)([1.0, 2.0])


@pytest.mark.usefixtures("untyped")
def test_unknown_mode_and_a_mode_that_cannot_be_linearized():
    w = jnp.ones(2)
    with pytest.raises(ValueError, match="`mode` must be one of .*got 'fwd'"):
        hj.hessian(jnp.sum, w, mode="fwd")
    with pytest.raises(ValueError, match="with `linearize=True`, got 'reverse-over-forward'"):
        hj.hessian(jnp.sum, w, mode="reverse-over-forward", linearize=True)


@pytest.mark.parametrize("linearize", [False, True])
def test_products_ask_for_full_precision_unless_told_otherwise(linearize):
    params, batch = oracles.leaves(), oracles.batch()

    def program(precision):
        run = lambda p, v: hj.hessian(oracles.loss_fn, p, batch, precision=precision, linearize=linearize)(v)
        return jax.jit(run).lower(params, params).as_text()

    assert "HIGHEST" in program("highest")
    assert "HIGHEST" not in program(None)
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in program(None)
