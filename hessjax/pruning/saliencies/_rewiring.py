"""Masks of a constant size: moved while the weights train, or fixed by the user."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hessjax._core import _tree
from hessjax._core._types import Params
from hessjax.pruning._ranking import ordered_keys, smallest, units_of
from hessjax.pruning._sparsity import Schedule
from hessjax.pruning.patterns._by_path import Patterns
from hessjax.pruning.patterns._pattern import unstructured
from hessjax.pruning.saliencies._saliency import Saliency

BACK, AWAY, GONE = -1.0, -2.0, -3.0  # where bands of scores begin, 1/2 wide; those that stay score |w|


class Rewired(NamedTuple):
    """The mask of the last gradient, for `rigl` that gradient's absolute values, and T."""

    kept: Params
    growth: Params
    num_updates: Int[Array, ""]


def static(scores: Any) -> Saliency:
    """Scores given by the user: the highest stay, whatever the training does.

    Args:
        scores: a pytree of numbers or bools with a leaf of the same path and shape for every pruned leaf;
            others are ignored, so that a tree of all params will do, or the `mask_of` another training (a
            lottery ticket, arXiv 1803.03635). Of a mask every zero goes first.

    Returns:
        A `Saliency`; at a constant sparsity the mask never changes.

    Raises:
        ValueError, TypeError: by `prune(...).init`, naming leaves missing, of another shape, or not real.

    Cost:
        Nothing between mask steps. Memory: the scores, in their own dtype.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> ticket = {"kernel": jnp.array([[True, False, True]])}
        >>> hj.prune_once({"kernel": jnp.array([[1.0, 5.0, 2.0]])}, hj.saliencies.static(ticket),
        ...                                                                              1 / 3).params
        {'kernel': Array([[1., 0., 2.]], dtype=float32)}
    """

    def init(dense: Params) -> Params:
        given = dict(zip(_tree.unique_paths(scores, "scores"), jax.tree.leaves(scores), strict=True))
        wanted = dict(zip(_tree.leaf_paths(dense), jax.tree.leaves(dense), strict=True))
        found = {path: given[path] for path in wanted if path in given}
        _tree.check_like(found, wanted, "scores", "params[where]")
        _tree.check_floating(_tree.wide(found), "scores")
        copies = [jnp.array(found[path], copy=True) for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(dense), copies)

    return Saliency(
        init,
        update=lambda state, grads, dense, mask, /, **extra: state,
        scores=lambda state, dense, /, **extra: _tree.wide(state),
    )


def sparse_evolution(fraction: float | int | Schedule, key: Any) -> Saliency:
    """SET: at each mask step the smallest weights of a leaf go, and as many come back at random.

    Of the K kept weights of a leaf (groups, under a pattern) the `round(fraction · K)` of least |w| go, no
    more than there are zeros, and as many others come back, so that at a constant sparsity every leaf keeps
    its number. Where the sparsity rises fewer come back, where it falls more; what has just gone only if
    nothing else is left. The first mask is by magnitude, so that a trained network may be given; for a fresh
    one, where it is a random choice within each leaf, take `uniform()` or `erdos_renyi()` as `allocation`.

    Args:
        fraction: of the kept weights that is replaced, in [0, 1], or a schedule `T -> fraction`.
        key: of the random numbers, which are new ones at every T.

    Returns:
        A `Saliency` for `prune` with `regrow=True` and no `threshold`. A weight that comes back starts from
        its dense copy, in the paper from a random number.

    Raises:
        ValueError: if a number `fraction` lies outside [0, 1]. (A schedule is taken to its nearest end.)
        TypeError: if `key` is not a random key.

    Cost:
        A copy of the mask per update; at a mask step a random number per weight and two rankings beside that
        of the allocation. Memory: a byte per weight, and a few numbers per weight during a mask step.

    References:
        Mocanu et al., Nature Communications 9 (2018), arXiv 1707.04780: fraction 0.3, each sign on its own.

    Example:
        >>> import jax, jax.numpy as jnp, optax, hessjax as hj
        >>> params, grads = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}, {"kernel": jnp.zeros((1, 4))}
        >>> tx = hj.prune(optax.sgd(0.1), hj.saliencies.sparse_evolution(0.5, jax.random.key(0)), 0.5,
        ...                                                                                  every=1)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[4., 0., 2., 0.]], dtype=float32)
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0):
        raise TypeError(f"`key` must be one random key, such as `jax.random.key(0)`, got {key!r}.")

    def chances(state: Rewired, dense: Params) -> Params:
        leaves, treedef = jax.tree.flatten(dense)
        now, ends = jax.random.fold_in(key, state.num_updates), itertools.accumulate(x.size for x in leaves)
        numbers = jax.random.uniform(now, (_tree.size(dense),), jnp.float32)  # one draw: each compiles slowly
        parts = zip(jnp.split(numbers, list(ends)[:-1]), leaves, strict=True)
        return jax.tree.unflatten(treedef, [part.reshape(x.shape) for part, x in parts])

    return _rewiring(fraction, lambda grads, dense: (), chances)


def rigl(fraction: float | int | Schedule) -> Saliency:
    """RigL: at each mask step the smallest weights of a leaf go, and those of the largest gradient come back.

    As `sparse_evolution` in all else. The gradient is that of the mask step's update, at the masked weights.
    In the paper what has just gone may come back at once.

    Args:
        fraction: of the kept weights that is replaced, in [0, 1], or a schedule `T -> fraction`; in the paper
            `optax.cosine_decay_schedule(0.3, stop)`, with `stop` at 3/4 of the training.

    Returns:
        A `Saliency` for `prune` with `regrow=True` and no `threshold`. A weight that comes back starts from
        its dense copy, in the paper from zero.

    Raises:
        ValueError: if a number `fraction` lies outside [0, 1]. (A schedule is taken to its nearest end.)

    Cost:
        A copy of mask and gradient per update; at a mask step two rankings beside that of the allocation.
        Memory: a byte and a number per weight, and a few numbers more during a mask step.

    References:
        Evci et al., Rigging the lottery: Making all tickets winners (2020), arXiv 1911.11134.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> params, grads = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}, {"w": jnp.array([[0.0, 9.0, 1.0, -2]])}
        >>> tx = hj.prune(optax.sgd(0.1), hj.saliencies.rigl(0.5), 0.5, every=1)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[4., 0., 0., 1.]], dtype=float32)
    """
    return _rewiring(
        fraction,
        remember=lambda grads, dense: jax.tree.map(lambda g, w: jnp.abs(g).astype(w.dtype), grads, dense),
        growth=lambda state, dense: _tree.wide(state.growth),
    )


def _rewiring(fraction: Any, remember: Callable[..., Params], growth: Callable[..., Params]) -> Saliency:
    """The rule round `remember(grads, dense)`, and `growth(state, dense)`: who comes back first."""
    if not callable(fraction) and not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in [0, 1], the share of kept weights replaced, got {fraction}.")

    def init(dense: Params) -> Rewired:
        full = jax.tree.map(lambda w: jnp.full_like(w, True, dtype=bool), dense)
        return Rewired(full, remember(jax.tree.map(jnp.zeros_like, dense), dense), jnp.zeros((), jnp.int32))

    def update(state: Rewired, grads: Params, dense: Params, mask: Params, /, **extra: Any) -> Rewired:
        return Rewired(jax.tree.map(jnp.copy, mask), remember(grads, dense), state.num_updates + 1)

    def scores(state: Rewired, dense: Params, /, **extra: Any) -> Params:
        share = fraction(state.num_updates) if callable(fraction) else fraction
        worth, fresh = jax.tree.map(jnp.abs, _tree.wide(dense)), growth(state, dense)
        bands = _bands(state.kept, worth, fresh, share, extra.get("pattern", unstructured()))
        shares = _relative(worth), _relative(fresh)
        below = jax.tree.map(lambda b, w, f: b + jnp.where(b == GONE, w, f) / 2, bands, *shares)
        return jax.tree.map(lambda b, w, x: jnp.where(b == 0, w, x), bands, worth, below)

    return Saliency(init, update, scores)


def _bands(mask: Params, worth: Params, fresh: Params, share: Any, pattern: Patterns) -> Params:
    """0 for weights that stay, and where the scores of the others begin."""
    units, masks = units_of(worth, pattern), jax.tree.map(lambda m: m.astype(jnp.float32), mask)
    kept = [x > 0 for x in units_of(masks, pattern).scores]
    total = jnp.stack([jnp.sum(k, dtype=jnp.int32) for k in kept])
    most = jnp.minimum(total, jnp.asarray(units.counts, jnp.int32) - total)
    number = jnp.clip(jnp.round(share * total.astype(jnp.float32)).astype(jnp.int32), 0, most)
    low, high = ordered_keys(units.scores), ordered_keys(units_of(fresh, pattern).scores)
    gone = smallest([jnp.where(k, x, ~(x & 0)) for k, x in zip(kept, low, strict=True)], number)
    back = smallest([~jnp.where(k, x & 0, x) for k, x in zip(kept, high, strict=True)], number)
    old, new = [jnp.where(g, GONE, 0.0) for g in gone], [jnp.where(b, BACK, AWAY) for b in back]
    return units.spread(list(map(jnp.where, kept, old, new)))


def _relative(tree: Params) -> Params:
    """By the largest number in the tree; NaN stays NaN."""
    top = jnp.max(jnp.stack([jnp.nanmax(x, initial=0) for x in jax.tree.leaves(tree)]))
    return jax.tree.map(lambda x: x / jnp.where(top > 0, top, 1).astype(x.dtype), tree)
