"""(A + λI)x = b in one line, with a residual that was measured."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._packing import Packing
from hessjax._typing import Estimator, Matvec, Relative, Tolerance, Vector
from hessjax.estimator import run
from hessjax.inverse.conjugate_gradient import conjugate_gradient
from hessjax.inverse.solution import Solution, System


def solve(
    matvec: Matvec,
    rhs: Vector,
    damping: Any = 0.0,
    *,
    method: Callable[..., Estimator] = conjugate_gradient,
    max_matvecs: int = 100,
    tol: Tolerance = Relative(1e-5),  # noqa: B008 - immutable
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> Solution:
    """Solve (A + λI)x = b: a Newton step, or an inverse curvature times a gradient.

    The influence of training examples on a test loss, for one, starts from
    `hj.solve(A, grad_of_test_loss, damping).x`. Nothing is preconditioned.

    Away from a minimum a Hessian is rarely positive definite. Where conjugate gradients meet a direction p
    with pᵀ(A + λI)p ≤ 0 they stop at the last good iterate, and the solution says so in
    `negative_curvature`, not converged. The ways out: `method=hj.minres`, which solves indefinite systems
    (x is then no descent step), a damping larger by more than `-solution.curvature`, or a Gauss–Newton
    matrix for A.

    Args:
        matvec: the symmetric linear map A.
        rhs: b, like the params.
        damping: λ, in the units of A's eigenvalues.
        method: `(rhs, damping, tol=...) -> Estimator`: `conjugate_gradient` or `minres`. To start from an x:
            `functools.partial(hj.conjugate_gradient, start=x)`.
        max_matvecs: the most products to spend on the search.
        tol: stop at this residual: absolute, or `relative` to ‖b‖.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        A `Solution`. Its residual is recomputed, ‖b − (A + λI)x‖ from one more product, and `converged`
        judges that one: in float32 the method's own may fall below what rounding lets x reach, which is
        about 1e-7·‖A + λI‖·‖x‖.

    Raises:
        TypeError: `rhs` is not floating point; `damping` is a `relative` one.
        ValueError: `rhs` or `damping` is not finite; the matvec's products are not like `rhs`.
        NonFiniteProductError: see `run`.

    Cost:
        At most `max_matvecs` products and one more; memory 5·d (`minres` 7·d).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([0.0, 1.0, 3.0]))
        >>> solution = hj.solve(A, jnp.ones(3), damping=1.0)
        >>> solution.x.round(4).tolist(), bool(solution.converged)
        ([1.0, 0.5, 0.25], True)
    """
    system = System.of(rhs, damping, tol)
    solution, _ = run(
        method(rhs, damping, tol=tol),
        matvec,
        jax.random.key(0),  # nothing here is random
        rhs,
        max_matvecs=max_matvecs,
        tol=tol,
        callbacks=callbacks,
        on_device=on_device,
    )
    if on_device:
        matvec = matvec if isinstance(matvec, jax.tree_util.Partial) else jax.tree_util.Partial(matvec)
        return _multiplied_and_measured(matvec, solution, system, rhs)
    return _measured(solution, matvec(_cast(solution.x, rhs)), system)


_cast = jax.jit(_tree.cast_like)


@jax.jit
def _multiplied_and_measured(matvec: Matvec, solution: Solution, system: System, rhs: Vector) -> Solution:
    return _measured(solution, matvec(_tree.cast_like(solution.x, rhs)), system)


@jax.jit
def _measured(solution: Solution, product: Vector, system: System) -> Solution:
    packing = Packing.of(system.rhs)
    rhs, x, product = map(packing.pack, (system.rhs, solution.x, product))
    residual = _tree.norm(_tree.add_scaled(rhs, -1, _tree.add_scaled(product, system.damping, x)))
    _, unit, limit = system._replace(rhs=rhs).scaled()
    return solution._replace(
        residual=residual,
        converged=jnp.asarray(residual <= unit * limit),
        num_matvecs=solution.num_matvecs + 1,
    )
