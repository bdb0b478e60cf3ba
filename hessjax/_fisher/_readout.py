"""What factors say: diagonals and dense blocks, how far they are off, the error where that is too much."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hessjax._core import _numbers, _sharding, _tree
from hessjax._core._results import is_known, is_single
from hessjax._core._tables import Column, Row, Table, number
from hessjax._core._types import Scalar, as_text
from hessjax._fisher._blocking import Blocking, Cut, Parts
from hessjax._fisher._factors import Dual, Factor, Like
from hessjax._fisher._rows import joined, signs, total

Residuals = tuple[Float[Array, " _"], ...]
"""How far every block is off; see `InverseFisher`."""

PIVOT = 8
"""A difference of numbers of size 1 below this times eps has no digit left."""

INACCURATE = 0.01
"""A block whose inverse is off by more than this fraction is not returned."""

LOST = 16
"""A pivot below this times eps times the entry it is left of is lost in that entry's rounding errors."""


def diagonal(like: Like, factor: Factor, shift: Scalar) -> Parts:
    """The diagonal of (A + κI)⁻¹; NaN where rounding has left no digit of it."""
    constant = factor.constant(shift)
    return tuple(
        determined(constant.astype(a.dtype) + factor.sign * jnp.sum(a**2, axis=1), constant)
        for a in factor.columns(like, shift)
    )


def dense(place: int, like: Like, factor: Factor, shift: Scalar) -> Array:
    """The blocks of (A + κI)⁻¹ of one group, with all their entries."""
    # Every device has all columns of a leaf whose entries are all asked for.
    a = _sharding.gathered(joined([factor.columns(like, shift)[place]], lead=2))
    constant = factor.constant(shift).astype(a.dtype) * jnp.eye(a.shape[-1], dtype=a.dtype)[None]
    return constant + factor.sign * jnp.einsum("bki,bkj->bij", a, a, precision="highest")


def determined(difference: Array, unit: Array) -> Array:
    """The difference of numbers of this size, or NaN if it is nothing but their rounding errors.

    A dual's diagonal is 1/κ minus nearly as much where a weight is well determined: κ[(A + κI)⁻¹]_jj lies
    above κ/(A_jj + κ). Damping of `PIVOT`·eps·‖F‖ keeps all of them.
    """
    unit = jnp.asarray(unit, difference.dtype)
    return jnp.where(difference >= PIVOT * jnp.finfo(difference.dtype).eps * unit, difference, jnp.nan)


# -- how far they are off ---------------------------------------------------------------------------


def measured(
    like: Like, factor: Factor, shift: Scalar, count: Array, *, is_whole: bool
) -> tuple[Factor, Float[Array, " blocks"]]:
    """The factor, with NaN for what the residuals show to be no inverse, and the residuals."""
    found = residual(like, factor, shift, count, is_whole=is_whole)
    # NaN compares as false: a residual that is none proves no inverse either.
    return factor.replaced(found <= INACCURATE), found


def residual(
    like: Like, factor: Factor, shift: Scalar, count: Array, *, is_whole: bool
) -> Float[Array, " blocks"]:
    """How far the inverse of every block is off, as `InverseFisher.residuals` says.

    What a vector shows can be good by luck: where a pivot is no more than the rounding errors of what it is
    left of, one fused multiply-add decides between an error of 10 % and of 0.5 %. So a block is lost, ∞, if
    its smallest pivot is; and a dual, to which null directions of F do no harm, also if λ changes no digit of
    F's diagonal, below eps times its mean.
    """
    Az = _numbers.promoted(*factor.images(like))
    dtype = Az[0].dtype
    z = [x[None].astype(dtype) for x in signs(like)]
    shift, count = shift.astype(dtype), count.astype(dtype)
    product = [(x + shift * y) / count for x, y in zip(Az, z, strict=True)]
    # A dual multiplies by gradients of size s once more, and s³ leaves float32's range at 1e-15 and 1e13. The
    # unit is a power of two, so that no digit changes.
    unit = functools.reduce(jnp.maximum, map(_numbers.power_of_two, product))
    solved = factor.solve(tuple(x / unit for x in product), shift)
    miss = [unit * count * x - y for x, y in zip(solved, z, strict=True)]
    if is_whole and isinstance(factor, Dual):
        found = jnp.atleast_1d(shift / count * _tree.norm(miss) / _tree.norm(product))
    else:
        units = jnp.sqrt(count * joined(diagonal(like, factor, shift)))
        found = _norms(joined(miss) / units) / _norms(joined(product) * units)
    eps = jnp.finfo(dtype).eps
    is_lost = factor.pivot < LOST * eps
    if isinstance(factor, Dual):
        number = sum(math.prod(x.shape) for x in like)
        trace = total([jnp.sum(x * y, axis=range(1, x.ndim)) for x, y in zip(Az, z, strict=True)])
        is_lost |= shift < eps * (trace / number)  # zᵀAz is the trace of A, about
    return jnp.where(is_lost, jnp.inf, found)


def _norms(x: Cut) -> Float[Array, " blocks"]:
    return jax.vmap(_tree.norm)(x)


def all_accurate(residuals: Residuals) -> Bool[Array, ""]:
    """Whether every block is."""
    return jnp.all(jnp.stack([jnp.all(x <= INACCURATE) for x in residuals]))


# -- the error -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What an error needs to know; small, so that compiled functions can return it beside their results.

    Attributes:
        residuals: of every block.
        sizes: ‖Fz‖ of every block, about the Frobenius norm of F; the trace of every leaf of a whole dual.
        damping: λ.
    """

    residuals: Residuals
    sizes: tuple[Float[Array, " _"], ...]
    damping: Scalar

    def check(
        self,
        blocking: Blocking,
        subject: str = "`grads`",
        remedy: str = "Smaller `chunk_size` or `block_size` help",
    ) -> None:
        """Nothing, if all is traced or good; else an error that names the first bad block.

        Args:
            blocking: of the weights.
            subject: what the gradients are called.
            remedy: what helps besides more damping.
        """
        is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self))
        if is_traced or bool(all_accurate(self.residuals)):
            return
        paths = _tree.leaf_paths(blocking.like)
        sizes = dict(sorted(blocking.by_leaf(self.sizes).items()))
        bad = [paths[i] for i, x in sizes.items() if not jnp.all(jnp.isfinite(x))]
        if bad:
            raise ValueError(
                f"{subject} must be finite, got NaN, infinity or numbers with squares beyond the dtype's "
                f"range in {', '.join(bad)}."
            )
        if not self.damping > 0:
            raise ValueError(
                "`damping` must be absolute here, a positive number: it is relative to gradients that are "
                "all zero, or too small to be squared."
            )
        # An estimate; but λ as given did not do, so that no less than a few times that is advised.
        enough = max(PIVOT * float(jnp.finfo(x.dtype).eps * _tree.norm(x)) for x in sizes.values())
        got = float(self.damping)
        raise ValueError(
            f"`damping` must be about {max(enough, 4 * got):.1e} or larger in this precision, got "
            f"{got:.1e}: the inverse would not be accurate for "
            f"{self._where(blocking, paths)}. {remedy} a little, gradients in float64 help for good."
        )

    def _where(self, blocking: Blocking, paths: list[str]) -> str:
        """The first block that is not accurate, and how many are not."""
        if not blocking.block_size:
            return "the whole network"
        bad = {i: ~(x <= INACCURATE) for i, x in sorted(blocking.by_leaf(self.residuals).items())}
        first = next(i for i in bad if bad[i].any())
        total, blocks = sum(int(x.sum()) for x in bad.values()), sum(x.size for x in bad.values())
        return f"block {int(bad[first].argmax())} of {paths[first]} ({total} of all {blocks} blocks)"


def sizes(like: Like, factor: Factor, count: Array, *, is_whole: bool) -> tuple[Float[Array, " _"], ...]:
    """`Verdict.sizes`, of each group that a factor covers."""
    if is_whole and isinstance(factor, Dual):
        return tuple(jnp.sum(rows**2)[None] / count.astype(rows.dtype) for rows in factor.rows)
    # z has random signs, so that E‖Fz‖² = tr F² = ‖F‖²_F.
    return tuple(_norms(image) / count.astype(image.dtype) for image in factor.images(like))


def table(inverse: Any) -> Table | str:
    """What an `InverseFisher` shows of itself."""
    totals, shift, residuals = inverse.totals, inverse.shift, inverse.residuals
    if not (is_known(totals, shift, residuals) and is_single(shift)):
        return f"InverseFisher(like={as_text(inverse.blocking.like)}, block_size={inverse.block_size})"
    heads = Column("Weights"), Column("Blocks"), Column("Gradients"), Column("Damping"), Column("Residual")
    counts = f"{int(totals.num_weights):,}", f"{inverse.blocking.num_blocks:,}"
    worst = max((float(jnp.max(r, initial=0)) for r in residuals), default=0.0)
    cells = *counts, f"{float(totals.num_grads):,.6g}", number(inverse.damping), f"{worst:.1e}"
    notes = () if all_accurate(residuals) else ("Blocks that are too inaccurate hold NaN: a larger damping.",)
    return Table(heads, (Row(cells),), notes=notes)
