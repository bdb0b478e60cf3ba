"""Whose gradients: what is pulled back from the outputs of an example, and a batch of examples with taps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._sharding import gathered
from hessjax._core._types import Key, Params, settings
from hessjax.curvature._gradients import of_each
from hessjax.curvature._product import as_pytree, described, scalar
from hessjax.curvature._roots import information_root
from hessjax.curvature._weights import by_position, present
from hessjax.curvature.likelihoods import Likelihood
from hessjax.layers._taps import Tapped, tapped


@settings()
class Gradients:
    """What is pulled back from an example's outputs, so that Σ ggᵀ over all rows is the curvature.

    Attributes:
        likelihood: what the outputs mean; None: they are the loss itself, at its own labels.
        num_samples: how many labels are drawn from the likelihood; None: none, its information is exact.
        argument: what the function is called.
    """

    likelihood: Likelihood | None = None
    num_samples: int | None = None
    argument: str = "fn"

    def cotangents(
        self, own: Float[Array, "1 ..."], key: Key | None, outputs: Array
    ) -> Float[Array, "rows ..."]:
        """The rows, each like the outputs, times the roots of the example's shares of the mean.

        Args:
            own: the shares of the example, one or one for each position.
            key: for the labels drawn.
            outputs: of the example, as a batch of one.
        """
        if self.likelihood is None:
            return jnp.sqrt(jnp.sum(own))[None]
        wide = _tree.wide(outputs)
        shares = by_position(own, outputs.shape[:-1])
        factors, shown = jnp.sqrt(shares).astype(wide.dtype)[..., None], present(shares, wide)
        if self.num_samples is None:
            return _roots(self.likelihood, shown, factors)
        keys = jax.random.split(key, self.num_samples)  # type: ignore[arg-type]
        # Scores of positions are independent: a row sums them, and the cross terms vanish on average.
        scores = jax.vmap(self.likelihood.score, in_axes=(0, None))(keys, shown)
        return factors[None] * scores / self.num_samples**0.5

    def of(self, fn: Callable[..., Any]) -> Partial:
        """The function, as one that refuses outputs which cannot be pulled back from."""
        return Partial(_outputs, self, as_pytree(fn))


def _outputs(gradients: Gradients, fn: Partial, params: Params, *args: Any) -> Array:
    if gradients.likelihood is None:
        return scalar(fn, args, gradients.argument)(params)
    outputs = fn(params, *args)
    if not isinstance(outputs, jax.Array) or outputs.ndim < 2:
        raise TypeError(
            f"`{gradients.argument}` must return one array with a likelihood, examples first and the "
            f"outputs of each last, got {described(outputs)}."
        )
    return outputs


def _roots(likelihood: Likelihood, outputs: Array, factors: Array) -> Float[Array, "rows ..."]:
    """For every position and column of the root of its information a row, zero at all other positions."""
    information = as_pytree(likelihood.information)
    positions = outputs.reshape(-1, outputs.shape[-1])
    roots = factors.reshape(-1, 1, 1) * jax.vmap(lambda z: information_root(information, z))(positions)
    rows = jnp.einsum("pq,pck->pkqc", jnp.eye(len(positions), dtype=roots.dtype), roots)
    return rows.reshape(-1, *outputs.shape)


def tapped_batch(
    gradients: Gradients,
    fn: Callable[..., Any],
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."],
    keys: Key | None,
) -> tuple[tuple[Tapped, ...], ...]:
    """Inputs and output gradients of every use of every leaf, with a leading axis of examples."""

    def of_example(example: tuple[Any, ...]) -> tuple[tuple[Tapped, ...], ...]:
        (batch, key, own), *rest = example
        key = None if key is None else key[0]
        pulled = functools.partial(gradients.cotangents, own, key)
        return tapped(gradients.of(fn), params, (batch, *rest), pulled)

    return of_each(of_example, ((args[0], keys, shares), *args[1:]))


def whole_batch(batch: Any) -> Any:
    """The batch, whole on every device of an explicit mesh; on automatic ones as it is.

    Where axes are explicit every sum over examples would have to say where it goes.
    """
    return jax.tree.map(lambda x: gathered(x) if isinstance(x, jax.Array) else x, batch)
