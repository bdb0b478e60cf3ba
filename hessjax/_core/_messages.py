"""Arguments that count something, and random keys, checked; tables as text."""

import io
import operator
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console


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


def plain(table: Any, width: int = 1000) -> str:
    """What rich shows, without colour, as wide as it needs, no blanks at the ends of lines."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def causes_of_nan(tree: Any, mode: str | None = None) -> str:
    """What may make derivatives of a finite loss NaN or infinite, at params like these."""
    causes = [f"{dtype} ends at {float(jnp.finfo(dtype).max):.5g}" for dtype in sorted(_short(tree), key=str)]
    at = "" if mode is None else f" (under `mode={mode!r}`; another may pass)"
    causes += [f"an untaken branch of `where`{at}", "a norm or square root at 0"]
    return ", or ".join(causes)


def _short(tree: Any) -> set[Any]:
    """The dtypes whose range ends early."""
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)}
    return {dtype for dtype in dtypes if float(jnp.finfo(dtype).max) < 1e6}
