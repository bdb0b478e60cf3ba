"""Which axes mean what, and that everybody asks the same module."""

import jax.numpy as jnp
import pytest

import hessjax as hj
from hessjax._core._axes import axes_of, heads_axis, is_matrix, within_filters


@pytest.mark.parametrize(
    ("shape", "spatial", "within"), [((6, 4), (), (0,)), ((3, 5, 6, 4), (0, 1), (0, 1, 2))]
)
def test_kernels_in_flaxs_layout(shape, spatial, within):
    axes = axes_of("layer/kernel", shape)
    assert (shape[axes.input], shape[axes.output]) == (6, 4)
    assert (axes.spatial, axes.stack, axes.fan) == (spatial, (), shape)
    assert within_filters(axes, len(shape)) == within


@pytest.mark.parametrize(
    ("is_output", "fused", "axis"), [(False, False, -2), (False, True, -1), (True, True, 0)]
)
def test_heads(is_output, fused, axis):
    assert heads_axis("attention/x/kernel", is_output, fused) == axis


@pytest.mark.parametrize(
    ("path", "ndim", "expected"),
    [
        ("a/kernel", 2, True),
        ("a/embedding", 2, True),
        ("a/bias", 2, False),
        ("a/scale", 1, False),
        ("bias", 4, False),
    ],
)
def test_what_is_pruned_by_default(path, ndim, expected):
    assert is_matrix(path, jnp.ones((1,) * ndim)) is expected


def test_another_layout_in_one_place_changes_everybody(monkeypatch):
    """With (out, in) kernels: filters, channels, n of m; what a pattern asks is asked of each leaf."""
    from hessjax.pruning.patterns import _patterns

    def turned(path, shape):
        return axes_of(path, shape)._replace(input=-1, output=-2, summed=-1)

    monkeypatch.setattr(_patterns, "axes_of", turned)
    leaf = jnp.arange(8.0).reshape(2, 4)
    assert hj.patterns.filters().group(leaf).shape == (2, 4)
    assert hj.patterns.channels().group(leaf).shape == (4, 2)
    assert hj.patterns.n_of_m(2, 4).group(leaf).tolist() == leaf.tolist()
