"""Leaves, and what was made for them, without the indices that go."""

from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

Indices: TypeAlias = dict[int, np.ndarray]
"""`{axis: indices}`"""


def take(leaf: Any, kept: Indices) -> Any:
    """The chosen entries, on the host: nothing to compile for every shape."""
    if not kept:
        return leaf
    value = np.asarray(leaf)
    for axis, indices in kept.items():
        value = np.take(value, indices, axis)
    return value if isinstance(leaf, np.ndarray) else jnp.asarray(value)


def shrink_leaf(
    path: str, leaf: Any, shapes: dict[str, tuple[int, ...]], kept: dict[str, Indices]
) -> tuple[Any, bool]:
    """A leaf cut like the param that its path ends in, and whether there is one.

    Raises:
        ValueError: if its shape does not show how to cut it.
    """
    owners = [name for name in shapes if name == "." or f"/{path}".endswith(f"/{name}")]
    if not owners:
        return leaf, False
    # Of `kernel` and `Dense_0/kernel` both at the end of a path, the longer one is meant.
    owner = max(owners, key=len)
    shape, like, cuts = np.shape(leaf), shapes[owner], kept.get(owner, {})
    # optax puts arrays of size 1 where a leaf has no such moment.
    if not cuts or np.size(leaf) <= 1 < np.prod(like):
        return leaf, shape == like or not cuts
    if shape[len(shape) - len(like) :] == like:
        ahead = len(shape) - len(like)
        return take(leaf, {axis + ahead: indices for axis, indices in cuts.items()}), True
    # Adafactor keeps row and column sums of the second moments: the leaf's shape without one axis.
    missing = [axis for axis in range(len(like)) if shape == like[:axis] + like[axis + 1 :]]
    if len(missing) != 1:
        raise ValueError(
            f"`tree` must have the params' shapes, but {path} has {shape} where {owner} had {like}, which "
            "does not show what belongs to a removed channel. Make it anew from the smaller params."
        )
    gone = missing[0]
    rest = {axis - (axis > gone): indices for axis, indices in cuts.items() if axis != gone}
    return take(leaf, rest), True
