"""Where data comes from: whatever can be gone through, opened anew for every pass, its arrays NumPy's."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

import jax
import numpy as np

from hessjax._core._messages import checked_function, shown
from hessjax._core._tree import leaf_paths

Source: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches of data: an iterable, or a function that opens one, to be called for every pass."""

ENDLESS = 2**40
"""As long as this is what repeats without end: loaders give `sys.maxsize`, or that divided into batches."""


def check_source(source: Any, argument: str = "batches") -> None:
    """Raise a TypeError for what is no source of batches, a ValueError for one that never ends."""
    if callable(source) and not isinstance(source, Iterable):
        checked_function(argument, source, "() -> iterable of batches")
        return
    if hasattr(source, "shape"):  # arrays, tensors, data frames: they can be iterated over, row by row
        raise TypeError(
            f"`{argument}` must be an iterable of batches, got one array, {shown(source)}, which would be "
            "taken apart into its rows: put one batch into a list."
        )
    if not isinstance(source, Iterable) or isinstance(source, (str, bytes, Mapping)):
        raise TypeError(
            f"`{argument}` must be an iterable of batches, got {type(source).__name__}; put one batch into a "
            "list, or pass the function that opens the data."
        )
    _check_is_no_batch(source, argument)
    if (length_of(source) or 0) >= ENDLESS:
        raise ValueError(f"`{argument}` must end, got a {type(source).__name__} that repeats without end.")


def check_reiterable(source: Any, argument: str = "batches") -> None:
    """Raise a TypeError for what is no source of batches, or can be gone through only once."""
    check_source(source, argument)
    if isinstance(source, Iterator):
        raise TypeError(
            f"`{argument}` must start afresh at every product, but this iterator can be used only once: "
            "pass a list, an object whose `__iter__` opens the data anew, or the function that makes the "
            f"iterator, `{argument}=lambda: ...`."
        )


def _check_is_no_batch(source: Any, argument: str) -> None:
    """Inputs and labels where a list of such pairs is wanted: each would be taken for a batch."""
    arrays = isinstance(source, (tuple, list)) and all(hasattr(x, "shape") for x in source)
    if (arrays and len({(str(x.dtype), len(x.shape)) for x in source}) > 1) or hasattr(source, "_fields"):
        listed = ", ".join(map(shown, source))
        raise TypeError(
            f"`{argument}` must be an iterable of batches, which are alike, got what looks like the parts of "
            f"one batch, {listed}: put it into a list, `[(x, y)]`."
        )


def length_of(source: Any) -> int | None:
    """How many batches there will be, where the source can say so."""
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:  # loaders have a length, and raise this where their data has none
        return None


def opened(source: Any, argument: str = "batches") -> Iterator[Any]:
    """One pass: batch after batch, arrays of other libraries made NumPy's."""
    if callable(source) and not isinstance(source, Iterable):
        found = source()
        if not isinstance(found, Iterable) or hasattr(found, "shape") or isinstance(found, (str, Mapping)):
            raise TypeError(f"`{argument}()` must give an iterable of batches, got {shown(found)}.")
        source = found
    for index, batch in enumerate(source):
        yield _as_numpy(batch, f"batch {index} of `{argument}`")


def _as_numpy(batch: Any, place: str) -> Any:
    leaves = jax.tree.leaves(batch)
    if not any(map(_is_foreign, leaves)):
        return batch
    named = zip(leaf_paths(batch), leaves, strict=True)
    arrays = [_array(x, path, place) if _is_foreign(x) else x for path, x in named]
    return jax.tree.unflatten(jax.tree.structure(batch), arrays)


def _is_foreign(leaf: Any) -> bool:
    """Whether this is an array of another library, a tensor."""
    ours = isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
    return not ours and hasattr(leaf, "__array__") and hasattr(leaf, "dtype")


def _array(leaf: Any, path: str, place: str) -> np.ndarray:
    try:
        return np.asarray(leaf)
    except (TypeError, RuntimeError, ValueError) as error:
        first = error
    try:
        return np.asarray(jax.numpy.from_dlpack(leaf))  # NumPy knows no bfloat16, and reads no accelerator
    except Exception:
        raise TypeError(
            f"{place} must hold arrays that NumPy can read, but {path} is a {type(leaf).__name__} which it "
            f"cannot: {first}"
        ) from first
