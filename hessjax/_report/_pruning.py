"""A network pruned at once: to a sparsity, or as far as a rise of the loss allows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessjax._core import _tree
from hessjax._core._types import Params
from hessjax._report import _passes
from hessjax._report._problem import Problem
from hessjax._report._work import make_matvec
from hessjax.estimators._trace import trace_by_leaf
from hessjax.pruning._once import prune_once
from hessjax.pruning.saliencies._first_order import magnitude

PROBES = 50
"""Products for the mean curvature of every leaf."""
TRIALS = 7
"""Halvings of the range of sparsities: its end is known to a hundredth."""
MOST = 0.99

Curvature = dict[str, float]
"""The mean eigenvalue of the block of every leaf, by path."""


class Pruned(NamedTuple):
    """A pruned network.

    Attributes:
        params: exactly zero where the mask is False.
        mask: True = kept; a scalar True for leaves that are not pruned.
        predicted: how much the loss was expected to rise; None where nothing predicts it.
    """

    params: Params
    mask: Params
    predicted: float | None


class Trial(NamedTuple):
    """A sparsity that was tried, the rise of the loss that was expected, and the one that was measured."""

    sparsity: float
    predicted: float
    rise: float


def check_kernels(problem: Problem) -> None:
    """Raise a ValueError for a network in which there is nothing to prune at once."""
    if not _passes.has_kernels(problem.params):
        raise ValueError(
            "`params` must hold a kernel for `--sparsity` and `--to-loss`, got none: a recipe names leaves "
            "by `where`."
        )


def curvature_of(problem: Problem, seed: int, callbacks: list[Any]) -> Curvature:
    """The mean eigenvalue of the block of every leaf, none below zero."""
    found = trace_by_leaf(
        make_matvec(problem), jax.random.key(seed), problem.params, PROBES, callbacks=callbacks
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(problem.params)]
    named = zip(_tree.leaf_paths(problem.params), sizes, strict=True)
    return {path: max(float(found.leaves[path].mean) / size, 0.0) for path, size in named if size}


def at_once(problem: Problem, sparsity: float, curvature: Curvature) -> Pruned:
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
    return Pruned(params, mask, _passes.predicted_rise(problem.params, params, curvature))


def to_loss(
    problem: Problem,
    rise: float,
    dense: float,
    curvature: Curvature,
    earlier: list[Trial],
    keep: Callable[[list[Trial]], None],
) -> tuple[float, list[Trial]]:
    """As many zeros at once as a rise of the loss allows, found by the prediction and checked by the loss.

    Args:
        problem: whose network.
        rise: how much the loss may rise.
        dense: the loss before.
        curvature: h̄, by leaf.
        earlier: the first trials, of a search that was interrupted.
        keep: given all trials after each.

    Returns:
        The most zeros tried that the loss allows, and the trials.

    Raises:
        ValueError: the fewest zeros tried exceed the rise.
    """
    trials: list[Trial] = []
    low, high, level = 0.0, MOST, _by_prediction(problem, rise, curvature)
    for index in range(TRIALS):
        trials.append(earlier[index] if index < len(earlier) else _trial(problem, level, dense, curvature))
        keep(trials)
        if trials[-1].rise <= rise:
            low = level
        else:
            high = level
        level = (low + high) / 2
    if not low:
        least = min(trial.sparsity for trial in trials)
        raise ValueError(
            f"`--to-loss` must allow a larger rise than {rise}: {least:.2%} zeros exceed it already."
        )
    return low, trials


def _trial(problem: Problem, level: float, dense: float, curvature: Curvature) -> Trial:
    found = _tried(problem, level, curvature)
    if found is None or found.predicted is None:
        return Trial(level, float("inf"), float("inf"))
    return Trial(level, found.predicted, _passes.mean_loss(problem, found.params) - dense)


def _tried(problem: Problem, level: float, curvature: Curvature) -> Pruned | None:
    try:
        return at_once(problem, level, curvature)
    except ValueError:  # more zeros than the floors of the leaves allow
        return None


def _by_prediction(problem: Problem, rise: float, curvature: Curvature) -> float:
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


class Numbers(NamedTuple):
    """What a network is worth: the loss over all data, and the metrics."""

    loss: float
    metrics: dict[str, float]


def numbers(problem: Problem, params: Params) -> Numbers:
    """Of a problem's network, with these params."""
    return Numbers(_passes.mean_loss(problem, params), _passes.metrics(problem, params))
