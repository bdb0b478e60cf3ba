"""Figures of curvature and pruning results, for notebooks and reports (`pip install 'hessjax[plots]'`).

Every function draws on the axes it is given, or on a new figure, and returns the axes. Styles are set for the
new figure only; the global `rcParams` stay as they are.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import ArrayLike
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from hessjax import _tree
from hessjax._typing import Eigenpairs, Params
from hessjax.spectral.density import SpectralDensity
from hessjax.spectral.trace import TraceByLeaf

Numbers: TypeAlias = Sequence[float | int] | ArrayLike
Pair: TypeAlias = Sequence[Axes] | np.ndarray

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
"""Colours that stay apart under every common colour blindness (Okabe and Ito, 2008)."""

_STYLE: dict[str, Any] = {
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


def density(density: SpectralDensity, eigenpairs: Eigenpairs | None = None, ax: Axes | None = None) -> Axes:
    """The spectral density, bulk and outliers in one picture.

    The eigenvalue axis is linear near zero and logarithmic beyond (asinh); the curve is
    `density.signed_log_curve()`. With `eigenpairs`, their values are marked at the foot: filled where
    converged, hollow where not.

    Args:
        density: from `hessjax.spectral_density`.
        eigenpairs: from `hessjax.eigenpairs`, of the same matvec.
        ax: axes to draw on; a new figure by default.

    Returns:
        The axes; x in loss per squared parameter, y the share of eigenvalues per unit of the asinh axis.

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
    top = float(np.max(np.abs(density.nodes))) or 1.0
    width = 8 / density.nodes.shape[1]  # about half the mean distance of the nodes on this axis
    grid, share = map(np.asarray, density.signed_log_curve(threshold=1e-3 * top, bandwidth=width))
    floor = share.max() * 1e-7
    with _axes(ax, figsize=(8.4, 4.4)) as (ax,):
        ax.fill_between(grid, floor, np.maximum(share, floor), color=BLUE, alpha=0.22, lw=0)
        ax.plot(grid, np.maximum(share, floor), color=BLUE, lw=1.6)
        ax.set_yscale("log")
        ax.set_ylim(floor * 3, share.max() * 3)
        _signed_log_axis(ax, grid, 1e-3 * top)
        ax.set_xlabel("eigenvalue (loss per squared parameter)")
        ax.set_ylabel("share of eigenvalues\nper unit of the axis")
        ax.set_title("Spectral density of the Hessian")
        if eigenpairs is not None:
            _mark(ax, eigenpairs)
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
    paths = _tree.leaf_paths(params)
    if list(traces.leaves) != paths:
        raise ValueError(f"`traces` must be of the leaves of `params`, {paths}, got {list(traces.leaves)}.")
    sizes = np.maximum([np.size(leaf) for leaf in jax.tree.leaves(params)], 1)
    mean = np.array([estimate.mean for estimate in traces.leaves.values()])
    stderr = np.array([estimate.stderr for estimate in traces.leaves.values()])
    with _axes(axes, 1, 2, figsize=(9.6, 0.36 * len(paths) + 1.7), sharey=True) as (left, right):
        _bars(left, paths, mean, stderr, BLUE)
        _bars(right, paths, mean / sizes, stderr / sizes, GREEN)
        left.invert_yaxis()
        left.set_title("Curvature by layer")
        left.set_xlabel("trace of the layer's block  (± standard error)")
        right.set_title("… per parameter")
        right.set_xlabel("trace / parameters = mean eigenvalue")
    return left, right


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
    x, y, zeros = map(np.asarray, (steps, accuracy, sparsity))
    with _axes(axes, 2, 1, figsize=(7.6, 5.0), sharex=True, height_ratios=(3, 2)) as (upper, lower):
        if dense_accuracy is not None:
            label = f"dense network, {dense_accuracy:.1%}"
            upper.axhline(dense_accuracy, color=GREY, ls=(0, (5, 3)), lw=1.3, label=label)
        upper.plot(x, y, color=BLUE, lw=1.8, label=f"pruned network, {y[-1]:.1%} at the end")
        upper.legend(loc="lower right")
        upper.set_ylabel("test accuracy")
        upper.set_title("Pruning while fine-tuning")
        lower.plot(x, zeros, color=ORANGE, lw=1.8, drawstyle="steps-post")
        lower.fill_between(x, zeros, color=ORANGE, alpha=0.18, lw=0, step="post")
        lower.set_ylim(0, 1)
        lower.set_ylabel("weights at zero")
        lower.set_xlabel("step of fine-tuning")
        lower.margins(x=0.01)
        for each in (upper, lower):
            each.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    return upper, lower


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
    paths, leaves = _tree.leaf_paths(params), jax.tree.leaves(params)
    left = np.array([np.count_nonzero(leaf) for leaf in leaves])
    sizes = np.array([np.size(leaf) for leaf in leaves])
    with _axes(ax, figsize=(7.6, 0.36 * len(paths) + 1.6)) as (ax,):
        rows = np.arange(len(paths))
        ax.barh(rows, np.ones(len(rows)), color="#EEEEEE", height=0.62)
        ax.barh(rows, left / np.maximum(sizes, 1), color=GREEN, height=0.62)
        for row, number, size in zip(rows, left, sizes, strict=True):
            ax.annotate(f"{number:,} of {size:,}", (1, row), (8, 0), textcoords="offset points", va="center")
        ax.set_yticks(rows, paths)
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.grid(visible=False)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlabel("weights that are not zero")
        ax.set_title("What is left of every layer")
    return ax


@contextlib.contextmanager
def _axes(axes: Any, rows: int = 1, columns: int = 1, **figure: Any) -> Iterator[list[Axes]]:
    """The axes given, in their own style, or those of a new figure in ours."""
    if axes is not None:
        yield list(np.atleast_1d(np.asarray(axes, dtype=object)))
        return
    with plt.rc_context(_STYLE):
        _, made = plt.subplots(rows, columns, layout="constrained", **figure)
        yield list(np.atleast_1d(made))


def _signed_log_axis(ax: Axes, grid: Any, unit: float) -> None:
    ax.set_xscale("asinh", linear_width=unit)
    ends = np.arcsinh(grid[[0, -1]] / unit)
    ax.set_xlim(*np.sinh(ends + 0.04 * np.ptp(ends) * np.array([-1, 1])) * unit)
    decades = 10.0 ** np.arange(np.ceil(np.log10(unit)), np.ceil(np.log10(np.abs(grid).max())) + 1)
    ticks = np.concatenate([-decades[::-1], [0.0], decades])
    ax.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(float(value))))


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _mark(ax: Axes, pairs: Eigenpairs) -> None:
    """The eigenvalues at the foot of the axes, the two ends with their values."""
    values, converged = np.asarray(pairs.values), np.asarray(pairs.converged)
    for shown, face, label in ((converged, ORANGE, "eigenvalues"), (~converged, "none", "not converged")):
        if shown.any():
            ax.plot(values[shown], np.full(shown.sum(), 0.03), "^", ms=7, mec=ORANGE, mfc=face, ls="none",
                    transform=ax.get_xaxis_transform(), label=label, zorder=3)  # fmt: skip
    found = values[np.isfinite(values)]
    for value in (found.max(), found.min()) if len(found) else ():
        ax.annotate(_number(float(value)), (value, 0.03), (0, 9), ax.get_xaxis_transform(), "offset points",
                    color=ORANGE, ha="center")  # fmt: skip
    ax.legend(loc="upper right")


def _bars(ax: Axes, names: list[str], values: Any, errors: Any, color: str) -> None:
    rows = np.arange(len(names))
    errors = np.where(np.isfinite(errors), errors, 0)
    ax.barh(rows, values, xerr=errors, color=color, alpha=0.85, height=0.62,
            error_kw={"ecolor": "#222222", "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set_yticks(rows, names)
    ax.grid(visible=False, axis="y")
