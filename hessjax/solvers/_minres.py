"""MINRES: (A + λI)x = b for any symmetric A, indefinite or singular, with five vectors of memory."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._packing import Packed, Packing
from hessjax._core._types import Block, Key, Params, Relative, Scalar, Tolerance, Vector, settings
from hessjax._run._estimator import Estimator
from hessjax.solvers._system import BELOW_ZERO, Solution, System


class Reflection(NamedTuple):
    """The last reflection of the QR factorisation of the tridiagonal matrix T, and what the next one needs.

    Attributes:
        cosine: of the last reflection.
        sine: of the last reflection.
        above: the entry of T's next column in the row before, not yet reflected.
        far: the entry of R two above the diagonal in the next column.
        beta: the entry of T below the diagonal: ‖A v − …‖ of the last step.
    """

    cosine: Float[Array, ""]
    sine: Float[Array, ""]
    above: Float[Array, ""]
    far: Float[Array, ""]
    beta: Float[Array, ""]


class MinresState(NamedTuple):
    """An iterate, in units of ‖b‖, and the last two vectors of each recurrence, packed.

    Attributes:
        x: the iterate.
        lanczos: the last two Lanczos vectors; the second is to be multiplied next.
        steps: the last two search directions.
        reflection: of the factorisation of T.
        residual: ‖b − (A + λI)x‖, by the recurrence.
        damping: λ.
        unit: ‖b‖.
        limit: the largest residual that counts as converged.
        curvature: the smallest rᵀ(A + λI)r / rᵀr so far.
        largest: the largest ‖(A + λI)v‖ so far: a lower bound of ‖A + λI‖.
        negative_curvature: `curvature` is below 0 by more than rounding errors.
        finished: (A + λI)r = 0 up to rounding: no x has a smaller residual.
        packing: how the vectors are packed.
        num_matvecs: products so far.
    """

    x: Packed
    lanczos: tuple[Packed, Packed]
    steps: tuple[Packed, Packed]
    reflection: Reflection
    residual: Float[Array, ""]
    damping: Float[Array, ""]
    unit: Float[Array, ""]
    limit: Float[Array, ""]
    curvature: Float[Array, ""]
    largest: Float[Array, ""]
    negative_curvature: Bool[Array, ""]
    finished: Bool[Array, ""]
    packing: Packing
    num_matvecs: Int[Array, ""]


@settings(arrays=("rhs", "damping", "tol"))
class Minres(System, Estimator):
    """MINRES for (A + λI)x = b, as an estimator of x: A may be indefinite, or singular.

    Every iterate has the smallest residual ‖b − (A + λI)x‖ in a Krylov space, which therefore never grows.
    A singular system that has a solution is solved; one that has none ends, not converged, with a least
    squares solution, and a run with a `tol` ends there.

    Args:
        rhs: b, like the params.
        damping: λ, a number of either sign.
        tol: residual at which the result counts as converged: absolute, or `relative` to ‖b‖.

    Returns:
        An `Estimator` with result `Solution`. Its residual, which is also the error, is that of the
        recurrence; `solve` recomputes it. `negative_curvature` is news about A + λI here, not a failure.

    Raises:
        TypeError: `rhs` is not floating point; `damping` is a `relative` one.
        ValueError: `rhs` or `damping` is not finite.

    Cost:
        One product a step, 20·d operations, memory 10·d. No basis is kept. Where `conjugate_gradient` works
        it takes about as many products and less memory. Other arrays compile nothing anew.

    References:
        Paige & Saunders (1975), Solution of sparse indefinite systems of linear equations; Liu & Roosta
        (2022), MINRES: from negative curvature detection to monotonicity properties.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, -2.0, 4.0]))
        >>> method = hj.estimators.minres(jnp.ones(3))
        >>> solution, _ = hj.run(method, A, jax.random.key(0), jnp.zeros(3), max_matvecs=3)
        >>> solution.x.round(4).tolist(), bool(solution.negative_curvature)
        ([1.0, -0.5, 0.25], True)
    """

    init_only = ("rhs", "damping", "tol")

    rhs: Vector
    damping: Any = 0.0
    _: dataclasses.KW_ONLY
    tol: Tolerance | None = Relative(1e-5)

    def init(self, key: Key, like: Params) -> MinresState:
        """The zero vector."""
        _tree.check_like(self.rhs, like, "rhs", "like")
        packing = Packing.of(like)
        rhs, unit, limit = self.scaled(packing)
        zero, nothing = jnp.zeros_like(unit), packing.zeros()
        return MinresState(
            # From zero: the residual is then b, and its norm 1 in units of ‖b‖.
            x=nothing,
            lanczos=(nothing, rhs),
            steps=(nothing, nothing),
            reflection=Reflection(zero - 1, zero, zero, zero, zero),
            residual=_tree.norm(rhs),
            damping=self.damping,
            unit=unit,
            limit=limit,
            curvature=zero + jnp.inf,
            largest=zero,
            negative_curvature=jnp.asarray(False),
            finished=jnp.asarray(False),
            packing=packing,
            num_matvecs=jnp.int32(0),
        )

    def query(self, state: MinresState) -> Block:
        """The last Lanczos vector."""
        return state.packing.unpack_block(tuple(x[None] for x in state.lanczos[1]))

    def update(self, state: MinresState, products: Block) -> MinresState:
        """A Lanczos step, a reflection more, and a step along the direction that it gives."""
        eps, (before, v), last = jnp.finfo(state.unit.dtype).eps, state.lanczos, state.reflection
        product = _tree.add_scaled(state.packing.pack(_tree.row(products, 0)), state.damping, v)
        largest = jnp.maximum(state.largest, _tree.norm(product))
        alpha = _tree.inner(v, product)
        # No reorthogonalisation: MINRES needs the residual of the recurrence, not an orthogonal basis.
        following = _tree.add_scaled(_tree.add_scaled(product, -alpha, v), -last.beta, before)
        reflection, delta, gamma, curvature, descent = _reflect(last, alpha, _tree.norm(following))
        moved = _step(state, following, reflection, delta, gamma)
        searching = ~state.finished & (state.residual > eps)
        # A step of c·‖r‖·w lowers ‖r‖ by c²/2 and adds rounding errors of eps·‖A + λI‖·c·‖w‖ to it.
        futile = jnp.abs(reflection.cosine) <= 2 * eps * largest * _tree.norm(moved.steps[1])
        finished = state.finished | (searching & futile & (descent <= 4 * jnp.sqrt(eps) * largest))
        moved = jax.tree.map(lambda new, old: jnp.where(searching & ~finished, new, old), moved, state)
        curvature = jnp.where(searching, curvature, jnp.inf)
        return moved._replace(
            curvature=jnp.minimum(state.curvature, curvature),
            largest=largest,
            negative_curvature=state.negative_curvature | (curvature < -BELOW_ZERO * eps * largest),
            finished=finished,
            num_matvecs=state.num_matvecs + 1,
        )

    def result(self, state: MinresState) -> Solution:
        """The iterate, in units of b again."""
        return Solution(
            state.packing.unpack(_tree.scale(state.unit, state.x)),
            state.unit * state.residual,
            state.residual <= state.limit,
            state.negative_curvature,
            state.curvature,
            state.num_matvecs,
            _is_stuck(state),
        )

    def error(self, state: MinresState) -> Scalar:
        """The residual of the recurrence; NaN once no x has a smaller one."""
        return _numbers.or_nan(~_is_stuck(state), state.unit * state.residual)

    def scale(self, state: MinresState) -> Scalar:
        """‖b‖."""
        return state.unit


minres = Minres


def _is_stuck(state: MinresState) -> Bool[Array, ""]:
    """A least squares solution: more products would change nothing, and a run with a `tol` is told so."""
    return state.finished & (state.residual > state.limit)


def _reflect(
    last: Reflection, alpha: Scalar, beta: Scalar
) -> tuple[Reflection, Scalar, Scalar, Scalar, Scalar]:
    """The next column (…, β, α, β') of T, made upper triangular (Paige & Saunders, §5).

    Returns:
        The next reflection; the entries of R above and on the diagonal; and of the residual r before this
        step rᵀ(A + λI)r / rᵀr and ‖(A + λI)r‖ / ‖r‖ (Liu & Roosta, lemma 3.1).
    """
    # T is symmetric tridiagonal: a column meets the last two reflections only (Paige & Saunders, §5).
    above = last.cosine * last.above + last.sine * alpha
    rest = last.sine * last.above - last.cosine * alpha
    gamma = jnp.hypot(rest, beta)
    # γ = 0 where A + λI is singular on the space so far: `finished` then keeps the iterate as it is.
    safe = jnp.where(gamma > 0, gamma, 1)
    next_above = -last.cosine * beta
    reflection = Reflection(rest / safe, beta / safe, next_above, last.sine * beta, beta)
    return reflection, above, safe, -last.cosine * rest, jnp.hypot(rest, next_above)


def _step(
    state: MinresState, following: Packed, new: Reflection, above: Scalar, diagonal: Scalar
) -> MinresState:
    """Along w = (v − R-entries · the two directions before) / diagonal, by cosine · residual."""
    (_, v), (older, old) = state.lanczos, state.steps
    w = _tree.add_scaled(_tree.add_scaled(v, -state.reflection.far, older), -above, old)
    w = _tree.scale(1 / diagonal, w)
    # β = 0: the space is invariant, the iterate solves the system in it, and the next row stays zero.
    length = jnp.where(new.beta > 0, new.beta, 1)
    return state._replace(
        x=_tree.add_scaled(state.x, new.cosine * state.residual, w),
        lanczos=(v, _tree.scale(1 / length, following)),
        steps=(old, w),
        reflection=new,
        residual=new.sine * state.residual,
    )
