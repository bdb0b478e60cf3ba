"""Chosen indices of an array's axes, and of whatever was made in the array's likeness."""

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
    owner = max(owners, key=len)
    shape, like, cuts = np.shape(leaf), shapes[owner], kept.get(owner, {})
    if not cuts or np.size(leaf) <= 1 < np.prod(like):
        return leaf, shape == like or not cuts
    if shape[len(shape) - len(like) :] == like:
        ahead = len(shape) - len(like)
        return take(leaf, {axis + ahead: indices for axis, indices in cuts.items()}), True
    missing = [axis for axis in range(len(like)) if shape == like[:axis] + like[axis + 1 :]]
    if len(missing) != 1:
        raise ValueError(
            f"`tree` must have the params' shapes, but {path} has {shape} where {owner} had {like}, which "
            "does not show what belongs to a removed channel. Make it anew from the smaller params."
        )
    gone = missing[0]
    rest = {axis - (axis > gone): indices for axis, indices in cuts.items() if axis != gone}
    return take(leaf, rest), True
