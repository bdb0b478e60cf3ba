"""Movement pruning: weights that move away from zero stay; scores with an optimizer of their own."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hessjax._core import _sharding, _tree
from hessjax._core._messages import checked_function, checked_schedule, shown
from hessjax._core._types import Params, settings
from hessjax.pruning.saliencies._saliency import (
    Context,
    Saliency,
    first_state,
    of_the_largest,
    promoting,
    stepped,
)


def named(optimizer: optax.GradientTransformation, text: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer, printed as this text: a default that `help` and a rule can show."""
    made = {"__repr__": lambda _: text, "__slots__": ()}
    return type("NamedOptimizer", (optax.GradientTransformationExtraArgs,), made)(*optimizer)


# One object each, so that rules with the default are equal.
_ADAM = named(optax.adam(1e-2), "optax.adam(0.01)")
_LAYER_WISE = named(
    optax.chain(optax.scale_by_trust_ratio(), optax.scale_by_learning_rate(5e-3)),
    "steps of 0.005 times a leaf's norm",
)


def check_optimizer(optimizer: Any, argument: str = "optimizer") -> None:
    """Raise a TypeError for what is no optimizer, such as a learning rate."""
    if not isinstance(optimizer, optax.GradientTransformation):
        hint = ": call it, with a learning rate" if callable(optimizer) else ""
        raise TypeError(
            f"`{argument}` must be one of optax, such as `optax.adam(1e-2)`, got {shown(optimizer)}{hint}."
        )


def check_penalty(penalty: Any) -> None:
    """Raise a ValueError for a penalty that is no schedule, and no number from 0 up."""
    checked_schedule("penalty", penalty)
    if not callable(penalty) and not 0 <= penalty < math.inf:
        raise ValueError(f"`penalty` must be a finite number, at least 0, or a schedule, got {penalty!r}.")


class Scores(NamedTuple):
    """What a movement saliency remembers.

    Attributes:
        scores: S, in float32 at least.
        inner: the state of their optimizer.
        num_updates: how many gradients they have taken.
    """

    scores: Params
    inner: Any
    num_updates: Int[Array, ""]


def from_magnitudes(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """First scores of `movement`: |w| in units of the leaf's standard deviation.

    Args:
        weights: of one leaf.

    Returns:
        |w| / std(w), in the shape of the weights; |w| where all are equal.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> hj.saliencies.from_magnitudes(jnp.array([-1.0, 3.0]))
        Array([0.5, 1.5], dtype=float32)
    """
    if not _tree.is_array(weights) or not jnp.issubdtype(jnp.result_type(weights), jnp.floating):
        raise TypeError(f"`weights` must be one floating-point array, those of a leaf, got {shown(weights)}.")
    spread = jnp.std(weights)
    return jnp.abs(weights) / jnp.where(spread > 0, spread, jnp.ones_like(spread))


@settings()
class Movement(Saliency):
    """Movement: scores S trained by the straight-through gradient of the loss with respect to the mask.

    With G the gradient at the masked weights and W the dense ones, ∂L/∂S = G⊙W at every place, pruned ones
    included, so that S grows where a weight moves away from zero, and a pruned weight can come back. The
    highest scores stay.

    Scores begin at the magnitudes, in units of each leaf's standard deviation, and a step moves those of a
    leaf in proportion to their slopes, by half a percent of their norm: S ← S − 0.005 ‖S‖ x/‖x‖ with x = G⊙W.
    The paper's begin at zero and take Adam's steps, which are equal for all weights:
    `movement(optax.adam(schedule), start=jnp.zeros_like)`. While most of the weights go, such scores first
    follow what all weights have in common, and a network that had learned its task may forget it: in 250
    steps of a pretrained encoder 4 of 6 did, and none whose scores began at the magnitudes (the notebook on
    movement). Where the length of a training is known, let the rate fall to 0 with it, as in the second
    example, so that the last masks settle: the default is constant, as it knows no length.

    Before the first gradient the ranking is that of the magnitudes.

    After the first gradient Adam's scores from zero are all of one size, that of its learning rate, and
    rounding would rank them: a mask made then takes them in proportion to their slopes.

    `sparsity` should start at 0, as scores have to be learned. The paper ranks every matrix on its own,
    `allocation=uniform()`, at every step, `every=1`: with `every=10` the gradient answers to a mask that is
    out of date, and the scores may run away.

    Args:
        optimizer: of the scores, with its own schedule; without weight decay. By default
            `optax.chain(optax.scale_by_trust_ratio(), optax.scale_by_learning_rate(0.005))`. Its steps must
            be of the size that scores have: those from magnitudes are about 1, and a slope is far smaller,
            so that plain gradient descent would leave them where they are.
        start: the first scores of a leaf, from its weights: `from_magnitudes`, or `jnp.zeros_like`.

    Raises:
        TypeError: if `optimizer` is none of optax, or `start` no function.

    Cost:
        A multiplication and the optimizer's step per weight and update. Memory: the scores, and the
        optimizer's state for them.

    References:
        Sanh et al., Movement pruning: Adaptive sparsity by fine-tuning (2020), arXiv 2005.07683.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, -2.0, 3.0]])}
        >>> from_zero = hj.saliencies.movement(optax.sgd(1.0), start=jnp.zeros_like)  # −Σ lr·G⊙W
        >>> tx = hj.prune(optax.sgd(0.1), from_zero, 1 / 3, every=1, start=1)
        >>> grads = {"kernel": jnp.array([[-1.0, 0.0, 1.0]])}  # the first grows, the last shrinks
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[ 1.1, -2. ,  0. ]], dtype=float32)

        Steps as by default, that end where the training does:

        >>> rate = optax.scale_by_learning_rate(optax.linear_schedule(1e-2, 0.0, 1000))
        >>> rule = hj.saliencies.movement(optax.chain(optax.scale_by_trust_ratio(), rate))
    """

    optimizer: optax.GradientTransformation = _LAYER_WISE
    start: Callable[[Array], Array] = from_magnitudes

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        checked_function("start", self.start, "(weights) -> scores")

    @property
    def needs_grads(self) -> bool:  # type: ignore[override]
        """Whether all scores are zero at the start."""
        return self.start is jnp.zeros_like

    def _first(self, weights: Array) -> Array:
        scores = self.start(weights)
        _tree.check_like(scores, weights, "start(weights)", "weights")
        return _sharding.born_like(jnp.array(scores, copy=True), weights)

    def init(self, weights: Params) -> Scores:
        """The first scores."""
        # A copy, as `start` may give back w itself, and the loop may donate params and state together.
        scores = jax.tree.map(self._first, _tree.wide(weights))
        return Scores(scores, first_state(self.optimizer, scores), jnp.zeros((), jnp.int32))

    def update(self, state: Scores, seen: Context) -> Scores:
        """One step of the optimizer along G⊙W."""
        return _stepped(self.optimizer, state, _slopes(state, seen))

    def scores(self, state: Scores, seen: Context) -> Params:
        """S."""
        if not self.needs_grads or seen.grads is None:
            return state.scores
        return _told_apart(self.optimizer, state, lambda: _slopes(state, seen))


@settings()
class SoftMovement(Saliency):
    """Soft movement: as `movement`, with scores σ(S) held down by a penalty λ · mean σ(S).

    Together with `sparsity=threshold(τ)` whatever has σ(S) ≤ τ goes, and the penalty decides how much that
    is, in every leaf differently. With a number for `sparsity` the count is exact as ever.

    Scores σ(S) in (0, 1), 0.5 at the start. The gradient passes to S straight through the threshold and σ,
    as in the paper.

    Args:
        penalty: λ in units of the loss, or a schedule `T -> λ`. The mean runs over all weights that are
            pruned.
        optimizer: of S, which begins at 0.

    Raises:
        TypeError: if `optimizer` is none of optax.
        ValueError: if `penalty` is negative or not finite.

    Cost:
        As `movement`.

    References:
        Sanh et al., Movement pruning: Adaptive sparsity by fine-tuning (2020), arXiv 2005.07683: τ from 0 to
        0.1 while λ rises to 400.

    Example:
        >>> import jax.numpy as jnp, optax, hessjax as hj
        >>> rule = hj.saliencies.soft_movement(penalty=1.0)
        >>> tx = hj.prune(optax.adam(1e-3), rule, hj.allocations.threshold(0.1), every=1, start=1)
        >>> tx.init({"kernel": jnp.ones((1, 2))}).saliency.scores
        {'kernel': Array([[0., 0.]], dtype=float32)}
    """

    penalty: float | int | Callable[[Any], Any]
    optimizer: optax.GradientTransformation = _ADAM
    needs_grads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        check_penalty(self.penalty)

    def init(self, weights: Params) -> Scores:
        """Scores of 0."""
        return Movement(self.optimizer, jnp.zeros_like).init(weights)

    def update(self, state: Scores, seen: Context) -> Scores:
        """One step of the optimizer along G⊙W and the gradient of the penalty."""
        return _stepped(self.optimizer, state, self._slopes(state, seen))

    def scores(self, state: Scores, seen: Context) -> Params:
        """σ(S)."""
        scores = state.scores
        if seen.grads is not None:
            first = Scores(jax.tree.map(lambda s: s * 0, scores), None, jnp.zeros((), jnp.int32))
            scores = _told_apart(self.optimizer, state, lambda: self._slopes(first, seen))
        return jax.tree.map(jax.nn.sigmoid, scores)

    def _slopes(self, state: Scores, seen: Context) -> Params:
        """G⊙W, and d/dS of λ · mean σ(S)."""
        amount = self.penalty(state.num_updates) if callable(self.penalty) else self.penalty
        amount = amount / _tree.size(state.scores)
        # σ(−S) instead of 1 − σ(S), which is 0 in float32 from S = 17 on.
        pull = jax.tree.map(
            lambda s: jnp.asarray(amount, s.dtype) * jax.nn.sigmoid(s) * jax.nn.sigmoid(-s), state.scores
        )
        return jax.tree.map(jnp.add, _slopes(state, seen), pull)


def _slopes(state: Scores, seen: Context) -> Params:
    """∂L/∂S = G⊙W, straight through the mask (eq. 6), at pruned places too: they can come back."""
    return jax.tree.map(
        lambda s, g, w: g.astype(s.dtype) * w.astype(s.dtype), state.scores, seen.grads, seen.weights
    )


def _told_apart(
    optimizer: optax.GradientTransformation, state: Scores, slopes: Callable[[], Params]
) -> Params:
    """S; after a first step of one size for all, S in proportion to the slopes.

    Adam's first step is lr · sign(slope) up to rounding, which would decide the ranking: differently under
    `vmap`, or on several devices. In the order of the slopes it is that of plain gradient descent.
    """
    is_first = state.num_updates == 1
    if not isinstance(is_first, jax.core.Tracer) and not is_first:
        return state.scores
    if not _first_steps_are_alike(optimizer, state.scores):
        return state.scores
    sizes = of_the_largest(jax.tree.map(jnp.abs, slopes()))
    return jax.tree.map(lambda s, size: jnp.where(is_first, s * size, s), state.scores, sizes)


def _first_steps_are_alike(optimizer: optax.GradientTransformation, like: Params) -> bool:
    """Whether the first step is as long for a slope of 1 as for one of 2, as Adam's is: tried on both."""
    with jax.ensure_compile_time_eval(), promoting():
        # A tree like the scores, as some optimizers tell leaves apart.
        slopes = jax.tree.map(lambda s: jnp.ones((*(1 for _ in s.shape[1:]), 2)).at[..., 1].set(2), like)
        zeros = jax.tree.map(jnp.zeros_like, slopes)
        steps = jax.tree.leaves(optimizer.update(slopes, optimizer.init(zeros), zeros)[0])
        short, long = (jnp.abs(jnp.stack([step.ravel()[i] for step in steps])) for i in (0, 1))
        return bool(jnp.any((long > 0) & (long < 1.001 * short)))


def _stepped(optimizer: optax.GradientTransformation, state: Scores, slopes: Params) -> Scores:
    """The scores after a step of their optimizer."""
    scores, inner = stepped(optimizer, slopes, state.inner, state.scores)
    return Scores(scores, inner, optax.safe_increment(state.num_updates))


movement, soft_movement = Movement, SoftMovement
