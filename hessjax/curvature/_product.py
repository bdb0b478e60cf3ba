"""What all curvature products share: precision, errors, and v ↦ JᵀMJv."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._types import LossFn, Matvec, ModelFn, Params, Scalar, Vector


def as_pytree(function: Callable[..., Any]) -> Partial:
    """The function as one that goes through `jit` as an argument, with the arrays it may carry."""
    return function if isinstance(function, Partial) else Partial(function)


def scalar(loss_fn: LossFn, args: tuple[Any, ...], argument: str = "loss_fn") -> Callable[[Any], Scalar]:
    """The loss in its first argument alone, refusing anything but one real number."""

    def loss(first: Any) -> Scalar:
        value = loss_fn(first, *args)
        if isinstance(value, jax.Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating):
            return value
        raise TypeError(
            f"`{argument}` must return one real number, the mean over the examples, got {described(value)}. "
            "Take the mean of per-example losses; return no auxiliary output."
        )

    return loss


def described(value: Any) -> str:
    """A value as error messages name it: `float32[2, 3]`, or its type."""
    is_array = isinstance(value, jax.Array)
    return f"{value.dtype}{list(value.shape)}" if is_array else f"a {type(value).__name__}"


def at_precision(precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """Matrix products and convolutions at this precision; None leaves it as it is."""
    # On GPUs float32 products may run in TF32, with an error near 1e-3: as large as many an eigenvalue.
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


@contextlib.contextmanager
def explained(way_out: str) -> Iterator[None]:
    """Turns jax's error about a `custom_vjp` into one that names the way out."""
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        # jax has no type for these errors; other words mean that something else is wrong.
        if "custom_vjp" not in str(error) and "custom_lin" not in str(error):
            raise
        raise TypeError(way_out) from error


def pull_back(pullback: Callable[[Any], tuple[Any]], cotangents: Any) -> Any:
    """What `jax.vjp` gives for a function of one argument, without the tuple."""
    return pullback(cotangents)[0]


@compiled()
def multiply_linear(linear: Callable[[Vector], Vector], params: Params, vector: Vector) -> Vector:
    """The product with a linear map that was made, and is kept, at these params."""
    # A linear map takes tangents in exactly the dtypes it was traced at, while vectors may come wider.
    _tree.check_like(vector, params, "vector", "params")
    return linear(_tree.cast_like(vector, params))


def sandwich(
    model_fn: ModelFn,
    curvature: Callable[[Any, tuple[Any, ...]], Partial],
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


@compiled(static_argnums=0)
def _multiply(
    precision: str | None,
    model_fn: ModelFn,
    curvature: Partial,
    params: Params,
    args: tuple[Any, ...],
    vector: Vector,
) -> Vector:
    _tree.check_like(vector, params, "vector", "params")
    return _linearize(precision, model_fn, curvature, params, args)(_tree.cast_like(vector, params))


@compiled(static_argnums=0)
def _linearize(
    precision: str | None, model_fn: ModelFn, curvature: Partial, params: Params, args: tuple[Any, ...]
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
            # The pullback is linear, so the point of its own vjp is immaterial: `outputs` lends its shapes.
            tangents = jax.vjp(pullback, outputs)[1]((vector,))[0]
            return pullback(_tree.cast_like(middle(tangents), tangents))[0]


def _check_outputs(outputs: Any) -> None:
    leaves = jax.tree.leaves(outputs)
    if not leaves or not all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves):
        got = ", ".join(map(described, leaves)) or "none"
        raise TypeError(f"`model_fn` must return real floating-point arrays only, got {got}.")
