"""torch-pruning (arXiv 2301.12900): what depends on a channel is found by tracing, and cut together."""

from typing import Any

import torch_pruning
from torch import nn

from peers import pruning_in_torch
from peers.in_torch import Network, load, loss

__all__ = ["compact", "load", "loss"]

WAYS: dict[str, list[str]] = {}
_KEPT: dict[str, Any] = {}


def compact(network: Network, name: str) -> dict[str, Any]:
    """The same channels as by magnitude, out of the convolution before and of what follows."""
    if name == "cut":
        _KEPT["small"] = _cut(network)
        return {}
    return pruning_in_torch.measured(network, _KEPT["small"], name)


def _cut(network: Network) -> nn.Module:
    model = pruning_in_torch.masked(network)
    graph = torch_pruning.DependencyGraph().build_dependency(model, network.data[0][:1])
    for block in model.blocks:
        dead = (block.second.weight.abs().sum(dim=(0, 2, 3)) == 0).nonzero().flatten().tolist()
        graph.get_pruning_group(block.first, torch_pruning.prune_conv_out_channels, idxs=dead).prune()
    return model
