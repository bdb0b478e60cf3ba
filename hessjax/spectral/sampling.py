"""The error that comes from the data being a sample: no number of probes or products removes it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
