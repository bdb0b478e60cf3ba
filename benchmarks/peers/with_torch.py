"""PyTorch by hand: a gradient, a product with the graph kept, WoodFisher's inverse, its masks."""

from typing import Any

import torch

from peers import in_torch
from peers.in_torch import Network, load, loss
from peers.problems import Problem
from peers.pruning_in_torch import compact, one_shot, training_step, zeros

__all__ = [
    "compact",
    "inverse_fisher",
    "load",
    "loss",
    "one_shot",
    "product",
    "training_step",
    "zeros",
]

WAYS: dict[str, list[str]] = {}


_KEPT: dict[str, Any] = {}


def product(network: Network, name: str) -> dict[str, Any]:
    params = network.params
    if name not in ("gradient", "Hessian, kept"):
        return {"absent": name}
    if name == "gradient":
        torch.autograd.grad(_loss(network), params)
        return {}
    if name not in _KEPT:
        _KEPT[name] = torch.autograd.grad(_loss(network), params, create_graph=True)
    out = torch.autograd.grad(_KEPT[name], params, network.vector, retain_graph=True)
    return in_torch.summary(out, network.vector)


def _loss(network: Network) -> torch.Tensor:
    return network.criterion(network.model(network.data[0]), network.data[1])


SAMPLE = 16
"""Gradients that the recursion is timed on; all cost the same."""


def inverse_fisher(problem: Problem, name: str) -> dict[str, Any]:
    """One gradient after the other, F⁻¹ ← F⁻¹ − F⁻¹g gᵀF⁻¹ / (m + gᵀF⁻¹g), all blocks together."""
    grads, width = torch.from_numpy(problem.arrays["grads"]), problem.options["block_size"]
    if name == "build":
        few, count = grads[:SAMPLE], len(grads)
        rows = few.reshape(len(few), -1, width)
        inverse = torch.eye(width).repeat(rows.shape[1], 1, 1) / problem.options["damping"]
        for row in rows:
            u = torch.einsum("bij,bj->bi", inverse, row)
            scale = count + torch.einsum("bi,bi->b", row, u)
            inverse -= torch.einsum("bi,bj->bij", u, u / scale[:, None])
        _KEPT["inverse"] = inverse
        return {"share": len(few) / count}
    if "inverse" not in _KEPT:
        inverse_fisher(problem, "build")
    torch.einsum("bij,bj->bi", _KEPT["inverse"], grads[0].reshape(-1, width))
    return {}
