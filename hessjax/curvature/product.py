"""What every product is made with: a loss that is checked, a precision, jax's errors explained."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from hessjax import _tree
from hessjax._typing import LossFn, Params, Vector


def as_pytree(function: Callable[..., Any]) -> Partial:
    """The function as one that goes through `jit` as an argument, with the arrays it may carry."""
    return function if isinstance(function, Partial) else Partial(function)


def scalar(loss_fn: LossFn, args: tuple[Any, ...], argument: str = "loss_fn") -> Callable[[Any], Any]:
    """The loss in its first argument alone, refusing anything but one real number."""

    def loss(first: Any) -> Any:
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
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


@contextlib.contextmanager
def explained(way_out: str) -> Iterator[None]:
    """Turns jax's error about a `custom_vjp` into one that names the way out."""
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        if "custom_vjp" not in str(error) and "custom_lin" not in str(error):
            raise
        raise TypeError(way_out) from error


def pull_back(pullback: Callable[[Any], tuple[Any]], cotangents: Any) -> Any:
    """What `jax.vjp` gives for a function of one argument, without the tuple."""
    return pullback(cotangents)[0]


@jax.jit
def multiply_linear(linear: Callable[[Vector], Vector], params: Params, vector: Vector) -> Vector:
    """The product with a linear map that was made, and is kept, at these params."""
    _tree.check_like(vector, params, "vector", "params")
    return linear(_tree.cast_like(vector, params))
