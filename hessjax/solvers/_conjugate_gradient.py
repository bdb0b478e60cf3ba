"""Conjugate gradients, and `solve`, which runs them unless another method is asked for."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_function, checked_instance
from hessjax._core._packing import Packed, Packing
from hessjax._core._sharding import Layouts
from hessjax._core._types import (
    Block,
    Key,
    Matvec,
    Params,
    Relative,
    Scalar,
    Tolerance,
    Vector,
    readable_defaults,
    settings,
)
from hessjax._run._arguments import RunOptions, checked_options
from hessjax._run._drivers import as_partial, run
from hessjax._run._estimator import Estimator
from hessjax.solvers._system import BELOW_ZERO, Solution, System, checked_vector


class CgState(NamedTuple):
    """An iterate, in units of ‖b‖, and the direction to search next, packed.

    Attributes:
        x: the iterate.
        residual: b − (A + λI)x, by the recurrence.
        direction: p/‖p‖, the vector to be multiplied next.
        length: ‖p‖.
        squares: the residual's squared norm.
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


@settings(arrays=("rhs", "damping", "start", "tol"))
class ConjugateGradient(System, Estimator):
    """Conjugate gradients for (A + λI)x = b, as an estimator of x.

    Every iterate minimises ½xᵀ(A + λI)x − bᵀx over a Krylov space. Where a search direction p has
    pᵀ(A + λI)p < 0 there is no minimum: the state rests at the last good iterate, keeps p, says so in the
    result, and a run with a `tol` ends. So it does where pᵀ(A + λI)p is within rounding errors of 0, which
    are about eps·‖A + λI‖·‖p‖²: that is `singular`, and not negative.

    Args:
        rhs: b, like the params.
        damping: λ, a number. It may be negative, as long as A + λI stays positive definite.
        start: x to start from, like the params; zero by default. It costs one product.
        tol: residual at which the result counts as converged: absolute, or `relative` to ‖b‖.

    Returns:
        An `Estimator` with result `Solution`. Its residual, which is also the error, is that of the
        recurrence, which in float32 goes on falling when the true one, ‖b − (A + λI)x‖, does not; `solve`
        recomputes it.

    Raises:
        TypeError: `rhs` or `start` is not floating point; `damping` is a `relative` one.
        ValueError: `rhs`, `start` or `damping` is not finite, or `start` is not like `rhs`.

    Cost:
        One product a step, 10·d operations, memory 5·d. After k steps the error in the norm of A + λI is at
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
    """

    init_only = ("rhs", "damping", "start", "tol")

    rhs: Vector
    damping: Any = 0.0
    _: dataclasses.KW_ONLY
    start: Vector | None = None
    tol: Tolerance | None = Relative(1e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            checked_vector(self.start, "start")
            _tree.check_like(self.start, self.rhs, "start", "rhs")

    def init(self, key: Key, like: Params) -> CgState:
        """The zero vector, or the one to start from, whose product is asked for first."""
        _tree.check_like(self.rhs, like, "rhs", "like")
        packing = Packing.of(like)
        rhs, unit, limit = self.scaled(packing)
        squares = _tree.inner(rhs, rhs)
        # From a vector to start from: a first step of length 1 along that vector, from zero.
        along = rhs if self.start is None else _tree.scale(1 / unit, packing.pack(_tree.wide(self.start)))
        length = _tree.norm(along)
        return CgState(
            x=packing.zeros(),
            residual=rhs,
            direction=_tree.scale(_over(1.0, length), along),
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

    def query(self, state: CgState) -> Block:
        """The direction."""
        return state.packing.unpack_block(tuple(x[None] for x in state.direction))

    def update(self, state: CgState, products: Block) -> CgState:
        """A step along the direction multiplied, and the next direction."""
        p, eps = state.direction, jnp.finfo(state.unit.dtype).eps
        # p has norm 1 here and `length` carries ‖p‖: pᵀp itself would leave float32.
        product = _tree.add_scaled(state.packing.pack(_tree.row(products, 0)), state.damping, p)
        largest = jnp.maximum(state.largest, _tree.norm(product))
        searching = state.begun & (
            state.squares > eps**2
        )  # else the start's product, or nothing left to gain
        curvature = jnp.where(searching, _tree.inner(p, product), jnp.inf)
        # Rounding alone gives pᵀ(A + λI)p an error of eps·‖A + λI‖: what is no larger has no sign.
        resting = state.negative_curvature | state.singular
        negative = ~resting & (curvature < -BELOW_ZERO * eps * largest)
        singular = ~resting & ~negative & (curvature <= eps * largest)
        resting |= negative | singular
        step = jnp.where(searching & ~resting, _over(state.squares, state.length * curvature), 0)
        step = jnp.where(state.begun, step, state.length)
        residual = _tree.add_scaled(state.residual, -step, product)
        squares = _tree.inner(residual, residual)
        moving = ~resting & (searching | ~state.begun)
        kept = jnp.where(searching, _over(squares, state.squares), 0) * state.length
        length = jnp.where(moving, jnp.sqrt(squares + kept**2), state.length)  # the two are orthogonal
        new, old = jnp.where(moving, _over(1.0, length), 0), jnp.where(moving, _over(kept, length), 1)
        return state._replace(
            x=_tree.add_scaled(state.x, step, p),
            residual=residual,
            direction=_tree.add_scaled(_tree.scale(new, residual), old, p),
            length=length,
            squares=squares,
            curvature=jnp.minimum(state.curvature, curvature),
            largest=largest,
            begun=jnp.asarray(True),
            negative_curvature=state.negative_curvature | negative,
            singular=state.singular | singular,
            num_matvecs=state.num_matvecs + 1,
        )

    def result(self, state: CgState) -> Solution:
        """The iterate, in units of b again."""
        residual = jnp.sqrt(state.squares)
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
        """The residual of the recurrence; NaN once a direction of no positive curvature was met."""
        resting = state.negative_curvature | state.singular
        return _numbers.or_nan(~resting, state.unit * jnp.sqrt(state.squares))

    def scale(self, state: CgState) -> Scalar:
        """‖b‖."""
        return state.unit


conjugate_gradient = ConjugateGradient


def _over(a: Any, b: Float[Array, ""]) -> Float[Array, ""]:
    """a/b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


@readable_defaults
def solve(
    matvec: Matvec,
    rhs: Vector,
    damping: Any = 0.0,
    *,
    method: Callable[..., Estimator] = conjugate_gradient,
    max_matvecs: int = 100,
    tol: Tolerance = Relative(1e-5),  # noqa: B008 - immutable
    **options: Unpack[RunOptions],
) -> Solution:
    """Solve (A + λI)x = b: a Newton step, or an inverse curvature times a gradient.

    The influence of training examples on a test loss, for one, starts from
    `hj.solve(A, grad_of_test_loss, damping).x`. Nothing is preconditioned.

    Away from a minimum a Hessian is rarely positive definite. Where conjugate gradients meet a direction p
    with pᵀ(A + λI)p < 0 they stop at the last good iterate, and the solution says so in
    `negative_curvature`, not converged; where it cannot be told from 0, in `singular`. The ways out:
    `method=hj.estimators.minres`, for indefinite systems (x is then no descent step), a damping larger by
    more than `-solution.curvature`, or a Gauss–Newton matrix for A.

    Args:
        matvec: the symmetric linear map A.
        rhs: b, like the params.
        damping: λ, in the units of A's eigenvalues.
        method: `(rhs, damping, tol=...) -> Estimator`: `conjugate_gradient` or `minres`. To start from an x:
            `functools.partial(hj.estimators.conjugate_gradient, start=x)`.
        max_matvecs: the most products to spend on the search.
        tol: stop at this residual: absolute, or `relative` to ‖b‖.
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        A `Solution`. Its residual is recomputed, ‖b − (A + λI)x‖ from one more product, and `converged`
        judges that one: in float32 the method's own may fall below what rounding lets x reach, which is
        about 1e-7·‖A + λI‖·‖x‖.

    Raises:
        TypeError: `rhs` is not floating point; `damping` is a `relative` one.
        ValueError: `rhs` or `damping` is not finite; the matvec's products are not like `rhs`.
        NonFiniteProductError: see `run`.

    Cost:
        At most `max_matvecs` products and one more; memory 5·d (`minres` 10·d).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([0.0, 1.0, 3.0]))
        >>> solution = hj.solve(A, jnp.ones(3), damping=1.0)
        >>> solution.x.round(4).tolist(), bool(solution.converged)
        ([1.0, 0.5, 0.25], True)
    """
    checked = checked_options("solve", options)
    system, estimator = System(rhs, damping, tol), _made(method, rhs, damping, tol)
    key = jax.random.key(0)  # nothing here is random
    solution, _ = run(estimator, matvec, key, rhs, max_matvecs=max_matvecs, tol=tol, **checked)
    if options.get("on_device"):
        return _multiplied_and_measured(as_partial(matvec), Layouts.of(rhs), solution, system, rhs)
    return _measured(Layouts.of(rhs), solution, matvec(_cast(solution.x, rhs)), system)


def _made(method: Any, rhs: Vector, damping: Any, tol: Any) -> Estimator:
    checked_function(
        "method", method, "(rhs, damping, tol=) -> Estimator`, such as `hessjax.estimators.minres"
    )
    return checked_instance("method(rhs, damping)", method(rhs, damping, tol=tol), Estimator, "minres(rhs)")


_cast = jax.jit(_tree.cast_like)


@compiled(static_argnums=1)
def _multiplied_and_measured(
    matvec: Matvec, layouts: Layouts, solution: Solution, system: System, rhs: Vector
) -> Solution:
    return _measured(layouts, solution, matvec(_tree.cast_like(solution.x, rhs)), system)


@functools.partial(jax.jit, static_argnums=0)
def _measured(layouts: Layouts, solution: Solution, product: Vector, system: System) -> Solution:
    with layouts.told(system.rhs):
        packing = Packing.of(system.rhs)
    rhs, x, product = map(packing.pack, (system.rhs, solution.x, product))
    residual = _tree.norm(_tree.add_scaled(rhs, -1, _tree.add_scaled(product, system.damping, x)))
    _, unit, limit = system.scaled(packing)
    return solution._replace(
        residual=residual,
        converged=jnp.asarray(residual <= unit * limit),
        num_matvecs=solution.num_matvecs + 1,
    )
