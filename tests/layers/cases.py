"""Small networks, one for every way in which a leaf can take part: plain functions of a dict of params."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    model_fn: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[int, ...]
    vocab: int = 0

    def params(self, seed: int = 0) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        return {k: jnp.asarray(rng.normal(size=shape) / 2) for k, shape in self.shapes.items()}

    def batch(self, num: int = 3, seed: int = 1) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(seed)
        shape = (num, *self.inputs)
        x = rng.integers(self.vocab, size=shape) if self.vocab else rng.normal(size=shape)
        return jnp.asarray(x), jnp.asarray(rng.integers(2, size=num))

    def loss_fn(self, params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        logits = self.model_fn(params, x)
        chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        chosen = chosen.reshape(len(labels), *[1] * (logits.ndim - 2), -1)
        chosen = jnp.broadcast_to(chosen, logits.shape)
        losses = -jnp.sum(chosen * jax.nn.log_softmax(logits), axis=-1)
        return jnp.mean(losses)


def dense(p, x):
    hidden = jnp.tanh(x @ p["w"] + p["b"][None])
    return hidden @ p["v"].T - p["c"][None]


def tokens(p, x):
    """Two positions with a row of logits each."""
    return jnp.tanh(x @ p["w"] + p["b"][None, None]) @ p["v"]


def scaled(p, x):
    x = x - x.mean(axis=-1, keepdims=True)
    x = p["scale"][None, None] * x + p["shift"][None, None]
    return jnp.tanh(x).sum(axis=1)


def heads(p, x):
    """Attention by einsum, the projections stacked along an axis of heads."""
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    mixed = jnp.einsum("bhts,bshe->bthe", weights, v)
    return jnp.einsum("bthe,hed->btd", mixed, p["o"]).mean(axis=1)


def experts(p, x):
    """A batch axis that data and weights share."""
    x = x.reshape(len(x), 2, 2)
    hidden = jnp.tanh(jnp.einsum("bei,eio->beo", x, p["w"]) + p["b"][None])
    return hidden.sum(axis=1)


def vmapped(p, x):
    one = jax.vmap(lambda w, b, row: jnp.tanh(row @ w + b), in_axes=(0, 0, None))
    return jax.vmap(lambda row: one(p["w"], p["b"], row).sum(axis=0))(x)


def convolution(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, p["k"], (2, 1), "SAME", dimension_numbers=numbers)
    x = jnp.tanh(x + p["b"][None, None, None])
    x = jax.lax.conv_general_dilated(
        x,
        p["g"],
        (1, 1),
        ((1, 0), (2, 1)),
        rhs_dilation=(1, 2),
        dimension_numbers=numbers,
        feature_group_count=2,
    )
    return x.sum(axis=(1, 2))


def transposed_convolution(p, x):
    x = jax.lax.conv_transpose(x, p["k"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.tanh(x).sum(axis=1)


def looped(p, x):
    """Every step has a matrix and a bias of its own."""

    def step(carry, layer):
        w, b = layer
        return carry + jnp.tanh(carry @ w + b[None]), None

    x, _ = jax.lax.scan(step, x, (p["w"], p["b"]))
    return x @ p["v"]


def recurrent(p, x):
    """All steps share a matrix."""

    def step(state, now):
        return jnp.tanh(state @ p["w"] + now @ p["u"] + p["b"][None]), None

    state, _ = jax.lax.scan(step, jnp.zeros((len(x), 3), x.dtype), x.swapaxes(0, 1), reverse=True)
    return state @ p["v"]


def nested(p, x):
    """A loop in a loop: one matrix for every outer step, shared by the inner ones."""

    def outer(carry, w):
        def inner(carry, _):
            return jnp.tanh(carry @ w), None

        return jax.lax.scan(inner, carry, None, length=2)[0], None

    return jax.lax.scan(outer, x, p["w"])[0]


def tied(p, x):
    hidden = jnp.tanh(p["e"][x] @ p["w"])
    return hidden.mean(axis=1) @ p["e"].T


def repeated(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"])


def remat(p, x):
    return jax.checkpoint(dense)(p, x)


def moved(p, x):
    """Reshaped, transposed, turned round and multiplied with a number on the way."""
    w = p["w"].reshape(2, 2, 3)[::-1].transpose(2, 0, 1).reshape(3, 4).T
    return jnp.tanh(x @ (-0.5 * w)) + p["b"].reshape(1, 3) / 2


def positions(p, x):
    """Rows that are always the same, and a normalisation by what the function closes over."""
    x = x + p["e"][jnp.array([2, 0, 1])][None]
    return (x * (p["scale"] / jnp.sqrt(jnp.asarray([1.0, 2.0, 3.0], x.dtype)))[None, None]).mean(axis=1)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))


def ruled(p, x):
    """An activation whose derivative is not what its inside has."""
    return doubled(jnp.tanh(x @ p["w"])) * jax.nn.relu6(x[:, :1])


CASES = {
    "dense": Case(dense, {"b": (3,), "c": (2,), "v": (2, 3), "w": (4, 3)}, (4,)),
    "tokens": Case(tokens, {"b": (3,), "v": (3, 2), "w": (4, 3)}, (2, 4)),
    "scale and bias": Case(scaled, {"scale": (4,), "shift": (4,)}, (3, 4)),
    "heads": Case(heads, {"k": (3, 2, 2), "o": (2, 2, 3), "q": (3, 2, 2), "v": (3, 2, 2)}, (4, 3)),
    "experts": Case(experts, {"b": (2, 3), "w": (2, 2, 3)}, (4,)),
    "vmapped": Case(vmapped, {"b": (2, 3), "w": (2, 4, 3)}, (4,)),
    "convolution": Case(convolution, {"b": (4,), "g": (2, 2, 2, 6), "k": (3, 2, 2, 4)}, (4, 4, 2)),
    "transposed convolution": Case(transposed_convolution, {"k": (3, 2, 3)}, (3, 2)),
    "scan": Case(looped, {"b": (2, 3), "v": (3, 2), "w": (2, 3, 3)}, (3,)),
    "recurrent": Case(recurrent, {"b": (3,), "u": (2, 3), "v": (3, 2), "w": (3, 3)}, (4, 2)),
    "nested scans": Case(nested, {"w": (2, 3, 3)}, (3,)),
    "tied embedding": Case(tied, {"e": (5, 3), "w": (3, 3)}, (4,), vocab=5),
    "repeated": Case(repeated, {"w": (3, 3)}, (3,)),
    "remat": Case(remat, {"b": (3,), "c": (2,), "v": (2, 3), "w": (4, 3)}, (4,)),
    "moved": Case(moved, {"b": (3,), "w": (4, 3)}, (4,)),
    "positions": Case(positions, {"e": (4, 3), "scale": (3,)}, (3, 3)),
    "rules of their own": Case(ruled, {"w": (4, 3)}, (4,)),
}
