"""Pruning during training: a wrapper round any optax optimizer that keeps the params exactly sparse."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hessjax import _tree
from hessjax._typing import Params, Where
from hessjax.pruning.allocation import Allocation, check_sparsity, global_threshold
from hessjax.pruning.saliency import Saliency, drop_others
from hessjax.pruning.steps import (
    Schedule,
    check_budget,
    check_first_step,
    check_steps,
    cond_now,
    is_mask_step,
    some_mask_steps,
)


class PruneState(NamedTuple):
    """What `prune` remembers; `optax.tree.get(opt_state, "num_nan")` reads a field wherever it is nested.

    `dense` and `mask` hold `optax.MaskedNode()` in place of every leaf that is not pruned.

    Attributes:
        num_updates: T, the updates so far.
        inner: the state of the wrapped optimizer.
        dense: the weights without their mask. Read where `mask` is False only: elsewhere the params are the
            truth.
        mask: booleans, True = kept.
        saliency: what the saliency remembers (scores, their optimizer, gradients).
        sparsity: what was asked for at the last mask step; 0 before the first.
        num_nan: how many scores were NaN at the last mask step; anything but 0 means that the run has gone
            wrong.
        predicted_increase: of the loss, by a saliency that compensates, at the last mask step; None for the
            others.
    """

    num_updates: Int[Array, ""]
    inner: Any
    dense: Params
    mask: Params
    saliency: Any
    sparsity: Float[Array, ""]
    num_nan: Int[Array, ""]
    predicted_increase: Float[Array, ""] | None = None


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a leaf has two or more axes: matrices, kernels, embeddings; no biases, no scales."""
    return jnp.ndim(leaf) >= 2


def prune(
    inner: optax.GradientTransformation | optax.MultiSteps,
    saliency: Saliency,
    sparsity: float | int | Schedule,
    *,
    allocation: Allocation = global_threshold(),  # noqa: B008 (a value, never changed)
    where: Where = is_matrix,
    every: int = 100,
    start: int = 0,
    stop: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train with `inner` while pruning: the params that the loop holds are the masked ones, exactly.

    The loop stays as it is. The dense weights W and the mask M live in the optimizer state; the gradient G,
    taken at the masked weights, goes into `inner` as G⊙M together with W. After T updates the params are M⊙W
    with M from the last mask step, T' = start, start + every, ... up to `stop`, and `stop` itself, and its
    sparsity is `sparsity(T')`. The mask of T' = 0 is made from the params given to `init` and acts from the
    first update on.

    Guaranteed, whatever `inner` is:

    - a pruned weight is exactly 0.0 after `optax.apply_updates`, and the number of zeros is exact;
    - a kept weight moves as `inner` alone would move it, to the last bit (at mask steps a saliency that
      compensates, as `obs` does, moves it too), and a leaf that is not pruned trains as if `prune` were not
      there (operation for operation: inside `jit` the two are different programs, and XLA may contract
      a·b + c in one of them). At kept places W is by definition the params, read anew at every update, so
      that the two cannot drift apart and outside changes are honoured;
    - a weight that comes back starts from its dense copy, which `inner` has kept moving (with zero gradient).

    Nothing may change the updates after `prune`: in a chain it comes last, and decay, ema, accumulation
    belong into `inner`. (`optax.MultiSteps` round `prune` is fine: T then counts its emitted updates; inside
    `prune`, T counts the small steps.)

    Args:
        inner: the optimizer. Its state may hold anything; its weight decay sees the dense weights.
        saliency: what a weight is worth, for example `magnitude()`.
        sparsity: the fraction of zeros among the selected weights, in [0, 1): a number, or a schedule
            `T -> sparsity` such as `optax.polynomial_schedule(0.0, 0.9, 3, 1000)`.
        allocation: how zeros are spread over the leaves: `global_threshold()` or `uniform()`.
        where: which leaves are pruned: a glob over their paths, several, or `(path, leaf) -> bool`. By
            default all with two or more axes.
        every: updates between two mask steps.
        start: the first mask step; until then nothing is pruned.
        stop: the last mask step; afterwards the mask rests. None: never.

    Returns:
        An optax transformation. Its `update` needs `params`, and hands further keyword arguments on to
        `inner` and to the saliency. `mask_of(opt_state)` gives the mask.

    Raises:
        ValueError: for `sparsity` outside [0, 1), `every` < 1, `start` < 0, `start` > `stop`; by `init`, if
            `where` matches no leaf, if the allocation's floors cannot be met, or if a schedule leaves [0, 1).
            A schedule is tried at `start`, at `start + every · 2ᵏ` up to `stop` (or k = 20) and at `stop`;
            what it gives elsewhere cannot raise inside `jit`: it is taken to the nearest end of [0, 1] and
            stands in `PruneState.sparsity`. By `update`, if `params` is missing or `grads` differs from it in
            structure.
        TypeError: by `init`, if a selected leaf is not floating-point.

    Cost:
        Between mask steps a few elementwise operations per selected weight; the ranking runs inside
        `lax.cond`, at mask steps only. Memory beyond `inner`'s: one dense copy and one byte per selected
        weight, nothing for other leaves.

    References:
        Zhu and Gupta, To prune, or not to prune (2017), arXiv 1710.01878: the cubic schedule.
        Lin et al., Dynamic model pruning with feedback (2020), arXiv 2006.07253: dense weights under a mask.

    Example:
        >>> import jax, jax.numpy as jnp, optax, hessjax as hj
        >>> params = {"kernel": jnp.arange(-4.0, 4.0).reshape(2, 4), "bias": jnp.zeros(4)}
        >>> tx = hj.prune(optax.adam(0.1), hj.magnitude(), sparsity=0.5)
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = tx.update(grads, state, params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[-4.1, -3.1,  0. ,  0. ],
               [ 0. ,  0. ,  1.9,  2.9]], dtype=float32)
    """
    check_steps(every, start, stop)
    if not callable(sparsity):
        check_sparsity(sparsity)
    if isinstance(inner, optax.MultiSteps):  # which hands extra arguments on only as a transformation
        inner = inner.gradient_transformation()
    inner = optax.with_extra_args_support(inner)

    compensates = saliency.compensate is not None

    def choose(dense: Params, scorer: Any, count: Any, extra: dict[str, Any]) -> dict[str, Any]:
        """The fields of the state that a mask step changes."""
        asked = sparsity(count) if callable(sparsity) else sparsity
        scores = saliency.scores(scorer, dense, **extra)
        mask = allocation(scores, asked)
        choice = {"mask": mask, "sparsity": jnp.asarray(asked, jnp.float32), "num_nan": _num_nan(scores)}
        if saliency.compensate is not None:
            dense, increase = saliency.compensate(scorer, dense, mask, **extra)
            choice |= {"dense": dense, "predicted_increase": jnp.asarray(increase, jnp.float32)}
        return choice

    def init(params: Params) -> PruneState:
        dense = _copy_selected(params, where)
        check_budget(sparsity, allocation, dense, some_mask_steps(every, start, stop))
        scorer, zero, nothing = saliency.init(dense), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        if compensates:
            check_first_step(sparsity, start)
        full = jax.tree.map(lambda x: jnp.full_like(x, True, dtype=bool), dense)
        choice = {"mask": full, "sparsity": nothing, "num_nan": zero}
        choice |= {"predicted_increase": nothing} if compensates else {}
        if start == 0 and not compensates:
            choice = choose(dense, scorer, zero, {})
        return PruneState(zero, inner.init(params), dense, saliency=scorer, **choice)

    def update(
        grads: Params, state: PruneState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, PruneState]:
        _check_update(grads, params)
        count = optax.safe_increment(state.num_updates)
        weights = _on_selected(_unmask, params, state.mask, state.dense)
        steps, inner_state = inner.update(
            _on_selected(_mask, grads, state.mask), state.inner, weights, **extra
        )
        before, dense = (drop_others(x, state.mask) for x in (weights, optax.apply_updates(weights, steps)))
        scorer = saliency.update(state.saliency, drop_others(grads, state.mask), before, state.mask, **extra)
        rest = {"mask": state.mask, "sparsity": state.sparsity, "num_nan": state.num_nan}
        if compensates:  # the others need not pay for dense weights going through `cond`
            rest |= {"dense": dense, "predicted_increase": state.predicted_increase}
        choice = {"dense": dense} | cond_now(
            is_mask_step(count, every, start, stop),
            lambda: choose(dense, scorer, count, extra),
            lambda: rest,
        )
        updates = _on_selected(_land, steps, choice["mask"], choice["dense"], params)
        return updates, PruneState(count, inner_state, saliency=scorer, **choice)

    return optax.GradientTransformationExtraArgs(init, update)


def mask_of(opt_state: Any) -> Params:
    """The current mask, True = kept, from the state of any optimizer that has `prune` somewhere in it.

    Args:
        opt_state: an optax state, nested in any way (chain, MultiSteps, ...), or something that holds one,
            such as a linen `TrainState`.

    Returns:
        A pytree like the params: booleans in the shape of every pruned leaf, and a scalar True for every
        other, so that `jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, hj.mask_of(opt_state))` masks a
        tree (dense weights, an average of params). Before the first update this is the mask that the first
        update will impose. From an `nnx.Optimizer`, whose state is made of Variables:
        `nnx.as_pure(hj.mask_of(optimizer.opt_state))`.

    Raises:
        ValueError: if there is no prune state in it, or more than one.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> tx = optax.chain(optax.clip(1.0), hj.prune(optax.sgd(0.1), hj.magnitude(), sparsity=0.5))
        >>> hj.mask_of(tx.init({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)}))
        {'bias': Array(True, dtype=bool), 'kernel': Array([[False,  True]], dtype=bool)}
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PruneState))
    found = [node for node in nodes if isinstance(node, PruneState)]
    if len(found) != 1:
        raise ValueError(
            f"`opt_state` must hold the state of exactly one `hessjax.prune`, found {len(found)} in "
            f"{type(opt_state).__name__}: pass the part that belongs to one."
        )
    return jax.tree.map(lambda m: jnp.asarray(True) if _is_hole(m) else m, found[0].mask, is_leaf=_is_hole)


def _unmask(param: Any, mask: Any, dense: Any) -> Array:
    return jnp.where(mask, param, dense)


def _mask(grad: Any, mask: Any) -> Array:
    return jnp.where(mask, grad, jnp.zeros_like(grad))


def _land(step: Any, mask: Any, dense: Any, param: Any) -> Array:
    """`M⊙W − param`, in a dtype that holds the params: rounded to a narrower one it would not cancel.

    Added to `param` it gives `M⊙W` again: 0.0 always; a kept weight because W = fl(param + u) for some float
    u, and of all floats fl(W − param) is the nearest to W − param, so that it rounds where u did. (One
    exception: a weight that jumps over zero exactly onto a power of two can land one unit in the last place
    beside it.) Returning u itself would keep one more array alive between this step and the ranking.
    """
    dtype = jnp.promote_types(step.dtype, param.dtype)
    return jnp.where(mask, dense, jnp.zeros_like(dense)).astype(dtype) - param.astype(dtype)


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _on_selected(f: Callable[..., Array], tree: Params, mask: Params, *rest: Params) -> Params:
    """`f(leaf, mask, ...)` on the pruned leaves; the others as they are."""
    return jax.tree.map(lambda x, m, *r: x if _is_hole(m) else f(x, m, *r), tree, mask, *rest)


def _copy_selected(params: Params, where: Where) -> Params:
    """Copies of the selected leaves: the loop may donate params and state to one jitted step."""
    hits = _tree.match(params, where)
    selected = jax.tree.map(lambda x, hit: x if hit else optax.MaskedNode(), params, hits)
    _tree.check_floating(selected, "params[where]")
    return jax.tree.map(lambda x: jnp.array(x, copy=True), selected)


def _num_nan(scores: Params) -> Array:
    return sum((jnp.sum(jnp.isnan(x), dtype=jnp.int32) for x in jax.tree.leaves(scores)), jnp.int32(0))


def _check_update(grads: Params, params: Params | None) -> None:
    if params is None:
        raise ValueError("`params` must be given: write `tx.update(grads, state, params)`, got None.")
    _tree.check_like(grads, params, "grads", "params")
