"""The figures of a report as PNG files, stage by stage."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hessjax import plot
from hessjax._report._stages import Done
from hessjax._report._work import Work
from hessjax.plot._style import BLUE, ORANGE, axes_of, names_on_axis, rows_height

DPI = 130


def figures(stage: str, done: Done, work: Work) -> dict[str, bytes]:
    """The pictures of a stage by file name; none for most."""
    draw = _DRAWN.get(stage)
    made = {} if draw is None else draw(done, work)
    return {name: _picture(ax) for name, ax in made.items()}


def _picture(ax: Axes) -> bytes:
    figure: Any = ax.get_figure(root=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    return buffer.getvalue()


def _layers(done: Done, work: Work) -> dict[str, Axes]:
    return {"layers.png": plot.layers(done.shown, work.problem.params)[0]}


def _density(done: Done, work: Work) -> dict[str, Axes]:
    return {"density.png": plot.density(done.shown)}


def _landscape(done: Done, work: Work) -> dict[str, Axes]:
    labels = ("the steepest direction", "the second steepest")[: len(done.shown.distances)]
    return {
        "landscape.png": plot.landscape(done.shown, labels=labels, log=bool(np.min(done.shown.losses) > 0))
    }


def _pruning(done: Done, work: Work) -> dict[str, Axes]:
    rows = done.result["levels"]
    if not rows:
        return {}
    zeros = [row["sparsity"] for row in rows]
    with axes_of(None, figsize=(8.4, 4.2)) as (ax,):
        ax.plot(zeros, [_number(row["loss"]) for row in rows], "o-", color=BLUE, label="measured")
        dense = work.results["loss"]["loss"]
        expected = [dense + _number(row["predicted"]) for row in rows]
        ax.plot(zeros, expected, "--", color=ORANGE, label="predicted by the mean curvature")
        ax.axhline(dense, color="0.5", lw=1, label="dense")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(xlabel="zeros among the kernels' weights", ylabel="loss")
        ax.set_title("Pruned at once, by magnitude, without training")
        ax.legend()
    return {"pruning.png": ax}


def _per_layer(done: Done, work: Work) -> dict[str, Axes]:
    rows: list[Mapping[str, Any]] = done.result["leaves"]
    with axes_of(None, figsize=(8.4, rows_height(len(rows)))) as (ax,):
        for name, color in (("largest", BLUE), ("least", ORANGE)):
            ax.plot([_number(row[name]) for row in rows], range(len(rows)), "o", color=color, label=name)
        names_on_axis(ax, [row["path"] for row in rows])
        ax.axvline(0, color="0.6", lw=1)
        ax.set(xlabel="eigenvalue of the block (loss per squared parameter)")
        ax.set_title("Ends of the spectrum by layer")
        ax.legend()
    return {"per-layer.png": ax}


def _number(value: Any) -> float:
    return float(value)


_DRAWN: dict[str, Callable[[Done, Work], dict[str, Axes]]] = {
    "trace": _layers,
    "pruning": _pruning,
    "density": _density,
    "per_layer": _per_layer,
    "landscape": _landscape,
}
