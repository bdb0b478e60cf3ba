"""Saliencies from the mean gradient, and from none at all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from hessjax._core import _tree
from hessjax._core._types import Params
from hessjax.pruning.saliencies._saliency import Saliency


class MeanGradient(NamedTuple):
    """What `gradient` remembers.

    Attributes:
        mean: a running mean of the gradient, in float32 at least.
        num_updates: of how many.
    """

    mean: Params
    num_updates: Int[Array, ""]


def gradient(decay: float | int = 0.9) -> Saliency:
    """First-order Taylor: |w · ḡ|, the first-order change of the loss when the weight goes.

    Args:
        decay: of the running mean ḡ, in [0, 1): 0 for the last gradient alone.

    Returns:
        A `Saliency` that needs gradients: until the first one all scores are 0. Scores in units of the loss.

    Raises:
        ValueError: if `decay` lies outside [0, 1).

    Cost:
        Two operations and one number per weight and update.

    References:
        Molchanov et al., Pruning convolutional neural networks for resource efficient inference (2016), arXiv
        1611.06440.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params, grads = {"kernel": jnp.array([[3.0, 2.0]])}, {"kernel": jnp.array([[[1.0, 2.0]]])}
        >>> hj.prune_once(params, hj.saliencies.gradient(), 0.5, grads_fn=lambda p: grads).params["kernel"]
        Array([[0., 2.]], dtype=float32)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be in [0, 1), of the running mean, got {decay}.")

    def init(dense: Params) -> MeanGradient:
        return MeanGradient(jax.tree.map(jnp.zeros_like, _tree.wide(dense)), jnp.zeros((), jnp.int32))

    def update(
        state: MeanGradient, grads: Params, dense: Params, mask: Params, /, **extra: Any
    ) -> MeanGradient:
        count = state.num_updates + 1
        share = (1 - decay) / (1 - decay ** count.astype(jnp.float32))  # a mean from the first one on
        mean = jax.tree.map(
            lambda m, g: m + (share * (g.astype(m.dtype) - m)).astype(m.dtype), state.mean, grads
        )
        return MeanGradient(mean, count)

    return Saliency(
        init,
        update,
        scores=lambda state, dense, /, **extra: jax.tree.map(lambda m, w: jnp.abs(m * w), state.mean, dense),
        needs_grads=True,
    )


def random(key: Key[Array, ""]) -> Saliency:
    """A random number for every weight, the same at every mask step: what any other saliency has to beat.

    Args:
        key: of the numbers.

    Returns:
        A `Saliency` without state; scores uniform in [0, 1). Masks of a growing sparsity are nested.

    Cost:
        A random number per weight at a mask step, nothing between.

    Example:
        >>> import jax, jax.numpy as jnp, hessjax as hj
        >>> pruned = hj.prune_once({"kernel": jnp.ones((2, 2))}, hj.saliencies.random(jax.random.key(0)), 0.5)
        >>> int(pruned.params["kernel"].sum())
        2
    """

    def scores(state: Any, dense: Params, /, **extra: Any) -> Params:
        leaves, treedef = jax.tree.flatten(dense)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            treedef, [jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        )

    return Saliency(
        init=lambda dense: (), update=lambda state, grads, dense, mask, /, **extra: state, scores=scores
    )
