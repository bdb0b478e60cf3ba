"""Figures of spectra: densities, layers, eigenvalues over training."""

from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from hessjax._core import _tree
from hessjax._core._messages import check_flags, checked_instance, checked_number
from hessjax._core._results import Eigenpairs
from hessjax._core._types import Params
from hessjax.estimators._density import SpectralDensity
from hessjax.estimators._trace import TraceByLeaf
from hessjax.plot._style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Numbers,
    Pair,
    axes_of,
    dot,
    names_on_axis,
    number,
    numbers_of,
    rows_height,
    wrapped,
)

EIGENVALUE = "eigenvalue (loss per squared parameter)"


def density(
    density: SpectralDensity,
    eigenpairs: Eigenpairs | None = None,
    ax: Axes | None = None,
    *,
    linear: bool = False,
) -> Axes:
    """The spectral density, bulk and outliers in one picture.

    The eigenvalue axis is linear near zero and logarithmic beyond (asinh); the curve is
    `density.signed_log_curve()`. With `eigenpairs`, their values are marked at the foot: filled where
    converged, hollow where not.

    Args:
        density: from `hessjax.spectral_density`.
        eigenpairs: from `hessjax.eigenpairs`, of the same matvec.
        ax: axes to draw on; a new figure by default.
        linear: a linear axis of eigenvalues instead, with `density.curve()`: outliers keep their distances,
            and the bulk is a spike.

    Returns:
        The axes; x in loss per squared parameter, y the share of eigenvalues per unit of the axis.

    Cost:
        Draws a thousand points.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax import plot
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.linspace(-1.0, 4.0, 50))
        >>> result = hj.spectral_density(A, jax.random.key(0), jnp.zeros(50), num_matvecs=20)
        >>> plot.density(result).get_yscale()
        'log'
    """
    checked_instance("density", density, SpectralDensity, "hessjax.spectral_density(...)")
    if eigenpairs is not None:
        checked_instance("eigenpairs", eigenpairs, Eigenpairs, "hessjax.eigenpairs(...)")
    check_flags(linear=linear)
    top = float(np.max(np.abs(density.nodes))) or 1.0
    width = 8 / density.nodes.shape[1]  # about half the mean distance of the nodes on this axis
    curve = density.curve() if linear else density.signed_log_curve(threshold=1e-3 * top, bandwidth=width)
    grid, share = map(np.asarray, curve)
    # The tails of the curve underflow to 0, which a logarithmic axis does not have.
    floor = share.max() * 1e-7
    with axes_of(ax, figsize=(8.4, 4.4)) as (ax,):
        ax.fill_between(grid, floor, np.maximum(share, floor), color=BLUE, alpha=0.22, lw=0)
        ax.plot(grid, np.maximum(share, floor), color=BLUE, lw=1.6)
        ax.set(yscale="log", ylim=(floor * 3, share.max() * 3))
        if not linear:
            _signed_log_axis(ax, grid, 1e-3 * top)
        ax.set(xlabel=EIGENVALUE, ylabel="share of eigenvalues\nper unit of the axis")
        ax.set_title("Spectral density of the Hessian")
        if eigenpairs is not None:
            _mark(ax, eigenpairs)
    return ax


def cumulative(density: SpectralDensity, ax: Axes | None = None, *, confidence: float = 0.95) -> Axes:
    """The share of eigenvalues up to every value, and the band in which the true one surely is.

    The axis is that of `density`: linear near zero, logarithmic beyond. The band is `density.bounds`: with
    this confidence the true staircase lies inside it, all of it.

    Args:
        density: from `hessjax.spectral_density`.
        ax: axes to draw on; a new figure by default.
        confidence: of the band, between 0 and 1.

    Returns:
        The axes; x in loss per squared parameter, y the share of eigenvalues at or below.

    Cost:
        Draws two thousand points.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax import plot
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.linspace(-1.0, 4.0, 50))
        >>> result = hj.spectral_density(A, jax.random.key(0), jnp.zeros(50), num_matvecs=20)
        >>> [text.get_text() for text in plot.cumulative(result).get_legend().get_texts()]
        ['estimate', '95 % bounds']
    """
    checked_instance("density", density, SpectralDensity, "hessjax.spectral_density(...)")
    if not 0 < checked_number("confidence", confidence) < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    top = float(np.max(np.abs(density.nodes))) or 1.0
    smooth, _ = map(np.asarray, density.signed_log_curve(2000, threshold=1e-3 * top))
    # With the nodes themselves, where the staircase jumps: a smooth grid alone would miss the steps.
    grid = np.union1d(smooth, np.asarray(density.nodes)[np.asarray(density.weights) > 0])
    lower, upper = density.bounds(grid, confidence)
    with axes_of(ax, figsize=(8.4, 4.4)) as (ax,):
        share, label = density.cumulative(grid), f"{100 * confidence:.3g} % bounds"
        ax.plot(grid, share, color=BLUE, lw=1.6, drawstyle="steps-post", label="estimate")
        ax.fill_between(grid, lower, upper, color=BLUE, alpha=0.22, lw=0, step="post", label=label)
        _signed_log_axis(ax, smooth, 1e-3 * top)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(ylim=(-0.02, 1.02), xlabel=EIGENVALUE, ylabel="eigenvalues at or below")
        ax.set_title("Cumulative spectral density of the Hessian")
        ax.legend(loc="lower right")
    return ax


def layers(traces: TraceByLeaf, params: Params, axes: Pair | None = None) -> tuple[Axes, Axes]:
    """The trace of every leaf's block, and the same per parameter, with standard errors.

    Args:
        traces: from `hessjax.trace_by_leaf`.
        params: the params it was taken at; they give the sizes.
        axes: two axes to draw on; a new figure by default.

    Returns:
        The two axes; x in loss per squared parameter, and the mean eigenvalue of the block.

    Raises:
        ValueError: if `traces` and `params` do not have the same leaves.

    Cost:
        Draws a bar for every leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax import plot
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "kernel": 3 * v["kernel"]})
        >>> params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
        >>> traces = hj.trace_by_leaf(A, jax.random.key(0), params, num_probes=2)
        >>> [tick.get_text() for tick in plot.layers(traces, params)[0].get_yticklabels()]
        ['bias', 'kernel']
    """
    checked_instance("traces", traces, TraceByLeaf, "hessjax.trace_by_leaf(...)")
    _tree.check_leaves(params)
    paths = _tree.leaf_paths(params)
    if list(traces.leaves) != paths:
        raise ValueError(f"`traces` must be of the leaves of `params`, {paths}, got {list(traces.leaves)}.")
    sizes = np.maximum([np.size(leaf) for leaf in jax.tree.leaves(params)], 1)
    mean = np.array([estimate.mean for estimate in traces.leaves.values()])
    stderr = np.array([estimate.stderr for estimate in traces.leaves.values()])
    with axes_of(axes, 1, 2, figsize=(9.6, rows_height(len(paths))), sharey=True) as (left, right):
        _bars(left, paths, mean, stderr, BLUE)
        _bars(right, paths, mean / sizes, stderr / sizes, GREEN)
        left.set(title="Curvature by layer", xlabel="trace of the layer's block\n(± standard error)")
        right.set(title="… per parameter", xlabel="trace / parameters\n= mean eigenvalue")
    return left, right


def _signed_log_axis(ax: Axes, grid: Any, unit: float) -> None:
    ax.set_xscale("asinh", linear_width=unit)
    ends = np.arcsinh(grid[[0, -1]] / unit)
    ax.set_xlim(*np.sinh(ends + 0.04 * np.ptp(ends) * np.array([-1, 1])) * unit)
    decades = 10.0 ** np.arange(np.ceil(np.log10(unit)), np.ceil(np.log10(np.abs(grid).max())) + 1)
    ticks = np.concatenate([-decades[::-1], [0.0], decades])
    ax.xaxis.set_major_locator(FixedLocator(_apart(ticks, unit, 0.11 * float(np.ptp(ends)))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(float(value))))


def _apart(ticks: np.ndarray, unit: float, gap: float) -> list[float]:
    """Those whose labels have room: zero, and from both ends inwards what is far enough from the others."""
    kept = [0.0]
    for tick in sorted(ticks.tolist(), key=abs, reverse=True):
        if np.abs(np.arcsinh(tick / unit) - np.arcsinh(np.array(kept) / unit)).min() >= gap:
            kept.append(tick)
    return sorted(kept)


def _mark(ax: Axes, pairs: Eigenpairs) -> None:
    """The eigenvalues at the foot of the axes, the two ends with their values."""
    values, converged = np.asarray(pairs.values), np.asarray(pairs.converged)
    for shown, face, label in ((converged, ORANGE, "eigenvalues"), (~converged, "none", "not converged")):
        if shown.any():
            ax.plot(values[shown], np.full(shown.sum(), 0.03), "^", ms=7, mec=ORANGE, mfc=face, ls="none",
                    transform=ax.get_xaxis_transform(), label=label, zorder=3)  # fmt: skip
    found = values[np.isfinite(values)]
    for value in (found.max(), found.min()) if len(found) else ():
        ax.annotate(number(float(value)), (value, 0.03), (0, 9), ax.get_xaxis_transform(), "offset points",
                    color=ORANGE, ha="center")  # fmt: skip
    ax.legend(loc="upper right")


def _bars(ax: Axes, names: list[str], values: Any, errors: Any, color: str) -> None:
    rows = np.arange(len(names))
    # From one sample the error is infinite: as a bar it would leave nothing of the axis.
    errors = np.where(np.isfinite(errors), errors, 0)
    ax.barh(rows, values, xerr=errors, color=color, alpha=0.85, height=0.62,
            error_kw={"ecolor": "#222222", "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    ax.axvline(0, color=GREY, lw=0.8)
    names_on_axis(ax, names)
    ax.grid(visible=False, axis="y")


CURVES = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")


def eigenvalues_over_training(
    steps: Numbers,
    values: Numbers,
    residuals: Numbers | None = None,
    threshold: float | Numbers | None = None,
    ax: Axes | None = None,
    *,
    threshold_label: str = "stability threshold 2/η",
) -> Axes:
    """The largest eigenvalues over training, against the threshold of stability.

    Gradient descent with step size η is stable in a quadratic while λ < 2/η; in full-batch training the
    largest eigenvalue rises until there and stays ("edge of stability").

    Args:
        steps: (n,) the updates at which they were measured.
        values: (n,) or (n, k) eigenvalues, largest first: `pairs.values[:k]` of each step.
        residuals: like `values`: some eigenvalue lies within this of each, drawn as a band.
        threshold: 2/η, one number or (n,) with a schedule; drawn as a line. (With momentum β it is
            2(1 + β)/η, for Adam see `adam_preconditioner`.)
        ax: axes to draw on; a new figure by default.
        threshold_label: what the legend calls that line.

    Returns:
        The axes; x in steps, y in loss per squared parameter.

    Raises:
        ValueError: `values`, `residuals` or `threshold` do not fit `steps`.

    Cost:
        Draws k lines of n points.

    References:
        Cohen, Kaur, Li, Kolter and Talwalkar (2021), Gradient descent on neural networks typically occurs
        at the edge of stability.

    Example:
        >>> from hessjax import plot
        >>> ax = plot.eigenvalues_over_training([0, 100, 200], [5.0, 15.0, 20.5], threshold=20.0)
        >>> ax.get_ylabel()
        'eigenvalue (loss per squared parameter)'
    """
    x, lines, errors = _training(steps, values, residuals)
    limit = None if threshold is None else _limit(threshold, x)
    with axes_of(ax, figsize=(7.2, 4.2)) as (ax,):
        for i, (line, error) in enumerate(zip(lines.T, errors.T, strict=True)):
            color = CURVES[i % len(CURVES)]
            ax.plot(
                x, line, marker=dot(line), color=color, lw=1.8, label=f"λ{str(i + 1).translate(_SUBSCRIPTS)}"
            )
            ax.fill_between(x, line - error, line + error, color=color, alpha=0.22, lw=0)
        if limit is not None:
            ax.plot(x, limit, color="#222222", ls=(0, (5, 3)), lw=1.4, label=wrapped(threshold_label))
        ax.set(xlabel="step of training", ylabel=EIGENVALUE, title="Largest eigenvalues over training")
        ax.margins(x=0.01)
        ax.legend(loc="best")
    return ax


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _training(steps: Any, values: Any, residuals: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps (n,), values (n, k), and residuals like them, zero where there are none."""
    x, lines = numbers_of("steps", steps), numbers_of("values", values)
    errors = np.zeros_like(lines) if residuals is None else numbers_of("residuals", residuals)
    if x.ndim != 1:
        raise ValueError(f"`steps` must be numbers of shape (n,), got {x.shape}.")
    if lines.shape[:1] != x.shape or lines.ndim > 2:
        raise ValueError(
            f"`values` must be ({len(x)},) or ({len(x)}, k), a row for each step, got {lines.shape}."
        )
    if errors.shape != lines.shape:
        raise ValueError(f"`residuals` must have the shape of `values`, {lines.shape}, got {errors.shape}.")
    return x, lines.reshape(len(x), -1), errors.reshape(len(x), -1)


def _limit(threshold: Any, x: np.ndarray) -> np.ndarray:
    limit = numbers_of("threshold", threshold)
    if limit.shape not in ((), x.shape):
        raise ValueError(f"`threshold` must be one number or ({len(x)},), got {limit.shape}.")
    return np.broadcast_to(limit, x.shape)
