"""Masks of a network's leaves, and moments of it: do they belong together?"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from hessjax._core import _tree
from hessjax._core._messages import checked_instance
from hessjax.layers._moments import LayerMoments
from hessjax.layers._outputs import Inputs, by_path, check_belong, inputs_of

Empty: TypeAlias = Literal["refuse", "allow"]
"""What to do about outputs that a mask leaves without inputs."""


def checked_masks(params: Any, mask: Any, moments: Any, empty: Empty) -> dict[str, Bool[Array, "..."]]:
    """The masks of the leaves that have zeros in them, by path, all arguments being what they must be."""
    _tree.check_floating(params)
    checked_instance("moments", moments, LayerMoments, "hessjax.layers.moments(model_fn, params, batches)")
    _tree.check_arrays(mask, "mask")
    leaves, found = by_path(params), by_path(mask)
    _check_masks(leaves, found)
    # A scalar stands for a leaf that is not pruned, and does not move either.
    masks = {
        path: jnp.asarray(m)
        for path, m in found.items()
        if np.ndim(m) and (not bool(np.all(m)) or _can_move(path, moments))
    }
    check_belong({path: leaves[path] for path in masks}, moments)
    _check_values(leaves, moments)
    if empty == "refuse":
        _check_empty(masks, moments)
    return masks


def _can_move(path: str, moments: LayerMoments) -> bool:
    """Whether a leaf that keeps everything can make up for the errors of those before it."""
    layouts = dict(zip(moments.problem.paths, moments.layouts, strict=True)).get(path, ())
    return bool(layouts) and layouts[0].shape[1] > 1 and not any(x.swapped or x.is_lookup for x in layouts)


def _check_masks(leaves: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    bad = [f"  {path}: missing" for path in leaves if path not in found]
    bad += [f"  {path}: not in `params`" for path in found if path not in leaves]
    both = [path for path in found if path in leaves]
    bad += [
        f"  {path}: {_tree.describe(found[path])}, must be boolean, of shape {np.shape(leaves[path])} or ()"
        for path in both
        if jnp.result_type(found[path]) != jnp.bool_
        or (np.ndim(found[path]) and np.shape(found[path]) != np.shape(leaves[path]))
        or (not np.ndim(found[path]) and np.ndim(leaves[path]) and not bool(found[path]))
    ]
    if bad:
        raise ValueError(
            "`mask` must have a boolean for every weight of `params`, True = kept, or True for a whole leaf, "
            "but\n" + "\n".join(bad)
        )


def _check_values(leaves: Mapping[str, Any], moments: LayerMoments) -> None:
    """Raise a ValueError for moments of another network of the same shapes."""
    known = by_path(moments.problem.params)
    both = [path for path in known if path in leaves]
    bad = [path for path in both if not bool(jnp.all(jnp.equal(known[path], leaves[path])))]
    if bad:
        raise ValueError(
            f"`moments` must be those of `params`, but {', '.join(bad)} had other values when they were "
            "taken: pass the dense params, whose outputs are to be kept, or take the moments anew."
        )


def _check_empty(masks: Mapping[str, Array], moments: LayerMoments) -> None:
    lines = [_empty(path, mask, inputs_of(moments, path)) for path, mask in masks.items()]
    if found := [line for line in lines if line]:
        raise ValueError(
            "`mask` must leave every output an input, but\n"
            + "\n".join(found)
            + '\nKeep one weight of each, or take such outputs for zero, `empty="allow"`.'
        )


def _empty(path: str, mask: Array, inputs: Inputs) -> str:
    none = ~np.asarray(inputs.moves.apply(mask)).any(axis=1)
    count = int(none.sum())
    return f"  {path}: {count} of {none.size} outputs, {_first(np.argwhere(none))}" if count else ""


def _first(places: Iterable[Any], most: int = 5) -> str:
    shown = [",".join(map(str, place[1:] if place[0] == 0 else place)) for place in list(places)[:most]]
    return f"the first {', '.join(shown)}"
