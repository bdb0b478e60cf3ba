"""Products Jᵀ C J v, with J the Jacobian of a model's outputs and C any curvature in them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from hessjax import _tree
from hessjax._typing import Matvec, ModelFn, Params, Vector
from hessjax.curvature.product import as_pytree, at_precision, described, multiply_linear


def sandwich(
    model_fn: ModelFn,
    curvature: Partial,
    params: Params,
    args: tuple[Any, ...],
    linearize: bool,
    precision: str | None,
) -> Matvec:
    """Products Jᵀ C J v; `curvature(outputs, args)` is C: a pytree, linear, from tangents to cotangents."""
    _tree.check_floating(params)
    model_fn = as_pytree(model_fn)
    if linearize:
        return Partial(multiply_linear, _linearize(precision, model_fn, curvature, params, args), params)
    return Partial(_Product(precision), model_fn, curvature, params, args)


@dataclasses.dataclass(frozen=True)
class _Product:
    """The settings of a product; equal settings hash alike, so that equal matvecs share compiled code."""

    precision: str | None

    def __call__(
        self, model_fn: ModelFn, curvature: Partial, params: Params, args: tuple[Any, ...], vector: Vector
    ) -> Vector:
        return _multiply(self.precision, model_fn, curvature, params, args, vector)


@functools.partial(jax.jit, static_argnums=0)
def _multiply(
    precision: str | None, model_fn: ModelFn, curvature: Partial, params: Params, args: Any, vector: Vector
) -> Vector:
    _tree.check_like(vector, params, "vector", "params")
    return _linearize(precision, model_fn, curvature, params, args)(_tree.cast_like(vector, params))


@functools.partial(jax.jit, static_argnums=0)
def _linearize(
    precision: str | None, model_fn: ModelFn, curvature: Partial, params: Params, args: Any
) -> Partial:
    # Out of `jit`, so that the linear maps' structure is one object for all params: see `hessian`.
    with at_precision(precision):
        outputs, pullback = jax.vjp(lambda p: model_fn(p, *args), params)
        _check_outputs(outputs)
        return Partial(_Through(precision), pullback, outputs, curvature(outputs, args))


@dataclasses.dataclass(frozen=True)
class _Through:
    """v ↦ JᵀCJv.

    J is the pullback's own transpose: the operations of a jvp, and a `custom_vjp` in the model is no
    obstacle. One set of activations serves both directions.
    """

    precision: str | None

    def __call__(
        self,
        pullback: Callable[[Any], tuple[Vector]],
        outputs: Any,
        middle: Callable[[Any], Any],
        vector: Vector,
    ) -> Vector:
        with at_precision(self.precision):
            tangents = jax.vjp(pullback, outputs)[1]((vector,))[0]
            return pullback(_tree.cast_like(middle(tangents), tangents))[0]


def _check_outputs(outputs: Any) -> None:
    leaves = jax.tree.leaves(outputs)
    if not leaves or not all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves):
        got = ", ".join(map(described, leaves)) or "none"
        raise TypeError(f"`model_fn` must return real floating-point arrays only, got {got}.")
