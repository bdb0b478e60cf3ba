"""Saliencies from the weights, from the mean gradient, from random numbers, and from the user."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from hessjax._core import _random, _sharding, _tree
from hessjax._core._messages import checked_key, checked_number
from hessjax._core._types import Params, settings
from hessjax.pruning.saliencies._saliency import Context, MaskChange, Saliency


@settings()
class Magnitude(Saliency):
    """The absolute value |w| of every weight.

    A pruned weight is scored by its dense copy, which the inner optimizer's momentum still moves (its
    gradient is zero); it comes back when it outgrows a kept one. No state; scores in the units and the dtype
    of the weights.

    Cost:
        One pass over the weights at a mask step, nothing between.

    References:
        Han et al., Learning both weights and connections for efficient neural networks (2015), arXiv
        1506.02626. Zhu and Gupta, To prune, or not to prune (2017), arXiv 1710.01878: the same along a cubic
        schedule.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, -3.0]])}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 0.5).params
        {'kernel': Array([[ 0., -3.]], dtype=float32)}
    """

    def scores(self, state: Any, seen: Context) -> Params:
        """|w|."""
        return jax.tree.map(jnp.abs, seen.weights)


class MeanGradient(NamedTuple):
    """What `gradient` remembers.

    Attributes:
        mean: a running mean of the gradient, in float32 at least.
        num_updates: of how many.
    """

    mean: Params
    num_updates: Int[Array, ""]


@settings()
class Gradient(Saliency):
    """First-order Taylor: |w · ḡ|, the first-order change of the loss when the weight goes.

    It needs gradients: until the first one all scores are 0. Scores in units of the loss.

    Args:
        decay: of the running mean ḡ, in [0, 1): 0 for the last gradient alone.

    Raises:
        ValueError: if `decay` lies outside [0, 1).

    Cost:
        Two operations and one number per weight and update.

    References:
        Molchanov et al., Pruning convolutional neural networks for resource efficient inference (2016), arXiv
        1611.06440.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params, grads = {"kernel": jnp.array([[3.0, 2.0]])}, {"kernel": jnp.array([[[1.0, 2.0]]])}
        >>> hj.prune_once(params, hj.saliencies.gradient(), 0.5, grads_fn=lambda p: grads).params["kernel"]
        Array([[0., 2.]], dtype=float32)
    """

    decay: float | int = 0.9
    needs_grads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= checked_number("decay", self.decay) < 1:
            raise ValueError(f"`decay` must be in [0, 1), of the running mean, got {self.decay}.")

    def init(self, weights: Params) -> MeanGradient:
        """A mean of nothing."""
        wide = _tree.wide(weights)
        zeros = jax.tree.map(lambda x: _sharding.born_like(jnp.zeros_like(x), x), wide)
        return MeanGradient(zeros, jnp.zeros((), jnp.int32))

    def update(self, state: MeanGradient, seen: Context) -> MeanGradient:
        """The mean with one more gradient in it."""
        count = optax.safe_increment(state.num_updates)
        # Adam's correction, written as the share of the newest: a mean from the first gradient on.
        share = (1 - self.decay) / (1 - self.decay ** count.astype(jnp.float32))
        mean = jax.tree.map(
            lambda m, g: m + share.astype(m.dtype) * (g.astype(m.dtype) - m), state.mean, seen.grads
        )
        return MeanGradient(mean, count)

    def scores(self, state: MeanGradient, seen: Context) -> Params:
        """|w · ḡ|."""
        return jax.tree.map(lambda m, w: jnp.abs(m * w.astype(m.dtype)), state.mean, seen.weights)


@settings(arrays=("key",))
class Random(Saliency):
    """A random number for every weight, the same at every mask step: what any other saliency has to beat.

    No state; scores uniform in [0, 1). Masks of a growing sparsity are nested.

    Args:
        key: of the numbers.

    Raises:
        TypeError: if `key` is not a random key.

    Cost:
        A random number per weight at a mask step, nothing between.

    Example:
        >>> import jax, jax.numpy as jnp, hessjax as hj
        >>> pruned = hj.prune_once({"kernel": jnp.ones((2, 2))}, hj.saliencies.random(jax.random.key(0)), 0.5)
        >>> int(pruned.params["kernel"].sum())
        2
    """

    key: Key[Array, ""]

    def __post_init__(self) -> None:
        checked_key(self.key)

    def scores(self, state: Any, seen: Context) -> Params:
        """The numbers."""
        leaves, treedef = jax.tree.flatten(seen.weights)
        keys = jax.random.split(self.key, len(leaves))
        shapes = [_sharding.shape_of(x, jnp.float32) for x in leaves]
        return jax.tree.unflatten(treedef, list(map(_random.uniform, keys, shapes)))


@settings()
class Ticket(MaskChange):
    """Of leaves that a mask is given for, what it prunes stays pruned at every sparsity.

    Attributes:
        leaves: their paths.
    """

    leaves: tuple[str, ...]

    def settle(self, mask: Params, order: Params, seen: Context) -> Params:
        """Nothing back that the mask prunes."""
        return jax.tree_util.tree_map_with_path(
            lambda path, m, x: m & (x > 0) if _tree.path_name(path) in self.leaves else m, mask, order
        )


@settings(arrays=("given",))
class Static(Saliency):
    """Scores given by the user, as `static` takes them."""

    given: Any

    @property
    def change(self) -> MaskChange:  # type: ignore[override]
        """A new ranking of the same scores, and nothing back that a mask prunes."""
        leaves = zip(_tree.leaf_paths(self.given), jax.tree.leaves(self.given), strict=True)
        return Ticket(tuple(path for path, x in leaves if _is_mask(x)))

    def init(self, weights: Params) -> Params:
        """The scores of the leaves that are pruned."""
        given = dict(zip(_tree.unique_paths(self.given, "scores"), jax.tree.leaves(self.given), strict=True))
        wanted = dict(zip(_tree.leaf_paths(weights), jax.tree.leaves(weights), strict=True))
        found = {path: given[path] for path in wanted if path in given}
        _tree.check_like(found, wanted, "scores", "params[where]")
        _tree.check_floating(_tree.wide(found), "scores")
        # Copies, as the loop may donate the state.
        copies = [_sharding.born_like(jnp.array(found[path], copy=True), x) for path, x in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(weights), copies)

    def scores(self, state: Params, seen: Context) -> Params:
        """Those given."""
        return _tree.wide(state)


def _is_mask(leaf: Any) -> bool:
    # What is not pruned may be anything: a name, a key.
    return _tree.is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.bool_)


magnitude, gradient, random = Magnitude, Gradient, Random


def static(scores: Any) -> Static:
    """Scores given by the user: the highest stay, whatever the training does.

    Args:
        scores: a pytree of numbers or bools with a leaf of the same path and shape for every pruned leaf;
            others are ignored, so that a tree of all params will do, or the `mask_of` another training (a
            lottery ticket, arXiv 1803.03635). Of a mask (bools) every False goes, also where that is more
            than the sparsity asks for.

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
    return Static(scores)
