"""Products some examples at a time are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

KEY = jax.random.key(0)
W = {"in": jax.random.normal(KEY, (3, 4)), "out": jax.random.normal(KEY, (4, 2))}
X = jax.random.normal(jax.random.key(1), (10, 3))
BATCH = {"x": X, "mask": jnp.array([1.0, 1, 0, 1, 1, 0, 1, 1, 0, 0]), "temperature": jnp.array(2.0)}


def model(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]) @ params["out"] / batch["temperature"]


def out_loss(outputs, batch):
    return jnp.mean(jax.nn.logsumexp(outputs, axis=1) ** 2)


def loss(params, batch):
    return out_loss(model(params, batch), batch)


def masked_loss(params, batch):
    each = jax.nn.logsumexp(model(params, batch), axis=1) ** 2
    return jnp.sum(batch["mask"] * each) / jnp.sum(batch["mask"])


def masked(batch):
    return batch["mask"]


MATVECS = {
    "hessian": lambda **options: hj.hessian(loss, W, BATCH, **options),
    "ggn": lambda **options: hj.ggn(model, out_loss, W, BATCH, **options),
    "fisher": lambda **options: hj.fisher(model, W, BATCH, likelihood=hj.likelihoods.categorical, **options),
}


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("microbatch", [3, 4, 99])  # five parts of 2; 4, 4 and 2; one
@pytest.mark.parametrize("name", MATVECS)
def test_same_product_as_at_once(name, microbatch):
    assert_same(MATVECS[name](microbatch=microbatch)(W), MATVECS[name]()(W))


@pytest.mark.parametrize("microbatch", [3, 4])
def test_inside_jit(microbatch):
    product = jax.jit(lambda w: hj.hessian(loss, w, BATCH, microbatch=microbatch)(w))(W)
    assert_same(product, MATVECS["hessian"]()(W))
    trace = hj.trace(MATVECS["hessian"](microbatch=microbatch), KEY, W, 3, on_device=True)
    assert_same(trace.mean, hj.trace(MATVECS["hessian"](), KEY, W, 3).mean)


@pytest.mark.parametrize("microbatch", [1, 4])  # one example of padding alone is 0/0
def test_weights_make_a_mean_of_means_exact(microbatch):
    whole = hj.hessian(masked_loss, W, BATCH)
    assert_same(hj.hessian(masked_loss, W, BATCH, microbatch=microbatch, weights=masked)(W), whole(W))


def test_less_memory():
    shapes = jax.eval_shape(lambda: W)
    batch = {"x": jax.ShapeDtypeStruct((4096, 3), jnp.float32), "temperature": BATCH["temperature"]}
    whole, parts = (
        hj.memory_estimate(hj.hessian(loss, shapes, batch, microbatch=size), shapes) for size in (None, 64)
    )
    assert parts.total < 0.5 * whole.total


def test_a_rematerialised_loss_takes_less_and_is_the_same():
    def deep(params, x, layer):
        for _ in range(12):
            x = layer(x, params)
        return jnp.mean(x**2)

    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    w = jax.random.normal(KEY, (16, 16)) / 4
    plain, lean = (lambda w, x, f=f: deep(w, x, f) for f in (layer, jax.checkpoint(layer)))
    x = jax.random.normal(KEY, (512, 16))
    assert_same(hj.hessian(lean, w, x)(w), hj.hessian(plain, w, x)(w))
    need = [hj.memory_estimate(jax.grad(f), w, x).total for f in (lean, plain)]
    assert need[0] <= need[1]  # of so small a layer some compilers keep as little


def test_bad_calls():
    with pytest.raises(ValueError, match="`weights` must be None without `microbatch`"):
        hj.hessian(masked_loss, W, BATCH, weights=masked)
    with pytest.raises(ValueError, match="`microbatch` must be None with `linearize=True`"):
        hj.ggn(model, out_loss, W, BATCH, microbatch=2, linearize=True)
    with pytest.raises(ValueError, match="`microbatch` must be None with a `key`, got 2"):
        MATVECS["fisher"](microbatch=2, key=KEY)
    with pytest.raises(ValueError, match="`args` must begin with the batch"):
        hj.hessian(size_of, W, microbatch=2)
    with pytest.raises(ValueError, match="`vector` must have the structure of `params`"):
        MATVECS["hessian"](microbatch=3)({"in": W["in"]})


def size_of(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
