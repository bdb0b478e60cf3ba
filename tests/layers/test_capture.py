"""Inputs and output gradients: they make up every example's gradient, whatever a leaf takes part in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from tests.layers.cases import CASES
from tests.oracles import close


@pytest.mark.parametrize("name", CASES)
def test_gradients_put_together_are_those_of_every_example(x64, name):
    case = CASES[name]
    params, batch = case.params(), case.batch()
    found = hj.layers.capture(case.loss_fn, params, batch)
    close(found.grads(), hj.per_example_grads(case.loss_fn, params, batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dense", "convolution", "scan"])
def test_in_float32(name):
    case = CASES[name]
    params, batch = case.params(), case.batch()
    found = hj.layers.capture(case.loss_fn, params, batch)
    close(found.grads(), hj.per_example_grads(case.loss_fn, params, batch), rtol=1e-6, atol=1e-6)


def test_weights_count_as_in_per_example_grads(x64):
    case = CASES["dense"]
    params, batch = case.params(), case.batch(4)
    weights = lambda batch: jnp.array([2.0, 0.0, 1.0, 0.5])
    found = hj.layers.capture(case.loss_fn, params, batch, weights=weights)
    close(found.grads(), hj.per_example_grads(case.loss_fn, params, batch, weights=weights), rtol=1e-10)


def test_bfloat16_is_captured_in_float32():
    case = CASES["dense"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params())
    x, labels = case.batch()
    found = hj.layers.capture(case.loss_fn, params, (x.astype(jnp.bfloat16), labels))
    assert {use.gradients.dtype for uses in found.uses for use in uses} == {jnp.dtype("float32")}


def test_leaves_that_are_not_covered_have_no_gradients():
    def loss_fn(params, x):
        return jnp.mean((x @ params["w"] / params["t"]) ** 2)

    params = {"t": jnp.ones(()), "w": jnp.ones((2, 3))}
    found = hj.layers.capture(loss_fn, params, jnp.ones((4, 2)))
    assert found.grads()["t"] is None
    assert found.grads()["w"].shape == (4, 2, 3)
    assert "Not covered: t." in str(found)


def test_a_part_of_the_params_the_rest_held_fixed(x64):
    case = CASES["dense"]
    params, batch = case.params(), case.batch()
    part = hj.select(params, "w")
    found = hj.layers.capture(part.restrict(case.loss_fn), part.part, batch).grads()
    np.testing.assert_allclose(found["w"], hj.per_example_grads(case.loss_fn, params, batch)["w"], rtol=1e-10)


def test_other_params_compile_nothing_anew(compilations):
    case = CASES["dense"]
    batch = case.batch()
    jax.block_until_ready(hj.layers.capture(case.loss_fn, case.params(), batch).uses)
    others = case.params(1)
    before = len(compilations)
    jax.block_until_ready(hj.layers.capture(case.loss_fn, others, batch).uses)
    assert len(compilations) == before


def test_rows_that_an_embedding_does_not_have(untyped):
    case = CASES["tied embedding"]
    x, labels = case.batch()
    with pytest.raises(ValueError, match="but e are asked for others"):
        hj.layers.capture(case.loss_fn, case.params(), (x.at[0, 0].set(5), labels))


def test_a_loss_that_is_no_scalar(untyped):
    with pytest.raises(TypeError, match="`loss_fn` must return one real number"):
        hj.layers.capture(lambda w, x: x @ w, jnp.ones(2), jnp.ones((3, 2)))
