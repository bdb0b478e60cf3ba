"""What stays of losses and matvecs that are made anew: a few of them, however many there were."""

import gc
import weakref

import jax
import jax.numpy as jnp
import optax
import pytest

import hessjax as hj
from hessjax._core._compiled import KEPT, compiled

ALL = lambda path, leaf: True
KEY, W = jax.random.key(0), jnp.array([1.0, 2.0, 3.0])
NEW = KEPT + 3


class Held:
    """An array in a closure, of which one can see that it is gone."""

    def __init__(self, number):
        self.array = number * jnp.ones(3)


def quadratic(held):
    return lambda w, *args: jnp.sum(held.array * w**2) / 2


CALLS = {
    "hessian": lambda f: hj.hessian(f, W)(W),
    "linearize": lambda f: hj.hessian(f, W, linearize=True)(W),
    "ggn": lambda f: hj.ggn(lambda w: w, f, W)(W),
    "per-example gradients": lambda f: hj.per_example_grads(f, W, jnp.ones((2, 1))),
    "empirical Fisher in parts": lambda f: hj.empirical_fisher(f, W, jnp.ones((2, 1)), microbatch=1)(W),
    "batches": lambda f: hj.over_batches(lambda x: hj.hessian(f, W, x), [jnp.ones(1)])(W),
    "a run on the host": lambda f: hj.trace(lambda v: jax.grad(f)(v), KEY, W, 2),
    "a run on the device": lambda f: hj.trace(lambda v: jax.grad(f)(v), KEY, W, 2, on_device=True),
    "solve": lambda f: hj.solve(hj.hessian(f, W), W, max_matvecs=2),
    "eigenpairs": lambda f: hj.eigenpairs(hj.hessian(f, W), KEY, W, 1, max_matvecs=2),
    "probe": lambda f: hj.trace(jnp.negative, KEY, W, 2, probe=lambda key, like: f(W) * jnp.ones_like(like)),
    "probe of a density": lambda f: hj.spectral_density(
        jnp.negative, KEY, W, 1, 2, probe=lambda key, like: f(W) * jnp.ones_like(like)
    ),
    "landscape": lambda f: hj.landscape(f, W, directions=W, distances=[0.0, 1.0]),
    "prune by gradients of examples": lambda f: pruned(
        hj.saliencies.obs("joint", 1.0),
        start=1,
        per_example_grads=lambda w: hj.per_example_grads(f, w, jnp.ones((2, 1))),
    ),
    "prune by a schedule": lambda f: pruned(hj.saliencies.magnitude(), lambda step: 0 * f(W) + 0.5),
    "prune_once": lambda f: hj.prune_once(
        W, hj.saliencies.gradient(), 0.5, grads_fn=lambda w: jax.grad(f)(w)[None], where=ALL
    ),
}  # fmt: skip


def pruned(saliency, sparsity=0.5, start=0, **extra):
    tx = hj.prune(optax.sgd(0.1), saliency, sparsity, start=start, where=ALL)
    state, w = tx.init(W), W
    for _ in range(2):
        updates, state = tx.update(W, state, w, **extra)
        w = optax.apply_updates(w, updates)
    return w


@pytest.mark.parametrize("call", CALLS)
def test_functions_made_anew_go(call):
    seen = []
    for number in range(1, NEW + 1):
        held = Held(float(number))
        # The array itself: a program may keep it without the function that closed over it.
        seen.append(weakref.ref(held.array))
        jax.block_until_ready(CALLS[call](quadratic(held)))
        del held
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= KEPT + 1


def test_a_function_that_is_used_again_is_compiled_once(compilations):
    f, other = quadratic(Held(2.0)), jnp.zeros(3)
    hj.hessian(f, W)(W)
    del compilations[:]
    assert hj.hessian(f, other)(W).tolist() == [2.0, 4.0, 6.0]
    assert not compilations


def test_what_was_let_go_is_compiled_again():
    step = compiled(static_argnums=0)(lambda power, f, x: f(x) ** power)
    functions = [jax.tree_util.Partial(lambda x, n=n: n * x) for n in range(KEPT + 1)]
    for _ in range(2):
        assert [float(step(2, f, 1.0)) for f in functions] == [n**2 for n in range(KEPT + 1)]
