"""curvlinops: linear operators for SciPy's `eigsh`, and estimators of its own."""

from typing import Any

import numpy as np
import torch
from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    hutchinson_trace,
    hutchpp_trace,
    lanczos_approximate_spectrum,
    xtrace,
)
from scipy.sparse.linalg import LinearOperator, eigsh

from peers import in_torch
from peers.in_torch import Network, loss
from peers.problems import Problem

__all__ = ["density", "estimate", "load", "loss", "product", "top", "trace"]

TOLERANCES = [1e-4, 1e-6, 0]
STEPS = [10, 20, 40, 80, 160]
KAPPA = 30.0
WAYS = {
    "top": [f"SciPy's eigsh, tol={tol:g}" for tol in TOLERANCES],
    "trace": ["hutchinson_trace, one at a time until 5 %"],
    "density": [f"{m} steps" for m in STEPS],
}


def load(problem: Problem) -> Any:
    """The network; a problem without one is its own numbers."""
    return in_torch.load(problem) if problem.kind in in_torch.TWINS else problem


def _operator(network: Network, kind: Any = HessianLinearOperator, batches: Any = None) -> Any:
    batches = batches or network.batches
    model, criterion, params = network.model, network.criterion, network.params
    # Its check of the data costs products of its own.
    return kind(model, criterion, params, batches, check_deterministic=False)


def _counted(operator: Any) -> tuple[LinearOperator, list[int]]:
    inner, counted = operator.to_scipy(), []

    def matvec(vector: np.ndarray) -> np.ndarray:
        counted.append(1)
        return inner.matvec(vector)

    return LinearOperator(inner.shape, matvec=matvec, dtype=inner.dtype), counted


def top(network: Network, way: int, k: int) -> dict[str, Any]:
    operator, counted = _counted(_operator(network))
    values, _ = eigsh(operator, k=k, which="LA", tol=TOLERANCES[way])
    return {"values": sorted(map(float, values), reverse=True), "products": len(counted)}


def trace(network: Network, way: int) -> dict[str, Any]:
    """It gives no error: the user takes single samples and looks at their spread."""
    operator, samples, stderr = _operator(network), [], np.inf
    while len(samples) < 20 or stderr > 0.05 * abs(np.mean(samples)):
        samples.append(float(hutchinson_trace(operator, num_matvecs=1)))
        stderr = float(np.std(samples, ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else np.inf
    return {"mean": float(np.mean(samples)), "stderr": stderr, "products": len(samples)}


def density(network: Network, way: int, probes: int) -> dict[str, Any]:
    """A curve of bumps on a grid; the narrower they are, the nearer W₁."""
    steps = STEPS[way]
    ends, counted = _counted(_operator(network))
    low, high = (float(eigsh(ends, k=1, which=which, tol=1e-2)[0][0]) for which in ("SA", "LA"))
    grid, curve = lanczos_approximate_spectrum(
        _operator(network), steps, num_points=4096, num_repeats=probes, kappa=KAPPA, boundaries=(low, high)
    )
    weights = curve / curve.sum()
    products = probes * steps + len(counted)
    return {
        "nodes": grid.tolist(),
        "weights": weights.tolist(),
        "products": products,
        "note": "with the ends",
    }


KINDS = {
    "Hessian": HessianLinearOperator,
    "Gauss–Newton": GGNLinearOperator,
    "empirical Fisher": EFLinearOperator,
}
_KEPT: dict[str, Any] = {}


def product(network: Network, name: str) -> dict[str, Any]:
    kind, _, how = name.partition(", ")
    if kind not in KINDS or how == "kept":
        return {"absent": name}
    if name not in _KEPT:
        batches = network.batches if how == "batches" else [network.data]
        _KEPT[name] = _operator(network, KINDS[kind], batches)
    return in_torch.summary(_KEPT[name] @ network.vector, network.vector)


ESTIMATORS = {"Hutchinson": hutchinson_trace, "Hutch++": hutchpp_trace, "XTrace": xtrace}


def estimate(problem: Problem, matrix: str, estimator: str, budget: int, trials: int) -> dict[str, Any]:
    """It returns no errors."""
    A, function = torch.from_numpy(problem.arrays[f"matrix/{matrix}"]), ESTIMATORS[estimator]
    torch.manual_seed(0)
    return {"means": [float(function(A, budget)) for _ in range(trials)], "errors": None}
