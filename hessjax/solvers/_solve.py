"""Systems of linear equations in one line, with a residual that was measured."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_function, checked_instance
from hessjax._core._packing import Packing
from hessjax._core._sharding import Layouts
from hessjax._core._types import Matvec, Relative, Tolerance, Vector, readable_defaults
from hessjax._run._arguments import RunOptions, checked_options
from hessjax._run._drivers import as_partial, run
from hessjax._run._estimator import Estimator
from hessjax.solvers._conjugate_gradient import conjugate_gradient
from hessjax.solvers._system import Solution, System


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
    `hj.solve(A, grad_of_test_loss, damping).x`. Nothing is preconditioned unless
    `method` says so.

    Away from a minimum a Hessian is rarely positive definite. Where conjugate gradients meet a direction p
    with pᵀ(A + λI)p < 0 they stop at the last good iterate, and the solution says so in
    `negative_curvature`, not converged; where it cannot be told from 0, in `singular`. The ways out:
    `method=hj.estimators.minres`, for indefinite systems (x is then no descent step), a damping larger by
    more than `-solution.curvature`, or a Gauss–Newton matrix for A.

    Args:
        matvec: the symmetric linear map A.
        rhs: b, like the params.
        damping: λ, in the units of A's eigenvalues.
        method: `(rhs, damping, tol=...) -> Estimator`: `conjugate_gradient` or `minres`. To start from an x,
            or with an approximate inverse P:
            `functools.partial(hj.estimators.conjugate_gradient, start=x, preconditioner=P)`.
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
