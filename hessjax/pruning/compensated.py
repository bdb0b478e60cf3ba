"""One rule to choose what goes, another to make up for it."""

from typing import Any

from hessjax._typing import Params
from hessjax.pruning.saliency import Saliency


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
        >>> rule = hj.compensated(hj.magnitude(), by=hj.obs(damping=1e-4))
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
