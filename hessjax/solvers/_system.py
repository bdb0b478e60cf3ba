"""What the solvers of (A + λI)x = b share: the solution with its doubt, and the checks of b and λ."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _tree
from hessjax._core._types import Relative, Scalar, Tolerance, Vector
from hessjax._run._estimator import checked_tolerance


class Solution(NamedTuple):
    """The solution of (A + λI)x = b, with its doubt.

    Attributes:
        x: like the params, in at least float32.
        residual: ‖b − (A + λI)x‖, in the units of b.
        converged: whether the residual is within the tolerance asked for.
        negative_curvature: whether a direction p with pᵀ(A + λI)p ≤ 0 (up to rounding) was met: A + λI is
            not positive definite. Conjugate gradients cannot go on from there; MINRES can.
        curvature: the smallest pᵀ(A + λI)p / pᵀp met, an upper bound of the smallest eigenvalue; infinite
            before the first. A damping that is to make A + λI positive definite must be larger by more than
            minus this.
        num_matvecs: how many products it took.
    """

    x: Vector
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    negative_curvature: Bool[Array, ""]
    curvature: Float[Array, ""]
    num_matvecs: Int[Array, ""]


class System(NamedTuple):
    """The right-hand side b, the damping λ and the tolerance, as arrays."""

    rhs: Vector
    damping: Scalar
    tol: Any

    @classmethod
    def of(cls, rhs: Vector, damping: Any, tol: Tolerance | None) -> "System":
        """Checked, in at least float32."""
        checked_vector(rhs, "rhs")
        if isinstance(damping, Relative):
            raise TypeError(
                "`damping` must be a number: a matvec alone has no scale for `relative` to refer to. The "
                "mean of A's diagonal, for one, is `hessjax.trace(A, key, params).mean` over their number."
            )
        if (checked := checked_tolerance(tol)) is None:
            raise ValueError("`tol` must be a number or `relative(r)`: it decides what counts as converged.")
        damping = jnp.asarray(damping, _tree.accumulator_dtype(rhs))
        if damping.shape or (not isinstance(damping, jax.core.Tracer) and not math.isfinite(damping)):
            raise ValueError(f"`damping` must be one finite number, got {damping}.")
        return cls(_tree.wide(rhs), damping, checked)

    def scaled(self) -> tuple[Vector, Scalar, Scalar]:
        """b/‖b‖, ‖b‖ and the largest residual that counts as converged, in units of ‖b‖.

        The methods run on b/‖b‖, so that squares of gradients of any size stay within float32. b = 0 counts
        as of norm 1.
        """
        norm = _tree.norm(self.rhs)
        unit = jnp.where(norm > 0, norm, 1)
        limit = self.tol.factor if isinstance(self.tol, Relative) else self.tol / unit
        return _tree.scale(1 / unit, self.rhs), unit, jnp.asarray(limit, unit.dtype)


def checked_vector(vector: Vector, argument: str) -> None:
    """Raise an error if a vector is not floating point or, as far as can be seen, not finite."""
    _tree.check_floating(vector, argument)
    finite = _finite_by_leaf(vector)
    if isinstance(finite, jax.core.Tracer):
        return
    bad = [path for path, good in zip(_tree.leaf_paths(vector), finite.tolist(), strict=True) if not good]
    if bad:
        raise ValueError(f"`{argument}` must be finite, got NaN or infinity in {', '.join(bad)}.")


@jax.jit
def _finite_by_leaf(vector: Vector) -> Bool[Array, " leaves"]:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(vector)])
