"""What a weight is worth: the contract between scores and pruning, and two rules made one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessjax._core._types import Params


class Saliency(NamedTuple):
    """A rule that scores weights, as three pure functions; the lowest scores are pruned first.

    The trees it sees have the structure of the params, with `optax.MaskedNode()` (no leaf at all) in place of
    every leaf that is not pruned, so that `jax.tree.map` over them just works. Keyword arguments that the
    training loop hands to `tx.update(grads, state, params, **extra)` arrive here too.

    Attributes:
        init: `(dense) -> state`, a pytree of arrays; `()` for a rule that remembers nothing.
        update: `(state, grads, dense, mask, /, **extra) -> state`, called at every step. `grads` is the
            gradient at the masked weights, itself not masked; `dense` the dense weights and `mask` the mask
            it was taken at.
        scores: `(state, dense, /, **extra) -> scores`, called at mask steps only: floating-point arrays in
            the shapes of `dense`. A NaN ranks below every other score, and `PruneState.num_nan` counts it.
            Among `extra` is the `pattern`: weights that go together are ranked by the mean of their scores.
        compensate: `(state, dense, mask, /, **extra) -> (dense, increase)`, called after the mask is made of
            the scores: the weights moved so that the kept ones make up for those that go, and by how much
            it expects the loss to rise. None: the kept weights stay where they are. A rule with it has to
            see gradients first, so that nothing is pruned at step 0.
        gates: `(state) -> gates`, arrays in the shapes of `dense` by which the weights are multiplied at
            every step: the params are mask ⊙ gates ⊙ dense, and the optimizer sees the gradient times the
            gates. None: the mask alone.
        needs_grads: whether scores mean nothing before the first gradient.
    """

    init: Callable[[Params], Any]
    update: Callable[..., Any]
    scores: Callable[..., Params]
    compensate: Callable[..., tuple[Params, Any]] | None = None
    gates: Callable[[Any], Params] | None = None
    needs_grads: bool = False


def is_hole(x: Any) -> bool:
    """Whether this stands for a leaf that is not pruned."""
    return isinstance(x, optax.MaskedNode)


def drop_others(tree: Params, mask: Params) -> Params:
    """The tree with `optax.MaskedNode()` wherever the mask has one."""
    return jax.tree.map(lambda x, m: m if is_hole(m) else x, tree, mask)


def magnitude() -> Saliency:
    """The absolute value |w| of every weight.

    A pruned weight is scored by its dense copy, which the inner optimizer's momentum still moves (its
    gradient is zero); it comes back when it outgrows a kept one.

    Returns:
        A `Saliency` without state; scores in the units and the dtype of the weights.

    Cost:
        One pass over the weights at a mask step, nothing between.

    References:
        Han et al., Learning both weights and connections for efficient neural networks (2015), arXiv
        1506.02626. Zhu and Gupta, To prune, or not to prune (2017), arXiv 1710.01878: the same along a cubic
        schedule.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> rule = hj.saliencies.magnitude()
        >>> dense = {"kernel": jnp.array([[1.0, -3.0]])}
        >>> rule.scores(rule.init(dense), dense)
        {'kernel': Array([[1., 3.]], dtype=float32)}
    """
    return Saliency(
        init=lambda dense: (),
        update=lambda state, grads, dense, mask, /, **extra: state,
        scores=lambda state, dense, /, **extra: jax.tree.map(jnp.abs, dense),
    )


def compensated(choose: Saliency, by: Saliency) -> Saliency:
    """Scores of one saliency, moves of the kept weights of another.

    Args:
        choose: what ranks the weights: `movement()`, `magnitude()`, ...
        by: what moves the kept ones: `obs(...)`, `wood_taylor(...)`.

    Returns:
        A `Saliency` whose state is the pair of theirs; its predicted increase is that of `by`.

    Raises:
        ValueError: if `by` is a saliency without `compensate`.

    Cost:
        The updates of both; the scores of the first, the move of the second.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
        >>> grads = {"kernel": jnp.array([[[1.0, 1.0]]])}
        >>> rule = hj.saliencies.compensated(hj.saliencies.magnitude(), by=hj.saliencies.obs(damping=1e-4))
        >>> hj.prune_once(params, rule, 0.5, grads_fn=lambda p: grads).params["kernel"].round(2)
        Array([[0., 3.]], dtype=float32)
    """
    if by.compensate is None:
        raise ValueError(
            "`by` must be a saliency that moves the kept weights, such as `obs()`, got one that does not."
        )
    compensate = by.compensate

    def update(state: Any, grads: Params, dense: Params, mask: Params, /, **extra: Any) -> tuple[Any, Any]:
        first, second = state
        return choose.update(first, grads, dense, mask, **extra), by.update(
            second, grads, dense, mask, **extra
        )

    return Saliency(
        init=lambda dense: (choose.init(dense), by.init(dense)),
        update=update,
        scores=lambda state, dense, /, **extra: choose.scores(state[0], dense, **extra),
        compensate=lambda state, dense, mask, /, **extra: compensate(state[1], dense, mask, **extra),
        needs_grads=choose.needs_grads,
        gates=None if choose.gates is None else lambda state: choose.gates(state[0]),  # type: ignore[misc]
    )
