"""What a weight is worth: the contract between scores and pruning, and two rules made one."""

from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hessjax._core import _sharding
from hessjax._core._messages import checked_instance, shown
from hessjax._core._types import Block, Params, settings
from hessjax.pruning.patterns._pattern import Patterns, unstructured


class Context(NamedTuple):
    """What a saliency gets to see.

    All trees have the structure of the params, with `optax.MaskedNode()` (no leaf at all) in place of every
    leaf that is not pruned, so that `jax.tree.map` over them just works.

    Attributes:
        weights: the dense weights: in `update` those that the gradient belongs to, at a mask step those
            after the optimizer's step.
        mask: booleans, True = kept: the mask in force.
        step: T, the updates so far, this one included.
        grads: the gradient at the masked weights, itself not masked; None before the first.
        per_example_grads: gradients of single examples, or of small batches, along a leading axis, where the
            training loop passes them on.
        pattern: which weights go together, to pass on to an allocation; they are ranked by the mean of their
            scores.
    """

    weights: Params
    mask: Params
    step: Int[Array, ""]
    grads: Params | None = None
    per_example_grads: Block | None = None
    pattern: Patterns = unstructured()


class MaskChange:
    """How the next mask follows from scores; by itself a new ranking of all weights at every mask step.

    Attributes:
        grows: whether weights come back by a rule of its own, which takes one mask step after the other.
    """

    grows: ClassVar[bool] = False

    def order(self, scores: Params, seen: Context) -> Params:
        """What is ranked: floating-point arrays in the shapes of the scores, of which the lowest go."""
        return scores

    def settle(self, mask: Params, order: Params, seen: Context) -> Params:
        """The next mask, from the one that the ranking of `order` gives."""
        return mask


@settings()
class Nested(MaskChange):
    """What is pruned stays pruned: every mask lies within the one before."""

    def order(self, scores: Params, seen: Context) -> Params:
        """Pruned weights go first, whatever they score."""
        return jax.tree.map(lambda s, m: jnp.where(m, s, -jnp.inf), scores, seen.mask)

    def settle(self, mask: Params, order: Params, seen: Context) -> Params:
        """Fewer zeros than before bring nothing back."""
        # The order alone would not do: of too many at −inf a ranking marks only as many as it is asked to.
        return jax.tree.map(jnp.logical_and, mask, seen.mask)


class Saliency:
    """A rule that scores weights; the lowest scores are pruned first.

    A rule of your own is a frozen dataclass, whose fields are its settings, that inherits from this class
    and has `scores`; what it must remember it returns from `init` and `update`, a pytree of arrays.

    Attributes:
        needs_grads: whether scores mean nothing before the first gradient.
        compensates: whether it has `compensate`. Such a rule has to see gradients first, so that nothing is
            pruned at step 0.
        gated: whether it has `gates`.
        change: how the next mask follows from the scores: by a new ranking, unless it says otherwise.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, hessjax as hj
        >>> @dataclasses.dataclass(frozen=True)
        ... class Power(hj.saliencies.Saliency):
        ...     exponent: float = 2.0
        ...     def scores(self, state, seen):
        ...         return jax.tree.map(lambda w: jnp.abs(w) ** self.exponent, seen.weights)
        >>> hj.prune_once({"kernel": jnp.array([[1.0, -3.0]])}, Power(), 0.5).params
        {'kernel': Array([[ 0., -3.]], dtype=float32)}
    """

    needs_grads: ClassVar[bool] = False
    compensates: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    change: ClassVar[MaskChange] = MaskChange()

    def init(self, weights: Params) -> Any:
        """The state at the start, a pytree of arrays; `()` for a rule that remembers nothing."""
        return ()

    def update(self, state: Any, seen: Context) -> Any:
        """The state after one more gradient; called at every step."""
        return state

    def scores(self, state: Any, seen: Context) -> Params:
        """Floating-point arrays in the shapes of `seen.weights`; called at mask steps only.

        A NaN ranks below every other score, and `PruneState.num_nan` counts it.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method `scores(state, seen)`.")

    def compensate(self, state: Any, seen: Context, mask: Params) -> tuple[Params, Float[Array, ""]]:
        """The dense weights, moved so that the kept ones make up for those that go, and the increase.

        Args:
            state: after the update of this step.
            seen: as in `scores`; its mask is the one before.
            mask: the new one.

        Returns:
            The weights, and by how much the loss is expected to rise.
        """
        raise NotImplementedError(f"{type(self).__name__} compensates for nothing.")

    def gates(self, state: Any) -> Params:
        """Arrays in the shapes of the weights by which they are multiplied at every step.

        The params are mask ⊙ gates ⊙ dense, and the optimizer sees the gradient times the gates.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gates.")


def is_hole(x: Any) -> bool:
    """Whether this stands for a leaf that is not pruned."""
    return isinstance(x, optax.MaskedNode)


def drop_others(tree: Params, mask: Params) -> Params:
    """The tree with `optax.MaskedNode()` wherever the mask has one."""
    # The mask first: where it has one hole for a whole subtree, as `optax.masked` makes them, that goes too.
    return jax.tree.map(lambda m, x: m if is_hole(m) else x, mask, tree, is_leaf=is_hole)


def checked_saliency(argument: str, rule: Any) -> Saliency:
    """The rule itself.

    Raises:
        TypeError: it is no saliency; most often parentheses are missing.
    """
    return checked_instance(argument, rule, Saliency, "magnitude()")


def checked_ranking(argument: str, rule: Any) -> Saliency:
    """The rule itself.

    Raises:
        TypeError: it is no saliency.
        ValueError: it is more than one, a way from mask to mask in training.
    """
    if checked_saliency(argument, rule).change.grows:
        raise ValueError(
            f"`{argument}` must rank weights, but {shown(rule)} drops and grows them, from one mask step of "
            "`prune` to the next: pass what it ranks by, such as `magnitude()`."
        )
    return rule


@settings(arrays=("choose", "by"))
class Compensated(Saliency):
    """Scores of one saliency, moves of the kept weights of another.

    Args:
        choose: what ranks the weights: `movement()`, `magnitude()`, ...
        by: what moves the kept ones: `obs(...)`, `wood_taylor(...)`.

    Its state is the pair of theirs; its predicted increase is that of `by`.

    Raises:
        TypeError: if `choose` or `by` is no saliency.
        ValueError: if `by` is a saliency that does not compensate, or one that drops and grows weights.

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

    choose: Saliency
    by: Saliency
    compensates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_saliency("choose", self.choose)
        if not checked_ranking("by", self.by).compensates:
            raise ValueError(
                "`by` must be a saliency that moves the kept weights, such as `obs()`, got one that does not."
            )

    @property
    def needs_grads(self) -> bool:  # type: ignore[override]
        """Whether the scores do."""
        return self.choose.needs_grads

    @property
    def gated(self) -> bool:  # type: ignore[override]
        """Whether the rule that chooses is."""
        return self.choose.gated

    @property
    def change(self) -> MaskChange:  # type: ignore[override]
        """That of the rule that chooses."""
        return self.choose.change

    def init(self, weights: Params) -> tuple[Any, Any]:
        """Both states."""
        return self.choose.init(weights), self.by.init(weights)

    def update(self, state: tuple[Any, Any], seen: Context) -> tuple[Any, Any]:
        """Both states after one more gradient."""
        return self.choose.update(state[0], seen), self.by.update(state[1], seen)

    def scores(self, state: tuple[Any, Any], seen: Context) -> Params:
        """Those of the first."""
        return self.choose.scores(state[0], seen)

    def compensate(
        self, state: tuple[Any, Any], seen: Context, mask: Params
    ) -> tuple[Params, Float[Array, ""]]:
        """The move of the second."""
        return self.by.compensate(state[1], seen, mask)

    def gates(self, state: tuple[Any, Any]) -> Params:
        """Those of the first."""
        return self.choose.gates(state[0])


compensated = Compensated


def of_the_largest(tree: Params) -> Params:
    """By the largest number in the tree; NaN stays NaN."""
    top = jnp.max(jnp.stack([jnp.nanmax(x, initial=0) for x in jax.tree.leaves(tree)]))
    return jax.tree.map(lambda x: x / jnp.where(top > 0, top, 1).astype(x.dtype), tree)


def promoting() -> AbstractContextManager[Any]:
    """Around what optax computes: its Adam raises a float to an int32, which strict promotion forbids."""
    return jax.numpy_dtype_promotion("standard")


def first_state(optimizer: optax.GradientTransformation, scores: Params) -> Any:
    """The first state of their optimizer, laid out over devices as they are."""
    return _sharding.born_like_tree(optimizer.init(scores), scores)


def stepped(
    optimizer: optax.GradientTransformation, slopes: Params, state: Any, scores: Params
) -> tuple[Params, Any]:
    """Scores after a step of their optimizer, and its state."""
    with promoting():
        steps, state = optimizer.update(slopes, state, scores)
        return optax.apply_updates(scores, steps), state
