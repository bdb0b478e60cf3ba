"""How all figures look: colours, the style of a new figure, numbers and names on an axis."""

import contextlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import ArrayLike
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

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


def names_on_axis(ax: Axes, names: Sequence[str]) -> None:
    """A row for each name, the first on top; in smaller letters where the rows are narrow."""
    figure = ax.get_figure(root=True)
    height = 72 * (figure.get_figheight() if figure else 4) / max(len(names), 1)  # of a row, in points
    size = min(plt.rcParams["font.size"], max(0.75 * height, 1.0))
    ax.set_yticks(np.arange(len(names)), short(names), fontsize=size)
    ax.set_ylim(len(names) - 0.5, -0.5)  # without the margins that a hundred rows would make of inches


def rows_height(number: int) -> float:
    """Inches for a figure with so many rows; what no picture can hold is squeezed."""
    return min((0.36 if number <= 60 else 0.2) * number + 1.7, 250.0)


def dot(values: Any) -> str | None:
    """A marker where a line alone would not show a point: one without a number on either side."""
    finite = np.pad(np.isfinite(np.ma.filled(np.ma.asarray(values, float), np.nan)), 1)
    return "." if np.any(finite[1:-1] & ~finite[:-2] & ~finite[2:]) else None


MOST_INSIDE, COLUMN, MOST_NAMED = 9, 24, 96
"""Entries of a legend: inside the axes at most, in one of its columns beside them, at all."""


def legend_columns(number: int) -> int:
    """How many a legend of so many entries takes."""
    return -(-min(number + 1, MOST_NAMED + 1) // COLUMN)


def legend_beside(ax: Axes, lines: Sequence[Line2D]) -> None:
    """A legend on the right of the axes; of very many lines the first ones."""
    more = len(lines) - MOST_NAMED
    rest = [Line2D([], [], ls="", label=f"and {more} more")] if more > 0 else []
    ax.legend(
        handles=[*lines[:MOST_NAMED], *rest],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        fontsize=9,
        ncols=legend_columns(len(lines)),
    )


def wrapped(text: str, width: int = 46) -> str:
    """A label in lines that fit beside an axis."""
    return "\n".join(textwrap.wrap(text, width)) or text


def short(names: Sequence[str], width: int = 38) -> list[str]:
    """The names, long ones with an ellipsis in the place of parts that tell none of them from another."""
    return [name if len(name) <= width else _shortened(name, names, width) for name in names]


def _shortened(name: str, names: Sequence[str], width: int) -> str:
    parts: list[str | None] = list(name.split("/"))
    middle = (len(parts) - 1) / 2
    for i in sorted(range(len(parts)), key=lambda i: abs(i - middle)):
        less = [*parts[:i], None, *parts[i + 1 :]]
        if len(_joined(parts)) > width and _stands_for_one(less, names):
            parts = less
    if len(_joined(parts)) <= width:
        return _joined(parts)
    head, tail = name[: width // 2], name[-(width // 2) + 1 :]  # one part alone may be too long
    same = [other for other in set(names) if other.startswith(head) and other.endswith(tail)]
    return f"{head}…{tail}" if len(same) == 1 else "\n".join(textwrap.wrap(name, width))


def _joined(parts: Sequence[str | None]) -> str:
    kept = [part for i, part in enumerate(parts) if part is not None or i == 0 or parts[i - 1] is not None]
    return "/".join("…" if part is None else part for part in kept)


def _stands_for_one(parts: Sequence[str | None], names: Sequence[str]) -> bool:
    pattern = re.compile("/".join(re.escape(part) for part in _joined(parts).split("/")).replace("…", ".*"))
    return sum(pattern.fullmatch(name) is not None for name in set(names)) == 1
