"""The same networks in PyTorch, and the weights of a problem's file in them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from peers.problems import Problem

Tree = dict[str, Any]


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    def __init__(self, params: Tree, state: Tree, options: Tree) -> None:
        super().__init__()
        self.layers = nn.ModuleList(dense(params[f"Dense_{i}"]) for i in range(len(params)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images (batch, pixels)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class ConvNet(nn.Module):
    """3×3 convolutions with BatchNorm, every one but the first at stride 2, and the mean over positions."""

    def __init__(self, params: Tree, state: Tree, options: Tree) -> None:
        super().__init__()
        count, stats = len(options["channels"]), state["batch_stats"]
        self.convs = nn.ModuleList(conv(params[f"Conv_{i}"], 2 if i else 1) for i in range(count))
        self.norms = nn.ModuleList(norm(params, stats, f"BatchNorm_{i}") for i in range(count))
        self.last = dense(params["Dense_0"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images (batch, 1, height, width)."""
        for convolution, normalise in zip(self.convs, self.norms, strict=True):
            x = normalise(convolution(x)).relu()
        return self.last(x.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut without weights, option A."""

    def __init__(self, params: Tree, stats: Tree, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.first, self.second = conv(params["Conv_0"], stride), conv(params["Conv_1"])
        self.norm_1, self.norm_2 = (norm(params, stats, f"BatchNorm_{i}") for i in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same, at the stride."""
        y = self.norm_2(self.second(self.norm_1(self.first(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        padding = (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])
        return (y + nn.functional.pad(shortcut, padding)).relu()


class ResNet(nn.Module):
    """ResNet-(6·blocks + 2)."""

    def __init__(self, params: Tree, state: Tree, options: Tree) -> None:
        super().__init__()
        stats, blocks = state["batch_stats"], options["blocks"]
        self.first, self.norm = conv(params["Conv_0"]), norm(params, stats, "BatchNorm_0")
        strides = [2 if i and i % blocks == 0 else 1 for i in range(3 * blocks)]
        names = [f"ResidualBlock_{i}" for i in range(3 * blocks)]
        self.blocks = nn.ModuleList(
            ResidualBlock(params[name], stats[name], stride)
            for name, stride in zip(names, strides, strict=True)
        )
        self.last = dense(params["Dense_0"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images (batch, 3, height, width)."""
        x = self.norm(self.first(x)).relu()
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(dim=(2, 3)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, normalised first."""

    def __init__(self, params: Tree, heads: int) -> None:
        super().__init__()
        self.heads, attention = heads, params["MultiHeadDotProductAttention_0"]
        self.norm_1, self.norm_2 = (layer_norm(params[f"LayerNorm_{i}"]) for i in range(2))
        self.query, self.key, self.value = (projection(attention[x]) for x in ("query", "key", "value"))
        self.out = projection(attention["out"])
        self.narrow, self.widen = dense(params["Dense_0"]), dense(params["Dense_1"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to the same."""
        y = self.norm_1(x)
        query, key, value = (f(y).unflatten(-1, (self.heads, -1)) for f in (self.query, self.key, self.value))
        # Written out: the fused kernels of PyTorch have no second derivative.
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(-2)
        x = x + self.out(y)
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm_2(x)), approximate="tanh"))


class Encoder(nn.Module):
    """Learnt positions, layers, and a classifier on the mean token."""

    def __init__(self, params: Tree, state: Tree, options: Tree) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(tensor(params["Embed_0"]["embedding"]), freeze=False)
        self.positions = nn.Parameter(tensor(params["positions"]))
        layers = range(options["layers"])
        self.layers = nn.ModuleList(
            EncoderLayer(params[f"EncoderLayer_{i}"], options["heads"]) for i in layers
        )
        self.norm, self.last = layer_norm(params["LayerNorm_0"]), dense(params["Dense_0"])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of token ids (batch, tokens)."""
        x = self.embedding(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.last(self.norm(x).mean(dim=1))


TWINS = {"MLP": MLP, "ResNet": ResNet, "encoder": Encoder, "conv net": ConvNet}


class Network(NamedTuple):
    """A model in evaluation mode, its loss, its data."""

    model: nn.Module
    criterion: nn.Module
    data: tuple[torch.Tensor, torch.Tensor]
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    vector: list[torch.Tensor]

    @property
    def params(self) -> list[nn.Parameter]:
        """In the order of the vector."""
        return list(self.model.parameters())


def load(problem: Problem) -> Any:
    """The network of a file; a problem without one is its own numbers.

    The vector's tree goes through the same conversion as the weights'.
    """
    torch.manual_seed(0)
    if problem.kind not in TWINS:
        return problem
    state = problem.tree("state")
    model, like = (
        TWINS[problem.kind](problem.tree(x), state, problem.options).eval() for x in ("params", "vector")
    )
    vector = [p.detach() for p in like.parameters()]
    data = batch_of(problem.arrays["x"], problem.arrays["y"])
    batches = [batch_of(x, y) for x, y in problem.batches()]
    return Network(model, nn.CrossEntropyLoss(), data, batches, vector)


def kernels(network: Network) -> list[nn.Parameter]:
    """The weights of the layers, without biases."""
    return [p for p in network.params if p.ndim > 1]


def loss(network: Network) -> float:
    """At all the data."""
    with torch.no_grad():
        return float(network.criterion(network.model(network.data[0]), network.data[1]))


def batch_of(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with their channels first, labels as PyTorch wants them."""
    inputs = tensor(x if x.ndim < 4 else x.transpose(0, 3, 1, 2))
    return (inputs if inputs.is_floating_point() else inputs.long()), torch.as_tensor(y).long()


def like(vector: torch.Tensor, params: list[Any]) -> Iterator[torch.Tensor]:
    """A flat vector in the shapes of the params."""
    return (
        part.view_as(p) for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True)
    )


def flat(tensors: Any) -> torch.Tensor:
    """One vector of many tensors."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def dense(params: Tree) -> nn.Module:
    return _filled(nn.utils.skip_init(nn.Linear, *params["kernel"].shape), params["kernel"].T, params["bias"])


def projection(params: Tree) -> nn.Module:
    """To or from heads, as one matrix."""
    kernel, bias = params["kernel"], params["bias"].reshape(-1)
    outputs = len(bias)
    return dense({"kernel": kernel.reshape(-1, outputs), "bias": bias})


def conv(params: Tree, stride: int = 1) -> nn.Module:
    kernel = params["kernel"].transpose(3, 2, 0, 1)
    outputs, inputs = kernel.shape[:2]
    module = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return _filled(module, kernel)


def norm(params: Tree, stats: Tree, name: str) -> nn.Module:
    """BatchNorm with its running statistics."""
    module = nn.BatchNorm2d(len(params[name]["scale"]))
    module.running_mean.copy_(tensor(stats[name]["mean"]))
    module.running_var.copy_(tensor(stats[name]["var"]))
    return _filled(module, params[name]["scale"], params[name]["bias"])


def layer_norm(params: Tree) -> nn.Module:
    return _filled(nn.LayerNorm(len(params["scale"]), eps=1e-6), params["scale"], params["bias"])


def _filled(module: nn.Module, weight: np.ndarray, bias: np.ndarray | None = None) -> nn.Module:
    module.weight.data = tensor(weight)
    if bias is not None:
        module.bias.data = tensor(bias)
    return module


Multiply = Callable[[torch.Tensor], torch.Tensor]
_KEPT: dict[str, tuple[Multiply, torch.Tensor]] = {}


def product(
    network: Network, name: str, kinds: dict[str, Callable[[Network, Any], Multiply]]
) -> dict[str, Any]:
    """With a matrix of a library's, made at the first call and kept, at one batch or over all."""
    kind, _, how = name.partition(", ")
    if kind not in kinds or how == "kept":
        return {"absent": name}
    if name not in _KEPT:
        batches = network.batches if how == "batches" else [network.data]
        _KEPT[name] = kinds[kind](network, batches), flat(network.vector)
    multiply, vector = _KEPT[name]
    return summary(multiply(vector), vector)


def summary(product: Any, vector: Any) -> dict[str, float]:
    """Norm, and part along the vector: enough to tell that two products are the same."""
    flat_product, flat_vector = (x if torch.is_tensor(x) else flat(x) for x in (product, vector))
    norm = torch.linalg.vector_norm(flat_product, dtype=torch.float64)
    return {"norm": float(norm), "along": float(flat_product.double() @ flat_vector.double())}
