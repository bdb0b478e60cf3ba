"""Numbers: the dtype that several have in common, powers of two as units, and NaN that is meant."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core._types import Scalar


def common_dtype(*numbers: Any) -> jnp.dtype:
    """What numbers and dtypes promote to, also where jax is told to do it for nobody."""
    # Only the dtype is asked for here: what is computed in it is cast to it in so many words.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*numbers)


def promoted(*numbers: Any) -> list[Array]:
    """All as arrays of their common dtype."""
    dtype = common_dtype(*numbers)
    return [jnp.asarray(x, dtype) for x in numbers]


def power_of_two(x: Float[Array, "..."]) -> Scalar:
    """The power of two next above all |x|, 1 where all are 0: to divide by it changes no digit."""
    top = jnp.max(jnp.abs(x))
    # The next above the largest number of the dtype would be infinite.
    exponent = jnp.minimum(jnp.frexp(top)[1], jnp.finfo(x.dtype).maxexp - 1)
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.where(top > 0, exponent, 0))


def eigh(matrix: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Eigenvalues (ascending) and eigenvectors (columns), in digits that no power of two changes."""
    # Not every backend's solver scales a matrix whose squares leave float32, and none by a power of two.
    unit = power_of_two(matrix)
    values, vectors = jnp.linalg.eigh(matrix / unit)
    return unit * values, vectors


def or_nan(there: Any, x: Array) -> Array:
    """`x` where there is such a number, and a NaN that is meant where there is none."""
    with meant():
        return jnp.where(there, x, jnp.nan)


def unknown() -> Scalar:
    """A number that is not there."""
    return or_nan(False, jnp.zeros(()))


@contextlib.contextmanager
def meant() -> Iterator[None]:
    """Around results of ours, which say by NaN and infinity what is not known: products stay watched."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield
