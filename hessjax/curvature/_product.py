"""What all curvature products share: precision, errors, and v ↦ JᵀMJv."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_function, shown
from hessjax._core._sharding import Layouts
from hessjax._core._types import LossFn, Matvec, ModelFn, Params, Scalar, Vector


def as_pytree(function: Callable[..., Any]) -> Partial:
    """The function as one that goes through `jit` as an argument, with the arrays it may carry."""
    return function if isinstance(function, Partial) else Partial(function)


def check_call(argument: str, function: Any, args: tuple[Any, ...], first: str = "params") -> None:
    """Raise a TypeError now for a function that `first` and these arguments cannot be passed to.

    That is: it is no function, they are no arrays, or they are too many or too few.
    """
    checked_function(argument, function, f"({first}, *args)")
    _check_args(args, argument)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # those of C have none, and wrapped ones may hide theirs
        return
    try:
        signature.bind(None, *args)
    except TypeError as error:
        raise TypeError(
            f"`{argument}` must take `{first}` and the {len(args)} `args` given after it, got one with the "
            f"signature {signature}: {error}."
        ) from None


def _check_args(args: tuple[Any, ...], function: str) -> None:
    """Raise a TypeError naming the first leaf of `args` that a compiled function cannot take."""
    for i, arg in enumerate(args):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            if _tree.is_array(leaf):
                continue
            where = f"`args[{i}]`" if path == () else f"`args[{i}]`, at {_tree.path_name(path)},"
            way_out = (
                "convert it, `jnp.asarray(x)`"
                if hasattr(leaf, "__array__") and not isinstance(leaf, (np.ndarray, type))
                else f"bind it beforehand, `functools.partial({function}, name=value)`"
            )
            raise TypeError(
                f"{where} must hold arrays and numbers only, which `{function}` is compiled for, got "
                f"{_tree.describe(leaf)}: {way_out}."
            )


def check_precision(precision: Any) -> None:
    """Raise a ValueError for what is no precision of matrix products."""
    try:
        with at_precision(precision):
            pass
    except (TypeError, ValueError):
        raise ValueError(
            "`precision` must be None or one of jax's, such as 'highest' or 'bfloat16' (see "
            f"`jax.default_matmul_precision`), got {shown(precision)}."
        ) from None


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


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@contextlib.contextmanager
def explained(argument: str, custom_vjp: str = "") -> Iterator[None]:
    """Turns jax's errors about what a function does into ones that name it, and the way out.

    Args:
        argument: what the function is called.
        custom_vjp: the way out where a `custom_vjp` cannot be passed.
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        message = _explanation(error, argument, custom_vjp)
        if message is None:
            raise
        raise TypeError(message) from error


def _explanation(error: Exception, argument: str, custom_vjp: str) -> str | None:
    if isinstance(error, _NEEDS_VALUES):
        return (
            f"`{argument}` must not look at values, which it is compiled without, but it does, by `if`, "
            "`int()` or a function of NumPy (the error above says where): bind what decides beforehand, "
            f"`functools.partial({argument}, name=value)`, or use `jnp.where`."
        )
    # jax has no type for these errors; other words mean that something else is wrong.
    if "Reverse-mode differentiation does not work" in str(error):
        return (
            f"`{argument}` must be differentiable backwards, but it has a `while_loop`, which jax cannot go "
            "back through (in no `mode` of `hessian` either): give it a fixed number of steps, by `scan` or "
            "by a `fori_loop` whose bounds are numbers."
        )
    hit = "custom_vjp" in str(error) or "custom_lin" in str(error)
    return custom_vjp if custom_vjp and hit else None


def pull_back(pullback: Callable[[Any], tuple[Any]], cotangents: Any) -> Any:
    """What `jax.vjp` gives for a function of one argument, without the tuple."""
    return pullback(cotangents)[0]


@dataclasses.dataclass(frozen=True)
class LinearProduct:
    """The product with a linear map that was made, and is kept, at these params.

    Attributes:
        argument: what the function that it was made from is called.
    """

    argument: str

    def __call__(self, linear: Callable[[Vector], Vector], params: Params, vector: Vector) -> Vector:
        """The product."""
        _tree.check_arrays(vector, "vector")
        with explained(self.argument):
            return _multiply_linear(Layouts.of(params), linear, params, vector)


@compiled(static_argnums=0)
def _multiply_linear(
    layouts: Layouts, linear: Callable[[Vector], Vector], params: Params, vector: Vector
) -> Vector:
    # A linear map takes tangents in exactly the dtypes it was traced at, while vectors may come wider.
    _tree.check_vector(vector, params)
    return layouts.laid(linear(_tree.cast_like(vector, params)))


def sandwich(
    model_fn: ModelFn,
    curvature: Callable[[Any, tuple[Any, ...]], Partial],
    params: Params,
    args: tuple[Any, ...],
    linearize: bool,
    precision: str | None,
    argument: str = "model_fn",
) -> Matvec:
    """Products Jᵀ C J v; `curvature(outputs, args)` is C: a pytree, linear, from tangents to cotangents.

    Errors call the model by the name of the argument that it was given as.
    """
    _tree.check_floating(params)
    model_fn = as_pytree(model_fn)
    if linearize:
        with explained(argument):
            linear = _linearize(precision, model_fn, curvature, params, args)
        return Partial(LinearProduct(argument), linear, params)
    return Partial(SandwichProduct(precision, argument), (model_fn, curvature), params, args)


@dataclasses.dataclass(frozen=True)
class SandwichProduct:
    """A model and its curvature: equal settings hash alike, and their matvecs share compiled code."""

    precision: str | None
    argument: str

    def __call__(
        self, functions: tuple[ModelFn, Any], params: Params, args: tuple[Any, ...], vector: Vector
    ) -> Vector:
        """The product."""
        _tree.check_arrays(vector, "vector")
        with explained(self.argument):
            return _multiply(self.precision, Layouts.of(params), *functions, params, args, vector)


@compiled(static_argnums=(0, 1))
def _multiply(
    precision: str | None,
    layouts: Layouts,
    model_fn: ModelFn,
    curvature: Partial,
    params: Params,
    args: tuple[Any, ...],
    vector: Vector,
) -> Vector:
    _tree.check_vector(vector, params)
    linear = _linearize(precision, model_fn, curvature, params, args)
    return layouts.laid(linear(_tree.cast_like(vector, params)))


@compiled(static_argnums=0)
def _linearize(
    precision: str | None, model_fn: ModelFn, curvature: Partial, params: Params, args: tuple[Any, ...]
) -> Partial:
    # Out of `jit`, so that the linear maps' structure is one object for all params: see `hessian`.
    with at_precision(precision):
        # Checked inside: of what is no array jax would say that itself, by no argument's name.
        outputs, pullback = jax.vjp(lambda p: _checked_outputs(model_fn(p, *args)), params)
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


def _checked_outputs(outputs: Any) -> Any:
    leaves = jax.tree.leaves(outputs)
    arrays = bool(leaves) and all(map(_tree.is_array, leaves))
    if not arrays or not all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves):
        got = ", ".join(map(described, leaves)) or "none"
        raise TypeError(f"`model_fn` must return real floating-point arrays only, got {got}.")
    return outputs
