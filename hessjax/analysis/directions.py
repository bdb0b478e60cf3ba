"""Directions in weight space worth looking along: random ones in the network's own scale, and lines."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core import _sharding, _tree
from hessjax._core._axes import Axes
from hessjax._core._layout import tree_axes
from hessjax._core._messages import checked_int
from hessjax._core._types import Key, Params, Vector
from hessjax._core._words import AxisWords
from hessjax.estimators.probes import gaussian


def random(
    key: Key,
    params: Params,
    *,
    filter_axis: int | Literal["output"] | None = "output",
    axes: AxisWords | None = None,
) -> Vector:
    """A Gaussian direction, each filter rescaled to the norm of the params' filter in its place.

    Weights that follow a normalisation or precede a ReLU can be scaled without changing the network, so
    that a step of fixed length means little to a network with large weights; in these units a distance
    of 1 is as far as the weights themselves. As in the paper, biases and scales, and all that has fewer than
    two axes, get zeros: they stay where they are. Layers that a leaf stacks are rescaled one by one.

    Args:
        key: random key.
        params: pytree of real floating-point arrays.
        filter_axis: a filter is a slice of a leaf along this axis. `"output"`: the one that counts the
            outputs, the last in Flax, kernels being (in, out) and (height, width, in, out). `None` rescales
            layers as a whole.
        axes: what the axes of leaves mean, where names and shapes do not tell, as in `prune`.

    Returns:
        A vector like `params`, in at least float32. Where a filter of the params is zero, so is its own.

    Raises:
        TypeError: `params` has leaves that are not floating point.
        ValueError: no leaf is a kernel or an embedding, or one has no such axis; `axes` does not fit.

    Cost:
        One random vector.

    References:
        Li et al. (2018), Visualizing the loss landscape of neural nets, §4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
        >>> d = hj.directions.random(jax.random.key(0), params)
        >>> jnp.linalg.norm(d["kernel"], axis=0).round(4).tolist(), d["bias"].tolist()
        ([5.0, 1.0], [0.0, 0.0])
    """
    _tree.check_floating(params)
    found = tree_axes(params, axes)
    deep = [meaning for meaning in found if meaning.kind != "vector"]
    if not deep:
        raise ValueError(
            "`params` must have a leaf with two or more axes, got none that is a kernel or an embedding; "
            "`hessjax.probes.gaussian` gives a direction with every entry random."
        )
    if filter_axis is not None and filter_axis != "output":
        filter_axis = checked_int("filter_axis", filter_axis)
        _check_axis(filter_axis, deep)
    # One tuple of axes for every leaf, static: all leaves of all trees of these shapes share a program.
    within = tuple(
        () if meaning.kind == "vector" else _summed_over(filter_axis, meaning) for meaning in found
    )
    return _rescaled(within, gaussian(key, params), params)


def line(params: Params, other: Params) -> Vector:
    """The direction from `params` to `other`: distance 0 is the one, distance 1 the other.

    Args:
        params: pytree of real floating-point arrays, where `landscape` starts.
        other: another like it: a later checkpoint, a pruned network, a second solution.

    Returns:
        other − params, a vector in at least float32.

    Raises:
        TypeError: either has leaves that are not floating point.
        ValueError: `other` is not like `params` (every leaf is listed).

    Cost:
        One subtraction.

    References:
        Goodfellow, Vinyals and Saxe (2015), Qualitatively characterizing neural network optimization
        problems, §3.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> def loss_fn(w):
        ...     return jnp.sum(w**2)
        >>> hj.landscape(loss_fn, a, directions=hj.directions.line(a, b), distances=[0.0, 0.5,
        ...                                                        1.0]).losses.tolist()
        [1.0, 0.5, 1.0]
    """
    _tree.check_floating(params)
    _tree.check_floating(other, "other")
    _tree.check_like(other, params, "other", "params")
    return jax.tree.map(lambda x, y: x - y, _tree.wide(other), _tree.wide(params))


def _check_axis(axis: int, found: Sequence[Axes]) -> None:
    numbers = sorted({len(meaning.shape) for meaning in found})
    if not all(-n <= axis < n for n in numbers):
        raise ValueError(
            f"`filter_axis` must be an axis of every leaf with two or more, which have {numbers} axes, got "
            f"{axis}."
        )
    stacks = [meaning.path for meaning in found if axis % len(meaning.shape) in meaning.stack]
    if stacks:
        raise ValueError(
            f"`filter_axis` must not count layers, as axis {axis} does in {', '.join(stacks)}; where it does "
            "not, say so by `axes`."
        )


@functools.partial(jax.jit, static_argnums=0)
def _rescaled(within: tuple[tuple[int, ...], ...], direction: Vector, params: Params) -> Vector:
    leaves, treedef = jax.tree.flatten(direction)
    pairs = zip(within, leaves, jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(treedef, [_rescaled_leaf(*each) for each in pairs])


def _rescaled_leaf(within: tuple[int, ...], d: Array, w: Array) -> Array:
    if not within:
        return _sharding.born_like(jnp.zeros_like(d), d)
    # Norms with their axes kept, in the direction's dtype: squares of bfloat16 weights lose their digits.
    norms = [jnp.sqrt(jnp.sum(x.astype(d.dtype) ** 2, axis=within, keepdims=True)) for x in (d, w)]
    # A filter of the params that is zero makes the direction zero there, not NaN.
    return d * norms[1] / jnp.where(norms[0] > 0, norms[0], 1)


def _summed_over(axis: int | Literal["output"] | None, meaning: Axes) -> tuple[int, ...]:
    """The axes that the norm of a filter sums over."""
    if axis == "output":
        return meaning.within_filters
    if axis is None:
        return meaning.unstacked
    number = len(meaning.shape)
    return tuple(i for i in meaning.unstacked if i != axis % number)


def __dir__() -> list[str]:
    """What tab completion shows: the names made here, not the imports."""
    return [name for name, value in globals().items() if getattr(value, "__module__", None) == __name__]
