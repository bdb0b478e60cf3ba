"""How all figures look: colours, the style of a new figure, numbers on an axis."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import ArrayLike
from matplotlib.axes import Axes

from hessjax._core._messages import checked_finite, shown

Numbers: TypeAlias = Sequence[float | int] | ArrayLike
Pair: TypeAlias = Sequence[Axes] | np.ndarray

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
"""Colours that stay apart under every common colour blindness (Okabe and Ito, 2008)."""

STYLE: dict[str, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "legend.frameon": False,
}


@contextlib.contextmanager
def axes_of(axes: Any, rows: int = 1, columns: int = 1, **figure: Any) -> Iterator[list[Axes]]:
    """The axes given, in their own style, or those of a new figure in ours."""
    if axes is not None:
        given = list(np.atleast_1d(np.asarray(axes, dtype=object)))
        if len(given) != rows * columns or not all(isinstance(ax, Axes) for ax in given):
            name, wanted = ("ax", "matplotlib's axes") if rows * columns == 1 else ("axes", "two of its axes")
            raise TypeError(f"`{name}` must be None or {wanted}, got {shown(axes)}.")
        yield given
        return
    with plt.rc_context(STYLE):
        _, made = plt.subplots(rows, columns, layout="constrained", **figure)
        yield list(np.atleast_1d(made))


def numbers_of(argument: str, numbers: Any) -> np.ndarray:
    """The numbers as an array."""
    try:
        if np.asarray(numbers).dtype.kind in "OSU":  # of None NumPy would make NaN
            raise TypeError
        return np.asarray(numbers, float)
    except (TypeError, ValueError):
        raise TypeError(f"`{argument}` must be numbers, got {shown(numbers)}.") from None


def columns_of(**columns: Any) -> tuple[np.ndarray, ...]:
    """Columns of numbers, all as long as the first."""
    arrays = {argument: numbers_of(argument, numbers) for argument, numbers in columns.items()}
    first, *_ = arrays.values()
    for argument, array in arrays.items():
        if array.ndim != 1 or not len(array) or len(array) != len(first):
            wanted = np.atleast_1d(first).shape[:1]
            raise ValueError(f"`{argument}` must be numbers of shape {wanted} here, got {array.shape}.")
    return tuple(arrays.values())


def dense_line(ax: Axes, accuracy: float | None) -> None:
    """The accuracy before pruning, to compare with."""
    if accuracy is not None:
        checked_finite("dense_accuracy", accuracy)
        ax.axhline(accuracy, color=GREY, ls=(0, (5, 3)), lw=1.3, label=f"dense network, {accuracy:.1%}")


def number(value: float) -> str:
    """As it stands on an axis."""
    return f"{value:.3g}".replace("-", "−")
