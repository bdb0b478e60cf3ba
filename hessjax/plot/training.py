"""Figures of curvature over training."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hessjax.plot._style import BLUE, GREEN, ORANGE, Numbers, axes_of

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
    x, lines, doubt = _training(steps, values, residuals)
    limit = None if threshold is None else np.asarray(threshold, float)
    if limit is not None and limit.shape not in ((), x.shape):
        raise ValueError(f"`threshold` must be one number or ({len(x)},), got {limit.shape}.")
    with axes_of(ax, figsize=(7.2, 4.2)) as (ax,):
        for i, (line, error) in enumerate(zip(lines.T, doubt.T, strict=True)):
            color = CURVES[i % len(CURVES)]
            ax.plot(x, line, color=color, lw=1.8, label=f"λ{str(i + 1).translate(_SUBSCRIPTS)}")
            ax.fill_between(x, line - error, line + error, color=color, alpha=0.22, lw=0)
        if limit is not None:
            ax.plot(
                x,
                np.broadcast_to(limit, x.shape),
                color="#222222",
                ls=(0, (5, 3)),
                lw=1.4,
                label=threshold_label,
            )
        ax.set_xlabel("step of training")
        ax.set_ylabel("eigenvalue (loss per squared parameter)")
        ax.set_title("Largest eigenvalues over training")
        ax.margins(x=0.01)
        ax.legend(loc="best")
    return ax


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _training(steps: Any, values: Any, residuals: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps (n,), values (n, k), and residuals like them, zero where there are none."""
    x, lines = np.asarray(steps), np.asarray(values, float)
    doubt = np.zeros_like(lines) if residuals is None else np.asarray(residuals, float)
    if x.ndim != 1 or lines.shape[:1] != x.shape or lines.ndim > 2:
        raise ValueError(
            f"`values` must be ({len(x)},) or ({len(x)}, k), a row for each step, got {lines.shape}."
        )
    if doubt.shape != lines.shape:
        raise ValueError(f"`residuals` must have the shape of `values`, {lines.shape}, got {doubt.shape}.")
    return x, lines.reshape(len(x), -1), doubt.reshape(len(x), -1)
