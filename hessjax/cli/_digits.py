"""The tour's problem: scikit-learn's handwritten digits and a small convolutional network for them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hessjax._core._types import Params
from hessjax.flax import linen_loss


class Digits(NamedTuple):
    """Images (n, 8, 8, 1) in [0, 1] with their digits (n,), in two parts."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]


def load() -> Digits:
    """scikit-learn's 1797 handwritten digits; the same 360 are always kept for testing."""
    raw = load_digits()
    images = (raw.images / 16).astype(np.float32)[..., None]
    parts = train_test_split(
        images, raw.target.astype(np.int32), test_size=360, stratify=raw.target, random_state=0
    )
    train_x, test_x, train_y, test_y = parts
    return Digits((train_x, train_y), (test_x, test_y))


class Network(nn.Module):
    """Two convolutions and two dense layers, 21,546 parameters; smooth, so that the Hessian exists."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Images (n, 8, 8, 1) to logits (n, 10)."""
        x = nn.gelu(nn.Conv(16, (3, 3))(x))
        x = nn.gelu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.gelu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def cross_entropy(logits: Any, batch: Any) -> Any:
    """Mean cross-entropy with labels smoothed by 0.1, which keeps the minimum at finite weights."""
    labels = optax.smooth_labels(jax.nn.one_hot(batch[1], 10), 0.1)
    return optax.softmax_cross_entropy(logits, labels).mean()


NETWORK = Network()
loss_fn = linen_loss(NETWORK, cross_entropy)


class Quality(NamedTuple):
    """Loss and accuracy on a batch, and the fraction of zeros among the weights that pruning may take."""

    loss: Any
    accuracy: Any
    sparsity: Any


@jax.jit
def quality(params: Params, batch: Any) -> Quality:
    """How good a network is, and how sparse its kernels are."""
    logits = NETWORK.apply({"params": params}, batch[0])
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    zeros = sum(jnp.sum(leaf == 0) for leaf in kernels) / sum(leaf.size for leaf in kernels)
    return Quality(cross_entropy(logits, batch), jnp.mean(jnp.argmax(logits, axis=-1) == batch[1]), zeros)
