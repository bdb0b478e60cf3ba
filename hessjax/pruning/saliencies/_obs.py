"""Optimal brain surgeon: prune what the loss misses least, and let the other weights make up for it."""

from typing import Literal, TypeAlias

from hessjax._core._types import Relative, Scalar, Tolerance
from hessjax.pruning.saliencies._saliency import Saliency
from hessjax.pruning.saliencies._second_order import DiagonalOnly, SecondOrder

Update: TypeAlias = Literal["joint", "greedy", "summed", "none"]
"""How the kept weights move."""


def obs(
    update: Update = "joint",
    damping: Tolerance | Scalar = Relative(0.01),  # noqa: B008 (a value, never changed)
    block_size: int | None = None,
    *,
    num_grads: int | None = None,
    batch_size: int = 1,
) -> Saliency:
    """Optimal brain surgeon with the empirical Fisher: scores ½ w_q² / [F⁻¹]_qq, and the kept weights move.

    With F = 1/m Σ g gᵀ + λI, the loss rises by ½ δᵀFδ. Pruning one weight costs least when the others move
    by −F⁻¹e_q w_q / [F⁻¹]_qq; pruning a set Q when they move by −F⁻¹_{:,Q} [F⁻¹_QQ]⁻¹ w_Q, which then costs
    ½ w_Qᵀ [F⁻¹_QQ]⁻¹ w_Q. Weights pruned before stay at zero and count for nothing.

    Args:
        update: how the kept weights make up for the pruned ones: `"joint"`, the best move for all that go
            together; `"greedy"`, the same move for a set chosen one weight at a time, each after the others
            have made up for the last (under `unstructured()`); `"summed"`, the single moves added up, as
            WoodFisher does; `"none"`.
        damping: λ in loss per squared parameter, or `hj.relative(r)`: r times the mean of diag F over the
            weights still there. (Of gradients that are all zero any λ will do: the scores then rank by
            magnitude.) What is too small for the precision is an error, as of `inverse_fisher`. Traced code
            cannot raise: inside a jitted `tx.update` the weights of such a block score NaN, which ranks below
            all others and which `PruneState.num_nan` counts; those that stay do not move, and the predicted
            increase is NaN.
        block_size: F couples only the weights of a block: so many consecutive ones of a leaf. None: all
            weights of all leaves.
        num_grads: in training, F is made from the last `num_grads` gradients of the loop. None: the
            gradients are passed at every update, as `tx.update(grads, state, params,
            per_example_grads=block)`; so it is by `prune_once`. Only mask steps read the block: between them
            the last one will do.
        batch_size: b, how many examples each gradient is a mean over; such means make F smaller by b, which
            is made up for.

    Returns:
        A `Saliency` that needs gradients; scores in units of the loss. Under a pattern that removes groups Q
        they are ½ w_Qᵀ [F⁻¹_QQ]⁻¹ w_Q, what the group costs if all others make up for it, in equal parts;
        under n:m those of its weights one after the other.

    Raises:
        ValueError: an `update` not listed; a damping that is not positive; `block_size`, `num_grads` or
            `batch_size` below 1. When scored or moved, outside `jit`: no gradients; gradients that are not
            finite (names the leaf); λ too small for the precision (names the block, its leaf, and a damping
            that should do).

    Cost:
        Scores, and once more the move: the factors of `inverse_fisher`, 6·m·B operations and B numbers for
        each weight where a block of B has no more weights than there are gradients (m), else 2·m² operations
        and m numbers. With k = min(m, B), `"greedy"` takes d·(2·k² + 2·k·B) more in B steps one after the
        other, and groups of g weights a Cholesky factor of a matrix of min(g, k) for each. `num_grads`
        gradients are kept in the optimizer's state: let the jitted step donate it (`donate_argnums`), or
        every update copies them all.

    References:
        Hassibi and Stork, Second order derivatives for network pruning: Optimal brain surgeon (1993).
        Singh and Alistarh, WoodFisher (2020), arXiv 2004.14340, eqs. 8-10.
        Frantar et al., M-FAC (2021), arXiv 2107.03356: gradients of the training loop.
        Kurtic et al., The optimal BERT surgeon (2022), arXiv 2203.07259, eq. 4: sets of weights.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
        >>> grads = {"kernel": jnp.array([[[1.0, 1.0]]])}  # the loss sees only the sum of the two weights
        >>> pruned = hj.prune_once(params, hj.saliencies.obs(damping=1e-4), 0.5, grads_fn=lambda p: grads)
        >>> pruned.params["kernel"].round(2)
        Array([[0., 3.]], dtype=float32)
    """
    return SecondOrder(num_grads, batch_size, update, damping, block_size, with_slope=False)


def wood_taylor(
    update: Update = "joint",
    damping: Tolerance | Scalar = Relative(0.01),  # noqa: B008 (a value, never changed)
    block_size: int | None = None,
    *,
    num_grads: int | None = None,
    batch_size: int = 1,
) -> Saliency:
    """Optimal brain surgeon where the gradient ḡ is not zero: the kept weights also take a Newton step.

    The loss changes by ḡ·δ + ½ δᵀFδ, least at u = w − F⁻¹ḡ; scores ½ u_q² / [F⁻¹]_qq, and the joint move is
    −F⁻¹ḡ − F⁻¹_{:,Q} [F⁻¹_QQ]⁻¹ u_Q. ḡ is the mean of the gradients that make F.

    Args:
        update: as in `obs`.
        damping: as in `obs`; with little of it the step is long.
        block_size: as in `obs`.
        num_grads: as in `obs`.
        batch_size: as in `obs`.

    Returns:
        A `Saliency` that needs gradients; scores in units of the loss. The increase it predicts includes
        what the Newton step gains, and so may be negative.

    Raises:
        ValueError: as `obs`.

    Cost:
        As `obs`.

    References:
        Singh and Alistarh, WoodFisher (2020), arXiv 2004.14340, section 6 (WoodTaylor).

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
        >>> grads = {"kernel": jnp.array([[[1.0, 0.0]], [[1.0, 2.0]]])}
        >>> pruned = hj.prune_once(params, hj.saliencies.wood_taylor(damping=1e-4), 0.5,
        ...                                                          grads_fn=lambda p: grads)
        >>> pruned.params["kernel"].round(2)
        Array([[0., 2.]], dtype=float32)
    """
    return SecondOrder(num_grads, batch_size, update, damping, block_size, with_slope=True)


def obd(*, num_grads: int | None = None, batch_size: int = 1) -> Saliency:
    """Optimal brain damage: ½ w_q² F_qq with the diagonal of the empirical Fisher; nothing else moves.

    Args:
        num_grads: as in `obs`.
        batch_size: as in `obs`.

    Returns:
        A `Saliency` that needs gradients; scores in units of the loss.

    Raises:
        ValueError: `num_grads` or `batch_size` below 1.

    Cost:
        One pass over the gradients at a mask step.

    References:
        LeCun et al., Optimal brain damage (1990).

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[3.0, 2.0]])}
        >>> grads = {"kernel": jnp.array([[[1.0, 2.0]]])}
        >>> hj.prune_once(params, hj.saliencies.obd(), 0.5, grads_fn=lambda p: grads).params["kernel"]
        Array([[0., 2.]], dtype=float32)
    """
    return DiagonalOnly(num_grads, batch_size)
