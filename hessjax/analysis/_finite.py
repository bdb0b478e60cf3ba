"""A row of `check`: whether gradient and products are finite, and if not, where and why."""

import contextlib
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core._messages import causes_of_nan
from hessjax._core._types import LossFn, Matvec, Params, Vector
from hessjax.analysis._comparisons import CheckRow, named
from hessjax.curvature._hessian import Mode, hessian


def finite_products(
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    grads: Vector,
    products: tuple[Vector, Vector],
    matvec: Matvec | None,
) -> tuple[CheckRow, dict[str, str]]:
    """The row, and of what is not finite the leaves: of the gradient, of the product."""
    infinite = np.array([[not_finite(x) for x in jax.tree.leaves(t)] for t in (grads, *products)])
    counts = {"gradient": infinite[0], "product": infinite[1:].max(axis=0)}
    bad = {name: named(params, count > 0) for name, count in counts.items() if count.any()}
    if not bad:
        return CheckRow("finite products", True, 0.0, 0, "gradient and products are finite"), bad
    context = loss_fn, params, args, "gradient" not in bad, matvec
    where = "; ".join(f"{name} NaN or infinite in: {leaves}" for name, leaves in bad.items())
    return CheckRow("finite products", False, float(infinite.sum()), 0, f"{where}: {_cause(*context)}"), bad


def _cause(
    loss_fn: LossFn, params: Params, args: tuple[Any, ...], has_gradient: bool, matvec: Matvec | None
) -> str:
    if has_gradient and matvec is not None:
        return "not so the gradient, so look at `matvec`"
    mode = cheapest_mode(loss_fn, params, args)
    for other in get_args(Mode):
        if has_gradient and other != mode and _passes(hessian(loss_fn, params, *args, mode=other), params):
            return f"with `mode={other!r}` it is finite"
    return causes_of_nan(params)


def _passes(matvec: Matvec, params: Params) -> bool:
    """Whether a product can be made, and is finite."""
    with contextlib.suppress(TypeError):
        return not any(map(not_finite, jax.tree.leaves(matvec(params))))
    return False


def not_finite(x: Any) -> int:
    """How many numbers are NaN or infinite."""
    return int(jnp.size(x) - jnp.sum(jnp.isfinite(x)))


def untested(name: str, leaves: str) -> CheckRow:
    """The row of what needs numbers that are not finite."""
    return CheckRow(name, False, math.nan, math.nan, f"not tested: not finite in {leaves}")


def cheapest_mode(loss_fn: LossFn, params: Params, args: tuple[Any, ...]) -> Mode:
    """The cheapest nesting of derivatives that the loss admits."""
    try:  # a trace decides; nothing is computed or compiled
        jax.eval_shape(hessian(loss_fn, params, *args), params)
    except TypeError:
        return "reverse-over-reverse"
    return "forward-over-reverse"
