"""L0 pruning: random gates that learn to close."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from hessjax._core import _random, _sharding, _tree
from hessjax._core._messages import checked_count, checked_key, checked_number
from hessjax._core._types import Params, settings
from hessjax.pruning._ranking import cond_now
from hessjax.pruning.saliencies._movement import check_optimizer, check_penalty, named
from hessjax.pruning.saliencies._saliency import Context, Saliency, first_state, stepped

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""The temperature of the concrete distribution, and the interval it is stretched to before clipping."""


_SHIFT = BETA * math.log(-LOW / HIGH)
"""P(z > 0) = σ(log α − this)."""

_ADAM = named(optax.adam(1e-1), "optax.adam(0.1)")


class Gates(NamedTuple):
    """What the L0 saliency remembers.

    Attributes:
        log_alpha: the gates' parameters.
        open: z, the gates in force.
        inner: the state of their optimizer.
        num_updates: how many gradients they have taken.
    """

    log_alpha: Params
    open: Params
    inner: Any
    num_updates: Int[Array, ""]


@settings(arrays=("key",))
class HardConcrete(Saliency):
    """L0 regularisation: every weight times a random gate z in [0, 1], whose law learns to be 0 or 1.

    z = clip(s(ζ − γ) + γ, 0, 1) with s = σ((log u − log(1 − u) + log α)/β) and u uniform, drawn anew at every
    update. The penalty λ · mean P(z > 0), P(z > 0) = σ(log α − β log(−γ/ζ)), pulls the gates shut against the
    gradient G⊙W⊙∂z/∂log α. From update `stop` on the gates rest at z = clip(σ(log α)(ζ − γ) + γ, 0, 1).

    Scores are the resting gates before they are clipped. What ends at 0 is pruned for good by
    `prune(inner, hard_concrete(..., stop=T), threshold(0.0), start=T, stop=T)`; with a number for the
    sparsity the lowest log α go, so many at least: a gate that rests at 0 makes a zero of a weight that the
    mask keeps. Before T the zeros in the params are those of the draw. Gates are for single weights,
    whatever the pattern.

    Args:
        penalty: λ in units of the loss, or a schedule `T -> λ`. The mean runs over all weights that are
            pruned.
        key: of the draws.
        optimizer: of log α.
        stop: the update from which on nothing is random, and log α rests.
        start_open: P(z > 0) at the start, in (0, 1).

    Raises:
        TypeError: `stop` is not an integer, `key` not a random key, or `optimizer` none of optax.
        ValueError: `stop` below 1, `start_open` outside (0, 1), or a `penalty` negative or not finite.

    Cost:
        A random number, a few elementwise operations and the optimizer's step per weight and update. Memory:
        log α, z and the optimizer's state for log α.

    References:
        Louizos et al., Learning sparse neural networks through L0 regularization (2017), arXiv 1712.01312:
        β = 2/3, γ = −0.1, ζ = 1.1.

    Example:
        >>> import jax, jax.numpy as jnp, optax, hessjax as hj
        >>> rule = hj.saliencies.hard_concrete(penalty=1.0, key=jax.random.key(0), stop=100)
        >>> tx = hj.prune(optax.adam(1e-3), rule, hj.allocations.threshold(0.0), start=100, stop=100)
        >>> float(tx.init({"kernel": jnp.ones((2, 2))}).sparsity)
        0.0
    """

    penalty: float | int | Callable[[Any], Any]
    key: Key[Array, ""]
    optimizer: optax.GradientTransformation = _ADAM
    _: dataclasses.KW_ONLY
    stop: int
    start_open: float = 0.9
    needs_grads: ClassVar[bool] = True
    gated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_count("stop", self.stop, 1, ", the update from which on the gates rest")
        checked_key(self.key)
        check_optimizer(self.optimizer)
        check_penalty(self.penalty)
        if not 0 < checked_number("start_open", self.start_open) < 1:
            raise ValueError(
                f"`start_open` must be in (0, 1), the share of open gates, got {self.start_open}."
            )

    def init(self, weights: Params) -> Gates:
        """Gates wide open, whose law is the one asked for."""
        at_start = math.log(self.start_open / (1 - self.start_open)) + _SHIFT
        log_alpha, ones = (
            jax.tree.map(lambda w, x=number: _sharding.born_like(jnp.full_like(w, x), w), _tree.wide(weights))
            for number in (at_start, 1)
        )
        return Gates(log_alpha, ones, first_state(self.optimizer, log_alpha), jnp.zeros((), jnp.int32))

    def update(self, state: Gates, seen: Context) -> Gates:
        """One step of the optimizer of log α, and new gates."""
        count = optax.safe_increment(state.num_updates)
        moved, inner = stepped(self.optimizer, self._slopes(state, seen), state.inner, state.log_alpha)
        # The key is no part of the state: serializers know no typed keys, and `count` tells draws apart.
        # From `stop` on all of it rests: the mask made then belongs to these gates.
        log_alpha, inner = jax.tree.map(
            lambda new, old: jnp.where(count > self.stop, old, new),
            (moved, inner),
            (state.log_alpha, state.inner),
        )
        opened = _gates(log_alpha, self.key, count, count < self.stop)
        return Gates(log_alpha, opened, inner, count)

    def scores(self, state: Gates, seen: Context) -> Params:
        """The resting gates before they are clipped."""
        return jax.tree.map(_stretch, _shares(state.log_alpha))

    def gates(self, state: Gates) -> Params:
        """Z."""
        return state.open

    def _slopes(self, state: Gates, seen: Context) -> Params:
        """G⊙W⊙∂z/∂log α, and the gradient of the penalty λ · mean P(z > 0)."""
        amount = self.penalty(state.num_updates) if callable(self.penalty) else self.penalty
        amount = amount / _tree.size(state.log_alpha)

        def slope(log_alpha: Array, z: Array, g: Array, w: Array) -> Array:
            through = g.astype(z.dtype) * w.astype(z.dtype) * _gate_slope(z)
            chance = jax.nn.sigmoid(log_alpha - _SHIFT)  # P(z > 0), whose slope is that of a sigmoid
            return through + jnp.asarray(amount, z.dtype) * chance * (1 - chance)

        return jax.tree.map(slope, state.log_alpha, state.open, seen.grads, seen.weights)


def _gates(log_alpha: Params, key: Array, count: Array, is_random: Array) -> Params:
    """z: drawn, or at rest."""
    leaves, treedef = jax.tree.flatten(log_alpha)
    keys = jax.random.split(jax.random.fold_in(key, count), len(leaves))

    def leaf(key: Array, x: Array) -> Array:
        # Away from 0 and 1, where the logit is infinite.
        u = 1e-6 + (1 - 2e-6) * _random.uniform(key, _sharding.shape_of(x, x.dtype))
        return _stretched(jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + x) / BETA))

    def drawn() -> Params:
        return jax.tree.unflatten(treedef, [leaf(k, x) for k, x in zip(keys, leaves, strict=True)])

    return cond_now(is_random, drawn, lambda: jax.tree.map(_stretched, _shares(log_alpha)))


def _shares(log_alpha: Params) -> Params:
    return jax.tree.map(jax.nn.sigmoid, log_alpha)


def _stretch(s: Array) -> Array:
    return s * (HIGH - LOW) + LOW


def _stretched(s: Array) -> Array:
    return jnp.clip(_stretch(s), 0, 1)


def _gate_slope(z: Array) -> Array:
    """∂z/∂log α from z itself: s(1 − s)(ζ − γ)/β where it is not clipped, 0 where it is."""
    s = (z - LOW) / (HIGH - LOW)
    return jnp.where((z > 0) & (z < 1), s * (1 - s) * (HIGH - LOW) / BETA, 0)


hard_concrete = HardConcrete
