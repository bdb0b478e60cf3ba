"""Curvature of a part of the params, the rest held fixed."""

from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial

from hessjax._core import _tree
from hessjax._core._types import LossFn, Params, Where
from hessjax._core._where import match
from hessjax.curvature._product import as_pytree


class Selection(NamedTuple):
    """Params split in two; each half has the structure of the whole, with None where the other has leaves.

    Attributes:
        part: the selected leaves.
        rest: the others.
    """

    part: Params
    rest: Params

    def merge(self, part: Params) -> Params:
        """The whole params again, with `part` in the place of `self.part`."""
        return merge(part, self.rest)

    def restrict(self, loss_fn: LossFn) -> LossFn:
        """`loss_fn` as a function of the part: `(part, *args) -> scalar`, the rest held fixed.

        A model function, whose outputs `ggn` and `fisher` take, is restricted in the same way. The result
        is a pytree that carries the rest along, so other params of the same shapes compile nothing
        anew.
        """
        # The rest is a leaf of the Partial, not a constant of a closure: other weights retrace nothing.
        return Partial(_restricted, as_pytree(loss_fn), self.rest)


def select(params: Params, where: Where) -> Selection:
    """Split `params` by path, so that everything that works on params works on a part of them.

    Args:
        params: any pytree of arrays.
        where: which leaves. A glob over their paths (`"Conv_0/*"`, `"*/kernel"`; `*` also crosses `/`),
            a sequence of globs, a function `(path, leaf) -> bool`, or booleans as a tree like `params` or its
            upper part.

    Returns:
        A `Selection(part, rest)`, with `.restrict(loss_fn)` and `.merge(part)`.

    Raises:
        TypeError: `where` selects leaves that are not floating point.
        ValueError: `where`, or one of several globs, matches no leaf (the paths are listed).

    Cost:
        Nothing is copied.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> params = {"body": {"w": jnp.array([1.0, 2.0])}, "head": {"w": jnp.array(3.0)}}
        >>> def loss_fn(params, x):
        ...     return x * jnp.sum(params["body"]["w"] ** 2) * params["head"]["w"]
        >>> head = hj.select(params, "body/*")
        >>> A = hj.hessian(head.restrict(loss_fn), head.part, 1.0)
        >>> A(head.part)["body"]["w"].tolist()
        [6.0, 12.0]
    """
    _tree.check_leaves(params)
    mask = match(params, where)
    # None is a subtree without leaves: jax maps and differentiates each half as if the other were not there.
    part = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, params)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, params)
    _check_differentiable(part)
    return Selection(part, rest)


def _check_differentiable(part: Params) -> None:
    """Raise a TypeError for counters in what is selected, in which nothing has a derivative."""
    leaves = zip(_tree.leaf_paths(part), jax.tree.leaves(part), strict=True)
    others = [f"{path}: {_tree.describe(x)}" for path, x in leaves if not _tree.is_floating(x)]
    if others:
        raise TypeError(
            f"`where` must select real floating-point leaves of `params` only, got {', '.join(others)}: what "
            "it leaves out may be anything."
        )


def merge(part: Params, rest: Params) -> Params:
    """The tree whose leaves come from `part` where it has them and from `rest` elsewhere."""
    return jax.tree.map(lambda a, b: b if a is None else a, part, rest, is_leaf=lambda leaf: leaf is None)


def _restricted(loss_fn: LossFn, rest: Params, part: Params, *args: Any) -> Any:
    return loss_fn(merge(part, rest), *args)
