"""Arguments checked by kind: numbers, counts, keys, functions, flags, choices, settings."""

import inspect
import math
import numbers
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# -- what messages call a value ----------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as messages name it, on one line: arrays by dtype and shape, functions by name."""
    if isinstance(value, type):
        return f"the class `{value.__name__}`"
    if inspect.isroutine(value) or (callable(value) and hasattr(value, "__name__")):
        return f"the function `{value.__name__}`"
    if isinstance(value, (jax.Array, np.ndarray)) and (np.ndim(value) or isinstance(value, jax.core.Tracer)):
        traced = "traced " if isinstance(value, jax.core.Tracer) else ""
        return f"{traced}{value.dtype}{list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def uncalled(value: Any) -> str:
    """A hint at the call to write, for a class of ours where one of its instances is wanted; or nothing."""
    ours = isinstance(value, type) and value.__module__.startswith("hessjax.")
    return f": call it, `{_as_call(value)}`" if ours else ""


def public_name(cls: type) -> str:
    """The name that people call the class by, `n_of_m` for `NOfM`, if there is one beside it."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z])", "_", cls.__name__).lower()
    return name if getattr(sys.modules.get(cls.__module__), name, None) is cls else cls.__name__


def _as_call(cls: type) -> str:
    """The call that makes one: `n_of_m(n, m)`."""
    needed = inspect.signature(cls).parameters.values()
    return f"{public_name(cls)}({', '.join(p.name for p in needed if p.default is p.empty)})"


# -- numbers -----------------------------------------------------------------------------------------


def checked_int(argument: str, number: Any) -> int:
    """The number as an int.

    Raises:
        TypeError: it is not an integer (2.0 is not one either, nor is True).
    """
    if isinstance(number, jax.core.Tracer):
        raise TypeError(
            f"`{argument}` must be an integer, got a traced value: it decides shapes, so make it static, "
            f"`jax.jit(f, static_argnames={argument!r})`."
        )
    try:
        if isinstance(number, (bool, np.bool_)):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise TypeError(f"`{argument}` must be an integer, got {shown(number)}.") from None


def is_number(x: Any) -> bool:
    """Whether this is one real number, traced or not; booleans are none."""
    if isinstance(x, (jax.Array, np.ndarray, np.generic)) and not np.ndim(x):
        return bool(jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating))
    return isinstance(x, numbers.Real) and not isinstance(x, (bool, np.bool_))


def checked_number(argument: str, number: Any, instead: str = "") -> Any:
    """The number itself, NaN too. `instead` may say what else a caller takes.

    Raises:
        TypeError: it is not one real number.
    """
    if not is_number(number):
        raise TypeError(f"`{argument}` must be a number{instead}, got {shown(number)}.")
    return number


def checked_finite(argument: str, number: Any) -> Any:
    """The number itself; traced ones pass.

    Raises:
        TypeError: it is not one real number.
        ValueError: it is NaN or infinite.
    """
    if not isinstance(checked_number(argument, number), jax.core.Tracer) and not math.isfinite(number):
        raise ValueError(f"`{argument}` must be finite, got {number}.")
    return number


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


def checked_key(key: Any, argument: str = "key") -> Any:
    """One random key.

    Raises:
        TypeError: it is not one.
    """
    if not is_key(key) or key.ndim:
        raise TypeError(
            f"`{argument}` must be one random key, such as `jax.random.key(0)`, got {shown(key)}{_hint(key)}."
        )
    return key


def checked_any_key(key: Any, argument: str = "key") -> Any:
    """One random key, or one in the old style, `jax.random.PRNGKey(0)`, which draws the same numbers.

    Raises:
        TypeError: it is neither.
    """
    return key if _is_old_key(key) else checked_key(key, argument)


def _is_old_key(key: Any) -> bool:
    return isinstance(key, (jax.Array, np.ndarray)) and key.dtype == jnp.uint32 and key.ndim == 1


def _hint(key: Any) -> str:
    if _is_old_key(key):
        return ": wrap it, `jax.random.wrap_key_data(key)`"
    return ": take one of them, `keys[0]`" if is_key(key) else ""


def checked_schedule(argument: str, value: Any) -> Any:
    """The number itself, or the function of the step T that gives one.

    Raises:
        TypeError: it is neither.
    """
    if callable(value) and not isinstance(value, type):
        return checked_function(argument, value, "(step) -> number")
    return checked_number(argument, value, ", or a schedule `(step) -> number`")


# -- functions, flags, choices, settings ---------------------------------------------------------------


def checked_function(argument: str, function: Any, form: str) -> Any:
    """The function itself; `form` says how it is called, `(params) -> scalar`.

    Raises:
        TypeError: it cannot be called, or not with as many arguments.
    """
    if not callable(function):
        raise TypeError(f"`{argument}` must be a function `{form}`, got {shown(function)}.")
    names = re.findall(r"[^, ]+", form[form.index("(") + 1 : form.index(")")])
    if "*args" not in names:
        _check_takes(argument, function, form, names)
    return function


def _check_takes(argument: str, function: Any, form: str, names: list[str]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # those of C have none, and wrapped ones may hide theirs
        return
    try:
        # A name with `=` behind it is passed as a keyword.
        signature.bind(
            *(name for name in names if "=" not in name), **{name[:-1]: 0 for name in names if "=" in name}
        )
    except TypeError as error:
        raise TypeError(
            f"`{argument}` must be a function `{form}`, got one with the signature {signature}: {error}."
        ) from None


def check_functions(**functions: Any) -> None:
    """Raise a TypeError for an argument that is given and no function of the params."""
    for argument, function in functions.items():
        if function is not None:
            checked_function(argument, function, "(params) -> ...")


def checked_flag(argument: str, flag: Any) -> bool:
    """The flag as a bool: what is merely true, such as the string "no", would count as True.

    Raises:
        TypeError: it is neither True nor False.
    """
    if not isinstance(flag, (bool, np.bool_)):
        raise TypeError(f"`{argument}` must be True or False, got {shown(flag)}.")
    return bool(flag)


def check_flags(**flags: Any) -> None:
    """Raise a TypeError for an argument that is neither True nor False."""
    for argument, flag in flags.items():
        checked_flag(argument, flag)


def checked_choice(argument: str, choice: Any, choices: Iterable[str], note: str = "") -> Any:
    """The choice itself, one of several names.

    Raises:
        ValueError: it is none of them.
    """
    names = tuple(choices)
    if not isinstance(choice, str) or choice not in names:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"`{argument}` must be one of {listed}{note}, got {shown(choice)}.")
    return choice


def checked_instance(argument: str, value: Any, kind: type, example: str) -> Any:
    """The value itself, an instance of a public class; most often parentheses are missing.

    Raises:
        TypeError: it is none: the call to write is named.
    """
    if isinstance(value, kind):
        return value
    hint = uncalled(value)
    if isinstance(value, str):
        calls = [_as_call(cls) for cls in _all_kinds(kind)]
        hint = "".join(f": write `{call}`" for call in calls if call.split("(")[0] == value)
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise TypeError(
        f"`{argument}` must be {article} `{kind.__name__}`, such as `{example}`, got {shown(value)}{hint}."
    )


def _all_kinds(kind: type) -> Iterator[type]:
    direct: list[type] = kind.__subclasses__()
    for cls in direct:
        yield cls
        yield from _all_kinds(cls)


def checked_sequence(argument: str, value: Any, what: str) -> Sequence[Any]:
    """The sequence itself, of what is said.

    Raises:
        TypeError: it is none; most often it is the one thing that should be put into a list.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(
            f"`{argument}` must be a sequence of {what}, got {shown(value)}: put one into a list."
        )
    return value


def check_path(argument: str, path: Any) -> None:
    """Raise a TypeError for what names no file, a ValueError for an empty name."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`{argument}` must be a path, a string or a `pathlib.Path`, got {shown(path)}.")
    if path == "":
        raise ValueError(f"`{argument}` must name a file or folder, got an empty string.")


# -- causes ----------------------------------------------------------------------------------------------


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
