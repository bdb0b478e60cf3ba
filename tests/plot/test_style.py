"""Labels: names shortened so that they stay apart, and inside the figure, however long and many they are."""

import matplotlib as mpl

mpl.use("Agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import hessjax as hj
from hessjax import plot
from hessjax.analysis._sensitivity_csv import SensitivityRow
from hessjax.plot import _spectrum, _style

LONG = "encoder/layers_{}/self_attention_block/query_projection/with/some/more/parts/of/the/path/kernel"


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_short_names_stay_apart_and_say_where_something_is_left_out():
    names = [LONG.format(i) for i in range(12)] + ["conv/kernel", LONG.format(1).replace("query", "key")]
    got = _style.short(names)
    assert len(set(got)) == len(names)
    assert got[0] == "encoder/layers_0/…/the/path/kernel"
    assert got[1] == "…/layers_1/…/query_projection/…/kernel"
    assert got[12] == "conv/kernel"
    assert all(len(name) <= 38 and (name in names or "…" in name) for name in got)


@pytest.mark.parametrize("names", [["x" * 100, "y" * 100], ["x" * 100, "x" * 50 + "z" + "x" * 49]])
def test_names_without_slashes(names):
    got = _style.short(names)
    assert got[0] != got[1]
    assert max(len(line) for name in got for line in name.split("\n")) <= 38


def estimate(mean):
    return hj.Estimate(jnp.float32(mean), jnp.float32(0.5), jnp.int32(5))


def drawn(figure):
    """Every text of the figure, each inside it."""
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    axes = [*figure.axes, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    for artist in axes:
        box = artist.get_tightbbox(figure.canvas.get_renderer())
        assert box.x0 >= -2
        assert box.y0 >= -2
        assert box.x1 <= width + 2
        assert box.y1 <= height + 2
    assert figure.axes[0].get_window_extent().width > 80


@pytest.mark.parametrize("number", [1, 7, 130])
def test_figures_of_leaves_show_every_name_inside(number):
    names = [LONG.format(f"{i:03d}") for i in range(number)]
    params = {name: jnp.ones((2, 2)) for name in names}
    means = [np.nan if i == 1 else (-1.0) ** i * 10**12 for i in range(number)]
    traces = hj.TraceByLeaf(estimate(1.0), dict(zip(names, map(estimate, means), strict=True)))
    left, _ = plot.layers(traces, params)
    kept = plot.kept(params)
    for ax in (left, kept):
        drawn(ax.figure)
        labels = [tick.get_text() for tick in ax.get_yticklabels()]
        assert len(set(labels)) == number
        assert ax.get_ylim() == (number - 0.5, -0.5)


@pytest.mark.parametrize(("number", "entries"), [(1, 1), (7, 7), (130, 97)])
def test_figures_of_curves_name_them_beside_the_axes(number, entries):
    names = [LONG.format(f"{i:03d}") for i in range(number)]
    rows = tuple(
        SensitivityRow(name, level, {"x" * 90: np.nan if i == 1 else 1.0}, None)
        for i, name in enumerate(names)
        for level in (0.0, 0.5)
    )
    ax = plot.sensitivity(hj.Sensitivity(rows))
    drawn(ax.figure)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == entries
    assert (texts[-1] == "and 34 more") == (number == 130)
    left = plot.accuracy_left({name: ([0.1, 0.3], [0.5, 0.9]) for name in names}, 0.9)
    drawn(left.figure)


def test_points_that_no_line_reaches_are_dots():
    assert _style.dot([1.0, np.nan, 2.0, 3.0]) == "."
    assert _style.dot([1.0]) == "."
    assert _style.dot([np.nan, 1.0, 2.0, np.nan]) is None
    assert _style.dot(np.ma.masked_invalid([1.0, np.inf, 2.0])) == "."
    upper, lower = plot.pruning_run([0], [0.9], [0.5])
    assert (upper.lines[0].get_marker(), lower.lines[0].get_marker()) == (".", ".")


def test_labels_of_directions_and_thresholds_are_wrapped():
    t = np.linspace(-1, 1, 5)
    losses = 1 + t[:, None] ** 2 + t**2
    plane = hj.Landscape((t, t), losses, np.full((5, 5), np.inf), np.ones(2), 1)
    drawn(plot.landscape(plane, labels=(LONG.format(1), LONG.format(2))).figure)
    ax = plot.landscape_surface(plane, labels=(LONG.format(1), LONG.format(2)))
    assert ax.get_xlabel() == "distance along encoder/layers_1/…/kernel"
    ax = plot.eigenvalues_over_training([0, 1], [1.0, 2.0], threshold=1.5, threshold_label="a threshold " * 9)
    drawn(ax.figure)


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
def test_ticks_of_the_eigenvalue_axis_have_room(unit):
    ends = np.array([-1.0, 1.0]) * 1e9 * unit
    ticks = np.concatenate([-(10.0 ** np.arange(9)), [0], 10.0 ** np.arange(9)]) * unit
    kept = np.arcsinh(np.array(_spectrum._apart(ticks, unit, 2.0)) / unit)
    assert 0 in kept
    assert np.diff(kept).min() >= 2.0
    assert 8 <= len(kept) <= len(ticks)
    assert ends[0] < min(kept) * unit
