"""JAX by hand: a gradient, the rank-one recursion for the inverse Fisher, masks in training by sorting."""

from typing import Any, NamedTuple

import inverse_fisher_cost
import jax
import jax.numpy as jnp
import optax

from peers import problems
from peers.in_jax import Network, load, loss
from peers.problems import Problem
from peers.pruning_in_jax import ADAM, Loop, leaves_and_kernels, share_of_zeros

__all__ = ["inverse_fisher", "load", "loss", "product", "training_step", "zeros"]

WAYS: dict[str, list[str]] = {}
SAMPLE = 16
_KEPT: dict[str, Any] = {}


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


# -- masks in training -----------------------------------------------------------------------------


def training_step(network: Network, name: str) -> dict[str, Any]:
    """As jaxpruner, which calls `jax.tree_map`, removed from JAX: its operations, written anew."""
    if name not in _KEPT:
        by_sorting = ADAM if name == "bare" else sorting(ADAM, problems.SPARSITY, problems.EVERY[name])
        _KEPT[name] = Loop(network, by_sorting, *([] if name == "bare" else [masked]))
    _KEPT[name].advance()
    return {} if name == "bare" else {"note": "as jaxpruner, which calls what JAX has removed"}


def zeros(network: Network, name: str) -> dict[str, Any]:
    return {"zeros": share_of_zeros(_KEPT[name].carry[0])}


class Sorting(NamedTuple):
    """Steps so far, the masks, and the inner optimizer's state."""

    count: jax.Array
    masks: Any
    inner: Any


def sorting(inner: optax.GradientTransformation, sparsity: float, every: int) -> Any:
    """Round an optimizer: every so many steps each kernel is ranked by a sort of all its entries."""

    def init(params: Any) -> Sorting:
        masks = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.uint8), params)
        return Sorting(jnp.zeros((), jnp.int32), masks, inner.init(params))

    def update(grads: Any, state: Sorting, params: Any) -> tuple[Any, Sorting]:
        anew = lambda: _masks(params, sparsity)  # noqa: E731
        masks = jax.lax.cond(state.count % every == 0, anew, lambda: state.masks)
        updates, inner_state = inner.update(grads, state.inner, params)
        return updates, Sorting(state.count + 1, masks, inner_state)

    return optax.GradientTransformation(init, update)


def _masks(params: Any, sparsity: float) -> Any:
    pairs = zip(*leaves_and_kernels(params), strict=True)
    masks = [_largest(x, sparsity) if chosen else jnp.ones(x.shape, jnp.uint8) for x, chosen in pairs]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def _largest(weights: jax.Array, sparsity: float) -> jax.Array:
    """1 where the magnitude is among the largest."""
    size = jnp.abs(weights).ravel()
    kept = round((1 - sparsity) * size.size)
    return (size >= size[jnp.argsort(size)[-kept]]).astype(jnp.uint8).reshape(weights.shape)


def masked(params: Any, state: Sorting) -> Any:
    """After every step."""
    return jax.tree.map(jnp.multiply, params, state.masks)
