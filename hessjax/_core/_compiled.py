"""`jax.jit` for what is given functions: of those made anew, as closures are, only a few are remembered."""

import copy
import dataclasses
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

from hessjax._core._types import assign, is_settings

KEPT = 8
"""How many functions made anew a step stays compiled for: each holds its arrays and up to a megabyte."""


class Compiled:
    """`jax.jit(function, **options)` for positional arguments, with functions within `Partial`s and settings.

    jax remembers by function what it compiled, and for ever. That serves a loss which a module defines. One
    that is defined in a call, such as a lambda over a batch, is another function at every call: with its
    arrays and its code it would stay though nobody can call it again. So each of those has a `jax.jit` to
    itself, and the last few of these are kept.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        functools.update_wrapper(self, function)
        self._function, self._options = function, options
        self._lasting = jax.jit(function, **options)
        self._passing: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        jitted, args = self._ready(args)
        return jitted(*args)

    def eval_shape(self, *args: Any) -> Any:
        """What the function returns, in shapes and dtypes."""
        jitted, args = self._ready(args)
        return jitted.eval_shape(*args)

    def lower(self, *args: Any) -> Any:
        """The program, before it is compiled."""
        jitted, args = self._ready(args)
        return jitted.lower(*args)

    def _ready(self, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        functions: list[Any] = []
        # Out of the arguments: jax has caches of their structures that are nobody's to clear.
        emptied = _emptied(args, functions)
        return (self._for(tuple(functions)), emptied) if functions else (self._lasting, args)

    def _for(self, functions: tuple[Any, ...]) -> Any:
        jitted = self._passing.pop(functions, None)
        # In the order of use: the first is the one that was not asked for the longest.
        self._passing[functions] = jitted = self._jit(functions) if jitted is None else jitted
        while len(self._passing) > KEPT:
            self._passing.popitem(last=False)[1].clear_cache()
        return jitted

    def _jit(self, functions: tuple[Any, ...]) -> Any:
        # A function of its own, since jax files what it compiles by function: both go together.
        own = functools.wraps(self._function)(lambda *args: self._function(*_filled(args, functions)))
        return jax.jit(own, **self._options)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Compiled]:
    """`Compiled` with these options of `jax.jit`, as a decorator."""
    return functools.partial(Compiled, **options)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["value"])
@dataclasses.dataclass(frozen=True)
class Known:
    """What a trace alone tells, as the result of a function that is compiled but never run.

    `function.eval_shape(...)` returns it. jax remembers that by functions and shapes, as all that it traces.

    Attributes:
        value: what hashes.
    """

    value: Any


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a function was: its number."""

    number: int

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("a slot is filled before it is called")


def _emptied(x: Any, functions: list[Any]) -> Any:
    """With slots in the place of functions that no module holds, which go to the end of the list."""

    def empty(function: Any) -> Any:
        if not _is_made_anew(function):
            return function
        functions.append(function)
        return _Slot(len(functions) - 1)

    return _replaced(x, empty)


def _filled(x: Any, functions: tuple[Any, ...]) -> Any:
    """With these functions in their slots."""
    return _replaced(x, lambda f: functions[f.number] if isinstance(f, _Slot) else f)


def _replaced(x: Any, change: Callable[[Any], Any]) -> Any:
    """With what `Partial`s call and settings hold changed; they may stand in tuples, and in each other."""
    if isinstance(x, Partial):
        inside = [_replaced(y, change) for y in x.args]
        return Partial(change(x.func), *inside, **x.keywords)
    if type(x) is tuple or type(x) is list:
        return type(x)(_replaced(y, change) for y in x)
    return _other_settings(x, change) if is_settings(x) else x


def _other_settings(x: Any, change: Callable[[Any], Any]) -> Any:
    # A `Partial` in a field for arrays is a tree of them: only what it calls is a function.
    arrays = type(x)._array_fields
    own = {name: value if name in arrays else change(value) for name, value in vars(x).items()}
    held = {name: _replaced(value, change) for name, value in own.items()}
    if all(held[name] is value for name, value in vars(x).items()):
        return x
    # Not by the constructor, whose checks refuse slots.
    other = copy.copy(x)
    assign(other, **held)
    return other


def _is_made_anew(function: Any) -> bool:
    """Whether it was defined, or bound to what it is to know, in a call."""
    function = getattr(function, "fun", function)  # jax's own cover of a `functools.partial`
    if isinstance(function, (functools.partial, types.MethodType)):
        return True
    found = inspect.unwrap(function)
    return isinstance(found, types.FunctionType) and "<locals>" in found.__qualname__
