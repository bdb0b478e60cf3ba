"""Passes over the data: the loss and its gradient with their scatter, and the loss of pruned networks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _tree
from hessjax._core._layout import kernels, selected
from hessjax._core._types import LossFn, Params, Scalar, Vector
from hessjax._report._plan import LEVELS
from hessjax._report._problem import Problem
from hessjax.analysis import _metrics
from hessjax.analysis._comparisons import loss_and_gradient as of_batch
from hessjax.analysis._sensitivity import sensitivity
from hessjax.curvature._batches import add, divide, zero
from hessjax.curvature._data import weighed
from hessjax.curvature._product import as_pytree, at_precision, scalar
from hessjax.estimators._samples import sampling_error
from hessjax.pruning._once import prune_once
from hessjax.pruning.saliencies._first_order import magnitude


class Gradient(NamedTuple):
    """The loss and its gradient over a data set.

    Attributes:
        loss: the mean loss.
        stderr: its standard error from the scatter between batches; infinite with a single one.
        norm: of the gradient.
        noise: the standard error of the gradient, as a norm: what the norm would be, about, at a point
            where the true gradient is zero; infinite with a single batch.
        leaves: norm of the gradient by leaf.
        batches: how many there are.
        examples: what they weigh in all.
    """

    loss: float
    stderr: float
    norm: float
    noise: float
    leaves: dict[str, float]
    batches: int
    examples: float


def loss_and_gradient(problem: Problem) -> Gradient:
    """One pass of gradients."""
    params, count = problem.params, 0.0
    total, twice = zero(params), zero(params)
    losses, weights, squares = [], [], []
    for weight, batch in weighed(problem.batches, problem.weights):
        value, grads = of_batch(as_pytree(problem.loss_fn), params, (batch,))
        losses.append(float(value))
        weights.append(weight)
        squares.append(float(_tree.inner(*[_tree.wide(grads)] * 2)))
        total, twice, count = add(total, weight, grads), add(twice, weight**2, grads), count + weight
    mean = divide(total, count, _tree.wide(params))
    values, shares = np.array(losses), np.array(weights)
    norms = [float(_tree.norm(leaf)) for leaf in jax.tree.leaves(mean)]
    return Gradient(
        loss=float((values * shares).sum() / count),
        stderr=float(sampling_error(values, shares)),
        norm=float(np.linalg.norm(norms)),
        noise=_noise(mean, twice, shares, np.array(squares)),
        leaves=dict(zip(_tree.leaf_paths(params), norms, strict=True)),
        batches=len(losses),
        examples=count,
    )


def _noise(mean: Vector, twice: Vector, weights: np.ndarray, squares: np.ndarray) -> float:
    """√(Σ w² ‖g_b − ḡ‖² · B/(B − 1)) / Σ w, expanded so that no gradient has to be kept."""
    number = len(weights)
    if number < 2:
        return float("inf")
    length = float(_tree.inner(mean, mean))
    inner = float(_tree.inner(twice, mean))
    spread = (weights**2 * squares).sum() - 2 * inner + (weights**2).sum() * length
    return float(np.sqrt(max(spread, 0.0) * number / (number - 1)) / weights.sum())


def mean_loss(problem: Problem, params: Params) -> float:
    """The loss over all batches."""
    total = count = 0.0
    for weight, batch in weighed(problem.batches, problem.weights):
        total, count = total + weight * float(_loss(problem.loss_fn, params, batch)), count + weight
    return total / count


def _loss(loss_fn: LossFn, params: Params, batch: Any) -> Scalar:
    return _compiled(as_pytree(loss_fn), params, batch)


@jax.jit
def _compiled(loss_fn: LossFn, params: Params, batch: Any) -> Scalar:
    with at_precision("highest"):
        return scalar(loss_fn, (batch,))(params)


def metrics(problem: Problem, params: Params) -> dict[str, float]:
    """The problem's metric, by name."""
    return {} if problem.metric is None else _metrics.named(problem.metric(params))


def pruned_at_once(
    problem: Problem, dense: float, curvature: dict[str, float], tell: Callable[[int], None]
) -> dict[str, Any]:
    """The loss without the least weights by magnitude, measured, and as the mean curvature predicts it.

    Args:
        problem: whose network.
        dense: its loss.
        curvature: by leaf, the mean eigenvalue of its block.
        tell: told after each level how many are done.

    Returns:
        By level the sparsity, the loss, its rise, the rise predicted by ½ Σ_l h̄_l Σ w² over what is pruned,
        and the metrics; by leaf and level the predicted rise, that leaf alone being pruned.
    """
    if not has_kernels(problem.params):
        return {"levels": [], "leaves": [], "why_not": "no leaf is a kernel"}
    rows: list[dict[str, Any]] = []
    for index, level in enumerate(LEVELS):
        try:
            params = prune_once(problem.params, magnitude(), level).params
        except ValueError as error:  # so few weights that every leaf cannot keep one
            return {"levels": rows, "leaves": [], "why_not": f"{level:.0%} cannot be reached: {error}"}
        rise = mean_loss(problem, params) - dense
        predicted = predicted_rise(problem.params, params, curvature)
        rows.append({"sparsity": level, "loss": dense + rise, "rise": rise, "predicted": predicted,
                     "metrics": metrics(problem, params)})  # fmt: skip
        tell(index + 1)
    alone = sensitivity(None, problem.params, LEVELS, diagonal=_diagonal(problem.params, curvature))
    leaves = [
        {"path": row.parameter, "sparsity": row.sparsity, "predicted": row.predicted} for row in alone.rows
    ]
    return {"levels": rows, "leaves": leaves}


def has_kernels(params: Params) -> bool:
    """Whether there is anything to prune where nobody says what."""
    try:
        return any(jax.tree.leaves(selected(params, kernels)))
    except ValueError:
        return False


def _diagonal(params: Params, curvature: dict[str, float]) -> Params:
    """The mean eigenvalue of its block for every weight of a leaf."""
    leaves = [
        jnp.full_like(leaf, curvature.get(path, 0.0))
        for path, leaf in zip(_tree.leaf_paths(params), jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def predicted_rise(dense: Params, pruned: Params, curvature: dict[str, float]) -> float:
    """½ Σ_l h̄_l Σ δ² of a change of the weights, h̄_l the mean eigenvalue of the block of leaf l."""
    change = _tree.add_scaled(_tree.wide(dense), -1.0, _tree.wide(pruned))
    lengths = [float(_tree.norm(leaf)) ** 2 for leaf in jax.tree.leaves(change)]
    named = zip(_tree.leaf_paths(dense), lengths, strict=True)
    return sum(0.5 * curvature.get(path, 0.0) * length for path, length in named if length)
