"""Matvecs made of matvecs: weighted sums and shifts."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int

from hessjax._core import _tree
from hessjax._core._messages import checked_finite, is_number, shown
from hessjax._core._types import Matvec, Vector
from hessjax.curvature._product import as_pytree


def weighted_sum(
    matvecs: Sequence[Matvec],
    weights: Sequence[ArrayLike] | ArrayLike | None = None,
    shift: ArrayLike = 0.0,
) -> Matvec:
    """The matvec v ↦ Σᵢ wᵢ Aᵢ v + shift · v.

    Scaling is `weighted_sum([A], [2.0])`, damping `weighted_sum([A], shift=1e-3)`, and what the
    Gauss–Newton matrix lacks of the Hessian `weighted_sum([H, G], [1.0, -1.0])`.

    Args:
        matvecs: symmetric linear maps on the same params; any of them may be one that streams from the host,
            such as `over_batches`.
        weights: a number for each, or an array (k,); None: 1 for all.
        shift: the multiple of the identity to add, in the units of the matvecs.

    Returns:
        The matvec, a pytree as its parts are: other weights, shifts or parts of the same shapes compile
        nothing anew. It can be traced if all its parts can. (Of a part that is `over_batches`, the sampling
        error does not come through.)

    Raises:
        ValueError: no matvecs, or not as many weights.
        TypeError: `matvecs` is not a sequence of callables.

    Cost:
        One product of each part; two vectors, float32 at least.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> w = jnp.array([1.0, 2.0])
        >>> A = hj.hessian(lambda w: jnp.sum(w**2), w)
        >>> B = hj.hessian(lambda w: jnp.sum(w**3), w)
        >>> hj.weighted_sum([A, B], [1.0, 0.5], shift=0.1)(jnp.ones(2)).tolist()
        [5.1, 8.1]
    """
    _check_matvecs(matvecs)
    # As arrays they are leaves of the Partial: other weights or another damping retrace nothing.
    weights = jnp.asarray([1.0] * len(matvecs) if weights is None else _checked_weights(weights), float)
    if weights.shape != (len(matvecs),):
        raise ValueError(
            f"`weights` must hold one number for each of the {len(matvecs)} matvecs, "
            f"got shape {weights.shape}."
        )
    if np.ndim(shift):
        raise ValueError(f"`shift` must be one number, got shape {np.shape(shift)}.")
    shift = jnp.asarray(checked_finite("shift", shift), float)
    return Partial(_sum, tuple(map(as_pytree, matvecs)), weights, shift)


def _checked_weights(weights: Any) -> Any:
    listed = isinstance(weights, Sequence) and not isinstance(weights, str)
    if is_number(weights) or (listed and all(map(is_number, weights))):
        return weights
    if not isinstance(weights, (jax.Array, np.ndarray)) or not jnp.issubdtype(weights.dtype, jnp.number):
        raise TypeError(f"`weights` must be numbers, one for each of `matvecs`, got {shown(weights)}.")
    return weights


def _check_matvecs(matvecs: Any) -> None:
    if not isinstance(matvecs, Sequence) or not all(map(callable, matvecs)):
        raise TypeError(
            f"`matvecs` must be a sequence of matvecs, got {type(matvecs).__name__}: put one into a list."
        )
    if not matvecs:
        raise ValueError("`matvecs` must hold at least one matvec, got none.")


def _sum(
    matvecs: tuple[Matvec, ...], weights: Float[Array, " k"], shift: Float[Array, ""], vector: Vector
) -> Vector:
    _tree.check_floating(vector, "vector")
    # A loop on the host over small compiled steps, not one jit: a part may stream its data from the host.
    total = _shifted(shift, vector)
    for index, matvec in enumerate(matvecs):
        # The index is traced and the sum donated: one compiled step and one buffer serve every part.
        total = _accumulate(total, weights, index, matvec(vector))
    return _narrow(total, vector)


@jax.jit
def _shifted(shift: Float[Array, ""], vector: Vector) -> Vector:
    return _tree.scale(shift, _tree.wide(vector))


@functools.partial(jax.jit, donate_argnums=0)
def _accumulate(total: Vector, weights: Float[Array, " k"], index: Int[Array, ""], product: Vector) -> Vector:
    _tree.check_vector(product, total, "matvec(vector)", "vector")
    return _tree.add_scaled(total, weights[index], product)


@functools.partial(jax.jit, donate_argnums=0)
def _narrow(total: Vector, like: Vector) -> Vector:
    return _tree.cast_like(total, like)


# -- preconditioning -----------------------------------------------------------------------------
