"""Arguments that count something, and random keys, checked."""

import operator
from typing import Any

import jax
import jax.numpy as jnp


def checked_int(argument: str, number: Any) -> int:
    """The number as an int.

    Raises:
        TypeError: it is not an integer (2.0 is not one either).
    """
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"`{argument}` must be an integer, got {number}.") from None


def checked_count(argument: str, number: Any, least: int = 1, meaning: str = "") -> int:
    """The number as an int.

    Raises:
        TypeError: it is not an integer (2.0 is not one either).
        ValueError: it is below `least`.
    """
    found = checked_int(argument, number)
    if found < least:
        raise ValueError(f"`{argument}` must be at least {least}{meaning}, got {found}.")
    return found


def is_key(x: Any) -> bool:
    """Whether these are random keys, `jax.random.key(0)`, traced or not."""
    return isinstance(x, jax.Array) and bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def checked_key(key: Any) -> Any:
    """One random key.

    Raises:
        TypeError: it is not one.
    """
    if not is_key(key) or key.ndim:
        raise TypeError(f"`key` must be one random key, such as `jax.random.key(0)`, got {key!r}.")
    return key
