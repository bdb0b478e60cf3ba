"""What are the benchmarks run on? Three networks from the literature, a small one, data of their shapes."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from hessjax.flax import linen_loss, linen_model


class Problem(NamedTuple):
    """A loss and a point: `loss_fn(params, *args)`, the cross-entropy of `model_fn(params, *args)`."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    args: tuple[Any, ...]
    model_fn: Callable[..., jax.Array] | None = None

    @property
    def num_params(self) -> int:
        """How many weights there are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    widths: tuple[int, ...] = (1024, 1024)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images (batch, pixels)."""
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, normalised first (Xiong et al. 2020, arXiv 2002.04745)."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, width) to the same."""
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """An encoder with learnt positions and a classifier on the mean token (arXiv 1706.03762)."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    vocabulary: int = 5000
    classes: int = 10

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of token ids (batch, tokens)."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x = EncoderLayer(self.heads)(x)
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(axis=1))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut without weights (He et al. 2016, arXiv 1512.03385, option A)."""

    channels: int
    stride: int = 1
    inner: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) to the same, at the stride; `inner` channels between the two."""
        y = nn.relu(_norm()(_conv(self.inner or self.channels, self.stride)(x)))
        y = _norm()(_conv(self.channels)(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(shortcut, [(0, 0)] * 3 + [(0, self.channels - x.shape[-1])]))


class ResNet(nn.Module):
    """ResNet-(6·blocks + 2) for CIFAR: three stages of residual blocks, BatchNorm on running statistics.

    The stages are 1, 2 and 4 times `channels` wide, or as `stream` says; so are their blocks inside, or as
    `inner` says.
    """

    blocks: int = 3
    channels: int = 16
    classes: int = 10
    stream: tuple[int, ...] | None = None
    inner: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images (batch, height, width, 3)."""
        stream = self.stream or tuple(self.channels * 2**stage for stage in range(3))
        x = nn.relu(_norm()(_conv(stream[0])(x)))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                inner = self.inner[stage] if self.inner else None
                x = ResidualBlock(stream[stage], stride, inner)(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


class SmallConvNet(nn.Module):
    """Two convolutions and two dense layers, enough for 8×8 digits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images (batch, 8, 8, 1)."""
        for channels in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def mlp(quick: bool, batch: int = 512) -> Problem:
    """784-1024-1024-10."""
    module = MLP((64, 64)) if quick else MLP()
    return _problem(module, images(batch, (784,)))


def transformer(quick: bool) -> Problem:
    """6 layers × 384 wide, 12.6 million weights, 16 sentences of 32 tokens."""
    module = Transformer(2, 32, 2, 100) if quick else Transformer()
    tokens = np.random.default_rng(1).integers(module.vocabulary, size=(16, 32), dtype=np.int32)
    return _problem(module, (jnp.asarray(tokens), _labels(16)))


def resnet(quick: bool) -> Problem:
    """ResNet-20, 128 images of CIFAR's shape."""
    module, shape = (ResNet(1, 4), (16, 16, 3)) if quick else (ResNet(), (32, 32, 3))
    return _problem(module, images(8 if quick else 128, shape))


def small_conv_net(batch: int = 256) -> Problem:
    """A network as small as the tour's."""
    return _problem(SmallConvNet(), images(batch, (8, 8, 1)))


def trained_on_digits(widths: tuple[int, ...], steps: int) -> Problem:
    """A perceptron after some steps of Adam on all of scikit-learn's digits; they are its batch."""
    from sklearn.datasets import load_digits  # here: it takes longer to import than jax

    pixels, labels = load_digits(return_X_y=True)
    batch = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)
    problem, tx = _problem(MLP(widths), batch), optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(problem.loss_fn)(params, batch), state)
        return optax.apply_updates(params, updates), state

    params, state = problem.params, tx.init(problem.params)
    for _ in range(steps):
        params, state = step(params, state)
    return problem._replace(params=params)


def dense(matvec: Callable[[Any], Any], like: Any) -> np.ndarray:
    """The matrix of a matvec in float64, 256 columns at a time."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    columns = jax.jit(jax.vmap(lambda v: jax.flatten_util.ravel_pytree(matvec(unravel(v)))[0]))
    parts = [columns(jnp.eye(flat.size, dtype=flat.dtype)[i : i + 256]) for i in range(0, flat.size, 256)]
    matrix = np.concatenate([np.asarray(part, np.float64) for part in parts])
    return (matrix + matrix.T) / 2


def images(batch: int, shape: tuple[int, ...], seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """Gaussian images with labels."""
    return normal(seed, (batch, *shape)), _labels(batch)


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers, drawn on the host: nothing to compile."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def cross_entropy(logits: jax.Array, batch: tuple[jax.Array, jax.Array], *_state: Any) -> jax.Array:
    """Softmax cross-entropy, mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def _problem(module: nn.Module, batch: tuple[jax.Array, jax.Array]) -> Problem:
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch[0])
    variables = jax.tree_util.tree_map_with_path(_initial, shapes)
    params = variables.pop("params")
    args = (batch, variables) if variables else (batch,)
    return Problem(linen_loss(module, cross_entropy), params, args, linen_model(module))


def _initial(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
    """He initialisation without the half minute that compiling a network's `init` can take on a CPU."""
    if len(shape.shape) >= 2:
        fan_in = np.prod(shape.shape[:-1])
        return normal(zlib.crc32(jax.tree_util.keystr(path).encode()), shape.shape) * np.float32(
            np.sqrt(2 / fan_in)
        )
    return jnp.full(shape.shape, float(path[-1].key in ("scale", "var")), shape.dtype)


def _labels(batch: int) -> jax.Array:
    return jnp.arange(batch) % 10


def _conv(channels: int, stride: int = 1) -> nn.Module:
    return nn.Conv(channels, (3, 3), stride, padding=1, use_bias=False)


def _norm() -> nn.Module:
    return nn.BatchNorm(use_running_average=True)
