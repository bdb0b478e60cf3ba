"""matfree: its Lanczos and its estimators, round a Hessian-vector product that the user writes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matfree import decomp, eig, stochtrace

from peers import in_jax
from peers.in_jax import Network, load, loss
from peers.problems import Problem
from peers.sampling import LAYER_STDERR, STDERR, together

__all__ = ["density", "estimate", "layer_traces", "load", "loss", "product", "top", "trace"]

STEPS = [10, 20, 40, 80, 160]
CHUNK = 8
WAYS = {
    "top": ["steps doubled until values rest"],
    "trace": ["Hutchinson, 8 at a time until 5 %"],
    "density": [f"{m} steps" for m in STEPS],
    "layer_traces": ["layer by layer, Hutchinson, 8 at a time"],
}


def hessian_product(loss_fn: Any, vector: Any, params: Any, state: Any, batches: Any) -> Any:
    """The mean over all examples of all batches, as the two lines that anyone would write."""
    total, sums = sum(len(y) for _, y in batches), jax.tree.map(jnp.zeros_like, params)
    for batch in batches:
        grad = lambda p, batch=batch: jax.grad(loss_fn)(p, batch, *state)  # noqa: E731
        out, share = jax.jvp(grad, (params,), (vector,))[1], len(batch[1]) / total
        sums = jax.tree.map(lambda s, x, share=share: s + share * x, sums, out)
    return sums


def _product_of(network: Network) -> Any:
    return lambda v, *point: hessian_product(network.loss_fn, v, *point)


def _point(network: Network) -> tuple[Any, ...]:
    return network.params, network.state, network.batches


_COMPILED: dict[Any, Any] = {}


def _compiled(key: Any, make: Any) -> Any:
    """One function for each number of steps: matfree's are fixed in the program."""
    if key not in _COMPILED:
        _COMPILED[key] = jax.jit(make())
    return _COMPILED[key]


def _start(network: Network, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape, np.float32)), network.params)


def top(network: Network, way: int, k: int) -> dict[str, Any]:
    """It knows no convergence: the user takes twice as many steps until the values rest, to 1e-4."""
    steps, products, before, start = 2 * k, 0, None, _start(network, 0)
    while True:
        find = _compiled(("top", steps), lambda m=steps: _top(network, m))
        values = np.sort(np.asarray(find(start, *_point(network))[0]))[::-1][:k]
        products += steps
        if (before is not None and np.all(np.abs(values / before - 1) < 1e-4)) or steps > 320:
            return {"values": values.tolist(), "products": products, "note": f"{steps} steps the last time"}
        before, steps = values, 2 * steps


def _top(network: Network, steps: int) -> Any:
    find = eig.eigh_partial(decomp.tridiag_sym(steps))
    return lambda start, *point: find(_product_of(network), start, *point)


def trace(network: Network, way: int) -> dict[str, Any]:
    """Chunks by vmap, their means and errors put together."""
    find = _compiled("trace", lambda: _trace(_product_of(network), network.params))
    return _chunks(find, _point(network), STDERR)


def _chunks(find: Any, point: Any, share: float) -> dict[str, Any]:
    means, errors = [], []
    for key in jax.random.split(jax.random.key(0), 600):
        mean, error = map(float, find(key, *point))
        means.append(mean)
        errors.append(error)
        stderr = float(np.sqrt(np.sum(np.square(errors))) / len(errors))
        if len(means) > 2 and stderr <= share * abs(np.mean(means)):
            break
    return {"mean": float(np.mean(means)), "stderr": stderr, "products": CHUNK * len(means)}


def _trace(product: Any, like: Any) -> Any:
    sampler = stochtrace.sampler_signs(like, num=CHUNK)
    find = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace(), sampler)
    return lambda key, *point: find(product, key, *point)


def layer_traces(network: Network, way: int) -> dict[str, Any]:
    """Of the Hessian in the weights of one layer after the other, each a program of its own."""
    found = []
    for index, leaf in enumerate(jax.tree.leaves(network.params)):
        if leaf.ndim > 1:
            make = lambda i=index, x=leaf: _trace(_product_of_leaf(network, i), x)  # noqa: E731
            find = _compiled(("layer", index), make)
            found.append(_chunks(find, _point(network), LAYER_STDERR))
    return together(found)


def _product_of_leaf(network: Network, index: int) -> Any:
    def multiply(vector: jax.Array, params: Any, *rest: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(params)
        put = lambda leaf: jax.tree.unflatten(tree, [*leaves[:index], leaf, *leaves[index + 1 :]])  # noqa: E731
        of_leaf = lambda leaf, *args: network.loss_fn(put(leaf), *args)  # noqa: E731
        return hessian_product(of_leaf, vector, leaves[index], *rest)

    return multiply


def density(network: Network, way: int, probes: int) -> dict[str, Any]:
    """The quadrature of its tridiagonal matrix: nodes and squared first components."""
    steps = STEPS[way]
    find = _compiled(("density", steps), lambda: _density(network, steps))
    runs = [find(_start(network, seed), *_point(network)) for seed in range(probes)]
    nodes, weights = (np.concatenate(parts).tolist() for parts in zip(*runs, strict=True))
    return {"nodes": nodes, "weights": weights, "products": probes * steps}


def _density(network: Network, steps: int) -> Any:
    tridiag = decomp.tridiag_sym(steps)

    def find(start: Any, *point: Any) -> Any:
        flat, unravel = jax.flatten_util.ravel_pytree(start)
        product = _product_of(network)
        of_flat = lambda v, *p: jax.flatten_util.ravel_pytree(product(unravel(v), *p))[0]  # noqa: E731
        nodes, vectors = jnp.linalg.eigh(tridiag(of_flat, flat, *point)[1])
        return nodes, vectors[0] ** 2

    return find


def product(network: Network, name: str) -> dict[str, Any]:
    """By hand: `jax.jvp` of `jax.grad`, in one program."""
    if name not in ("Hessian", "Hessian, batches"):
        return {"absent": name}
    call = _compiled("product", lambda: _product_of(network))
    params, state, batches = _point(network)
    batches = batches if name == "Hessian, batches" else [network.data]
    return in_jax.summary(call(network.vector, params, state, batches), network.vector)


def estimate(problem: Problem, matrix: str, estimator: str, budget: int, trials: int) -> dict[str, Any]:
    if estimator == "Hutch++":
        return {"absent": estimator}
    with jax.enable_x64(True):
        A = jnp.asarray(problem.arrays[f"matrix/{matrix}"])
        like = jnp.zeros(len(A), A.dtype)
        if estimator == "Hutchinson":
            sampler = stochtrace.sampler_signs(like, num=budget)
            make = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace(), sampler)
        else:
            sampler = stochtrace.sampler_sphere(like, num=budget // 2)
            make = stochtrace.estimator_leave_one_out_mean_and_sem(stochtrace.leave_one_out_xtrace(), sampler)
        one = jax.jit(lambda key: make(lambda v: A @ v, key))
        runs = [one(key) for key in jax.random.split(jax.random.key(0), trials)]
    means, errors = np.array(runs).T
    return {"means": means.tolist(), "errors": errors.tolist()}
