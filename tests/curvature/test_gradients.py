import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree

import hessjax as hj


def dense_grads(loss, params, batch, *args):
    """One gradient after the other, each of a batch of one."""
    count = jax.tree.leaves(batch)[0].shape[0]
    cut = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(count)]
    return np.stack([ravel_pytree(jax.grad(loss)(params, one, *args))[0] for one in cut])


@pytest.mark.smoke
@pytest.mark.parametrize("microbatch", [None, 1, 3, 7, 50])
def test_rows_are_the_gradients_of_single_examples(x64, microbatch):
    params, batch = oracles.leaves(), oracles.batch()
    grads = hj.per_example_grads(oracles.loss_fn, params, batch, microbatch=microbatch)
    want = dense_grads(oracles.loss_fn, params, batch)
    np.testing.assert_allclose(oracles.rows(grads), want, rtol=1e-11, atol=1e-13)
    whole = jax.grad(oracles.loss_fn)(params, batch)
    oracles.close(jax.tree.map(lambda x: jnp.mean(x, axis=0), grads), whole, rtol=1e-11, atol=1e-13)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "options", [{}, {"linearize": True}, {"microbatch": 3}, {"microbatch": 7}, {"microbatch": 9}], ids=str
)
def test_the_empirical_fisher_is_their_uncentred_covariance(x64, options):
    params, batch = oracles.leaves(), oracles.batch()
    got = oracles.matrix_of(hj.empirical_fisher(oracles.loss_fn, params, batch, **options), params)
    grads = dense_grads(oracles.loss_fn, params, batch)
    np.testing.assert_allclose(got, grads.T @ grads / 7, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_every_container(x64, container):
    params, batch = oracles.CONTAINERS[container](oracles.leaves()), oracles.batch()
    grads = hj.per_example_grads(oracles.loss_fn, params, batch, microbatch=4)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    want = dense_grads(oracles.loss_fn, params, batch)
    np.testing.assert_allclose(oracles.rows(grads), want, rtol=1e-11, atol=1e-13)
    product = hj.empirical_fisher(oracles.loss_fn, params, batch, microbatch=4)(params)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    want = want.T @ (want @ ravel_pytree(params)[0]) / 7
    np.testing.assert_allclose(ravel_pytree(product)[0], want, rtol=1e-10, atol=1e-12)


def test_only_the_first_argument_is_cut_and_models_see_batches_of_one(x64):
    """An axis of the state as long as the batch is left alone, and so is what has no axes."""
    seen = []

    def loss(params, batch, state, key):
        x, y = batch["x"], batch["y"]
        seen.append((x.shape, y.shape, batch["deep"]["key"].shape, state.shape))
        noise = jax.random.normal(key, (3,)) + batch["temperature"]
        return oracles.loss_fn(params, (x, y + noise[None] + state.sum()))

    x, y = oracles.batch(5)
    batch = {"x": x, "y": np.asarray(y), "temperature": 0.5, "deep": {"key": jax.random.key(1)}}
    params, state, key = oracles.leaves(), jnp.arange(5.0), jax.random.key(0)
    noise = jax.random.normal(key, (3,)) + 0.5 + 10.0
    want = dense_grads(oracles.loss_fn, params, (x, y + noise[None]))
    for microbatch in (None, 2):
        grads = hj.per_example_grads(loss, params, batch, state, key, microbatch=microbatch)
        np.testing.assert_allclose(oracles.rows(grads), want, rtol=1e-11, atol=1e-13)
        product = hj.empirical_fisher(loss, params, batch, state, key, microbatch=microbatch)(params)
        want_product = want.T @ (want @ ravel_pytree(params)[0]) / 5
        np.testing.assert_allclose(ravel_pytree(product)[0], want_product, rtol=1e-10, atol=1e-12)
    assert set(seen) == {((1, 2), (1, 3), (), (5,))}


@pytest.mark.parametrize("microbatch", [None, 3])
def test_jit_equals_eager_and_float32_is_near_float64(x64, microbatch):
    point = oracles.leaves(), oracles.batch(), oracles.leaves(3)

    def both(params, batch, vector):
        options = {"microbatch": microbatch}
        return (
            hj.per_example_grads(oracles.loss_fn, params, batch, **options),
            hj.empirical_fisher(oracles.loss_fn, params, batch, **options)(vector),
        )

    eager = both(*point)
    oracles.close(jax.jit(both)(*point), eager, rtol=1e-12, atol=1e-13)
    single = both(*jax.tree.map(lambda x: x.astype(jnp.float32), point))
    oracles.close(single, eager, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("microbatch", [None, 3])
def test_mixed_dtypes_come_back_as_they_went_in(microbatch):
    params = oracles.leaves()
    params["d_kernel"] = params["d_kernel"].astype(jnp.bfloat16)
    grads = hj.per_example_grads(oracles.loss_fn, params, oracles.batch(), microbatch=microbatch)
    product = hj.empirical_fisher(oracles.loss_fn, params, oracles.batch(), microbatch=microbatch)(
        oracles.leaves(1)
    )
    dtypes = jax.tree.map(lambda x: x.dtype, params)
    assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, product) == dtypes
    want = hj.empirical_fisher(oracles.loss_fn, oracles.leaves(), oracles.batch())(oracles.leaves(1))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), product)
    oracles.close(wide, want, rtol=0.1, atol=0.2)


@pytest.mark.smoke
@pytest.mark.parametrize("microbatch", [None, 3])
def test_new_params_and_batches_compile_nothing(compilations, microbatch):
    apply = jax.jit(lambda matvec, vector: matvec(vector))
    vector, batches = oracles.leaves(5), [oracles.batch(seed=i) for i in range(2)]
    points = [oracles.leaves(i) for i in range(2)]
    for params, batch in zip(points, batches, strict=True):
        del compilations[:]
        grads = hj.per_example_grads(oracles.loss_fn, params, batch, microbatch=microbatch)
        matvec = hj.empirical_fisher(oracles.loss_fn, params, batch, microbatch=microbatch)
        jax.block_until_ready((grads, matvec(vector), apply(matvec, vector)))
    assert not compilations


def test_all_whole_microbatches_share_their_code(compilations):
    params, batch = oracles.leaves(), oracles.batch(24)
    del compilations[:]
    hj.per_example_grads(oracles.loss_fn, params, batch, microbatch=2)
    assert len(compilations) <= 2  # the empty block, and one for all twelve


def test_over_ragged_batches_and_on_a_part(x64):
    params, (x, y) = oracles.leaves(), oracles.batch(9)
    part = hj.select(params, "d_*")
    loss = part.restrict(oracles.loss_fn)
    grads = hj.per_example_grads(loss, part.part, (x, y))
    want = dense_grads(oracles.loss_fn, params, (x, y))[:, 4:]
    np.testing.assert_allclose(oracles.rows(grads), want, rtol=1e-11, atol=1e-13)
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    matvec = hj.over_batches(lambda b: hj.empirical_fisher(loss, part.part, b, microbatch=3), batches)
    np.testing.assert_allclose(
        oracles.matrix_of(matvec, part.part), want.T @ want / 9, rtol=1e-10, atol=1e-12
    )


def test_data_that_cannot_be_cut():
    params, (x, y) = oracles.leaves(), oracles.batch()
    for function in (hj.per_example_grads, hj.empirical_fisher):
        with pytest.raises(ValueError, match=r"x: 7, y: 6\. What all examples share goes into the arguments"):
            function(oracles.loss_fn, params, {"x": x, "y": y[:6]})
        with pytest.raises(ValueError, match="`args` must begin with the batch"):
            function(oracles.loss_fn, params)
        with pytest.raises(ValueError, match="at least one example, got 0"):
            function(oracles.loss_fn, params, (x[:0], y[:0]))
        with pytest.raises(ValueError, match="`microbatch` must be at least 1, got 0"):
            function(oracles.loss_fn, params, (x, y), microbatch=0)
        with pytest.raises(TypeError, match="`params` must have real floating-point leaves"):
            function(oracles.loss_fn, {"w": jnp.ones(2, int)}, (x, y))
    with pytest.raises(ValueError, match="`microbatch` must be None with `linearize=True`.*got 3"):
        hj.empirical_fisher(oracles.loss_fn, params, (x, y), microbatch=3, linearize=True)
    with pytest.raises(TypeError, match=r"`loss_fn` must return one real number.*got float32\[1\]"):
        hj.per_example_grads(lambda w, x: w * x, jnp.float32(1), jnp.ones(4))
    with pytest.raises(TypeError, match=r"`loss_fn` must return one real number.*got float32\[1\]"):
        hj.empirical_fisher(lambda w, x: w * x, jnp.float32(1), jnp.ones(4))(jnp.float32(1))
    for microbatch in (None, 3):
        matvec = hj.empirical_fisher(oracles.loss_fn, params, (x, y), microbatch=microbatch)
        with pytest.raises(ValueError, match="`vector` must have the structure of `params`"):
            matvec({"w": jnp.ones(2)})


def test_labels_beside_the_batch_are_warned_of():
    """Every example would meet all labels: never what is meant."""
    x, y = jnp.ones((4, 2)), jnp.ones(4)
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    with pytest.warns(UserWarning, match=r"labels, put both into one batch, `\(x, y\)`"):
        hj.per_example_grads(loss, jnp.ones(2), x, y)
    hj.per_example_grads(loss, jnp.ones(2), x, jnp.ones(1))
    hj.per_example_grads(loss, jnp.ones(2), x[:1], y[:1])
