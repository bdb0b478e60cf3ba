"""hessjax, as its documentation says; every other file here has functions of these names.

load(problem)           the network in the peer's framework; `loss(network)` to compare
WAYS                    for each task the ways to ask, from the plain one to those that take more work
top(network, way, k)    values, products
trace(network, way)     mean, stderr, products: to a standard error of 5 %
density(network, way, probes)    nodes, weights, products
layer_traces(network, way)    (mean, stderr) of every layer's weights, products: to one of 10 % each
product(network, name)  norm of the product and its part along the vector; `name` from PRODUCTS
estimate(problem, ...)  means and standard errors of many runs on a matrix
one_shot(problem, rule, seed)    the kernels after pruning at each sparsity
training_step(network, name), zeros(network, name)    one step; the share of zeros in the kernels by then
compact(network, name)  cut half of the channels inside ResNet-20's blocks; run it; what is left
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
from jax.tree_util import Partial

import hessjax as hj
from peers import in_jax
from peers.in_jax import Network, load, loss
from peers.layers import of_matrix
from peers.problems import Problem
from peers.pruning_in_jax import compact, one_shot, training_step, zeros
from peers.sampling import LAYER_STDERR, together

__all__ = [
    "compact",
    "density",
    "estimate",
    "inverse_fisher",
    "layer_traces",
    "layers",
    "load",
    "loss",
    "one_shot",
    "product",
    "top",
    "trace",
    "training_step",
    "zeros",
]

STEPS = [10, 20, 40, 80, 160]
CHUNK = 20
WAYS = {
    "top": ["default"],
    "trace": ["tol=relative(0.05)", "XTrace, doubled until 5 %"],
    "density": [f"{m} steps" for m in STEPS],
    "layer_traces": ["all in one pass", "layer by layer, hj.select"],
}


def matvec(network: Network) -> Any:
    """The Hessian at all the data: linearized if it is one batch, else over the batches."""
    if len(network.batches) > 1:
        return hj.over_batches(Partial(_of_batch, network), network.batches)
    return _of_batch(network, network.data, linearize=True)


def _of_batch(network: Network, batch: Any, linearize: bool = False) -> Any:
    return hj.hessian(network.loss_fn, network.params, batch, *network.state, linearize=linearize)


def top(network: Network, way: int, k: int) -> dict[str, Any]:
    pairs = hj.eigenpairs(matvec(network), jax.random.key(0), network.params, k, "largest", max_matvecs=1000)
    return {"values": pairs.values.tolist(), "products": int(pairs.num_matvecs)}


def trace(network: Network, way: int) -> dict[str, Any]:
    A, key, params = matvec(network), jax.random.key(0), network.params
    if way == 0:
        found = hj.trace(A, key, params, 5000, tol=hj.relative(0.05))
        products = int(found.num_samples)
    else:
        budget, products, found = 12, 0, None
        while found is None or (found.stderr > 0.05 * abs(found.mean) and budget < 400):
            budget *= 2
            found = hj.trace(A, key, params, budget, estimator=hj.estimators.xtrace)
            products += budget
    return {"mean": float(found.mean), "stderr": float(found.stderr), "products": products}


def density(network: Network, way: int, probes: int) -> dict[str, Any]:
    steps = STEPS[way]
    found = hj.spectral_density(
        matvec(network), jax.random.key(0), network.params, num_probes=probes, num_matvecs=steps
    )
    nodes, weights = (np.asarray(x).ravel().tolist() for x in (found.nodes, found.weights))
    return {"nodes": nodes, "weights": weights, "products": probes * steps}


def layer_traces(network: Network, way: int) -> dict[str, Any]:
    """A product with the whole Hessian is a sample for every layer; one with a block of it takes less."""
    kernels = [path for path in in_jax.paths(network.params) if path.endswith("kernel")]
    return _in_one_pass(network) if way == 0 else together([_of_layer(network, path) for path in kernels])


def _of_layer(network: Network, path: str) -> dict[str, Any]:
    chosen = hj.select(network.params, path)
    A = hj.hessian(
        chosen.restrict(network.loss_fn), chosen.part, network.data, *network.state, linearize=True
    )
    found = hj.trace(A, jax.random.key(0), chosen.part, 5000, tol=hj.relative(LAYER_STDERR))
    products = int(found.num_samples)
    return {"mean": float(found.mean), "stderr": float(found.stderr), "products": products}


def _in_one_pass(network: Network) -> dict[str, Any]:
    A, key, state = matvec(network), jax.random.key(0), None
    method, chosen = hj.estimators.hutchinson_by_leaf(), [p.ndim > 1 for p in jax.tree.leaves(network.params)]
    while True:
        found, state = hj.run(method, A, key, network.params, max_matvecs=CHUNK, state=state)
        means, errors = (np.asarray(x)[1 : 1 + len(chosen)][chosen] for x in (found.mean, found.stderr))
        if np.all(errors <= LAYER_STDERR * np.abs(means)):
            layers = np.stack([means, errors], axis=1)
            return {"layers": layers.tolist(), "products": int(found.num_samples)}


def product(network: Network, name: str) -> dict[str, Any]:
    """Made at the first call and kept: what later calls take is one product."""
    call = _kept(network, name)
    out = jax.block_until_ready(call(network.vector))
    if name == "gradient":
        return {}
    return in_jax.summary(out, network.vector)


_KEPT: dict[str, Any] = {}


def _kept(network: Network, name: str) -> Callable[[Any], Any]:
    if name not in _KEPT:
        _KEPT[name] = PRODUCTS[name](network)
    return _KEPT[name]


def _gradient(network: Network) -> Callable[[Any], Any]:
    gradient = jax.jit(jax.grad(network.loss_fn))
    return lambda vector: gradient(network.params, network.data, *network.state)


def _hessian(network: Network, batch: Any, **options: bool) -> Any:
    return hj.hessian(network.loss_fn, network.params, batch, *network.state, **options)


def _ggn(network: Network, batch: Any, **options: bool) -> Any:
    model_fn, params = network.model_fn, network.params
    return hj.ggn(model_fn, models.cross_entropy, params, batch, *network.state, **options)


def _empirical_fisher(network: Network, batch: Any, **options: bool) -> Any:
    return hj.empirical_fisher(network.loss_fn, network.params, batch, *network.state, **options)


def _once(make: Callable[..., Any], **options: bool) -> Callable[[Network], Any]:
    return lambda network: make(network, network.data, **options)


def _streamed(make: Callable[..., Any]) -> Callable[[Network], Any]:
    return lambda network: hj.over_batches(lambda batch: make(network, batch), network.batches)


PRODUCTS = {
    "gradient": _gradient,
    "Hessian": _once(_hessian),
    "Hessian, kept": _once(_hessian, linearize=True),
    "Hessian, batches": _streamed(_hessian),
    "Gauss–Newton": _once(_ggn),
    "Gauss–Newton, kept": _once(_ggn, linearize=True),
    "Gauss–Newton, batches": _streamed(_ggn),
    "empirical Fisher": _once(_empirical_fisher),
    "empirical Fisher, kept": _once(_empirical_fisher, linearize=True),
    "empirical Fisher, batches": _streamed(_empirical_fisher),
}

ESTIMATORS = {"Hutchinson": None, "Hutch++": hj.estimators.hutchpp, "XTrace": hj.estimators.xtrace}


def estimate(problem: Problem, matrix: str, estimator: str, budget: int, trials: int) -> dict[str, Any]:
    """As many runs as asked for, in float64."""
    with jax.enable_x64(True):
        A = jnp.asarray(problem.arrays[f"matrix/{matrix}"])
        like, product = jnp.zeros(len(A), A.dtype), Partial(jnp.matmul, A)

        @jax.jit
        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            make = ESTIMATORS[estimator]
            found = hj.trace(product, key, like, budget, estimator=make, on_device=True)
            return found.mean, found.stderr

        runs = [one(key) for key in jax.random.split(jax.random.key(0), trials)]
    means, errors = np.array(runs).T
    return {"means": means.tolist(), "errors": errors.tolist()}


def inverse_fisher(problem: Problem, name: str) -> dict[str, Any]:
    """Build, or apply to one vector."""
    grads, options = _grads(problem), problem.options
    if name == "build" or "inverse" not in _KEPT:
        _KEPT["inverse"] = hj.inverse_fisher(grads, options["damping"], options["block_size"])
        jax.block_until_ready(_KEPT["inverse"])
    if name == "apply":
        out = jax.block_until_ready(_KEPT["inverse"].apply(grads[0]))
        return {"norm": float(np.linalg.norm(np.asarray(out, np.float64)))}
    return {}


def _grads(problem: Problem) -> jax.Array:
    """Moved once."""
    if "grads" not in _KEPT:
        _KEPT["grads"] = jnp.asarray(problem.arrays["grads"])
    return _KEPT["grads"]


def layers(network: Network, name: str, fisher: str, positions: str) -> dict[str, Any]:
    """Of the dense layers and convolutions, as curvlinops has no others."""
    part, vector = (hj.select(tree, _covered) for tree in (network.params, network.vector))
    key = f"{fisher}, {positions}"
    if name == "factors" or f"moments, {key}" not in _KEPT:
        _KEPT[f"moments, {key}"] = _moments(network, part, fisher, positions)
    moments = _KEPT[f"moments, {key}"]
    if name == "factors":
        return _factors(moments)
    if name == "EKFAC":
        matrix = hj.layers.ekfac(moments, network.batches)
    else:
        matrix = _kept_matrix(moments, name, key)
    return {**in_jax.summary(matrix(vector.part), vector.part), "compared": ["norm", "along"]}


def _moments(network: Network, part: Any, fisher: str, positions: str) -> Any:
    likelihood = hj.likelihoods.categorical if fisher == "exact" else None
    fn = part.restrict(network.model_fn if fisher == "exact" else network.loss_fn)
    data = network.batches, *network.state
    found = hj.layers.moments(fn, part.part, *data, likelihood=likelihood, positions=positions)
    return jax.block_until_ready(found)


def _covered(path: str, leaf: Any) -> bool:
    return path.startswith(("Conv", "Dense"))


def _kept_matrix(moments: Any, name: str, key: str) -> Any:
    if f"{name}, {key}" not in _KEPT:
        kfac = hj.layers.kfac(moments)
        _KEPT[f"{name}, {key}"] = kfac.inverse(1e-2) if name == "inverse" else kfac
    return _KEPT[f"{name}, {key}"]


def _factors(moments: Any) -> dict[str, Any]:
    """Those of the weights, in the order of the layers."""
    kernels = [moments.of(path)[0] for path in moments.problem.paths if path.endswith("kernel")]
    found = {side: [of_matrix(getattr(x, side)[0]) for x in kernels] for side in ("left", "right")}
    return {**found, "compared": list(found)}
