"""The error that comes from the data being a sample: no number of probes or products removes it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from hessjax._typing import BatchMatvec, Forms, Vector


@dataclasses.dataclass(eq=False)
class Watched:
    """A matvec over batches that remembers what each batch contributed to every product's vᵀAv."""

    matvec: BatchMatvec
    seen: list[Forms] = dataclasses.field(default_factory=list)

    def __call__(self, vector: Vector) -> Vector:
        """The product."""
        product, forms = self.matvec.by_batch(vector)
        self.seen.append(forms)
        return product

    def forms(self, num_products: Any) -> Forms | None:
        """The mean over that many products; None if some were made elsewhere, in a run since restored."""
        if len(self.seen) != int(num_products):
            return None
        parts = jnp.mean(jnp.stack([forms.parts for forms in self.seen]), axis=0)
        return Forms(parts, self.seen[0].weights)


def sampling_error(values: Any, weights: Any) -> Any:
    """The standard error of a mean over batches, from how the batches differ.

    Batches of n_b examples have means of variance σ²/n_b, so Σ n_b (x_b − x̄)²/(B − 1) estimates σ², and the
    mean of all N examples has variance σ²/N. Infinite for a single batch.

    Args:
        values: (batches, ...) the mean over each batch; of numpy or of jax.
        weights: (batches,) the number of examples in each, n_b.

    Returns:
        (...) the standard error, in the units of the values.
    """
    weights = weights.reshape(-1, *[1] * (values.ndim - 1))
    mean = (weights * values).sum(axis=0) / weights.sum()
    if len(values) < 2:
        return abs(mean) + math.inf
    return ((weights * (values - mean) ** 2).sum(axis=0) / ((len(values) - 1) * weights.sum())) ** 0.5
