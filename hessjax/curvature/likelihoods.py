"""What a model's outputs mean: distributions, as far as a Fisher information needs them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core._types import Key, settings, settings_as_text


@settings()
class Likelihood:
    """A distribution of labels whose parameters are a model's outputs, one example along the last axis.

    Both functions take the outputs of all examples, (..., examples, c), in at least float32.

    Attributes:
        information: `(outputs, tangents) -> F t`: each example's Fisher information in its outputs times
            its tangent, in the shape of the outputs.
        score: `(key, outputs) -> ∇ log p(y)`: the gradient of the log-likelihood in the outputs, at labels y
            drawn from the distribution itself.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> def information(logits, tangents):
        ...     p = jax.nn.sigmoid(logits)
        ...     return p * (1 - p) * tangents
        >>> def score(key, logits):
        ...     p = jax.nn.sigmoid(logits)
        ...     return jax.random.bernoulli(key, p) - p
        >>> bernoulli = hj.likelihoods.Likelihood(information, score)
        >>> A = hj.fisher(lambda w, x: x * w, jnp.zeros(1), jnp.ones((5, 1)), likelihood=bernoulli)
        >>> A(jnp.ones(1)).tolist()
        [0.25]
    """

    information: Callable[[Array, Array], Array]
    score: Callable[[Key, Array], Array]

    def __repr__(self) -> str:
        if self.information in (_softmax_information, _unit_information):
            return "categorical" if self.information is _softmax_information else "gaussian"
        return settings_as_text(self)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not callable(value := getattr(self, field.name)):
                raise TypeError(f"`{field.name}` must be a function, got {value!r}.")


def _softmax_information(
    logits: Float[Array, "... c"], tangents: Float[Array, "... c"]
) -> Float[Array, "... c"]:
    """(diag(p) − p pᵀ) t."""
    # The p pᵀ is never formed: c numbers for each example where the matrix would take c².
    p = jax.nn.softmax(logits)
    return p * (tangents - jnp.sum(p * tangents, axis=-1, keepdims=True))


def _softmax_score(key: Key, logits: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """The drawn class as a one-hot vector, minus p."""
    labels = jax.random.categorical(key, logits)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) - jax.nn.softmax(logits)


def _unit_information(
    _means: Float[Array, "... c"], tangents: Float[Array, "... c"]
) -> Float[Array, "... c"]:
    return tangents


def _normal_score(key: Key, means: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """What the labels drawn add to the means: a standard normal vector."""
    return jax.random.normal(key, means.shape, means.dtype)


categorical = Likelihood(_softmax_information, _softmax_score)
"""Classes, given logits in the last axis: the Fisher of softmax cross-entropy, mean over the examples."""

gaussian = Likelihood(_unit_information, _normal_score)
"""Normal with the outputs as means and variance 1: the Fisher of ½‖outputs − y‖², mean over the examples."""


def __dir__() -> list[str]:
    """What tab completion shows: the names made here, not the imports."""
    return [name for name, value in globals().items() if getattr(value, "__module__", None) == __name__]
