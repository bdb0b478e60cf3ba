"""curvlinops: linear operators for SciPy's `eigsh`, and estimators of its own."""

from typing import Any

import numpy as np
import torch
from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    hutchinson_trace,
    hutchpp_trace,
    lanczos_approximate_spectrum,
    xtrace,
)
from scipy.sparse.linalg import LinearOperator, eigsh

from peers import in_torch
from peers.in_torch import Network, load, loss
from peers.layers import of_matrix
from peers.problems import Problem
from peers.sampling import STDERR, layer_by_layer, sampled

__all__ = ["density", "estimate", "layer_traces", "layers", "load", "loss", "product", "top", "trace"]

TOLERANCES = [1e-4, 1e-6, 0]
STEPS = [10, 20, 40, 80, 160]
KAPPA = 30.0
WAYS = {
    "top": [f"SciPy's eigsh, tol={tol:g}" for tol in TOLERANCES],
    "trace": ["hutchinson_trace, one at a time until 5 %"],
    "density": [f"{m} steps" for m in STEPS],
    "layer_traces": ["an operator for each layer, hutchinson_trace"],
}


def _operator(
    network: Network, kind: Any = HessianLinearOperator, batches: Any = None, params: Any = None
) -> Any:
    batches, params = batches or network.batches, params or network.params
    model, criterion = network.model, network.criterion
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
    return sampled(_sampler(_operator(network)), STDERR)


def _sampler(operator: Any) -> Any:
    return lambda: [float(hutchinson_trace(operator, num_matvecs=1))]


def layer_traces(network: Network, way: int) -> dict[str, Any]:
    """Of a matrix for each layer's weights alone."""
    params = in_torch.kernels(network)
    return layer_by_layer(params, lambda p: _sampler(_operator(network, params=[p])))


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


def _multiply(kind: Any) -> Any:
    return lambda network, batches: _operator(network, kind, batches).__matmul__


KINDS = {
    "Hessian": _multiply(HessianLinearOperator),
    "Gauss–Newton": _multiply(GGNLinearOperator),
    "empirical Fisher": _multiply(EFLinearOperator),
}


def product(network: Network, name: str) -> dict[str, Any]:
    found = in_torch.product(network, name, KINDS)
    # The gradient of a LayerNorm's weight, differentiated forwards in its input; written out it is right.
    normed = any(isinstance(module, torch.nn.LayerNorm) for module in network.model.modules())
    wrong = {"note": "off, as PyTorch is, in the forward derivative of LayerNorm's backward pass"}
    return {**found, **(wrong if normed and name.startswith("Hessian") and "norm" in found else {})}


ESTIMATORS = {"Hutchinson": hutchinson_trace, "Hutch++": hutchpp_trace, "XTrace": xtrace}


def estimate(problem: Problem, matrix: str, estimator: str, budget: int, trials: int) -> dict[str, Any]:
    """It returns no errors."""
    A, function = torch.from_numpy(problem.arrays[f"matrix/{matrix}"]), ESTIMATORS[estimator]
    torch.manual_seed(0)
    return {"means": [float(function(A, budget)) for _ in range(trials)], "errors": None}


_KEPT: dict[str, Any] = {}


def layers(network: Network, name: str, fisher: str, positions: str) -> dict[str, Any]:
    """Of the layers that it has: dense ones and convolutions."""
    kind = EKFACLinearOperator if name == "EKFAC" else KFACLinearOperator
    key = f"{kind.__name__}, {fisher}, {positions}"
    if name in ("factors", "EKFAC") or key not in _KEPT:
        _KEPT[key] = _kronecker(network, kind, fisher, positions)
    if name == "factors":
        return _factors(_KEPT[key])
    if name == "inverse":
        inverse = f"inverse, {key}"
        if inverse not in _KEPT:
            _KEPT[inverse] = KFACInverseLinearOperator(_KEPT[key], damping=1e-2, use_exact_damping=True)
        key = inverse
    _, vector = _covered(network)
    return {**in_torch.summary(_KEPT[key] @ vector, vector), "compared": ["norm", "along"]}


def _kronecker(network: Network, kind: Any, fisher: str, positions: str) -> Any:
    params, _ = _covered(network)
    options = {"fisher_type": {"exact": "type-2"}.get(fisher, fisher), "kfac_approx": positions}
    matrix = kind(
        network.model, network.criterion, params, network.batches, check_deterministic=False, **options
    )
    if kind is KFACLinearOperator:
        matrix.compute_kronecker_factors()
    return matrix


def _factors(matrix: Any) -> dict[str, Any]:
    names = list(matrix._input_covariances)
    sides = {"left": matrix._input_covariances, "right": matrix._gradient_covariances}
    found = {side: [of_matrix(factors[n].numpy()) for n in names] for side, factors in sides.items()}
    return {**found, "compared": list(found)}


def _covered(network: Network) -> tuple[list[Any], torch.Tensor]:
    """Its params, and the vector's part on them."""
    modules = [m for m in network.model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    chosen = {id(p) for m in modules for p in m.parameters()}
    pairs = [(p, v) for p, v in zip(network.params, network.vector, strict=True) if id(p) in chosen]
    return [p for p, _ in pairs], in_torch.flat([v for _, v in pairs])
