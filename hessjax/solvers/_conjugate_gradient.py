"""Conjugate gradients, with or without an approximate inverse as a preconditioner."""

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
from hessjax.solvers._system import BELOW_ZERO, Solution, System, checked_vector


class CgState(NamedTuple):
    """An iterate, in units of ‖b‖, and the direction to search next, packed.

    Attributes:
        x: the iterate.
        residual: b − (A + λI)x, by the recurrence.
        direction: p/‖p‖, the vector to be multiplied next.
        length: ‖p‖.
        squares: rᵀPr, r the residual; without a preconditioner P that is ‖r‖².
        damping: λ.
        unit: ‖b‖.
        limit: the largest residual norm that counts as converged.
        curvature: the smallest pᵀ(A + λI)p / pᵀp so far.
        largest: the largest ‖(A + λI)p‖ / ‖p‖ so far: a lower bound of ‖A + λI‖.
        begun: False while the next product is that of the vector to start from.
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
    begun: Bool[Array, ""]
    negative_curvature: Bool[Array, ""]
    singular: Bool[Array, ""]
    packing: Packing
    num_matvecs: Int[Array, ""]


@settings(arrays=("rhs", "damping", "start", "preconditioner", "tol"))
class ConjugateGradient(System, Estimator):
    """Conjugate gradients for (A + λI)x = b, as an estimator of x.

    Every iterate minimises ½xᵀ(A + λI)x − bᵀx over a Krylov space. Where a search direction p has
    pᵀ(A + λI)p < 0 there is no minimum: the state rests at the last good iterate, keeps p, says so in the
    result, and a run with a `tol` ends. So it does where pᵀ(A + λI)p is within rounding errors of 0, which
    are about eps·‖A + λI‖·‖p‖²: that is `singular`, and not negative.

    With a preconditioner P they are those of P^½(A + λI)P^½ in other variables. The nearer P is to
    (A + λI)⁻¹ the fewer products it takes: `hj.layers.kfac(...).inverse(λ)` for a network's Fisher, or
    Jacobi's, one over the diagonal. What is stopped at is the residual of the system itself all the same.

    Args:
        rhs: b, like the params.
        damping: λ, a number. It may be negative, as long as A + λI stays positive definite.
        start: x to start from, like the params; zero by default. It costs one product.
        preconditioner: P, a symmetric positive definite matvec; None: the identity.
        tol: residual at which the result counts as converged: absolute, or `relative` to ‖b‖.

    Returns:
        An `Estimator` with result `Solution`. Its residual, which is also the error, is that of the
        recurrence, which in float32 goes on falling when the true one, ‖b − (A + λI)x‖, does not; `solve`
        recomputes it. It is NaN once a vector v was met with vᵀPv < 0: P is not positive definite.

    Raises:
        TypeError: `rhs` or `start` is not floating point; `damping` is a `relative` one; `preconditioner` is
            no function.
        ValueError: `rhs`, `start` or `damping` is not finite, or `start` is not like `rhs`.

    Cost:
        One product a step, 10·d operations, memory 5·d; with a preconditioner one of its products too, 2·d
        operations more, memory 4·d and what it takes. After k steps the error in the norm of A + λI is at
        most 2((√κ − 1)/(√κ + 1))ᵏ of the first, κ the condition number. Other arrays compile nothing anew.

    References:
        Hestenes & Stiefel (1952), Methods of conjugate gradients for solving linear systems.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 2.0, 4.0]))
        >>> method = hj.estimators.conjugate_gradient(jnp.ones(3))
        >>> solution, _ = hj.run(method, A, jax.random.key(0), jnp.zeros(3), max_matvecs=3)
        >>> solution.x.round(4).tolist()
        [1.0, 0.5, 0.25]
        >>> P = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 0.5, 0.25]))
        >>> method = hj.estimators.conjugate_gradient(jnp.ones(3), preconditioner=P)
        >>> solution, _ = hj.run(method, A, jax.random.key(0), jnp.zeros(3), max_matvecs=1)
        >>> solution.x.round(4).tolist()
        [1.0, 0.5, 0.25]
    """

    init_only = ("rhs", "damping", "start", "tol")

    rhs: Vector
    damping: Any = 0.0
    _: dataclasses.KW_ONLY
    start: Vector | None = None
    preconditioner: Matvec | None = None
    tol: Tolerance | None = Relative(1e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            checked_vector(self.start, "start")
            _tree.check_like(self.start, self.rhs, "start", "rhs")
        if self.preconditioner is not None:
            checked_function("preconditioner", self.preconditioner, "(vector) -> vector")
            assign(self, preconditioner=as_partial(self.preconditioner))

    def init(self, key: Key, like: Params) -> CgState:
        """The zero vector, or the one to start from, whose product is asked for first."""
        _tree.check_like(self.rhs, like, "rhs", "like")
        packing = Packing.of(like)
        rhs, unit, limit = self.scaled(packing)
        along = self._preconditioned(packing, rhs)
        squares = _tree.inner(rhs, along)
        if self.start is not None:  # a first step of length 1 along the vector to start from, from zero
            along = _tree.scale(1 / unit, packing.pack(_tree.wide(self.start)))
        length = _tree.norm(along)
        return CgState(
            x=packing.zeros(),
            residual=rhs,
            direction=_tree.scale(over(1.0, length), along),
            length=length,
            squares=squares,
            damping=self.damping,
            unit=unit,
            limit=limit,
            curvature=jnp.full_like(unit, jnp.inf),
            largest=jnp.zeros_like(unit),
            begun=jnp.asarray(self.start is None),
            negative_curvature=jnp.asarray(False),
            singular=jnp.asarray(False),
            packing=packing,
            num_matvecs=jnp.int32(0),
        )

    def _preconditioned(self, packing: Packing, residual: Packed) -> Packed:
        if self.preconditioner is None:
            return residual
        vector = packing.unpack(residual)
        product = self.preconditioner(vector)
        _tree.check_vector(product, vector, "preconditioner(vector)", "rhs")
        return packing.pack(_tree.wide(product))

    def _residual(self, state: CgState) -> Scalar:
        return jnp.sqrt(state.squares) if self.preconditioner is None else _tree.norm(state.residual)

    def query(self, state: CgState) -> Block:
        """The direction."""
        return state.packing.unpack_block(tuple(x[None] for x in state.direction))

    def update(self, state: CgState, products: Block) -> CgState:
        """A step along the direction multiplied, and the next direction."""
        p, eps = state.direction, jnp.finfo(state.unit.dtype).eps
        # p has norm 1 here and `length` carries ‖p‖: pᵀp itself would leave float32.
        product = _tree.add_scaled(state.packing.pack(_tree.row(products, 0)), state.damping, p)
        largest = jnp.maximum(state.largest, _tree.norm(product))
        # Else this is the start's product, or nothing is left to gain.
        searching = state.begun & (self._residual(state) > eps)
        curvature = jnp.where(searching, _tree.inner(p, product), jnp.inf)
        # Rounding alone gives pᵀ(A + λI)p an error of eps·‖A + λI‖: what is no larger has no sign.
        resting = state.negative_curvature | state.singular
        negative = ~resting & (curvature < -BELOW_ZERO * eps * largest)
        singular = ~resting & ~negative & (curvature <= eps * largest)
        resting |= negative | singular
        step = jnp.where(searching & ~resting, over(state.squares, state.length * curvature), 0)
        step = jnp.where(state.begun, step, state.length)
        residual = _tree.add_scaled(state.residual, -step, product)
        along = self._preconditioned(state.packing, residual)
        squares = _tree.inner(residual, along)
        moving = ~resting & (searching | ~state.begun)
        kept = jnp.where(searching, over(squares, state.squares), 0) * state.length
        if self.preconditioner is None:
            length = jnp.sqrt(squares + kept**2)  # the two are orthogonal
        else:
            length = _tree.norm(_tree.add_scaled(along, kept, p))
        length = jnp.where(moving, length, state.length)
        new, old = jnp.where(moving, over(1.0, length), 0), jnp.where(moving, over(kept, length), 1)
        return state._replace(
            x=_tree.add_scaled(state.x, step, p),
            residual=residual,
            direction=_tree.add_scaled(_tree.scale(new, along), old, p),
            length=length,
            squares=jnp.where(moving, squares, state.squares),
            curvature=jnp.minimum(state.curvature, curvature),
            largest=largest,
            begun=jnp.asarray(True),
            negative_curvature=state.negative_curvature | negative,
            singular=state.singular | singular,
            num_matvecs=state.num_matvecs + 1,
        )

    def result(self, state: CgState) -> Solution:
        """The iterate, in units of b again."""
        residual = _numbers.or_nan(state.squares >= 0, self._residual(state))
        return Solution(
            state.packing.unpack(_tree.scale(state.unit, state.x)),
            state.unit * residual,
            residual <= state.limit,
            state.negative_curvature,
            state.curvature,
            state.num_matvecs,
            state.singular,
        )

    def error(self, state: CgState) -> Scalar:
        """The residual of the recurrence; NaN where the search has ended early, or P is not definite."""
        resting = state.negative_curvature | state.singular | (state.squares < 0)
        return _numbers.or_nan(~resting, state.unit * self._residual(state))

    def scale(self, state: CgState) -> Scalar:
        """‖b‖."""
        return state.unit


conjugate_gradient = ConjugateGradient


def over(a: Any, b: Float[Array, ""]) -> Float[Array, ""]:
    """a/b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
