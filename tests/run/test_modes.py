"""Everything public works, with the same numbers, under the modes that people set in jax."""

import contextlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import hessjax as hj

KEY = jax.random.key(0)
W = {"bias": jnp.array([0.1, -0.2]), "kernel": jnp.array([[1.0, 0.5], [-0.3, 0.2], [0.7, -0.4]])}
BATCH = (jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.array([0, 1, 1, 0]))


def model_fn(params, batch):
    return batch[0] @ params["kernel"] + params["bias"][None]


def output_loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def loss_fn(params, batch):
    return output_loss(model_fn(params, batch), batch)


def pruned(saliency):
    tx = hj.prune(optax.sgd(0.1), saliency, 0.5, start=1)
    updates, state = tx.update(jax.grad(loss_fn)(W, BATCH), tx.init(W), W)
    return optax.apply_updates(W, updates), hj.mask_of(state)


CATEGORICAL = {"likelihood": hj.likelihoods.categorical}
CALLS = {
    "hessian": lambda A: hj.hvp(loss_fn, W, W, BATCH),
    "ggn": lambda A: hj.ggn(model_fn, output_loss, W, BATCH)(W),
    "fisher": lambda A: hj.fisher(model_fn, W, BATCH, **CATEGORICAL)(W),
    "sampled fisher": lambda A: hj.fisher(model_fn, W, BATCH, **CATEGORICAL, key=KEY)(W),
    "empirical_fisher": lambda A: hj.empirical_fisher(loss_fn, W, BATCH)(W),
    "ggn_roots": lambda A: hj.ggn_roots(model_fn, W, BATCH, **CATEGORICAL),
    "sampled_grads": lambda A: hj.sampled_grads(model_fn, W, BATCH, **CATEGORICAL, key=KEY),
    "over_batches": lambda A: hj.over_batches(lambda b: hj.hessian(loss_fn, W, b), [BATCH, BATCH])(W),
    "arithmetic": lambda A: hj.preconditioned(hj.weighted_sum([A, A], [1.0, 2.0], 0.1), W_ABOVE_0)(W),
    "eigenpairs": lambda A: hj.eigenpairs(A, KEY, W, 1).values,
    "trace": lambda A: hj.trace(A, KEY, W, 3),
    "trace_by_leaf": lambda A: hj.trace_by_leaf(A, KEY, W, 3),
    "xtrace": lambda A: hj.trace(A, KEY, W, 6, estimator=hj.estimators.xtrace, tol=1e-6),
    "hutchpp": lambda A: hj.trace(A, KEY, W, 6, estimator=hj.estimators.hutchpp),
    "before a product": lambda A: hj.estimators.hutchinson().result(hj.estimators.hutchinson().init(KEY, W)),
    "diagonal": lambda A: hj.diagonal(A, KEY, W, 3),
    "frobenius_norm": lambda A: hj.frobenius_norm(A, KEY, W, 3),
    "spectral_density": lambda A: hj.spectral_density(A, KEY, W, 1, 3).moment(),
    "spectrum": lambda A: hj.spectrum(A, KEY, W, 1, 4).trace,
    "solve": lambda A: hj.solve(A, W, 0.1).x,
    "minres": lambda A: hj.solve(A, W, 0.1, method=hj.estimators.minres).x,
    "inverse_fisher": lambda A: hj.inverse_fisher(hj.per_example_grads(loss_fn, W, BATCH), 0.1).diagonal(),
    "power_iteration": lambda A: hj.run(hj.estimators.power_iteration(1), A, KEY, W, max_matvecs=4)[0].values,
    "prune, magnitude": lambda A: pruned(hj.saliencies.magnitude()),
    "prune, movement": lambda A: pruned(hj.saliencies.movement()),
    "prune_once, obs": lambda A: (
        hj.prune_once(
            W, hj.saliencies.obs(damping=0.1), 0.5, grads_fn=lambda p: hj.per_example_grads(loss_fn, p, BATCH)
        ).params
    ),
    "landscape": lambda A: (
        hj.landscape(loss_fn, W, BATCH, directions=W, distances=[jnp.linspace(-1, 1, 3)]).losses
    ),
}
W_ABOVE_0 = jax.tree.map(lambda x: 1.0 + x**2, W)


@contextlib.contextmanager
def no_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def no_jit():
    # Hints say what is traced: without `jit` a loop's index is a number of Python's.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with jax.disable_jit():
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


OP_BY_OP = {"hessian", "ggn", "ggn_roots", "trace", "diagonal", "solve", "inverse_fisher", "prune, magnitude"}
"""What is tried without `jit`: there a loop is a loop of Python's."""

MODES = {
    "no promotion": no_promotion,
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": no_jit,
    "enable_x64": lambda: jax.enable_x64(True),
    "default_matmul_precision": lambda: jax.default_matmul_precision("highest"),
    "check_tracer_leaks": jax.checking_leaks,
}


@pytest.mark.promotes
@pytest.mark.parametrize("call", CALLS)
def test_in_every_mode_the_same(call):
    A = hj.hessian(loss_fn, W, BATCH)
    want = CALLS[call](A)
    for name, mode in MODES.items():
        if name == "disable_jit" and call not in OP_BY_OP:
            continue
        with mode():
            got = CALLS[call](hj.hessian(loss_fn, W, BATCH))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # With x64 keys draw other random numbers: there it has to work.
            if name != "enable_x64":
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4, err_msg=name)
