"""The mask that stands somewhere in the state of an optimizer."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _tree
from hessjax._core._types import Params
from hessjax.pruning.saliencies._saliency import is_hole
from hessjax.pruning.training._checks import RESTORE, UNDONE, check_mask
from hessjax.pruning.training._state import PruneState


def mask_of(opt_state: Any, params: Params | None = None) -> Params:
    """The current mask, True = kept, from the state of any optimizer that has `prune` somewhere in it.

    Args:
        opt_state: an optax state, nested in any way (chain, MultiSteps, ...), or something that holds one,
            such as a linen `TrainState`.
        params: the params it belongs to. Only needed where `optax.masked` or `optax.partition` hides a whole
            subtree from `prune` by one bool or label: what lies in it no state says, and without `params`
            one scalar stands in its place. (From a `TrainState` they are taken by themselves.)

    Returns:
        A pytree like the params: booleans in the shape of every pruned leaf, and a scalar True for every
        other, so that `jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, hj.mask_of(opt_state, params))`
        masks a tree (dense weights, an average of params). Before the first update this is the mask that the
        first update will impose. From an `nnx.Optimizer`, whose state is made of Variables:
        `nnx.as_pure(hj.mask_of(optimizer.opt_state))`.

    Raises:
        ValueError: if there is no prune state in it, or more than one that has a mask for the same leaf, or
            if `params` are others.

    Warns:
        UserWarning: if pruned weights were found not to be 0 (`PruneState.num_undone`), which inside `jit`
            cannot be an error.

    Cost:
        Reads what is there; outside `jit` one number comes to the host.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> tx = optax.chain(optax.clip(1.0), hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(),
        ...                                                                                    sparsity=0.5))
        >>> hj.mask_of(tx.init({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)}))
        {'bias': Array(True, dtype=bool), 'kernel': Array([[False,  True]], dtype=bool)}
    """
    found = _prune_states(opt_state)
    if not found:
        raise ValueError(
            "`opt_state` must hold the state of a `hessjax.prune`, found none in "
            f"{type(opt_state).__name__}. {RESTORE}"
        )
    _warn_undone(found)
    mask = functools.reduce(_either, [state.mask for state in found])
    params = getattr(opt_state, "params", None) if params is None else params
    if params is not None:
        _tree.check_arrays(params, "params")
        mask = _spread(mask, params)
    return jax.tree.map(lambda m: jnp.asarray(True) if is_hole(m) else m, mask, is_leaf=is_hole)


def _prune_states(tree: Any) -> list[PruneState]:
    """All of them, those inside the inner optimizer of another included."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, PruneState))
    found = [node for node in nodes if isinstance(node, PruneState)]
    # The walk ends at a state of `prune`: what is inside its `inner` is looked for from there.
    return [state for node in found for state in (node, *_prune_states(node.inner))]


def check_apart(mask: Params, inner: Any) -> None:
    """Raise a ValueError if a `prune` inside has masks for leaves of this one."""
    ours = set(_tree.leaf_paths(mask))
    theirs = [path for state in _prune_states(inner) for path in _tree.leaf_paths(state.mask)]
    if both := sorted(ours.intersection(theirs)):
        raise ValueError(
            "`inner` must not prune what the `prune` around it does, but both have a mask for "
            f"{', '.join(both)}: give each leaves of its own by `where`."
        )


def _warn_undone(states: list[PruneState]) -> None:
    numbers = jax.tree.leaves([state.num_undone for state in states])  # out of Variables, as nnx has them
    known = [x for x in numbers if isinstance(x, jax.Array | np.ndarray)]
    known = [x for x in known if not isinstance(x, jax.core.Tracer)]
    if worst := max((int(jnp.max(x)) for x in known), default=0):
        warnings.warn(
            f"{worst} pruned weights were not 0 in the params that an update was given. {UNDONE}",
            stacklevel=3,
        )


def _either(a: Any, b: Any) -> Any:
    """Two masks as one; each may have a single hole where the other has a whole subtree."""
    if is_hole(a) or is_hole(b):
        return b if is_hole(a) else a
    (inside_a, kind_a), (inside_b, kind_b) = _opened(a), _opened(b)
    if kind_a != kind_b or (inside_a and inside_a[0] is a):
        raise ValueError(
            "`opt_state` must hold one mask for every leaf, found two for the same: pass the part that "
            "belongs to one `hessjax.prune`."
        )
    return jax.tree.unflatten(kind_a, list(map(_either, inside_a, inside_b)))


def _opened(node: Any) -> tuple[list[Any], Any]:
    """What lies directly in a node of a tree, and the node without it; a leaf lies in itself."""
    return jax.tree.flatten(node, is_leaf=lambda x: x is not node)


def _spread(mask: Params, params: Params) -> Params:
    """A hole for every leaf, where one stood for a whole subtree of the params."""
    hole = next((m for m in jax.tree.leaves(mask, is_leaf=is_hole) if is_hole(m)), None)
    check_mask("opt_state", mask, params)
    return jax.tree.map(
        lambda m, p: jax.tree.map(lambda _: hole, p) if is_hole(m) else m, mask, params, is_leaf=is_hole
    )
