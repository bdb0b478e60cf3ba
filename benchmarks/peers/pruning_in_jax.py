"""What hessjax is asked about pruning: at one go, in training, and physically smaller."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax

import hessjax as hj
from peers import in_jax, problems
from peers.in_jax import Network
from peers.problems import Problem

_KEPT: dict[Any, Any] = {}

# -- at one go -------------------------------------------------------------------------------------


def one_shot(problem: Problem, rule: str, seed: int) -> dict[str, Any]:
    """A trained network without retraining, from the same weights at each sparsity."""
    options, x, y = problem.options, *(jnp.asarray(problem.arrays[f"train/{name}"]) for name in "xy")
    params = tuple(jnp.asarray(kernel) for kernel in problem.part(f"net/{seed}").values())
    few = x[: options["grads"]], y[: options["grads"]]
    saliency, recomputes = _rules(options)[rule]
    found = [
        hj.prune_once(
            params,
            saliency,
            sparsity,
            recomputes=recomputes,
            grads_fn=lambda p: hj.per_example_grads(_loss_fn, p, few),
        ).params
        for sparsity in options["sparsities"]
    ]
    return {"kernels": [[kernel.ravel().tolist() for kernel in kernels] for kernels in found]}


def _loss_fn(kernels: tuple[jax.Array, ...], batch: Any) -> jax.Array:
    x = batch[0]
    for kernel in kernels[:-1]:
        x = jax.nn.relu(x @ kernel)
    return models.cross_entropy(x @ kernels[-1], batch)


def _rules(options: dict[str, Any]) -> dict[str, tuple[hj.saliencies.Saliency, int]]:
    """WoodFisher's has a matrix for each layer: no layer is larger than its blocks."""
    obs, damping = hj.saliencies.obs, options["damping"]
    return {
        "magnitude": (hj.saliencies.magnitude(), 1),
        "WoodFisher": (obs("summed", damping, block_size=64 * 40), 1),
        "OBS, joint": (obs("joint", damping), 1),
        "OBS, joint, recomputed": (obs("joint", hj.relative(0.01)), options["recomputes"]),
    }


# -- in training -----------------------------------------------------------------------------------

ADAM = optax.adam(1e-4)
Step = Callable[[Any, Any, Any], Any]


def training_step(network: Network, name: str) -> dict[str, Any]:
    """One more of a loop that goes on from call to call."""
    if name not in _KEPT:
        _KEPT[name] = Loop(network, _transformation(name))
    _KEPT[name].advance()
    return {}


def zeros(network: Network, name: str) -> dict[str, Any]:
    """The share among the kernels by now."""
    return {"zeros": share_of_zeros(_KEPT[name].carry[0])}


def _transformation(name: str) -> Any:
    """Every layer to the same sparsity, at every step or once in a thousand."""
    if name == "bare":
        return ADAM
    every, uniform = problems.EVERY[name], hj.allocations.uniform()
    return hj.prune(ADAM, hj.saliencies.magnitude(), problems.SPARSITY, every=every, allocation=uniform)


class Loop:
    """Training: params and the optimizer's state go on from step to step, and re-use their memory."""

    def __init__(self, network: Network, tx: Any, after: Step = lambda params, state: params) -> None:
        def step(params: Any, state: Any, *args: Any) -> tuple[Any, Any]:
            grads = jax.grad(network.loss_fn)(params, *args)
            updates, state = tx.update(grads, state, params)
            return after(optax.apply_updates(params, updates), state), state

        params = jax.tree.map(jnp.copy, network.params)
        self.carry = (params, tx.init(params))
        self._step, self._args = jax.jit(step, donate_argnums=(0, 1)), (network.data, *network.state)

    def advance(self) -> None:
        """One step."""
        self.carry = jax.block_until_ready(self._step(*self.carry, *self._args))


def share_of_zeros(params: Any) -> float:
    """Among the kernels."""
    kernels = [np.asarray(x) for x, chosen in zip(*leaves_and_kernels(params), strict=True) if chosen]
    return float(sum(np.sum(kernel == 0) for kernel in kernels) / sum(kernel.size for kernel in kernels))


def leaves_and_kernels(params: Any) -> tuple[list[jax.Array], list[bool]]:
    """All leaves, and which of them are pruned."""
    return jax.tree.leaves(params), [path.endswith("kernel") for path in in_jax.paths(params)]


# -- smaller ---------------------------------------------------------------------------------------


def compact(network: Network, name: str) -> dict[str, Any]:
    """`cut` makes the smaller network; `before` and `after` run the two; `size` says what they are."""
    variables = {"params": network.params, **network.state[0]}

    def full_fn(variables: Any, batch: Any) -> jax.Array:  # statistics shrink with the params
        return network.model_fn(variables["params"], batch, {"batch_stats": variables["batch_stats"]})

    if name == "cut":
        _KEPT["masked"] = _masked(network.params)
        _KEPT["small"] = hj.compact(full_fn, {**variables, "params": _KEPT["masked"]}, network.data)
        return {}
    small = _KEPT["small"]
    if name == "size":
        counts = [sum(x.size for x in jax.tree.leaves(p)) for p in (network.params, small.params["params"])]
        logits = small.model_fn(small.params, network.data)
        return {"weights": counts, "norm": float(np.linalg.norm(logits))}
    if name not in _KEPT:
        fn, given = {"before": (full_fn, variables), "after": (small.model_fn, small.params)}[name]
        _KEPT[name] = jax.jit(fn), given
    fn, given = _KEPT[name]
    jax.block_until_ready(fn(given, network.data))
    return {}


def _masked(params: Any) -> Any:
    """What the second convolution of every block reads least of is zero."""
    where, pattern = "ResidualBlock_*/Conv_1/kernel", hj.patterns.channels()
    rule, uniform = hj.saliencies.magnitude(), hj.allocations.uniform()
    return hj.prune_once(params, rule, 0.5, pattern=pattern, where=where, allocation=uniform).params
