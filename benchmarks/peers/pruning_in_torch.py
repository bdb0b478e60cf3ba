"""The same in PyTorch: `torch.nn.utils.prune`, and WoodFisher's way by hand."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from peers import in_torch, problems
from peers.in_torch import Network
from peers.problems import Problem

_KEPT: dict[Any, Any] = {}

# -- at one go -------------------------------------------------------------------------------------


def one_shot(problem: Problem, rule: str, seed: int) -> dict[str, Any]:
    """By the library's magnitudes, or by WoodFisher's inverse, built once for all sparsities."""
    if rule not in ("magnitude", "WoodFisher"):
        return {"absent": rule}
    kernels = list(problem.part(f"net/{seed}").values())
    layers = {
        f"Dense_{i}": {"kernel": k, "bias": np.zeros(k.shape[1], k.dtype)} for i, k in enumerate(kernels)
    }
    model, sparsities = in_torch.MLP(layers, {}, {}), problem.options["sparsities"]
    if rule == "magnitude":
        found = [_by_magnitude(copy.deepcopy(model), sparsity) for sparsity in sparsities]
    else:
        inverses = _inverses(model, problem)
        found = [_by_inverses(model, inverses, sparsity) for sparsity in sparsities]
    return {"kernels": [[w.T.reshape(-1).tolist() for w in weights] for weights in found]}


def _by_magnitude(model: nn.Module, sparsity: float) -> list[torch.Tensor]:
    chosen = [(layer, "weight") for layer in model.layers]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=sparsity)
    return [layer.weight.detach() for layer in model.layers]


def _inverses(model: nn.Module, problem: Problem) -> list[torch.Tensor]:
    """F⁻¹ ← F⁻¹ − F⁻¹g gᵀF⁻¹ / (m + gᵀF⁻¹g), one gradient after the other, a matrix for each layer."""
    count = problem.options["grads"]
    x, y = in_torch.batch_of(*(problem.arrays[f"train/{name}"][:count] for name in "xy"))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    rows = [grads[f"layers.{i}.weight"].flatten(1) for i in range(len(model.layers))]
    return [_recursion(layer, problem.options["damping"]) for layer in rows]


def _recursion(rows: torch.Tensor, damping: float) -> torch.Tensor:
    inverse = torch.eye(rows.shape[1]) / damping
    for row in rows:
        u = inverse @ row
        inverse.addr_(u, u, alpha=-1 / (len(rows) + float(row @ u)))
    return inverse


def _by_inverses(model: nn.Module, inverses: list[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """The lowest w²/[F⁻¹]_qq of all go; every one moves the others as if it went alone."""
    weights = [layer.weight.detach() for layer in model.layers]
    diagonals = [F.diagonal().view_as(w) for F, w in zip(inverses, weights, strict=True)]
    scores = in_torch.flat([w**2 / d for w, d in zip(weights, diagonals, strict=True)])
    gone = torch.zeros(len(scores), dtype=torch.bool)
    gone[scores.argsort()[: round(sparsity * len(scores))]] = True
    found = []
    for F, w, d, g in zip(inverses, weights, diagonals, in_torch.like(gone, weights), strict=True):
        moved = w - (F @ torch.where(g, w / d, 0).reshape(-1)).view_as(w)
        found.append(torch.where(g, 0, moved))
    return found


# -- in training -----------------------------------------------------------------------------------


def training_step(network: Network, name: str) -> dict[str, Any]:
    """Masks of the library's hooks; at a mask step each layer's remaining weights are ranked once more."""
    if name not in _KEPT:
        _KEPT[name] = _loop(network, name)
    model, adam = _KEPT[name]
    if name == "mask step":
        _prune(model, 0.01)
    adam.zero_grad()
    network.criterion(model(network.data[0]), network.data[1]).backward()
    adam.step()
    return {"note": "of what is left 1 % goes, none comes back"} if name == "mask step" else {}


def zeros(network: Network, name: str) -> dict[str, Any]:
    """In the layers as the last step saw them."""
    weights = [layer.weight for layer in _layers(_KEPT[name][0])]
    return {"zeros": float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))}


def _loop(network: Network, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = copy.deepcopy(network.model)
    if name != "bare":
        _prune(model, problems.SPARSITY)
    return model, torch.optim.Adam(model.parameters(), lr=1e-4)


def _prune(model: nn.Module, amount: float) -> None:
    for layer in _layers(model):
        prune.l1_unstructured(layer, "weight", amount)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


# -- smaller ---------------------------------------------------------------------------------------


def compact(network: Network, name: str) -> dict[str, Any]:
    """It has no way to make a network smaller: the zeros stay."""
    if name == "cut":
        _KEPT["small"] = masked(network)
        return {"note": "zeros stay: no smaller, no faster"}
    return measured(network, _KEPT["small"], name)


def masked(network: Network) -> nn.Module:
    """What the second convolution of every block reads least of is zero."""
    model = copy.deepcopy(network.model)
    for block in model.blocks:
        prune.ln_structured(block.second, "weight", amount=0.5, n=1, dim=1)
        prune.remove(block.second, "weight")
    return model


def measured(network: Network, small: nn.Module, name: str) -> dict[str, Any]:
    """Run one of the two, or say what they are."""
    model = network.model if name == "before" else small
    with torch.no_grad():
        logits = model(network.data[0])
    if name != "size":
        return {}
    counts = [sum(p.numel() for p in m.parameters()) for m in (network.model, small)]
    return {"weights": counts, "norm": float(logits.norm())}
