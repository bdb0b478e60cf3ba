"""Wanda: weights times the size of what they are multiplied with; and what saliencies by moments share."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._messages import checked_choice, checked_instance
from hessjax._core._types import Params, settings
from hessjax.layers._moments import LayerMoments
from hessjax.layers._outputs import Inputs, by_path, check_belong, inputs_of
from hessjax.pruning.saliencies._saliency import Context, Saliency

Within: TypeAlias = Literal["output", "network"]
"""What weights are compared with: those of the same output, or all there are."""


def check_moments(moments: Any) -> None:
    checked_instance("moments", moments, LayerMoments, "hessjax.layers.moments(model_fn, params, batches)")


def check_counted(moments: LayerMoments) -> None:
    """Raise a ValueError if no output of any leaf counts: all weights would cost the same, nothing."""
    sides = [use.right for uses in moments.leaves for use in uses]
    if any(isinstance(x, jax.core.Tracer) for x in sides):
        return
    if sides and not any(bool(jnp.any(x != 0)) for x in sides):
        raise ValueError(
            "`moments` must have gradients that are not all zero, got none in any leaf, as of a likelihood "
            "with a single class, or a loss of 0: no weight would cost more than another. "
            "`hessjax.saliencies.wanda(moments)` needs inputs alone."
        )


def inputs_now(moments: LayerMoments, weights: Params) -> list[Inputs]:
    """Of every leaf that is pruned, the weights as they are now in the place of the dense ones."""
    leaves = by_path(weights)
    check_belong(leaves, moments, "params[where]")
    found = [(inputs_of(moments, path), leaf) for path, leaf in leaves.items()]
    return [inputs._replace(dense=inputs.moves.apply(_tree.wide(leaf))) for inputs, leaf in found]


def there_of(seen: Context) -> Params:
    return jax.tree.map(lambda w, m: jnp.where(m, w, 0), seen.weights, seen.mask)


def tree_of(seen: Context, leaves: list[Any]) -> Params:
    return jax.tree.unflatten(jax.tree.structure(seen.weights), leaves)


@settings(arrays=("moments",))
class Wanda(Saliency):
    """|w| · ‖x‖, the weight times the root mean square of what it is multiplied with.

    Published is the comparison within an output: of every column the same share goes. So the score of a
    weight is the share of its column that lies below it, whatever the allocation then compares: under
    `uniform` all columns of a leaf are equally sparse, under `explicit` and its like as sparse as the leaf,
    under n:m the lowest of each group go. Nothing moves; `compensated(wanda(moments), by=obc(moments))` has
    the kept weights make up for the others.

    Args:
        moments: `hessjax.layers.moments(fn, params, batches)`, with positions `"expand"`.
        within: `"output"`, as published; `"network"`: the score is w²·E[x²]·E[g²]/2, with g what comes back
            to the output: the diagonal of K-FAC's quadratic, in units of the loss, for `global_threshold` and
            for the mean over groups that go as a whole.

    Raises:
        TypeError: if `moments` are none.
        ValueError: for another `within`; when scored, for leaves that there are no moments of, or of another
            shape (all are named).

    Cost:
        A sort of every column, or a pass over the weights.

    References:
        Sun et al., A simple and effective pruning approach for large language models (2023), arXiv
        2306.11695.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.array([[1.0, 4.0], [2.0, 1.0]]), jnp.array([[3.0, 1.0]])
        >>> moments = hj.layers.moments(model_fn, w, [x], likelihood=hj.likelihoods.gaussian)
        >>> hj.prune_once(w, hj.saliencies.wanda(moments), 0.5, where="*").params  # 3·1 against 1·2
        Array([[1., 4.],
               [0., 0.]], dtype=float32)
    """

    moments: LayerMoments
    within: Within = "output"

    def __post_init__(self) -> None:
        check_moments(self.moments)
        checked_choice("within", self.within, ("output", "network"))
        if self.within == "network":
            check_counted(self.moments)

    def __repr__(self) -> str:
        return f"wanda({self.moments.problem.paths}, {self.within!r})"

    def scores(self, state: Any, seen: Context) -> Params:
        """Shares of the column, or costs."""
        found = inputs_now(self.moments, there_of(seen))
        score = _shares if self.within == "output" else diagonal_costs
        return tree_of(seen, [inputs.moves.undo(score(inputs)) for inputs in found])


def _shares(inputs: Inputs) -> Float[Array, "s i o"]:
    sizes = jnp.abs(inputs.dense) * jnp.sqrt(inputs.squares)[..., None]
    order = jnp.argsort(jnp.argsort(sizes, axis=1), axis=1)
    return order.astype(sizes.dtype) / sizes.shape[1]


def diagonal_costs(inputs: Inputs) -> Float[Array, "s i o"]:
    return inputs.dense**2 * inputs.squares[..., None] * inputs.importance[:, None] / 2


wanda = Wanda
