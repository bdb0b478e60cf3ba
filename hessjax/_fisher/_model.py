"""The quadratic model that optimal brain surgeon minimises, and its minima with some weights pruned.

Around weights w the loss changes by ḡ·δ + ½ δᵀFδ, F = b/m Σ gᵢgᵢᵀ + λI. It is least at u = w − F⁻¹ḡ. With
δ = −w on a set Q of weights it is least if the rest K move by

    δ_K = −F_KK⁻¹ (F_KQ δ_Q + ḡ_K),    which is    −F⁻¹ḡ − F⁻¹_{:,Q} [F⁻¹_QQ]⁻¹ u_Q on K.

The first form needs the factors of fewer weights only, made as those of all are; and F_KK⁻¹ is applied to a
combination of the rows.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._types import Amount, Block, Params, Relative, Scalar
from hessjax._fisher._blocking import Blocking, Parts, Rows
from hessjax._fisher._inverse_fisher import InverseFisher, inverse_of, measured
from hessjax._fisher._rows import Totals, coefficients, read

_NOTHING = 1e-12


class Model(NamedTuple):
    """ḡ·δ + ½ δᵀFδ, over the weights that are there.

    Attributes:
        blocking: how the weights are cut into blocks.
        rows: √b g, zero for weights that are not there.
        totals: what the gradients add up to.
        shift: κ = mλ.
        scale: b.
        slope: the number c for which ḡ = c Σ rowsᵢ; None where ḡ is taken to vanish.
    """

    blocking: Blocking
    rows: tuple[Rows, ...]
    totals: Totals
    shift: Scalar
    scale: Scalar
    slope: Scalar | None

    def inverse(self, kept: Parts | None = None) -> InverseFisher:
        """F⁻¹, or F_KK⁻¹ of the weights marked; measured, and NaN in blocks where it is not accurate."""
        rows = self.rows
        if kept is not None:
            # Zeros rather than fewer columns: shapes stay static, and F is λI there, apart from K.
            rows = tuple(jnp.where(k[:, None] > 0, x, 0) for k, x in zip(kept, rows, strict=True))
        made = inverse_of(rows, self.totals, Amount(self.shift), self.scale, self.blocking, shift=self.shift)
        return measured(made)

    def images(self, vector: Parts) -> list[Float[Array, "blocks m"]]:
        """Gv, for what each factor covers."""
        places = zip(*map(self.blocking.coupled, (self.rows, vector)), strict=True)
        return [coefficients(rows, v) for rows, v in places]


def model_of(
    blocking: Blocking,
    grads: Block,
    mask: Params,
    damping: Amount,
    batch_size: Any,
    count: Any = None,
    *,
    with_slope: bool = False,
) -> Model:
    """The model of the weights that the mask keeps.

    Args:
        blocking: how to cut.
        grads: a block of gradients.
        mask: booleans, True for the weights that are there.
        damping: λ.
        batch_size: b.
        count: how many gradients there are, if some of the rows are empty places.
        with_slope: whether ḡ, the mean of the gradients, counts.
    """
    scale = jnp.asarray(batch_size, _tree.accumulator_dtype(grads))
    rows, totals = read(blocking, grads, scale, mask, count)
    shift = totals.shift(damping)
    if isinstance(damping, Relative):
        # Without any gradient every damping is as good: the scores then rank by magnitude.
        empty = jnp.all(jnp.stack([jnp.all(x == 0) for x in rows]))
        shift = jnp.where(empty, _NOTHING * totals.number, shift)
    # The rows hold √b g, and ḡ is the mean of g itself.
    slope = 1 / (totals.number * jnp.sqrt(scale)) if with_slope else None
    return Model(blocking, rows, totals, shift, scale, slope)


def optimum(model: Model, inverse: InverseFisher, weights: Parts) -> Parts:
    """Where the model is least without any constraint, u = w − F⁻¹ḡ."""
    if model.slope is None:
        return weights
    # By F⁻¹Gᵀc, for F⁻¹ times the vector ḡ would be a difference of nearly equal ones.
    inside = [jnp.full(x.shape, model.slope, x.dtype) for x in model.images(weights)]
    steps = inverse.combined(model.rows, inside)
    return tuple(w - x for w, x in zip(weights, steps, strict=True))


# -- moves -----------------------------------------------------------------------------------------


def joint_move(model: Model, weights: Parts, pruned: Parts, kept: Parts) -> tuple[Parts, InverseFisher]:
    """The δ that minimises the model among those with δ = −w on the pruned weights."""
    gone = tuple(jnp.where(p > 0, w, 0) for w, p in zip(weights, pruned, strict=True))
    inverse, m = model.inverse(kept), model.totals.number
    # F_KQ δ_Q + ḡ_K is a combination of the rows: one ridge regression onto what the pruned ones contributed.
    slope = 0 if model.slope is None else model.slope
    inside = [x / m - slope for x in model.images(gone)]
    steps = inverse.combined(model.rows, inside)
    moves = zip(steps, gone, kept, strict=True)
    return tuple(jnp.where(k > 0, x, -w) for x, w, k in moves), inverse


def summed_move(model: Model, weights: Parts, pruned: Parts, kept: Parts) -> tuple[Parts, InverseFisher]:
    """The sum of the moves that would be best if each pruned weight were the only one."""
    inverse = model.inverse()
    best = optimum(model, inverse, weights)
    places = zip(best, pruned, inverse.diagonals(), strict=True)
    # WoodFisher (arXiv 2004.14340) adds up −(u_q/[F⁻¹]_qq) F⁻¹e_q: linear in e_q, so one solve for all q.
    along = inverse.solved(tuple(jnp.where(p > 0, u / d, 0) for u, p, d in places))
    moves = zip(weights, best, along, pruned, kept, strict=True)
    return tuple(jnp.where(p > 0, -w, jnp.where(k > 0, u - w - x, 0)) for w, u, x, p, k in moves), inverse


def no_move(model: Model, weights: Parts, pruned: Parts, kept: Parts) -> tuple[Parts, None]:
    """The pruned weights go, the others stay where they are."""
    return tuple(jnp.where(p > 0, -w, 0) for w, p in zip(weights, pruned, strict=True)), None


def increases(model: Model, move: Parts) -> list[Float[Array, " blocks"]]:
    """ḡ·δ + ½ δᵀFδ of every block, or of the one block."""
    images = model.images(move)
    squares = [
        sum(jnp.sum(x**2, axis=range(1, x.ndim)) for x in part) for part in model.blocking.coupled(move)
    ]
    m, damping = model.totals.number, model.shift / model.totals.number
    slope = 0 if model.slope is None else model.slope
    # δᵀFδ as a sum of squares, ‖Gδ‖²/m + λ‖δ‖²: no rounding makes it negative.
    return [
        slope * jnp.sum(image, axis=-1) + (jnp.sum(image**2, axis=-1) / m + damping * square) / 2
        for image, square in zip(images, squares, strict=True)
    ]
