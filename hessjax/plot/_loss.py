"""Figures of the loss around the params."""

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from hessjax._core._messages import check_flags, checked_instance, checked_sequence, shown
from hessjax.analysis._landscape import Landscape
from hessjax.plot._style import BLUE, GREY, ORANGE, STYLE, axes_of, dot, number, short, wrapped


def landscape(
    result: Landscape,
    ax: Axes | None = None,
    *,
    labels: tuple[str, ...] = ("direction 1", "direction 2"),
    log: bool = False,
) -> Axes:
    """The loss along one direction as a curve, or across two as filled contours; the centre is marked.

    A curve comes with its standard error as a band where several batches were averaged. Points without a
    finite loss leave a gap in a curve, and white in a plane.

    Args:
        result: from `hessjax.landscape`.
        ax: axes to draw on; a new figure by default.
        labels: what the directions are, e.g. `("top eigenvector", "a random direction")`.
        log: a logarithmic scale of the loss, which must be positive: for losses that span decades.

    Returns:
        The axes; x (and y) in lengths of the directions, the loss in its own units.

    Raises:
        ValueError: no finite loss, one that is not positive with `log`, or a plane without at least two
            distances each way.

    Cost:
        Draws a point for each of the grid.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax import plot
        >>> def loss_fn(w):
        ...     return jnp.sum(w**2)
        >>> curve = hj.landscape(loss_fn, jnp.zeros(3), directions=jnp.ones(3))
        >>> plot.landscape(curve).get_ylabel()
        'loss'
    """
    losses = _finite(result, log, labels)
    curve = losses.ndim == 1
    with axes_of(ax, figsize=(6.4, 4.2) if curve else (6.4, 5.2)) as (ax,):
        if curve:
            _curve(ax, result, losses, log)
        else:
            _contours(ax, result, losses, log)
            ax.set_ylabel(wrapped(f"distance along {labels[1]}"))
        ax.set_xlabel(wrapped(f"distance along {labels[0]}"))
        ax.set_title("Loss along a direction" if curve else "Loss across two directions")
    return ax


def landscape_surface(
    result: Landscape,
    ax: Any = None,
    *,
    labels: tuple[str, ...] = ("direction 1", "direction 2"),
    log: bool = False,
) -> Any:
    """The loss across two directions as a surface in three dimensions.

    A surface hides what lies behind it; `landscape` shows the same numbers in full.

    Args:
        result: from `hessjax.landscape`, of two directions.
        ax: axes with `projection="3d"` to draw on; a new figure by default.
        labels: what the directions are.
        log: draw the decimal logarithm of the loss, which must be positive.

    Returns:
        The axes; x and y in lengths of the directions, z in units of the loss.

    Raises:
        ValueError: as `landscape`, or the result has one direction only.

    Cost:
        Draws a patch for each cell of the grid.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax import plot
        >>> def loss_fn(w):
        ...     return jnp.sum(w**2)
        >>> plane = hj.landscape(loss_fn, jnp.zeros(2), directions=jnp.eye(2))
        >>> plot.landscape_surface(plane).get_zlabel()
        'loss'
    """
    losses = _finite(result, log, labels)
    if ax is not None and not hasattr(ax, "plot_surface"):
        raise TypeError(f'`ax` must be axes with `projection="3d"`, or None, got {shown(ax)}.')
    if losses.ndim != 2:
        raise ValueError("`result` must be of two directions, got one: `plot.landscape` draws its curve.")
    along = [f"distance along {label}" for label in short(labels, 26)]
    with plt.rc_context(STYLE if ax is None else {}):
        if ax is None:  # the layout engines leave a broad margin round three dimensions
            ax = plt.figure(figsize=(6.4, 5.2)).add_axes((-0.04, 0.02, 0.98, 0.98), projection="3d")
        _surface(ax, result, np.log10(losses) if log else losses)
        ax.set_xlabel(along[0], labelpad=8)
        ax.set_ylabel(along[1], labelpad=8)
        ax.set_zlabel("log₁₀ loss" if log else "loss", labelpad=6)
        ax.set_title("Loss across two directions", loc="left", x=0.08, y=0.92)
    return ax


def _surface(ax: Any, result: Landscape, height: np.ndarray) -> None:
    grid = np.meshgrid(*map(np.asarray, result.distances), indexing="ij")
    ax.plot_surface(*grid, height, cmap="viridis", rstride=1, cstride=1, lw=0.3, edgecolor="#00000030")
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    ax.set_box_aspect(None, zoom=0.94)


def _finite(result: Landscape, log: bool, labels: Any) -> np.ma.MaskedArray:
    """The losses, those that are not finite masked."""
    checked_instance("result", result, Landscape, "hessjax.landscape(...)")
    check_flags(log=log)
    if isinstance(labels, str) or len(checked_sequence("labels", labels, "strings")) < len(result.distances):
        raise ValueError(f"`labels` must be a string for each direction, got {labels!r}.")
    losses = np.ma.masked_invalid(np.asarray(result.losses, float))
    if not losses.count():
        raise ValueError("`result` must have a finite loss somewhere, got none: go less far.")
    if log and losses.min() <= 0:
        raise ValueError(f"`log` needs positive losses, but the smallest is {losses.min():.4g}.")
    if min(losses.shape) < 2:
        raise ValueError(f"`result` must have two distances or more each way, got a grid of {losses.shape}.")
    return losses


def _curve(ax: Axes, result: Landscape, losses: np.ma.MaskedArray, log: bool) -> None:
    (x,) = map(np.asarray, result.distances)
    _band(ax, x, losses, np.asarray(result.stderr, float))
    ax.plot(x, losses, marker=dot(losses), color=BLUE, lw=1.8)
    if x[0] <= 0 <= x[-1]:
        ax.axvline(0, color=GREY, lw=1.0, ls=(0, (5, 3)), zorder=1)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(
            FixedLocator(_levels(float(losses.min()), float(losses.max()), log).tolist())
        )
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(_as_number)
    ax.set_ylabel("loss")


def _band(ax: Axes, x: np.ndarray, losses: np.ma.MaskedArray, stderr: np.ndarray) -> None:
    known = np.isfinite(stderr) & ~np.ma.getmaskarray(losses)  # of one batch the standard error is infinite
    if known.any():
        low, high = (np.where(known, losses.filled(0) + sign * stderr, np.nan) for sign in (-1, 1))
        ax.fill_between(x, low, high, color=BLUE, alpha=0.22, lw=0, label="± standard error")
        ax.legend(loc="best")


def _contours(ax: Axes, result: Landscape, losses: np.ma.MaskedArray, log: bool) -> None:
    x, y = map(np.asarray, result.distances)
    low, high = float(losses.min()), float(losses.max())
    high = high if high > low else low + max(abs(low), 1.0) * 1e-3  # a flat loss has one colour
    norm = LogNorm(low, high) if log else Normalize(low, high)
    ax.set_facecolor("white")
    ax.grid(visible=False)
    fine = np.geomspace(low, high, 80) if log else np.linspace(low, high, 80)
    filled = ax.contourf(x, y, losses.T, levels=fine, norm=norm, cmap="viridis")
    filled.set_edgecolor("face")  # no hairlines between the colours in a PDF
    levels = _levels(low, high, log)
    inks = ["white" if norm(level) < 0.6 else "#333333" for level in levels]
    ax.contour(x, y, losses.T, levels=levels, colors=inks, linewidths=0.9)
    _colour_bar(ax, norm, levels)
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        ax.plot(0, 0, "o", ms=7, mfc=ORANGE, mec="white", mew=1.4, zorder=3)
    ax.margins(0)


def _colour_bar(ax: Axes, norm: Normalize, levels: np.ndarray) -> None:
    bar = ax.figure.colorbar(mpl.cm.ScalarMappable(norm, "viridis"), ax=ax, label="loss", pad=0.03)
    bar.ax.yaxis.set_major_locator(FixedLocator(levels.tolist()))  # a tick for every line
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(_as_number)
    bar.outline.set_visible(False)


def _as_number(value: float, _: Any) -> str:
    return number(float(value))


def _levels(low: float, high: float, log: bool) -> np.ndarray:
    """Round numbers between the extremes, about ten."""
    if not log:
        ticks = np.asarray(MaxNLocator(10).tick_values(low, high))
        return ticks[(ticks >= low) & (ticks <= high)]
    for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        ticks = np.asarray(LogLocator(subs=subs, numticks=99).tick_values(low, high))
        inside = ticks[(ticks >= low) & (ticks <= high)]
        if len(inside) >= 5:
            return inside
    return _levels(low, high, log=False)
