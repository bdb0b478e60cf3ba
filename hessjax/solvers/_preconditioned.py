"""Conjugate gradients with a preconditioner: an approximate inverse, applied once a step."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._messages import checked_function
from hessjax._core._packing import Packed, Packing
from hessjax._core._types import (
    Block,
    Key,
    Matvec,
    Params,
    Relative,
    Scalar,
    Tolerance,
    Vector,
    assign,
    settings,
)
from hessjax._run._drivers import as_partial
from hessjax._run._estimator import Estimator
from hessjax.solvers._conjugate_gradient import over
from hessjax.solvers._system import BELOW_ZERO, Solution, System


class PcgState(NamedTuple):
    """An iterate, in units of ‖b‖, and the direction to search next, packed.

    Attributes:
        x: the iterate.
        residual: r = b − (A + λI)x, by the recurrence.
        direction: p/‖p‖, the vector to be multiplied next.
        length: ‖p‖.
        squares: rᵀPr.
        damping: λ.
        unit: ‖b‖.
        limit: the largest residual norm that counts as converged.
        curvature: the smallest pᵀ(A + λI)p / pᵀp so far.
        largest: the largest ‖(A + λI)p‖ / ‖p‖ so far: a lower bound of ‖A + λI‖.
        negative_curvature: a direction of negative curvature was met, and is `direction`.
        singular: the same of one whose curvature cannot be told from 0.
        packing: how the vectors are packed.
        num_matvecs: products so far.
    """

    x: Packed
    residual: Packed
    direction: Packed
    length: Float[Array, ""]
    squares: Float[Array, ""]
    damping: Float[Array, ""]
    unit: Float[Array, ""]
    limit: Float[Array, ""]
    curvature: Float[Array, ""]
    largest: Float[Array, ""]
    negative_curvature: Bool[Array, ""]
    singular: Bool[Array, ""]
    packing: Packing
    num_matvecs: Int[Array, ""]


@settings(arrays=("rhs", "damping", "preconditioner", "tol"))
class PreconditionedConjugateGradient(System, Estimator):
    """Preconditioned conjugate gradients for (A + λI)x = b: those of P^½(A + λI)P^½ in other variables.

    The nearer P is to (A + λI)⁻¹ the fewer products it takes: `hj.layers.kfac(...).inverse(λ)` for a
    network's Fisher, or Jacobi's, one over the diagonal. What is stopped at is the residual of the system
    itself, as without P; directions of no positive curvature end the search as in `conjugate_gradient`.

    Args:
        rhs: b, like the params.
        damping: λ, a number, as in `conjugate_gradient`.
        preconditioner: P, a symmetric positive definite matvec.
        tol: residual at which the result counts as converged: absolute, or `relative` to ‖b‖.

    Returns:
        An `Estimator` with result `Solution`, as `conjugate_gradient`. Its residual is NaN once a vector v
        was met with vᵀPv < 0: P is not positive definite.

    Raises:
        TypeError: `preconditioner` is no function; as `conjugate_gradient`.
        ValueError: as `conjugate_gradient`.

    Cost:
        One product of each a step, 12·d operations, memory 5·d and what P takes.

    References:
        Hestenes & Stiefel (1952), Methods of conjugate gradients for solving linear systems.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 20.0, 400.0]))
        >>> P = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 0.05, 0.0025]))
        >>> method = functools.partial(hj.estimators.preconditioned_conjugate_gradient, preconditioner=P)
        >>> solution = hj.solve(A, jnp.ones(3), method=method)
        >>> solution.x.round(4).tolist()
        [1.0, 0.05, 0.0025]
    """

    init_only = ("rhs", "damping", "tol")

    rhs: Vector
    damping: Any = 0.0
    _: dataclasses.KW_ONLY
    preconditioner: Matvec
    tol: Tolerance | None = Relative(1e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_function("preconditioner", self.preconditioner, "(vector) -> vector")
        assign(self, preconditioner=as_partial(self.preconditioner))

    def init(self, key: Key, like: Params) -> PcgState:
        """The zero vector; the first direction is Pb."""
        _tree.check_like(self.rhs, like, "rhs", "like")
        packing = Packing.of(like)
        rhs, unit, limit = self.scaled(packing)
        along = self._preconditioned(packing, rhs)
        length = _tree.norm(along)
        return PcgState(
            x=packing.zeros(),
            residual=rhs,
            direction=_tree.scale(over(1.0, length), along),
            length=length,
            squares=_tree.inner(rhs, along),
            damping=self.damping,
            unit=unit,
            limit=limit,
            curvature=jnp.full_like(unit, jnp.inf),
            largest=jnp.zeros_like(unit),
            negative_curvature=jnp.asarray(False),
            singular=jnp.asarray(False),
            packing=packing,
            num_matvecs=jnp.int32(0),
        )

    def _preconditioned(self, packing: Packing, residual: Packed) -> Packed:
        vector = packing.unpack(residual)
        product = self.preconditioner(vector)
        _tree.check_vector(product, vector, "preconditioner(vector)", "rhs")
        return packing.pack(_tree.wide(product))

    def query(self, state: PcgState) -> Block:
        """The direction."""
        return state.packing.unpack_block(tuple(x[None] for x in state.direction))

    def update(self, state: PcgState, products: Block) -> PcgState:
        """A step along the direction multiplied, and the next direction."""
        p, eps = state.direction, jnp.finfo(state.unit.dtype).eps
        # p has norm 1 here and `length` carries ‖p‖: pᵀp itself would leave float32.
        product = _tree.add_scaled(state.packing.pack(_tree.row(products, 0)), state.damping, p)
        largest = jnp.maximum(state.largest, _tree.norm(product))
        searching = _tree.norm(state.residual) > eps  # else nothing is left to gain
        curvature = jnp.where(searching, _tree.inner(p, product), jnp.inf)
        # Rounding alone gives pᵀ(A + λI)p an error of eps·‖A + λI‖: what is no larger has no sign.
        resting = state.negative_curvature | state.singular
        negative = ~resting & (curvature < -BELOW_ZERO * eps * largest)
        singular = ~resting & ~negative & (curvature <= eps * largest)
        moving = searching & ~(resting | negative | singular)
        step = jnp.where(moving, over(state.squares, state.length * curvature), 0)
        residual = _tree.add_scaled(state.residual, -step, product)
        along = self._preconditioned(state.packing, residual)
        squares = _tree.inner(residual, along)
        kept = jnp.where(moving, over(squares, state.squares) * state.length, 0)
        direction = _tree.add_scaled(along, kept, p)
        length = _tree.norm(direction)
        new, old = jnp.where(moving, over(1.0, length), 0), jnp.where(moving, 0, 1)
        return state._replace(
            x=_tree.add_scaled(state.x, step, p),
            residual=residual,
            direction=_tree.add_scaled(_tree.scale(new, direction), old, p),
            length=jnp.where(moving, length, state.length),
            squares=jnp.where(moving, squares, state.squares),
            curvature=jnp.minimum(state.curvature, curvature),
            largest=largest,
            negative_curvature=state.negative_curvature | negative,
            singular=state.singular | singular,
            num_matvecs=state.num_matvecs + 1,
        )

    def result(self, state: PcgState) -> Solution:
        """The iterate, in units of b again."""
        residual = _numbers.or_nan(state.squares >= 0, _tree.norm(state.residual))
        return Solution(
            state.packing.unpack(_tree.scale(state.unit, state.x)),
            state.unit * residual,
            residual <= state.limit,
            state.negative_curvature,
            state.curvature,
            state.num_matvecs,
            state.singular,
        )

    def error(self, state: PcgState) -> Scalar:
        """The residual of the recurrence; NaN where the search has ended early, or P is not definite."""
        resting = state.negative_curvature | state.singular | (state.squares < 0)
        return _numbers.or_nan(~resting, state.unit * _tree.norm(state.residual))

    def scale(self, state: PcgState) -> Scalar:
        """‖b‖."""
        return state.unit


preconditioned_conjugate_gradient = PreconditionedConjugateGradient
