"""hessian-eigenthings: Lanczos, traces with errors, Lanczos quadrature."""

from collections.abc import Callable
from typing import Any

import torch
from hessian_eigenthings import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    LambdaOperator,
    lanczos,
    spectral_density,
    supervised_forward,
    supervised_loss,
    supervised_loss_of_output,
    supervised_per_sample_loss,
)
from hessian_eigenthings import trace as trace_of

from peers import in_torch
from peers.in_torch import Network, load, loss
from peers.problems import Problem
from peers.sampling import LAYER_STDERR, STDERR, together

__all__ = ["density", "estimate", "layer_traces", "load", "loss", "product", "top", "trace"]

STEPS = [10, 20, 40, 80, 160]
WAYS = {
    "top": ["max_iter doubled until converged", "the same, reorthogonalize=True"],
    "trace": ["Hutch++, doubled until 5 %", "Hutchinson, doubled until 5 %"],
    "density": [f"{m} steps" for m in STEPS],
    "layer_traces": ["layer by layer, Hutchinson doubled"],
}


def _hessian(network: Network, batches: Any, chosen: Any = None) -> Any:
    loss_fn = supervised_loss(network.criterion)
    return HessianOperator(network.model, batches, loss_fn, param_filter=chosen)


def _ggn(network: Network, batches: Any) -> Any:
    of_output = supervised_loss_of_output(network.criterion)
    return GGNOperator(network.model, batches, supervised_forward, of_output)


def _empirical_fisher(network: Network, batches: Any) -> Any:
    per_sample = supervised_per_sample_loss(network.criterion)
    return EmpiricalFisherOperator(network.model, batches, per_sample)


def top(network: Network, way: int, k: int) -> dict[str, Any]:
    """It begins at 2k steps, its default, and begins anew with twice as many until all say converged."""
    operator, steps, products = _hessian(network, network.batches), 2 * k, 0
    reorthogonalize = None if way == 0 else True
    while True:
        found = lanczos(
            operator, k=k, max_iter=steps, which="LA", tol=1e-4, reorthogonalize=reorthogonalize, seed=0
        )
        products += found.iterations
        if bool(found.converged.all()) or 2 * steps > 640:
            return {
                "values": found.eigenvalues.tolist(),
                "products": products,
                "note": f"converged at max_iter={steps}" if bool(found.converged.all()) else "not converged",
            }
        steps *= 2


def trace(network: Network, way: int) -> dict[str, Any]:
    return _trace(_hessian(network, network.batches), ("hutch++", "hutchinson")[way], STDERR)


def _trace(operator: Any, method: str, share: float) -> dict[str, Any]:
    budget, products = 24, 0
    while True:
        found = trace_of(operator, num_matvecs=budget, method=method, seed=budget)
        products += budget
        if found.stderr <= share * abs(found.estimate) or budget > 2000:
            return {"mean": found.estimate, "stderr": found.stderr, "products": products}
        budget *= 2


def layer_traces(network: Network, way: int) -> dict[str, Any]:
    """Of the layers' weights one by one, which it chooses by a filter."""
    found = [
        _trace(_hessian(network, network.batches, lambda _, p, own=own: p is own), "hutchinson", LAYER_STDERR)
        for own in in_torch.kernels(network)
    ]
    return together(found)


def density(network: Network, way: int, probes: int) -> dict[str, Any]:
    steps = STEPS[way]
    found = spectral_density(_hessian(network, network.batches), num_runs=probes, lanczos_steps=steps, seed=0)
    nodes, weights = found.raw_eigenvalues.ravel().tolist(), found.raw_weights.ravel().tolist()
    return {"nodes": nodes, "weights": weights, "products": probes * steps}


KINDS: dict[str, Callable[[Network, Any], Any]] = {
    "Hessian": lambda *of: _hessian(*of).matvec,
    "Gauss–Newton": lambda *of: _ggn(*of).matvec,
    "empirical Fisher": lambda *of: _empirical_fisher(*of).matvec,
}


def product(network: Network, name: str) -> dict[str, Any]:
    return in_torch.product(network, name, KINDS)


def estimate(problem: Problem, matrix: str, estimator: str, budget: int, trials: int) -> dict[str, Any]:
    if estimator == "XTrace":
        return {"absent": estimator}
    A = torch.from_numpy(problem.arrays[f"matrix/{matrix}"])
    operator = LambdaOperator(lambda v: A @ v, size=len(A), device=A.device, dtype=A.dtype)
    method = estimator.lower()
    runs = [trace_of(operator, num_matvecs=budget, method=method, seed=seed) for seed in range(trials)]
    return {"means": [run.estimate for run in runs], "errors": [run.stderr for run in runs]}
