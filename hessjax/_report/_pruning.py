"""A network pruned: at once, as far as a rise of the loss allows, or by a recipe while it trains."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessjax._core import _tree
from hessjax._core._types import Params
from hessjax._report import _passes
from hessjax._report._problem import Problem
from hessjax._report._work import make_matvec
from hessjax.curvature._data import unweighed
from hessjax.estimators._trace import trace_by_leaf
from hessjax.pruning._once import prune_once
from hessjax.pruning.saliencies._first_order import magnitude
from hessjax.pruning.training._masks import mask_of
from hessjax.recipes._recipe import load_recipe

PROBES = 50
"""Products for the mean curvature of every leaf."""
TRIALS = 7
"""Halvings of the range of sparsities: its end is known to a hundredth."""
MOST = 0.99


class Outcome(NamedTuple):
    """A pruned network, and what that did.

    Attributes:
        params: exactly zero where the mask is False.
        mask: True = kept; a scalar True for leaves that are not pruned.
        how: what was done, in words.
        predicted: how much the loss was expected to rise; None where nothing predicts it.
        trials: sparsities that were tried, with the rise that was expected and the one that was measured.
        curvature: the mean eigenvalue of the block of every leaf, by path; empty where none was needed.
    """

    params: Params
    mask: Params
    how: str
    predicted: float | None
    trials: list[dict[str, float]]
    curvature: dict[str, float]


def curvature_of(problem: Problem, seed: int, tell: Callable[[int, int], None]) -> dict[str, float]:
    """The mean eigenvalue of the block of every leaf, none below zero."""
    found = trace_by_leaf(make_matvec(problem), jax.random.key(seed), problem.params, PROBES)
    tell(PROBES, PROBES)
    sizes = [leaf.size for leaf in jax.tree.leaves(problem.params)]
    named = zip(_tree.leaf_paths(problem.params), sizes, strict=True)
    return {path: max(float(found.leaves[path].mean) / size, 0.0) for path, size in named if size}


def at_once(problem: Problem, sparsity: float, curvature: dict[str, float]) -> Outcome:
    """The weights of least ½ h̄ w² at zero, h̄ the mean curvature of their leaf.

    Args:
        problem: whose network.
        sparsity: the fraction of zeros among the kernels' weights.
        curvature: h̄, by leaf.
    """
    floor = 1e-6 * max(curvature.values(), default=0.0) or 1.0
    leaves = [
        leaf * (0.5 * max(curvature.get(path, 0.0), floor)) ** 0.5
        for path, leaf in zip(_tree.leaf_paths(problem.params), jax.tree.leaves(problem.params), strict=True)
    ]
    scaled = jax.tree.unflatten(jax.tree.structure(problem.params), leaves)
    mask = prune_once(scaled, magnitude(), sparsity).mask
    params = jax.tree.map(lambda w, kept: jnp.where(kept, w, jnp.zeros_like(w)), problem.params, mask)
    predicted = _passes.predicted_rise(problem.params, params, curvature)
    how = f"{sparsity:.1%} of the kernels' weights at once, those of least curvature times square"
    return Outcome(params, mask, how, predicted, [], curvature)


def to_loss(problem: Problem, rise: float, curvature: dict[str, float]) -> Outcome:
    """As many zeros at once as a rise of the loss allows, found by the prediction and checked by the loss.

    Raises:
        ValueError: `rise` is not above zero, or the fewest zeros tried exceed it.
    """
    if not rise > 0:
        raise ValueError(f"`--to-loss` must be above 0, a rise of the loss, got {rise}.")
    dense = _passes.mean_loss(problem, problem.params)
    trials: list[dict[str, float]] = []
    best: Outcome | None = None
    low, high, level = 0.0, MOST, _by_prediction(problem, rise, curvature)
    for _ in range(TRIALS):
        tried = _tried(problem, level, curvature)
        measured = float("inf") if tried is None else _passes.mean_loss(problem, tried.params) - dense
        predicted = float("inf") if tried is None or tried.predicted is None else tried.predicted
        trials.append({"sparsity": level, "predicted": predicted, "rise": measured})
        if measured <= rise:
            best, low = tried, level
        else:
            high = level
        level = (low + high) / 2
    if best is None:
        least = min(trial["sparsity"] for trial in trials)
        raise ValueError(
            f"`--to-loss` must allow a larger rise than {rise}: {least:.2%} zeros exceed it already."
        )
    how = (
        f"{low:.1%} of the kernels' weights at once: the most tried that raises the loss by at most {rise:g}"
    )
    return best._replace(how=how, trials=trials)


def _tried(problem: Problem, level: float, curvature: dict[str, float]) -> Outcome | None:
    try:
        return at_once(problem, level, curvature)
    except ValueError:  # more zeros than the floors of the leaves allow
        return None


def _by_prediction(problem: Problem, rise: float, curvature: dict[str, float]) -> float:
    """The most zeros of which the prediction allows them: no loss is evaluated."""
    low, high = 0.0, MOST
    for _ in range(TRIALS):
        level = (low + high) / 2
        tried = _tried(problem, level, curvature)
        if tried is not None and tried.predicted is not None and tried.predicted <= rise:
            low = level
        else:
            high = level
    return low or high / 2


# -- recipes ---------------------------------------------------------------------------------------


class _Step:
    """The plain training step: the gradient of the loss, compiled once."""

    def __init__(self, problem: Problem) -> None:
        self._loss_fn = problem.loss_fn
        self._compiled = jax.jit(self._step, static_argnums=0)

    def __call__(self, tx: Any, params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        return self._compiled(tx, params, state, batch)

    def _step(self, tx: Any, params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        updates, state = tx.update(jax.grad(self._loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state


def by_recipe(
    problem: Problem, recipe: Path, num_steps: int | None, tell: Callable[[int, int], None]
) -> Outcome:
    """Train while a recipe prunes, with the problem's own step or a plain one.

    Args:
        problem: whose network, optimizer and step.
        recipe: the YAML file.
        num_steps: updates; None: to the end of the last policy, and one pass more.
        tell: told after each update how many were made, and how many there will be.
    """
    epoch = sum(1 for _ in unweighed(problem.batches))
    found = load_recipe(recipe, steps_per_epoch=epoch)
    last = max(int(rule.options["stop"]) for rule in found.rules)
    number = last + epoch if num_steps is None else num_steps
    if number < last:
        raise ValueError(
            f"`--steps` must be at least {last}, the end of the recipe's last policy, got {number}."
        )
    tx = found.prune(problem.optimizer or optax.adam(1e-4))
    step = problem.step or _Step(problem)
    params, state = problem.params, tx.init(problem.params)
    for count, batch in zip(range(number), _endless(problem), strict=False):
        params, state = step(tx, params, state, batch)
        tell(count + 1, number)
    how = f"{number} steps of training under the recipe {recipe.name}"
    return Outcome(params, mask_of(state), how, None, [], {})


def _endless(problem: Problem) -> Iterator[Any]:
    while True:
        yield from unweighed(problem.batches)


@dataclasses.dataclass(frozen=True)
class Before:
    """The dense network's numbers, beside which those of the pruned one stand."""

    loss: float
    metrics: dict[str, float]


def numbers(problem: Problem, params: Params) -> Before:
    """The loss over all data, and the metrics."""
    return Before(_passes.mean_loss(problem, params), _passes.metrics(problem, params))
