import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj
from hessjax._core import _memory

LIKE = {"w": jax.ShapeDtypeStruct((256, 64), jnp.float32), "b": jax.ShapeDtypeStruct((64,), jnp.float32)}
X = jax.ShapeDtypeStruct((32, 256), jnp.float32)
SIZE = 4 * (256 * 64 + 64)


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)


def own(function, *args):
    """What the compiled program says of itself."""
    sizes = jax.jit(function).lower(*args).compile().memory_analysis()
    return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


def test_a_product_is_what_its_program_says():
    A = hj.hessian(loss_fn, LIKE, X)
    found = hj.memory_estimate(A, LIKE)
    # The params are an argument twice, of the matvec and as the vector's shapes: the same array.
    assert found.total + SIZE == pytest.approx(own(lambda A, v: A(v), A, LIKE), rel=0.01)
    assert found.limit is None
    assert found.fits is None


def test_functions_take_arrays_and_settings():
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype), LIKE)
    found = hj.memory_estimate(hj.inverse_fisher, grads, damping=hj.relative(0.1), block_size=16)
    call = lambda grads: hj.inverse_fisher(grads, damping=hj.relative(0.1), block_size=16)
    assert found.total == pytest.approx(own(call, grads), rel=0.01)
    assert hj.memory_estimate(loss_fn, LIKE, X).rows[0].bytes == SIZE + 4 * 32 * 256


def test_arrays_and_their_shapes_need_the_same():
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), LIKE)
    x = np.zeros(X.shape, np.float32)
    one = hj.memory_estimate(hj.estimators.hutchinson(), hj.hessian(loss_fn, params, x), params)
    two = hj.memory_estimate(hj.estimators.hutchinson(), hj.hessian(loss_fn, LIKE, X), LIKE)
    assert one == two


def test_a_run_on_the_device_has_its_state_once():
    A = hj.hessian(loss_fn, LIKE, X)
    estimator = hj.estimators.slq(1, 30)
    on_host, on_device = (hj.memory_estimate(estimator, A, LIKE, on_device=flag) for flag in (False, True))
    assert on_device.total < 1.2 * on_host.total
    assert [row.name for row in on_device.rows if row.is_peak] == [
        "beginning",
        "the whole run",
        "reading the result",
    ]


def test_a_step_of_pruning():
    tx = hj.prune(optax.adam(1e-3), hj.saliencies.magnitude(), 0.5)
    found = hj.memory_estimate(tx, LIKE)
    state = jax.eval_shape(tx.init, LIKE)
    assert found.rows[1].bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert found.total > 2 * SIZE + found.rows[1].bytes


def test_what_does_not_fit_is_said_with_a_way_out(monkeypatch):
    A = hj.hessian(loss_fn, LIKE, X)
    monkeypatch.setattr(_memory, "memory_stats", lambda device: {"bytes_limit": 20 * SIZE, "bytes_in_use": 0})
    with pytest.warns(
        hj.MemoryLimitWarning, match="1.(35|42) MB of each.*has 1.32 MB. Less take: `reorthogonalise"
    ):
        found = hj.memory_estimate(hj.estimators.slq(1, 15), A, LIKE)
    assert found.fits is False
    assert "there is" in str(found)
    assert "Less: `reorthogonalise=False`" in str(found).replace("\n", " ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hj.memory_estimate(hj.estimators.slq(1, 15, reorthogonalise=False), A, LIKE).fits


def test_a_run_whose_state_does_not_fit_warns_first(monkeypatch):
    params = jnp.ones(100)
    A = jax.tree_util.Partial(jnp.multiply, params)
    monkeypatch.setattr(_memory, "memory_stats", lambda device: {"bytes_limit": 4000, "bytes_in_use": 1000})
    with pytest.warns(hj.MemoryLimitWarning, match="state of `slq` needs 4.94 kB .* has 3.00 kB. Less"):
        hj.spectral_density(A, jax.random.key(0), params, num_matvecs=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hj.spectral_density(A, jax.random.key(0), params, num_matvecs=10, reorthogonalise=False)
        jax.jit(lambda x: hj.trace(A, jax.random.key(0), x, 2, on_device=True).mean)(params)


def test_bad_calls():
    A = hj.over_batches(lambda batch: hj.hessian(loss_fn, LIKE, batch), [X])
    with pytest.raises(TypeError, match="must be that of one batch"):
        hj.memory_estimate(hj.estimators.hutchinson(), A, LIKE)
    with pytest.raises(TypeError, match="`matvec` and `like` behind an estimator, got 1"):
        hj.memory_estimate(hj.estimators.hutchinson(), LIKE)
    with pytest.raises(TypeError, match="`what` must be an estimator, an optax"):
        hj.memory_estimate("lanczos", LIKE)
    with pytest.raises(TypeError, match="given the params behind a transformation, got 0"):
        hj.memory_estimate(optax.adam(0.1))


def test_bytes_as_text():
    assert [_memory.shown_bytes(n) for n in (0, 999, 1000, 3_200_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.00 kB",
        "3.20 GB",
    ]
