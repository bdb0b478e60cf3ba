"""traceax: trace estimators for lineax's operators; the operator is the user's, over flat weights."""

import functools
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import traceax

from peers import in_jax, with_matfree
from peers.in_jax import Network, load, loss
from peers.problems import Problem

__all__ = ["estimate", "load", "loss", "product", "trace"]

WAYS = {"trace": ["XTrace, doubled until 5 %"]}


_COMPILED: dict[Any, Any] = {}


def trace(network: Network, way: int) -> dict[str, Any]:
    """Only its XTrace and XNysTrace report an error."""
    flat, unravel = jax.flatten_util.ravel_pytree(network.params)
    budget, products = 24, 0
    while True:
        if budget not in _COMPILED:
            _COMPILED[budget] = jax.jit(
                lambda key, flat, *point, k=budget: _xtrace(network, unravel, key, flat, k, *point)
            )
        key = jax.random.key(budget)
        mean, stderr = map(float, _COMPILED[budget](key, flat, network.state, network.batches))
        products += budget
        if stderr <= 0.05 * abs(mean) or budget > 400:
            return {"mean": mean, "stderr": stderr, "products": products}
        budget *= 2


def _xtrace(network: Network, unravel: Any, key: Any, flat: jax.Array, budget: int, *point: Any) -> Any:
    def of_flat(vector: jax.Array) -> jax.Array:
        out = with_matfree.hessian_product(network.loss_fn, unravel(vector), unravel(flat), *point)
        return jax.flatten_util.ravel_pytree(out)[0]

    operator = lineax.FunctionLinearOperator(of_flat, jax.eval_shape(lambda: flat), lineax.symmetric_tag)
    mean, more = traceax.XTraceEstimator()(key, operator, budget)
    return mean, more["std.err"]


def product(network: Network, name: str) -> dict[str, Any]:
    """Lineax's own way to keep what does not depend on the vector."""
    if name != "Hessian, kept":
        return {"absent": name}
    if name not in _COMPILED:
        _COMPILED[name] = _linearized(network)
    return in_jax.summary(_COMPILED[name](network.vector), network.vector)


def _linearized(network: Network) -> Any:
    def gradient(params: Any, args: Any) -> Any:
        return jax.grad(network.loss_fn)(params, *args)

    args = (network.data, *network.state)
    operator = lineax.JacobianLinearOperator(gradient, network.params, args, tags=lineax.symmetric_tag)
    multiply = equinox.filter_jit(lambda kept, vector: kept.mv(vector))
    return functools.partial(multiply, lineax.linearise(operator))


ESTIMATORS = {
    "Hutchinson": traceax.HutchinsonEstimator,
    "Hutch++": traceax.HutchPlusPlusEstimator,
    "XTrace": traceax.XTraceEstimator,
}


def estimate(problem: Problem, matrix: str, estimator: str, budget: int, trials: int) -> dict[str, Any]:
    """Errors only where it gives some."""
    with jax.enable_x64(True):
        A = lineax.MatrixLinearOperator(jnp.asarray(problem.arrays[f"matrix/{matrix}"]), lineax.symmetric_tag)
        find = ESTIMATORS[estimator]()
        one = jax.jit(lambda key: find(key, A, budget))
        runs = [one(key) for key in jax.random.split(jax.random.key(0), trials)]
    means = np.array([mean for mean, _ in runs])
    errors = [float(more["std.err"]) for _, more in runs] if runs[0][1] else None
    return {"means": means.tolist(), "errors": errors}
