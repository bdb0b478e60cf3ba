"""Figures: what they show, that they draw headless, and that they leave the user's settings alone."""

import jax
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


@pytest.fixture(scope="module")
def spectrum():
    nodes = jnp.array([[-0.1, 0.0, 0.2, 8.0]])
    weights = jnp.array([[0.1, 0.7, 0.19, 0.01]])
    return hj.SpectralDensity(nodes, weights, jnp.int32(1), jnp.int32(4), jnp.float32(500))


@pytest.fixture(scope="module")
def pairs():
    values = jnp.array([8.0, 5.0, -0.1, jnp.nan])
    converged = jnp.array([True, False, True, False])
    return hj.Eigenpairs(values, jnp.zeros((4, 2)), jnp.zeros(4), converged, jnp.int32(9))


@pytest.fixture(scope="module")
def traces():
    def of(mean, stderr):
        return hj.Estimate(jnp.float32(mean), jnp.float32(stderr), jnp.int32(5))

    return hj.TraceByLeaf(of(6.0, 1.0), {"bias": of(-2.0, 0.5), "kernel": of(8.0, jnp.inf)})


PARAMS = {"bias": jnp.ones(2), "kernel": jnp.array([[0.0, 1.0], [2.0, 0.0]])}


def test_density_marks_every_eigenvalue_found(spectrum, pairs):
    ax = plot.density(spectrum, pairs)
    curve, filled, hollow = ax.lines
    assert ax.get_yscale() == "log"
    assert np.all(np.diff(curve.get_xdata()) > 0)
    np.testing.assert_allclose(filled.get_xdata(), [8.0, -0.1])
    np.testing.assert_allclose(hollow.get_xdata(), [5.0, np.nan])
    assert [text.get_text() for text in ax.texts] == ["8", "−0.1"]
    assert ax.get_xlim()[0] < -0.1
    assert ax.get_xlim()[1] > 8.0


def test_density_on_a_linear_axis(spectrum):
    ax = plot.density(spectrum, linear=True)
    assert ax.get_xscale() == "linear"
    grid, share = (np.asarray(x) for x in ax.lines[0].get_data())
    np.testing.assert_allclose(np.trapezoid(share, grid), 1, rtol=1e-3)


def test_density_scales_with_the_loss(spectrum):
    ax = plot.density(spectrum)
    scaled = plot.density(spectrum._replace(nodes=1e-6 * spectrum.nodes))
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(scaled.lines[0].get_xdata(), 1e-6 * x, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(scaled.lines[0].get_ydata(), y, rtol=1e-3)


def test_cumulative_is_a_staircase_within_its_band(spectrum):
    ax = plot.cumulative(spectrum, confidence=0.9)
    x, y = ax.lines[0].get_data()
    assert np.all(np.diff(x) > 0)
    assert np.all(np.diff(y) >= -1e-6)
    assert y[0] == 0
    assert y[-1] == pytest.approx(1)
    np.testing.assert_allclose(y[x < 1][-1], 0.99, rtol=1e-5)
    (band,) = ax.collections
    assert band.get_label() == "90 % bounds"
    lower, upper = spectrum.bounds(jnp.asarray(x), 0.9)
    corners = band.get_paths()[0].vertices[:, 1]
    assert corners.min() == pytest.approx(float(lower.min()), abs=1e-6)
    assert corners.max() == pytest.approx(float(upper.max()), abs=1e-6)
    assert np.all((lower <= y + 1e-6) & (y <= upper + 1e-6))


def test_layers_shows_trace_and_trace_per_parameter(traces):
    left, right = plot.layers(traces, PARAMS)
    assert [bar.get_width() for bar in left.patches] == [-2.0, 8.0]
    assert [bar.get_width() for bar in right.patches] == [-1.0, 2.0]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["bias", "kernel"]


def test_layers_of_other_params_are_refused(traces):
    with pytest.raises(ValueError, match="`traces` must be of the leaves of `params`"):
        plot.layers(traces, {"weights": jnp.ones(2)})


def test_pruning_run_and_kept():
    upper, lower = plot.pruning_run([0, 10, 20], [0.9, 0.8, 0.85], np.array([0.0, 0.5, 0.9]), 0.92)
    names = [text.get_text() for text in upper.get_legend().get_texts()]
    assert names == ["dense network, 92.0%", "pruned network, 85.0% at the end"]
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [0.0, 0.5, 0.9])
    assert [text.get_text() for text in plot.kept(PARAMS).texts] == ["2 of 2", "2 of 4"]


def test_draws_on_given_axes_and_leaves_rc_params(spectrum, pairs, traces, tmp_path):
    before = dict(mpl.rcParams)
    figure, axes = plt.subplots(3, 2)
    assert plot.density(spectrum, pairs, ax=axes[0, 0]) is axes[0, 0]
    assert plot.kept(PARAMS, ax=axes[0, 1]) is axes[0, 1]
    assert plot.cumulative(spectrum, ax=axes[0, 1]) is axes[0, 1]
    assert plot.layers(traces, PARAMS, axes=axes[1]) == tuple(axes[1])
    assert plot.pruning_run([0, 1], [0.5, 0.6], [0.0, 0.9], axes=axes[2]) == tuple(axes[2])
    assert len(plt.get_fignums()) == 1
    figure.savefig(tmp_path / "all.png")
    plot.density(spectrum)
    assert dict(mpl.rcParams) == before


def test_density_of_a_single_zero_eigenvalue_draws(tmp_path):
    A = jax.tree_util.Partial(jnp.multiply, 0.0)
    zero = hj.spectral_density(A, jax.random.key(0), jnp.zeros(3), num_matvecs=2)
    plot.density(zero).figure.savefig(tmp_path / "zero.png")


def sensitivity_of(**kwargs):
    centre = {"one": jnp.arange(6.0).reshape(2, 3), "two": jnp.arange(4.0).reshape(2, 2)}
    diagonal = jax.tree.map(jnp.ones_like, centre)

    def metric(params):
        return {"accuracy": 1.0, "loss": 1 + sum(jnp.sum((params[k] - centre[k]) ** 2) / 2 for k in centre)}

    return hj.sensitivity(kwargs.get("metric", metric), centre, [0.0, 0.5, 0.75], diagonal=diagonal)


def test_sensitivity_draws_a_curve_for_every_leaf_and_the_prediction_of_the_loss():
    result = sensitivity_of()
    ax = plot.sensitivity(result, "loss")
    assert [line.get_linestyle() for line in ax.lines] == ["--", "-", "--", "-", "--"]
    for predicted, measured in (ax.lines[:2], ax.lines[2:4]):
        np.testing.assert_allclose(measured.get_xydata(), predicted.get_xydata())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "one",
        "two",
        "predicted",
    ]  # the highest first
    assert len(plot.sensitivity(result).lines) == 2
    only = plot.sensitivity(sensitivity_of(metric=None))
    assert [line.get_linestyle() for line in only.lines] == ["--", "--"]
    assert only.get_ylabel() == "predicted rise of the loss"
    with pytest.raises(ValueError, match="`metric` must be one of accuracy, loss, got recall"):
        plot.sensitivity(result, "recall")


def test_accuracy_left_draws_a_line_for_every_method_from_the_sparsest_on():
    runs = {"magnitude": ([0.15, 0.03], [0.8, 0.6]), "movement": ([0.15, 0.03], [0.81, 0.75])}
    ax = plot.accuracy_left(runs, dense_accuracy=0.85)
    _, magnitude, movement = ax.lines
    assert ax.get_xscale() == "log"
    np.testing.assert_allclose(magnitude.get_xydata(), [[0.03, 0.6], [0.15, 0.8]])
    np.testing.assert_allclose(movement.get_xydata(), [[0.03, 0.75], [0.15, 0.81]])
    assert magnitude.get_color() != movement.get_color()
    assert [x.get_text() for x in ax.get_xticklabels()] == ["3%", "15%"]
