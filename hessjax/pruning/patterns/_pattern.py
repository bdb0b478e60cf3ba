"""Patterns: which weights of a leaf go together, and how many of a group may go."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Shaped


class Pattern(NamedTuple):
    """A way to cut a leaf into groups of equal size, and what may happen to a group.

    Attributes:
        name: what messages call it. Equal settings give the same functions, so that they share what is
            compiled.
        group: `(leaf) -> (groups, size)`: the weights of each group in a row. It only moves numbers, and
            raises a ValueError for a shape it does not fit.
        ungroup: `(rows, shape) -> leaf`, its inverse.
        at_most: how many weights of a group may go. None: a group goes as a whole, or stays.
        tie: leaves of the same name (not None) have as many groups, and lose the same ones.
    """

    name: str
    group: Callable[[Any], Any]
    ungroup: Callable[[Any, tuple[int, ...]], Any]
    at_most: int | None = None
    tie: str | None = None


@functools.lru_cache
def unstructured() -> Pattern:
    """Every weight on its own.

    Returns:
        A `Pattern`.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> hj.patterns.unstructured().group(jnp.ones((2, 3))).shape
        (6, 1)
    """
    return Pattern("unstructured()", lambda x: x.reshape(-1, 1), lambda rows, shape: rows.reshape(shape))


@functools.lru_cache
def n_of_m(n: int, m: int, axis: int = 0) -> Pattern:
    """At least n of every m consecutive weights along an axis stay: 2:4 and its relatives.

    A ranking takes the lowest scores as always, but never more than m − n out of a group; at the sparsity
    1 − n/m every group has exactly n weights left.

    Args:
        n: how many stay.
        m: the size of a group.
        axis: along which they lie. Hardware wants the axis that is summed over, which is 0 for a Dense
            kernel.

    Returns:
        A `Pattern`. `prune` raises a ValueError if m does not divide the axis, or if the sparsity is above
        1 − n/m.

    Raises:
        ValueError: unless 0 < n < m.

    References:
        Mishra et al., Accelerating sparse deep neural networks (2021), arXiv 2104.08378: 2:4.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]])}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=hj.patterns.n_of_m(2, 4,
        ...     axis=1)).params["kernel"]
        Array([[9., 8., 0., 0., 0., 0., 3., 4.]], dtype=float32)
    """
    if not 0 < n < m:
        raise ValueError(f"`n` must be between 1 and m - 1, how many of `m` stay, got {n} of {m}.")

    def group(x: Shaped[Array, "..."]) -> Shaped[Array, "groups m"]:
        last = jnp.moveaxis(x, axis_of(axis, x.shape), -1)
        check_divides(m, last.shape[-1], f"axis {axis}")
        return last.reshape(-1, m)

    def ungroup(rows: Shaped[Array, "groups m"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        place = axis_of(axis, shape)
        last = (*shape[:place], *shape[place + 1 :], shape[place])
        return jnp.moveaxis(rows.reshape(last), -1, place)

    return Pattern(f"n_of_m({n}, {m}, axis={axis})", group, ungroup, at_most=m - n)


def blocks(shape: tuple[int, ...]) -> Pattern:
    """Rectangular blocks over the last axes of a leaf go as a whole.

    Args:
        shape: of one block, `(32, 32)`; axes before the last `len(shape)` are cut into single indices.

    Returns:
        A `Pattern`. `prune` raises a ValueError for a leaf with fewer axes, or axes it does not divide.

    Raises:
        ValueError: if a size is below 1.

    References:
        Narang et al., Block-sparse recurrent neural networks (2017), arXiv 1711.02782.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 1.0, 5.0, 0.5], [1.0, 1.0, 0.1, 0.1]])}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=hj.patterns.blocks((2,
        ...     2))).params["kernel"]
        Array([[0. , 0. , 5. , 0.5],
               [0. , 0. , 0.1, 0.1]], dtype=float32)
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"`shape` must be sizes of at least 1, of one block, got {shape}.")
    return _blocks(tuple(shape))


@functools.lru_cache
def _blocks(shape: tuple[int, ...]) -> Pattern:
    k = len(shape)

    def cut(full: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The leaf's shape with each of its last axes in two, and the order that brings blocks together."""
        if len(full) < k:
            raise ValueError(f"it needs {k} axes, and there are {len(full)}")
        lead = len(full) - k
        for place, size in enumerate(shape):
            check_divides(size, full[lead + place], f"axis {lead + place}")
        pairs = [part for n, size in zip(full[lead:], shape, strict=True) for part in (n // size, size)]
        outer, inner = range(lead, lead + 2 * k, 2), range(lead + 1, lead + 2 * k, 2)
        return (*full[:lead], *pairs), (*range(lead), *outer, *inner)

    def group(x: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        fine, order = cut(x.shape)
        return x.reshape(fine).transpose(order).reshape(-1, math.prod(shape))

    def ungroup(rows: Shaped[Array, "groups size"], full: tuple[int, ...]) -> Shaped[Array, "..."]:
        fine, order = cut(full)
        moved = rows.reshape([fine[i] for i in order])
        return moved.transpose([order.index(i) for i in range(len(order))]).reshape(full)

    return Pattern(f"blocks({shape})", group, ungroup)


@functools.lru_cache
def channels(axis: int = -2) -> Pattern:
    """All weights with the same index along an axis go as a whole.

    Args:
        axis: -2 for the input channels of a Flax kernel, -1 for the output channels (`filters()`).

    Returns:
        A `Pattern`. `prune` raises a ValueError for a leaf without that axis.

    References:
        Li et al., Pruning filters for efficient ConvNets (2016), arXiv 1608.08710.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0, 0.5], [1.0, 3.0, 2.0]])}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 1 / 3,
        ...                                               pattern=hj.patterns.channels(-1)).params["kernel"]
        Array([[0. , 2. , 0.5],
               [0. , 3. , 2. ]], dtype=float32)
    """

    def group(x: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        first = jnp.moveaxis(x, axis_of(axis, x.shape), 0)
        return first.reshape(first.shape[0], math.prod(first.shape[1:]))

    def ungroup(rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        place = axis_of(axis, shape)
        rest = (*shape[:place], *shape[place + 1 :])
        return jnp.moveaxis(rows.reshape(shape[place], *rest), 0, place)

    return Pattern(f"channels({axis})", group, ungroup)


def filters() -> Pattern:
    """The output channels of a Flax kernel, its last axis, go as a whole: `channels(-1)`.

    Returns:
        A `Pattern`.
    """
    return channels(-1)._replace(name="filters()")


def rows() -> Pattern:
    """The rows of a matrix, its first axis, go as a whole: `channels(0)`.

    Returns:
        A `Pattern`.
    """
    return channels(0)._replace(name="rows()")


def axis_of(axis: int, shape: tuple[int, ...]) -> int:
    """The axis counted from the front, or a ValueError."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"there is no axis {axis}")
    return axis % len(shape)


def check_divides(size: int, length: int, name: str) -> None:
    """Raise a ValueError for a length that is no multiple of the size."""
    if length % size:
        raise ValueError(f"{size} does not divide {name}, which has {length}")
