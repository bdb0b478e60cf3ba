"""What the solvers of (A + λI)x = b share: the solution with its residual, and the checks of b and λ."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _tree
from hessjax._core._messages import checked_number
from hessjax._core._packing import Packed, Packing
from hessjax._core._results import by_shapes, is_known, is_single
from hessjax._core._tables import Column, Row, Table, number, printable
from hessjax._core._types import CONVERGENCE, Amount, Relative, Scalar, Tolerance, Vector, assign, settings


@printable
class Solution(NamedTuple):
    """The solution of (A + λI)x = b, with its residual.

    Attributes:
        x: like the params, in at least float32.
        residual: ‖b − (A + λI)x‖, in the units of b.
        converged: whether the residual is within the tolerance asked for.
        negative_curvature: whether a direction p was met with pᵀ(A + λI)p below 0 by more than rounding
            errors: A + λI is not positive definite. Conjugate gradients cannot go on from there; MINRES can.
        curvature: the smallest pᵀ(A + λI)p / pᵀp met, an upper bound of the smallest eigenvalue; infinite
            before the first. A damping that is to make A + λI positive definite must be larger by more than
            minus this.
        num_matvecs: how many products it took.
        singular: whether the method ended because A + λI could not be told from a singular matrix: conjugate
            gradients at a direction whose curvature is within rounding errors of 0, MINRES where no x has a
            smaller residual. A damping above eps·‖A + λI‖, or float64, leads on.
    """

    x: Vector
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    negative_curvature: Bool[Array, ""]
    curvature: Float[Array, ""]
    num_matvecs: Int[Array, ""]
    singular: Bool[Array, ""]

    def _table(self) -> Table | str:
        if not (is_known(self._replace(x=None)) and is_single(self.residual)):
            return by_shapes(self)
        heads = Column("Residual"), Column("Converged", "word"), Column("Products"), Column("Least curvature")
        converged = "yes" if self.converged else "no"
        cells = number(self.residual), converged, f"{int(self.num_matvecs):,}", number(self.curvature)
        notes = {
            "A + λI is not positive definite: a larger damping, or MINRES.": self.negative_curvature,
            "A + λI is singular to rounding: a damping, or float64.": self.singular,
        }
        said = tuple(note for note, holds in notes.items() if holds)
        return Table(heads, (Row(cells, "" if self.converged else "bold red"),), notes=said)


BELOW_ZERO = 16
"""A curvature counts as negative below minus this times eps times ‖A + λI‖: products of a network have
rounding errors of several eps."""


@settings(arrays=("rhs", "damping", "tol"))
class System:
    """The right-hand side b, the damping λ and the tolerance, checked; b in at least float32."""

    rhs: Vector
    damping: Any = 0.0
    tol: Tolerance | None = Relative(1e-5)

    def __post_init__(self) -> None:
        checked_vector(self.rhs, "rhs")
        assign(self, damping=_checked_damping(self.damping, self.rhs), rhs=_tree.wide(self.rhs))
        assign(self, tol=Amount.of(self.tol, meaning=CONVERGENCE))

    def scaled(self, packing: Packing) -> tuple[Packed, Scalar, Scalar]:
        """b/‖b‖ packed, ‖b‖ and the largest residual that counts as converged, in units of ‖b‖.

        The methods run on b/‖b‖, so that squares of gradients of any size stay within float32. b = 0 counts
        as of norm 1.
        """
        rhs = packing.pack(self.rhs)
        norm = _tree.norm(rhs)
        # b = 0 has the solution 0, which is found without dividing by its norm.
        unit = jnp.where(norm > 0, norm, 1)
        limit = Amount.of(self.tol).fraction(unit)
        return _tree.scale(1 / unit, rhs), unit, jnp.asarray(limit, unit.dtype)


def _checked_damping(damping: Any, rhs: Vector) -> Scalar:
    if isinstance(damping, Relative):
        raise TypeError(
            "`damping` must be a number: a matvec alone has no scale for `relative` to refer to. The "
            "mean of A's diagonal, for one, is `hessjax.trace(A, key, params).mean` over their number."
        )
    # An array: other dampings compile nothing anew.
    number = jnp.asarray(checked_number("damping", damping), _tree.accumulator_dtype(rhs))
    if not isinstance(number, jax.core.Tracer) and not math.isfinite(number):
        raise ValueError(f"`damping` must be one finite number, got {number}.")
    return number


def checked_vector(vector: Vector, argument: str) -> None:
    """Raise an error if a vector is not floating point or, as far as can be seen, not finite."""
    _tree.check_floating(vector, argument)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(vector)):
        return  # of a run that is only asked about
    finite = _finite_by_leaf(vector)
    if isinstance(finite, jax.core.Tracer):
        return
    bad = [path for path, good in zip(_tree.leaf_paths(vector), finite.tolist(), strict=True) if not good]
    if bad:
        raise ValueError(f"`{argument}` must be finite, got NaN or infinity in {', '.join(bad)}.")


@jax.jit
def _finite_by_leaf(vector: Vector) -> Bool[Array, " leaves"]:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(vector)])
