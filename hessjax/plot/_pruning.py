"""Figures of pruning: a run over its steps, what it leaves of every layer, and what each layer can spare."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from hessjax._core import _tree
from hessjax._core._messages import checked_instance, shown
from hessjax._core._types import Params
from hessjax.analysis._sensitivity import Sensitivity, SensitivityRow
from hessjax.plot._style import (
    BLUE,
    GREEN,
    GREY,
    MOST_INSIDE,
    ORANGE,
    Numbers,
    Pair,
    axes_of,
    columns_of,
    dense_line,
    dot,
    legend_beside,
    legend_columns,
    names_on_axis,
    number,
    rows_height,
    short,
    wrapped,
)


def pruning_run(
    steps: Numbers,
    accuracy: Numbers,
    sparsity: Numbers,
    dense_accuracy: float | None = None,
    axes: Pair | None = None,
) -> tuple[Axes, Axes]:
    """Accuracy above sparsity, over the steps of a run that prunes while it trains.

    Args:
        steps: (n,) the updates at which the two were measured.
        accuracy: (n,) fraction of right answers.
        sparsity: (n,) fraction of zeros.
        dense_accuracy: accuracy before pruning, drawn as a line to compare with.
        axes: two axes to draw on; a new figure by default.

    Returns:
        The two axes.

    Cost:
        Draws n points twice.

    Example:
        >>> from hessjax import plot
        >>> upper, lower = plot.pruning_run([0, 50, 100], [0.98, 0.96, 0.97], [0.0, 0.8, 0.9], 0.98)
        >>> lower.get_xlabel()
        'step of fine-tuning'
    """
    x, y, zeros = columns_of(steps=steps, accuracy=accuracy, sparsity=sparsity)
    with axes_of(axes, 2, 1, figsize=(7.6, 5.0), sharex=True, height_ratios=(3, 2)) as (upper, lower):
        dense_line(upper, dense_accuracy)
        upper.plot(x, y, marker=dot(y), color=BLUE, lw=1.8, label=f"pruned network, {y[-1]:.1%} at the end")
        upper.legend(loc="lower right")
        upper.set(ylabel="test accuracy", title="Pruning while fine-tuning")
        lower.plot(x, zeros, marker=dot(zeros), color=ORANGE, lw=1.8, drawstyle="steps-post")
        lower.fill_between(x, zeros, color=ORANGE, alpha=0.18, lw=0, step="post")
        lower.set(ylim=(0, 1), ylabel="weights at zero", xlabel="step of fine-tuning")
        lower.margins(x=0.01)
        for each in (upper, lower):
            each.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    return upper, lower


def accuracy_left(
    curves: Mapping[str, tuple[Numbers, Numbers]],
    dense_accuracy: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against the share of the weights that is left, a line for every method.

    Args:
        curves: for every method's name `(left, accuracy)`: (n,) fractions of the weights that are left,
            positive, and (n,) fractions of right answers.
        dense_accuracy: accuracy before pruning, drawn as a line to compare with.
        ax: axes to draw on; a new figure by default.

    Returns:
        The axes. The share is on a logarithmic axis, the sparsest networks on the left.

    Cost:
        Draws every point once.

    Example:
        >>> from hessjax import plot
        >>> runs = {"magnitude": ([0.03, 0.15], [0.60, 0.80]), "movement": ([0.03, 0.15], [0.75, 0.80])}
        >>> ax = plot.accuracy_left(runs, dense_accuracy=0.85)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['dense network, 85.0%', 'magnitude', 'movement']
    """
    points = _points(curves)
    beside = legend_columns(len(points)) if len(points) >= MOST_INSIDE else 0
    with axes_of(ax, figsize=(7.6 + 2.6 * beside, 4.4 + beside)) as (ax,):
        dense_line(ax, dense_accuracy)
        for i, (name, (left, accuracy)) in enumerate(zip(short(list(points)), points.values(), strict=True)):
            order = np.argsort(left)
            color, marker = (ORANGE, BLUE, GREEN)[i % 3], "osD^v"[i // 3 % 5]
            x, y = left[order], accuracy[order]
            ax.plot(x, y, color=color, marker=marker, lw=1.8, label=name)
        _shares_left(ax, {x for left, _ in points.values() for x in left.tolist()})
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        few = len(ax.lines) <= MOST_INSIDE
        ax.legend(loc="best") if few else legend_beside(ax, list(ax.lines))
        ax.set(ylabel="test accuracy", title="What accuracy the weights that are left still give")
    return ax


def _points(curves: Any) -> dict[str, tuple[np.ndarray, ...]]:
    try:
        pairs = {name: (left, accuracy) for name, (left, accuracy) in curves.items()}
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            f"`curves` must be a mapping `name -> (left, accuracy)`, got {shown(curves)}."
        ) from None
    return {
        name: columns_of(**{f"curves[{name!r}][0]": left, f"curves[{name!r}][1]": accuracy})
        for name, (left, accuracy) in pairs.items()
    }


def _shares_left(ax: Axes, shares: set[float]) -> None:
    """A logarithmic axis with a tick at every share, and at no other."""
    ax.set(xscale="log", xticks=sorted(shares), xlabel="weights left")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{number(100 * x)}%"))
    ax.margins(x=0.08)


def kept(params: Params, ax: Axes | None = None) -> Axes:
    """How much of every leaf is left: the fraction of weights that are not zero.

    Args:
        params: pruned params.
        ax: axes to draw on; a new figure by default.

    Returns:
        The axes.

    Cost:
        Draws a bar for every leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from hessjax import plot
        >>> ax = plot.kept({"bias": jnp.ones(3), "kernel": jnp.array([[0.0, 1.0], [0.0, 0.0]])})
        >>> [text.get_text() for text in ax.texts]
        ['3 of 3', '1 of 4']
    """
    _tree.check_leaves(params)
    paths, leaves = _tree.leaf_paths(params), jax.tree.leaves(params)
    left = np.array([np.count_nonzero(leaf) for leaf in leaves])
    sizes = np.array([np.size(leaf) for leaf in leaves])
    with axes_of(ax, figsize=(7.6, rows_height(len(paths)))) as (ax,):
        rows = np.arange(len(paths))
        ax.barh(rows, np.ones(len(rows)), color="#EEEEEE", height=0.62)
        ax.barh(rows, left / np.maximum(sizes, 1), color=GREEN, height=0.62)
        for row, number, size in zip(rows, left, sizes, strict=True):
            ax.annotate(f"{number:,} of {size:,}", (1, row), (8, 0), textcoords="offset points", va="center")
        names_on_axis(ax, paths)
        ax.grid(visible=False)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(xlim=(0, 1), xlabel="weights that are not zero", title="What is left of every layer")
    return ax


def sensitivity(result: Sensitivity, metric: str | None = None, ax: Axes | None = None) -> Axes:
    """A metric against the sparsity of one leaf, a curve for every leaf; predictions are dashed.

    The prediction is of the loss: it is drawn, on top of the value at sparsity 0, when the metric shown is
    called `loss`, or when nothing was measured. The legend begins with the leaf that ends highest.

    Args:
        result: of `sensitivity`.
        metric: which of its metrics; the first by default.
        ax: axes to draw on; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: if there is no such metric.

    Cost:
        Draws a curve for every leaf, or two.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> from hessjax import plot
        >>> params = {"one": jnp.ones((2, 3)), "two": jnp.ones((3, 2))}
        >>> result = hj.sensitivity(lambda p: p["one"].sum(), params, [0.0, 0.5])
        >>> ax = plot.sensitivity(result)
        >>> ax.get_ylabel(), len(ax.lines)
        ('metric', 2)
    """
    shown = _shown(result, metric)
    curves = {k: list(rows) for k, rows in itertools.groupby(result.rows, key=lambda row: row.parameter)}
    with axes_of(ax, figsize=(6.2 + 2.6 * legend_columns(len(curves)), 5.4)) as (ax,):
        legend_beside(ax, _curves(ax, curves, shown))
        ax.set(xlabel="sparsity of that leaf alone", ylabel=wrapped(shown or "predicted rise of the loss"))
        ax.set_title("What every leaf can spare")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.margins(x=0.01)
    return ax


def _shown(result: Sensitivity, metric: str | None) -> str | None:
    """The metric to draw; None where nothing was measured."""
    checked_instance("result", result, Sensitivity, "hessjax.sensitivity(...)")
    names = list(result.rows[0].metrics)
    if metric is not None and metric not in names:
        raise ValueError(
            f"`metric` must be one of {', '.join(names) or '(none was measured)'}, got {metric}."
        )
    return metric or (names[0] if names else None)


def _curves(ax: Axes, curves: dict[str, list[SensitivityRow]], metric: str | None) -> list[Line2D]:
    """Every leaf's curve; the entries of the legend, the leaf that ends highest first."""
    looks = zip(
        short(list(curves)), curves.values(), _colors(len(curves)), itertools.cycle(".sD^v"), strict=False
    )
    handles, is_predicted = [], False
    for name, rows, color, marker in looks:
        look = {"color": color, "marker": marker, "ms": 3.5 if marker != "." else 7}
        line, is_predicted = _curve(ax, name, sorted(rows, key=lambda row: row.sparsity), metric, look)
        handles.append(line)
    handles.sort(key=lambda line: -np.asarray(line.get_ydata())[-1])
    dashed = ax.plot([], [], color=GREY, ls="--", lw=1.3, label="predicted") if is_predicted else []
    return [*handles, *dashed]


def _curve(
    ax: Axes, name: str, rows: list[SensitivityRow], metric: str | None, look: dict[str, Any]
) -> tuple[Line2D, bool]:
    """One leaf: what was measured; and the prediction where it is of the same kind, and whether it is."""
    x, predicted = [row.sparsity for row in rows], [row.predicted or 0.0 for row in rows]
    if metric is None:
        return ax.plot(x, predicted, ls="--", lw=1.4, label=name, **look)[0], False
    measured = [row.metrics[metric] for row in rows]
    has_both = metric == "loss" and rows[0].sparsity == 0 and rows[0].predicted is not None
    if has_both:
        ax.plot(x, measured[0] + np.array(predicted), color=look["color"], ls="--", lw=1.3)
    return ax.plot(x, measured, lw=1.6, label=name, **look)[0], has_both


def _colors(number: int) -> list[Any]:
    """Colours that stay apart, in the order of the leaves: from the first layers to the last if many."""
    few = [BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00"]
    return few[:number] if number <= len(few) else list(colormaps["viridis"](np.linspace(0, 0.92, number)))
