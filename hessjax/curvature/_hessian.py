"""Hessian-vector products: a loss, params and one batch become a matvec."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
from jax.tree_util import Partial

from hessjax._core import _digests, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import check_flags, checked_choice
from hessjax._core._sharding import Layouts
from hessjax._core._types import LossFn, Matvec, Params, Scalar, Vector
from hessjax.curvature._parts import check_alone, in_parts
from hessjax.curvature._product import (
    LinearProduct,
    as_pytree,
    at_precision,
    check_call,
    check_precision,
    explained,
    pull_back,
    scalar,
)
from hessjax.curvature._weights import Weights

Mode: TypeAlias = Literal["forward-over-reverse", "reverse-over-reverse", "reverse-over-forward"]
"""How two derivatives are nested."""


def hessian(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    mode: Mode = "forward-over-reverse",
    linearize: bool = False,
    microbatch: int | None = None,
    weights: Weights | None = None,
    precision: str | None = "highest",
) -> Matvec:
    """The Hessian of `loss_fn(params, *args)` in `params`, as a matvec v ↦ Hv.

    The matvec is a `jax.tree_util.Partial`, hence itself a pytree: it goes through `jax.jit` as an
    argument, and one made from other params or another batch of the same shapes compiles nothing anew
    (as long as `loss_fn` is the same function, or an equal one).

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the examples in `args`.
        params: pytree of real floating-point arrays.
        *args: what else the loss takes: a batch, a random key, BatchNorm statistics.
        mode: how two derivatives are nested. `"forward-over-reverse"` is the cheapest;
            `"reverse-over-reverse"` also works where a `custom_vjp` stands in the way;
            `"reverse-over-forward"` where it does not and memory is tight.
        linearize: do the work that does not depend on v once, now, and keep it. Later products cost a
            third less; pays from the third product at one point. Not with `"reverse-over-forward"`.
        microbatch: the most examples to work on at once, of the batch, which is then the first of `args`;
            None: all. The loss must be a mean over them. Inside `jit` the parts run in a loop, which is slow
            for convolutions on a CPU.
        weights: with `microbatch`, if the loss is a weighted mean (over tokens that are no padding):
            `weights(batch) -> array`, how much each example counts, or each output position. None: all alike.
        precision: of matrix products and convolutions; `None` leaves it to the surrounding
            `jax.default_matmul_precision`. Only accelerators notice: their default may keep 3 digits.

    Returns:
        The matvec. It takes a vector like `params` (cast to their dtypes) and returns one, in loss per
        parameter.

    Raises:
        TypeError: `params` has leaves that are not floating point; at the first product, `loss_fn`
            does not return a real scalar, or holds a `custom_vjp` that `mode` cannot pass.
        ValueError: unknown `mode`; `microbatch` below 1 or with `linearize`; `weights` without it, or such
            as `per_example_grads` refuses; at a product, `vector` is not like `params` (every leaf is
            listed).

    Cost:
        By operation count a product is at most 3 gradients, 2 when linearized. Memory: about two
        gradients' peak, with `microbatch` those of so many examples, and one vector for the sum; linearized,
        the activations of a gradient stay allocated with the matvec.

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(params, x):
        ...     return jnp.sum(jnp.array([1.0, 2.0]) * params["w"] ** 2 * x)
        >>> A = hj.hessian(loss_fn, {"w": jnp.ones(2)}, 3.0)
        >>> A({"w": jnp.array([1.0, 1.0])})["w"].tolist()
        [6.0, 12.0]
    """
    _tree.check_floating(params)
    check_call("loss_fn", loss_fn, args)
    _digests.check_alike(params, args)
    check_flags(linearize=linearize)
    check_precision(precision)
    products: dict[str, Any] = _LINEARIZED if linearize else _PRODUCTS
    checked_choice("mode", mode, products, " with `linearize=True`" if linearize else "")
    loss_fn = as_pytree(loss_fn)
    check_alone(weights, microbatch)
    if microbatch is not None:
        return in_parts(_Product(mode, precision), loss_fn, params, args, microbatch, weights, linearize)
    if linearize:
        # No product is made here, so no vector is checked: `LinearProduct` keeps the params to do that.
        with explained("loss_fn", _way_out(mode)):
            linear = _linearize(mode, precision, loss_fn, params, args)
        return Partial(LinearProduct("loss_fn"), linear, params)
    return Partial(_Product(mode, precision), loss_fn, params, args)


def hvp(loss_fn: LossFn, params: Params, vector: Vector, *args: Any) -> Vector:
    """One Hessian-vector product: `hessian(loss_fn, params, *args)(vector)`.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`.
        params: pytree of real floating-point arrays.
        vector: a vector like `params`.
        *args: what else the loss takes.

    Returns:
        Hv, a vector like `params`, in loss per parameter.

    Raises:
        TypeError: as `hessian`.
        ValueError: as `hessian`.

    Cost:
        One product, at most 3 gradients.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> hj.hvp(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])).tolist()
        [6.0, 12.0]
    """
    return hessian(loss_fn, params, *args)(vector)


Loss: TypeAlias = Callable[[Params], Scalar]


# In units of a forward pass a gradient is 3 (1 forward, 2 backward). The outermost derivative decides what
# is stored, and whether a `custom_vjp`, which has no forward rule, gets in the way.


def _forward_over_reverse(loss: Loss, params: Params, vector: Vector) -> Vector:
    # At most 9 units, and the tangent travels with the gradient: nothing is kept for a second backward pass.
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def _reverse_over_forward(loss: Loss, params: Params, vector: Vector) -> Vector:
    # ∇(∇L·v): the inner derivative is one number, so the backward pass stores the activations of a jvp only.
    return jax.grad(lambda p: jax.jvp(loss, (p,), (vector,))[1])(params)


def _reverse_over_reverse(loss: Loss, params: Params, vector: Vector) -> Vector:
    # vᵀH is Hv, H being symmetric. Needs no forward rule, so it passes every `custom_vjp`.
    return jax.vjp(jax.grad(loss), params)[1](vector)[0]


_PRODUCTS = {
    "forward-over-reverse": _forward_over_reverse,
    "reverse-over-reverse": _reverse_over_reverse,
    "reverse-over-forward": _reverse_over_forward,
}


def _linear_forward(loss: Loss, params: Params) -> Callable[[Vector], Vector]:
    # The 3 units of primal work are done here; the linear part that is left takes at most 6 of the 9.
    return jax.linearize(jax.grad(loss), params)[1]


def _linear_reverse(loss: Loss, params: Params) -> Callable[[Vector], Vector]:
    return Partial(pull_back, jax.vjp(jax.grad(loss), params)[1])


_LINEARIZED = {
    "forward-over-reverse": _linear_forward,
    "reverse-over-reverse": _linear_reverse,
}


@dataclasses.dataclass(frozen=True)
class _Product:
    """The settings of a product; equal settings hash alike, so that equal matvecs share compiled code."""

    mode: str
    precision: str | None

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple[Any, ...], vector: Vector) -> Vector:
        _tree.check_arrays(vector, "vector")
        with explained("loss_fn", _way_out(self.mode)):
            return _multiply(self, Layouts.of(params), loss_fn, params, args, vector)


@compiled(static_argnums=(0, 1))
def _multiply(
    settings: _Product,
    layouts: Layouts,
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    vector: Vector,
) -> Vector:
    _tree.check_vector(vector, params)
    # Around the trace, not the call: the precision is written into the program's operations.
    with at_precision(settings.precision):
        vector = _tree.cast_like(vector, params)
        return layouts.laid(_PRODUCTS[settings.mode](scalar(loss_fn, args), params, vector))


@compiled(static_argnums=(0, 1))
def _linearize(
    mode: str, precision: str | None, loss_fn: LossFn, params: Params, args: tuple[Any, ...]
) -> Any:
    # Returned from `jit`, the linear map's structure comes from the cached trace: it is the same object
    # for every params and batch of these shapes, and code compiled for one serves the next.
    with at_precision(precision):
        return _LINEARIZED[mode](scalar(loss_fn, args), params)


def _way_out(mode: str) -> str:
    return (
        f"`loss_fn` must have no `custom_vjp` inside for {mode!r}, the `mode` of this product; use "
        "`hessian(..., mode='reverse-over-reverse')`, which can pass one."
    )
