"""JAX by hand: a gradient, and the rank-one recursion for the inverse Fisher."""

from typing import Any

import inverse_fisher_cost
import jax
import jax.numpy as jnp

from peers import in_jax
from peers.in_jax import Network, loss
from peers.problems import Problem

__all__ = ["inverse_fisher", "load", "loss", "product"]

WAYS: dict[str, list[str]] = {}
SAMPLE = 16
_KEPT: dict[str, Any] = {}


def load(problem: Problem) -> Any:
    """The network; a problem without one is its own numbers."""
    return in_jax.load(problem) if problem.kind in in_jax.MODULES else problem


def product(network: Network, name: str) -> dict[str, Any]:
    if name != "gradient":
        return {"absent": name}
    if name not in _KEPT:
        _KEPT[name] = jax.jit(jax.grad(network.loss_fn))
    jax.block_until_ready(_KEPT[name](network.params, network.data, *network.state))
    return {}


def inverse_fisher(problem: Problem, name: str) -> dict[str, Any]:
    """The recursion that `benchmarks/inverse_fisher_cost.py` has, on some of the gradients."""
    if name != "build":
        return {"absent": name}
    grads, width = jnp.asarray(problem.arrays["grads"]), problem.options["block_size"]
    few = grads[:SAMPLE].reshape(min(SAMPLE, len(grads)), -1, width)
    jax.block_until_ready(inverse_fisher_cost.rank_one(few, len(grads)))
    return {"share": len(few) / len(grads)}
