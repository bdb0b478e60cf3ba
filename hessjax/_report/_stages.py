"""The stages of a report, in the order of their cost: each gives plain data, and spends so many products."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _tree
from hessjax._core._results import Eigenpairs
from hessjax._report import _passes
from hessjax._report._plan import FORWARD, LANDSCAPE_POINTS, LEVELS, QUALITY_PROBES
from hessjax._report._record import layer_rows, to_json
from hessjax._report._work import Work
from hessjax._run._drivers import run
from hessjax.analysis._check import check
from hessjax.analysis._landscape import landscape
from hessjax.curvature._batches import over_batches
from hessjax.curvature._ggn import fisher
from hessjax.curvature._select import select
from hessjax.estimators._density import SpectralDensity
from hessjax.estimators._eigenpairs import eigenpairs
from hessjax.estimators._slq import slq, spectral_density
from hessjax.estimators._trace import trace_by_leaf
from hessjax.layers._coverage import coverage
from hessjax.layers._kfac import kfac
from hessjax.layers._moments import moments
from hessjax.layers._quality import quality


class Done(NamedTuple):
    """What a stage gives.

    Attributes:
        result: plain data, for `report.json`.
        products: how many it made; a pass of losses counts as a quarter of one; None: it makes others.
        shown: the results themselves, for figures.
    """

    result: dict[str, Any]
    products: float | None
    shown: Any = None


def checked(work: Work) -> Done:
    """The self-test."""
    problem = work.problem
    found = check(problem.loss_fn, problem.params, batches=problem.batches, weights=problem.weights)
    rows = [row._asdict() for row in found.rows]
    return Done({"passed": found.passed, "rows": rows}, 25)


def loss(work: Work) -> Done:
    """Loss, gradient and metric, with what they change by from batch to batch."""
    found = _passes.loss_and_gradient(work.problem)
    return Done(found._asdict() | {"metrics": _passes.metrics(work.problem, work.problem.params)}, 1)


def trace(work: Work) -> Done:
    """The trace, in all and by leaf."""
    problem, number = work.problem, work.plan.products["trace"]
    found = trace_by_leaf(
        work.matvec,
        work.key(2),
        problem.params,
        number,
        groups=problem.groups,
        callbacks=work.callbacks("trace"),
    )
    rows = [row._asdict() for row in layer_rows(found, problem.params)]
    return Done({"total": found.total, "leaves": rows, "groups": found.groups}, number, found)


def pruned(work: Work) -> Done:
    """What zeros in the place of the least weights do to the loss."""
    curvature = {row["path"]: float(row["per_parameter"]) for row in work.results["trace"]["leaves"]}
    total = work.plan.products["pruning"]
    found = _passes.pruned_at_once(
        work.problem,
        float(work.results["loss"]["loss"]),
        curvature,
        lambda number: work.tell("pruning", round(total * number / len(LEVELS)), total),
    )
    return Done(found, FORWARD * len(found["levels"]))


def top(work: Work) -> Done:
    """Eigenvalues from both ends."""
    params, number = work.problem.params, work.plan.products["eigenpairs"]
    size = _tree.size(params)
    k = min(work.asked.top, max((size - 1) // 2, 1))
    pairs = eigenpairs(
        work.matvec,
        work.key(4),
        params,
        k,
        "both" if size > 2 else "largest",
        max_matvecs=number,
        callbacks=work.callbacks("eigenpairs"),
    )
    work.steepest = _two_steepest(pairs)
    return Done(_eigenvalues(pairs), int(pairs.num_matvecs), pairs)


def _eigenvalues(pairs: Eigenpairs) -> dict[str, Any]:
    return pairs._replace(vectors=None)._asdict()  # as large as ten networks


def _two_steepest(pairs: Eigenpairs) -> Any:
    order = np.argsort(-np.abs(np.nan_to_num(np.asarray(pairs.values))), kind="stable")[:2]
    return jax.tree.map(lambda rows: rows[np.sort(order)], pairs.vectors)


def density(work: Work) -> Done:
    """All eigenvalues, by stochastic Lanczos quadrature."""
    number = work.plan.products["density"]
    probes = 2 if number >= 40 else 1
    found = spectral_density(
        work.matvec,
        work.key(5),
        work.problem.params,
        probes,
        max(min(number // probes, _tree.size(work.problem.params)), 1),
        callbacks=work.callbacks("density"),
    )
    return Done(_curve(found) | {"trace": found.trace_of(lambda x: x)}, number, found)


def _curve(found: SpectralDensity) -> dict[str, Any]:
    largest = float(np.max(np.abs(found.nodes))) or 1.0
    threshold = 1e-3 * largest
    grid, share = found.signed_log_curve(240, threshold=threshold, bandwidth=8 / found.nodes.shape[1])
    return {"grid": grid, "share": share, "threshold": threshold, "probes": int(np.sum(found.num_probes))}


def per_layer(work: Work) -> Done:
    """The largest and the least eigenvalue of the block of every leaf."""
    params, number = work.problem.params, work.plan.products["per_layer"]
    named = [
        (path, int(np.size(leaf)))
        for path, leaf in zip(_tree.leaf_paths(params), jax.tree.leaves(params), strict=True)
    ]
    steps = max(min(number // len(named), _tree.size(params)), 1)
    rows = []
    for index, (path, size) in enumerate(named):
        if size:
            # A leaf is an array: all of them share what is compiled for one.
            method = dataclasses.replace(slq(1, steps), leaf=jnp.int32(index))
            told = work.callbacks("per_layer", str(index), index * steps, len(named) * steps)
            found, _ = run(
                method,
                work.matvec,
                jax.random.fold_in(work.key(6), index),
                params,
                max_matvecs=steps,
                callbacks=told,
            )
            rows.append(_ends(path, size, found))
    return Done({"leaves": rows, "steps": steps}, steps * len(rows))


def _ends(path: str, size: int, found: SpectralDensity) -> dict[str, Any]:
    nodes, weights = np.asarray(found.nodes), np.asarray(found.weights)
    seen = nodes[weights > 1e-12 * weights.max()]
    return {"path": path, "parameters": size, "largest": float(seen.max()), "least": float(seen.min())}


def around(work: Work) -> Done:
    """The loss across the plane of the two steepest eigenvectors, as far as it is expected to double."""
    problem, steepest = work.problem, work.steepest
    assert steepest is not None
    values = work.results["eigenpairs"]["values"]
    steep = sorted((abs(float(x)) for x in values if math.isfinite(float(x))), reverse=True)[:2]
    height = abs(float(work.results["loss"]["loss"])) or 1.0
    # A rise by the loss itself, as the quadratic model has it: ½ λ t² = loss.
    reach = [math.sqrt(2 * height / x) if x > 0 else 1.0 for x in steep]
    number = len(jax.tree.leaves(steepest)[0])
    distances = [np.linspace(-t, t, LANDSCAPE_POINTS) for t in reach[:number]]
    found = landscape(
        problem.loss_fn,
        problem.params,
        directions=steepest,
        distances=distances if number > 1 else distances[0],
        batches=problem.batches,
        weights=problem.weights,
    )
    total = work.plan.products["landscape"]
    work.tell("landscape", total, total)
    return Done(found._asdict(), total, found)


def layers(work: Work) -> Done:
    """What every leaf takes part in, and how well K-FAC describes the curvature."""
    problem, batch = work.problem, work.first_batch
    fn = problem.loss_fn if problem.model_fn is None else problem.model_fn
    found = coverage(fn, problem.params, batch)
    rows = [leaf._asdict() for leaf in found.leaves]
    told: dict[str, Any] = {"leaves": rows, "covered": len(found.covered), "kfac": None, "why_not": ""}
    if problem.model_fn is None or problem.likelihood is None:
        return Done(told | {"why_not": "the problem has no `model_fn` and `likelihood`"}, 0)
    if not found.covered:
        return Done(told | {"why_not": "no leaf is covered"}, 0)
    try:
        measured = _kfac(work, found.covered)
    except ValueError as error:  # batches that are filled up, say: all else in the report is there
        return Done(told | {"why_not": str(error).rstrip(".")}, 0)
    return Done(told | {"kfac": measured}, work.plan.products["layers"])


def _kfac(work: Work, covered: tuple[str, ...]) -> dict[str, Any]:
    problem = work.problem
    assert problem.model_fn is not None
    assert problem.likelihood is not None
    part = select(problem.params, covered)
    model_fn, likelihood = part.restrict(problem.model_fn), problem.likelihood
    found = moments(model_fn, part.part, problem.batches, likelihood=likelihood, weights=problem.weights)

    def of_batch(batch: Any) -> Any:
        return fisher(model_fn, part.part, batch, likelihood=likelihood, weights=problem.weights)

    exact = over_batches(of_batch, problem.batches, weights=problem.weights)
    measured = quality(kfac(found), exact, work.key(8), part.part, num_probes=QUALITY_PROBES)
    named = zip(measured.paths, measured.errors, measured.stderr, strict=True)
    rows = [{"path": path, "error": float(e), "stderr": float(s)} for path, e, s in named]
    return {"leaves": rows, "error": measured.error, "outside": measured.outside}


STAGES: dict[str, Callable[[Work], Done]] = {
    "check": checked,
    "loss": loss,
    "trace": trace,
    "pruning": pruned,
    "eigenpairs": top,
    "density": density,
    "per_layer": per_layer,
    "landscape": around,
    "layers": layers,
}


def done(name: str, work: Work) -> Done:
    """The stage of this name, its result in JSON's own types."""
    found = STAGES[name](work)
    return found._replace(result=to_json(found.result))
