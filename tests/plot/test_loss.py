"""Figures of landscapes: what they show, and that they draw headless on any axes."""

import jax.numpy as jnp
import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import hessjax as hj
from hessjax import plot


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


T = np.linspace(-1, 1, 9)


def curve(losses=1 + T**2, stderr=0.1):
    return hj.Landscape((T,), np.asarray(losses), np.full(9, stderr), np.ones(1), 4)


def plane(losses=None):
    losses = 0.5 + T[:, None] ** 2 + 3 * T[:7] ** 2 if losses is None else losses
    return hj.Landscape((T, T[:7]), losses, np.full(losses.shape, np.inf), np.ones(2), 1)


def test_a_curve_shows_losses_errors_and_the_centre():
    ax = plot.landscape(curve(), labels=("the way",))
    line, centre = ax.lines
    np.testing.assert_allclose(line.get_ydata(), 1 + T**2)
    assert list(centre.get_xdata()) == [0, 0]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [0.9, 2.1])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("distance along the way", "loss")
    assert not plot.landscape(curve(stderr=np.inf)).collections


def test_points_without_a_finite_loss_are_left_out():
    ax = plot.landscape(curve(np.where(T > 0.5, np.inf, 1.0)))
    assert np.ma.getmaskarray(ax.lines[0].get_ydata()).sum() == 2
    losses = np.array(plane().losses)
    losses[0] = np.nan
    figure = plot.landscape(plane(losses)).figure
    figure.canvas.draw()
    plot.landscape_surface(plane(losses)).figure.canvas.draw()


@pytest.mark.parametrize("log", [False, True])
def test_a_plane_has_a_tick_for_every_line(log):
    ax = plot.landscape(plane(), log=log, labels=("here", "there"))
    ax.figure.canvas.draw()
    lines = ax.collections[-1]
    bar = ax.figure.axes[1]
    np.testing.assert_allclose(bar.get_yticks(), lines.levels)
    assert np.all((lines.levels >= 0.5) & (lines.levels <= 4.5))
    assert len(lines.levels) >= 5
    assert ax.lines[-1].get_xydata().tolist() == [[0, 0]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("distance along here", "distance along there")
    # the first direction runs along x: along y the loss is three times as steep
    spans = [np.ptp(path.vertices, axis=0) for path in lines.get_paths() if len(path.vertices)]
    inner = min((span for span in spans if span.min() > 0), key=np.sum)
    assert inner[0] > inner[1]


def test_flat_and_far_spanning_losses_draw():
    for losses in (np.full((9, 7), 2.0), np.full((9, 7), 0.0), 10.0 ** (12 * plane().losses)):
        for log in (False, True) if losses.min() > 0 else (False,):
            plot.landscape(plane(losses), log=log).figure.canvas.draw()
    plot.landscape(curve(10.0 ** (9 * T)), log=True).figure.canvas.draw()


def test_a_surface_and_given_axes():
    before = dict(mpl.rcParams)
    figure = plt.figure()
    ax = figure.add_subplot(projection="3d")
    assert plot.landscape_surface(plane(), ax, log=True) is ax
    assert ax.get_zlabel() == "log₁₀ loss"
    flat = figure.add_subplot()
    assert plot.landscape(plane(), flat) is flat
    assert plot.eigenvalues_over_training([0, 1], [1.0, 2.0], ax=flat) is flat
    assert len(plt.get_fignums()) == 1
    plot.landscape(curve())
    assert dict(mpl.rcParams) == before


def test_eigenvalues_with_threshold_and_residuals():
    steps, values = [0, 10, 20], jnp.array([[3.0, 1.0], [4.0, 2.0], [5.0, 2.5]])
    ax = plot.eigenvalues_over_training(steps, values, residuals=0.1 * values, threshold=4.5)
    first, second, limit = ax.lines
    np.testing.assert_allclose(second.get_ydata(), values[:, 1])
    np.testing.assert_allclose(limit.get_ydata(), 4.5)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["λ₁", "λ₂", "stability threshold 2/η"]
    assert first.get_color() != second.get_color()
    np.testing.assert_allclose(ax.collections[0].get_paths()[0].vertices[:, 1].max(), 5.5, rtol=1e-6)
    ax = plot.eigenvalues_over_training(steps, values[:, 0], threshold=4.5, threshold_label="38/η")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["λ₁", "38/η"]


def test_bad_input():
    with pytest.raises(ValueError, match="a finite loss somewhere, got none"):
        plot.landscape(curve(np.full(9, np.nan)))
    with pytest.raises(ValueError, match="positive losses, but the smallest is -1"):
        plot.landscape(curve(T), log=True)
    with pytest.raises(ValueError, match="of two directions, got one"):
        plot.landscape_surface(curve())
    with pytest.raises(ValueError, match=r"two distances or more each way, got a grid of \(1, 9\)"):
        plot.landscape(hj.Landscape((T[:1], T), np.ones((1, 9)), np.ones((1, 9)), np.ones(2), 1))
    with pytest.raises(
        ValueError, match=r"`values` must be \(2,\) or \(2, k\), a row for each step, got \(3,\)"
    ):
        plot.eigenvalues_over_training([0, 1], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"`residuals` must have the shape of `values`, \(2,\), got \(1,\)"):
        plot.eigenvalues_over_training([0, 1], [1.0, 2.0], [0.1])
    with pytest.raises(ValueError, match=r"`threshold` must be one number or \(2,\), got \(3,\)"):
        plot.eigenvalues_over_training([0, 1], [1.0, 2.0], threshold=[1.0, 2.0, 3.0])
