"""PyHessian (arXiv 1912.07145): power iteration, Hutchinson, Lanczos quadrature, by its one class."""

import sys
from typing import Any

import numpy as np
import torch
from pyhessian import hessian
from pyhessian.utils import hessian_vector_product

from peers import in_torch
from peers.in_torch import Network, load, loss
from peers.sampling import STDERR, layer_by_layer, sampled

__all__ = ["density", "layer_traces", "load", "loss", "product", "top", "trace"]

TOLERANCES = [1e-4, 1e-5, 1e-6, 1e-7]
STEPS = [10, 20, 40, 80, 160]
WAYS = {
    "top": [f"tol={tol:g}" for tol in TOLERANCES],
    "trace": ["its own stop, tol=1e-3", "until 5 % standard error"],
    "density": [f"{m} steps" for m in STEPS],
    "layer_traces": ["layer by layer, the others frozen"],
}


def _made(network: Network) -> tuple[Any, list[int]]:
    """The class with the data as it wants it; and a list that grows with every product."""
    one = len(network.batches) == 1
    data = {"data": network.data} if one else {"dataloader": network.batches}
    made, counted = hessian(network.model, network.criterion, cuda=False, **data), []
    place, name = (
        (sys.modules["pyhessian.hessian"], "hessian_vector_product")
        if one
        else (made, "dataloader_hv_product")
    )
    inner = hessian_vector_product if one else made.dataloader_hv_product

    def counting(*args: Any) -> Any:
        counted.append(1)
        return inner(*args)

    setattr(place, name, counting)
    return made, counted


def top(network: Network, way: int, k: int) -> dict[str, Any]:
    made, counted = _made(network)
    values, _ = made.eigenvalues(maxIter=1000, tol=TOLERANCES[way], top_n=k)
    return {"values": [float(v) for v in values], "products": len(counted)}


def trace(network: Network, way: int) -> dict[str, Any]:
    made, _ = _made(network)
    if way == 0:
        return sampled(lambda: made.trace(maxIter=5000), np.inf, least=1)
    return sampled(_sampler(made), STDERR)


def _sampler(made: Any) -> Any:
    return lambda: made.trace(maxIter=20, tol=0)  # it never stops by itself


def layer_traces(network: Network, way: int) -> dict[str, Any]:
    """It takes all params that require gradients: the others are frozen meanwhile."""
    try:
        return layer_by_layer(in_torch.kernels(network), lambda p: _sampler(_of_layer(network, p)))
    finally:
        network.model.requires_grad_(True)


def _of_layer(network: Network, chosen: torch.nn.Parameter) -> Any:
    for p in network.params:
        p.grad = None
        p.requires_grad_(p is chosen)
    return _made(network)[0]


def density(network: Network, way: int, probes: int) -> dict[str, Any]:
    made, counted = _made(network)
    torch.eig = _eig
    nodes, weights = made.density(iter=STEPS[way], n_v=probes)
    return {
        "nodes": [float(x) for run in nodes for x in run],
        "weights": [float(x) for run in weights for x in run],
        "products": len(counted),
        "note": "it calls `torch.eig`, which PyTorch has removed: put back for this row",
    }


def _eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What `torch.eig` returned, for a symmetric matrix: real and imaginary parts, and the vectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


_KEPT: dict[str, Any] = {}


def product(network: Network, name: str) -> dict[str, Any]:
    if name == "Hessian, kept":
        if name not in _KEPT:
            _KEPT[name] = hessian(network.model, network.criterion, data=network.data, cuda=False)
        made = _KEPT[name]
        out = hessian_vector_product(made.gradsH, made.params, network.vector)
    elif name == "Hessian, batches":
        made = hessian(network.model, network.criterion, dataloader=network.batches, cuda=False)
        _, out = made.dataloader_hv_product(network.vector)
    else:
        return {"absent": name}
    return in_torch.summary(out, network.vector)
