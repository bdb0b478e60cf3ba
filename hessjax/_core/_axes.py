"""Which axes of a leaf mean what: the one place that decides, for everybody who asks."""

from typing import Any, NamedTuple

import jax.numpy as jnp


class Axes(NamedTuple):
    """The axes of a leaf by their meaning, as indices of its shape, from either end.

    A leaf with too few axes has none at that index: whoever needs it there says so.

    Attributes:
        stack: axes along which whole leaves lie side by side, such as layers under `nn.scan`.
        spatial: those of a convolution's window.
        input: the input features.
        output: the output features, of which each is a filter.
        rows: what messages and tables call rows.
        summed: what a matrix product sums over, as hardware for N:M sparsity wants it.
        fan: the shape of what takes part in one product, the sum and product of whose axes count
            neurons and pairs of them.
    """

    stack: tuple[int, ...]
    spatial: tuple[int, ...]
    input: int
    output: int
    rows: int
    summed: int
    fan: tuple[int, ...]


def axes_of(path: str, shape: tuple[int, ...]) -> Axes:
    """The axes of a leaf in Flax's layout: Dense (in, out), Conv (window…, in, out).

    Args:
        path: of the leaf.
        shape: of the leaf.
    """
    # By shape alone, whatever the path: other layouts, and stacked layers, belong here and nowhere else.
    return Axes(
        stack=(),
        spatial=tuple(range(len(shape) - 2)),
        input=-2,
        output=-1,
        rows=0,
        summed=0,
        fan=tuple(shape),
    )


def within_filters(axes: Axes, num_axes: int) -> tuple[int, ...]:
    """The axes that a filter extends over: all but the output's, and those that stack leaves."""
    apart = {axis % num_axes for axis in (axes.output, *axes.stack)}
    return tuple(axis for axis in range(num_axes) if axis not in apart)


def heads_axis(path: str, is_output: bool, fused: bool) -> int:
    """The axis of an attention kernel's heads.

    Flax has (features, heads, entries) for query, key and value and (heads, entries, features) for the
    output; others have heads and entries in one axis, `fused`.

    Args:
        path: of the leaf.
        is_output: whether it is the output's projection.
        fused: whether heads and their entries share an axis.
    """
    if is_output:
        return 0  # fused or not: heads come first in what the output sums over
    return -1 if fused else -2


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a leaf has two or more axes: matrices, kernels, embeddings; no scales, and no biases.

    (Attention has biases of two axes, heads and their entries: they are called `bias` all the same.)
    """
    return jnp.ndim(leaf) >= 2 and path.rsplit("/", 1)[-1] != "bias"
