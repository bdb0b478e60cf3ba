"""scikit-learn's handwritten digits and a small convolutional network for them: data, loss, training."""

from collections.abc import Callable, Iterator
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


BATCH = 128
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


def minibatches(data: tuple[Any, Any], rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    """Shuffled batches of 128 without end; the rest of every pass is dropped."""
    while True:
        order = rng.permutation(len(data[1]))
        # Batches of one shape, for which a step is compiled once.
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield data[0][chosen], data[1][chosen]


def trained(
    data: Digits, steps: int, seed: int = 0, tell: Callable[[int, int], None] | None = None
) -> Params:
    """The dense network: AdamW with a cosine schedule, over shuffled batches.

    Args:
        data: what `load` gives.
        steps: how many updates.
        seed: of weights and batches.
        tell: told after each update how many were made, and how many there will be.
    """
    params = jax.jit(NETWORK.init)(jax.random.key(seed), data.train[0][:1])["params"]
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state, batches = tx.init(params), minibatches(data.train, np.random.default_rng(seed))
    for count in range(steps):
        params, state = step(params, state, next(batches))
        if tell is not None:
            tell(count + 1, steps)
    return params
