"""What an accelerator computes, beside the CPU of the same machine; skipped where there is none."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest

import hessjax as hj

pytestmark = [
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator"),
    pytest.mark.promotes,  # the networks of `meshes`
]

KEY = jax.random.key(7)
PARAMS = {"a": jax.random.normal(KEY, (40, 30)), "b": jax.random.normal(jax.random.key(8), (30,))}
CURVATURE = jax.tree.map(lambda x: jnp.abs(x) + 0.5, PARAMS)


def elementwise(curvature, vector):
    """A product without any matrix multiplication: all rounding beyond float32 is then our own."""
    return jax.tree.map(lambda c, v: c * v, curvature, vector)


def on_cpu(function, *args):
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return function(*jax.device_put(args, cpu))


@pytest.mark.parametrize("name", meshes.CALLS)
def test_every_public_call_agrees_with_the_cpu(name):
    call = meshes.CALLS[name]
    with jax.default_matmul_precision("highest"):  # the loss's own: by default it may round to ten bits
        expected = on_cpu(call, meshes.PARAMS, meshes.BATCH)
        found = call(meshes.PARAMS, meshes.BATCH)
    assert meshes.difference(expected, found) < 1e-4


ESTIMATORS = {
    "lanczos": hj.estimators.lanczos(3),
    "power_iteration": hj.estimators.power_iteration(1),
    "hutchinson": hj.estimators.hutchinson(),
    "hutchpp": hj.estimators.hutchpp(12),
    "xtrace": hj.estimators.xtrace(12),
    "slq": hj.estimators.slq(2, 6),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("on_device", [False, True])
def test_our_own_arithmetic_is_float32_by_default(name, on_device):
    """Without asking for it: inner products and rotations must not round to ten bits."""

    def result(params, curvature):
        matvec = jax.tree_util.Partial(elementwise, curvature)
        return hj.run(ESTIMATORS[name], matvec, KEY, params, max_matvecs=12, on_device=on_device)[0]

    expected = on_cpu(result, PARAMS, CURVATURE)
    found = result(PARAMS, CURVATURE)
    numbers = lambda tree: [np.asarray(x) for x in jax.tree.leaves(tree) if jnp.ndim(x) < 2]
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_solve_is_exact_beyond_ten_bits():
    matvec = jax.tree_util.Partial(elementwise, CURVATURE)
    found = hj.solve(matvec, PARAMS, tol=1e-6, max_matvecs=200)
    for x, b, c in zip(*map(jax.tree.leaves, (found.x, PARAMS, CURVATURE)), strict=True):
        np.testing.assert_allclose(x, b / c, rtol=1e-4, atol=1e-5)


def test_the_inverse_fisher_is_exact_beyond_ten_bits():
    rows = jax.random.normal(KEY, (48, 64))
    dense = np.asarray(rows, np.float64)
    exact = np.linalg.inv(dense.T @ dense / len(dense) + 0.1 * np.eye(64))
    for block_size in (None, 64):
        inverse = hj.inverse_fisher(rows, damping=0.1, block_size=block_size)
        v = jax.random.normal(jax.random.key(3), (64,))
        np.testing.assert_allclose(inverse.apply(v), exact @ np.asarray(v), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_masks_are_those_of_the_cpu(sparsity):
    def mask(params):
        return hj.prune_once(params, hj.saliencies.magnitude(), sparsity).mask

    expected = on_cpu(mask, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, mask(PARAMS), expected)


def test_a_pruned_step_runs_within_one_program():
    tx = hj.prune(optax.adam(1e-2), hj.saliencies.magnitude(), 0.5, every=1, start=1)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            trace = hj.trace(
                jax.tree_util.Partial(elementwise, CURVATURE), KEY, params, num_probes=2, on_device=True
            )
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), trace.mean

        return jax.lax.scan(step, (params, tx.init(params)), None, length=4)

    (params, _), traces = train(PARAMS)
    assert int((params["a"] == 0).sum()) == PARAMS["a"].size // 2
    np.testing.assert_allclose(traces, sum(float(c.sum()) for c in jax.tree.leaves(CURVATURE)), rtol=1e-5)
