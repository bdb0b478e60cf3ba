"""The error that comes from the data being a sample: no number of probes or products removes it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._typing import BatchMatvec, Forms, Vector


class Watched:
    """A matvec over batches that remembers what each batch contributed to every product's vᵀAv."""

    def __init__(self, matvec: BatchMatvec) -> None:
        self._matvec = matvec
        self._seen: list[Forms] = []

    def __call__(self, vector: Vector) -> Vector:
        """The product."""
        product, forms = self._matvec.by_batch(vector)
        self._seen.append(forms)
        return product

    def forms(self) -> Forms:
        """The mean over the products."""
        parts = jnp.mean(jnp.stack([forms.parts for forms in self._seen]), axis=0)
        return Forms(parts, self._seen[0].weights)


@jax.jit
def sampling_error(
    values: Float[Array, "batches ..."], weights: Float[Array, " batches"]
) -> Float[Array, "..."]:
    """The standard error of a mean over batches, from how the batches differ.

    Batches of n_b examples have means of variance σ²/n_b, so Σ n_b (x_b − x̄)²/(B − 1) estimates σ², and the
    mean of all N examples has variance σ²/N. Infinite for a single batch.

    Args:
        values: the mean over each batch.
        weights: the number of examples in each, n_b.
    """
    weights = weights.reshape(-1, *[1] * (values.ndim - 1))
    mean = jnp.sum(weights * values, axis=0) / jnp.sum(weights)
    squares = jnp.sum(weights * (values - mean) ** 2, axis=0)
    variance = squares / (max(len(values) - 1, 1) * jnp.sum(weights))
    return jnp.where(len(values) > 1, jnp.sqrt(variance), jnp.inf)
