"""The five questions, from trained weights to numbers: each a generator of rows."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peers import problems
from peers.asking import Answer, Group, Worker, rounds
from peers.layers import layers
from peers.problems import Problem
from peers.pruning import compact, one_shot, training_step
from peers.rows import Row, coverage, row, timed, unusable, wasserstein
from peers.sampling import LAYER_STDERR, STDERR

ANSWERS = ["hessjax", "pyhessian", "curvlinops", "eigenthings", "matfree", "traceax"]
PRODUCTS = ["hessjax", "torch", "pyhessian", "curvlinops", "eigenthings", "matfree", "traceax"]
ESTIMATES = ["hessjax", "curvlinops", "eigenthings", "matfree", "traceax"]
LAYER_TRACES = ["hessjax", "pyhessian", "curvlinops", "matfree", "eigenthings"]
ACCURACY, DISTANCE = 1e-4, 0.005
TRACES = ("trace", "layer_traces")
"""Whose ways are different estimators."""

Judge = Callable[[Answer, Problem], Row]
Paths = Callable[[str], Path]


def judge_top(answer: Answer, problem: Problem) -> Row:
    """Whether every value is right to 1e-4 of itself."""
    truth, values = problem.arrays["truth/top"], np.asarray(answer["values"])
    error = float(np.max(np.abs(values / truth[: len(values)] - 1)))
    return {"error": error, "right": error <= ACCURACY, "values": answer["values"]}


def judge_trace(answer: Answer, problem: Problem) -> Row:
    """Whether the standard error is 5 % of the estimate, as asked, and the truth within three of that."""
    truth = float(problem.arrays["truth/trace"])
    stderr, error = answer["stderr"] / abs(answer["mean"]), abs(answer["mean"] / truth - 1)
    return {"error": error, "stderr": stderr, "right": stderr < 1.1 * STDERR and error < 3 * STDERR}


def judge_density(answer: Answer, problem: Problem) -> Row:
    """Whether it is within half a percent of the range of the true one."""
    distance = wasserstein(answer["nodes"], answer["weights"], problem.arrays["truth/spectrum"])
    return {"error": distance, "right": distance <= DISTANCE}


def judge_layers(answer: Answer, problem: Problem) -> Row:
    """Whether every layer's standard error is as small as asked, and its truth within four of them."""
    means, errors = np.asarray(answer["layers"]).T
    truth = problem.arrays["truth/layers"]
    small = np.all(errors <= 1.1 * LAYER_STDERR * np.abs(means))
    near = np.all(np.abs(means - truth) <= 4 * errors)
    return {"error": float(np.max(np.abs(means / truth - 1))), "right": bool(small and near)}


PLAN: list[tuple[str, str, str, dict[str, Any], Judge]] = [
    ("digits_in_conv_net", "top-5", "top", {"k": 5}, judge_top),
    ("digits_in_conv_net", "top-10", "top", {"k": 10}, judge_top),
    ("digits_in_conv_net", "trace", "trace", {}, judge_trace),
    ("digits_in_conv_net", "density", "density", {"probes": 3}, judge_density),
    ("digits_in_mlp", "top-5", "top", {"k": 5}, judge_top),
    ("digits_in_mlp", "top-10", "top", {"k": 10}, judge_top),
    ("digits_in_mlp", "trace", "trace", {}, judge_trace),
]
QUICK = [PLAN[0], PLAN[2], PLAN[3]]


def answers(quick: bool, path_of: Paths) -> Iterator[Row]:
    """Time to the answer: in fresh processes, so that a first call is one; all in the same if quick."""
    plans = [QUICK] if quick else [[line] for line in PLAN]
    for plan in plans:
        path = path_of(plan[0][0])
        with Group(ANSWERS, path, 40 if quick else 150) as group:
            yield from unusable(group, f"{plan[0][0]}: {plan[0][1]}")
            for name, asked, task, given, judge in plan:
                judged = functools.partial(judge, problem=problems.read(path))
                yield from answer(group, f"{name}: {asked}", task, given, judged, 1 if quick else 5)


def answer(
    group: Group, question: str, task: str, given: dict[str, Any], judge: Callable[[Answer], Row], count: int
) -> Iterator[Row]:
    """Each peer's plain way, and, where that was not right, the first of its other ways that was.

    The ways to a density differ in their steps, and none is plain: only the first that is near enough counts.
    Those to a trace are different estimators, and all are shown. Ratios are to our first that is right.
    """
    found: dict[tuple[str, int], Row] = {}
    for name in group.usable:
        for way, words in enumerate(group.ways(name, task)):
            said = group.workers[name].ask(task, way=way, **given)
            line = row(question, name, words, said, **({} if "failed" in said else judge(said)))
            found[name, way] = line
            if "failed" in said or (line.get("right") and task not in TRACES):
                break
            last = way + 1 == len(group.ways(name, task))
            if not (task in TRACES or {"density": last}.get(task, way == 0)):
                del found[name, way]
    again = {key: line for key, line in found.items() if line["first"] and line["first"] < 60}
    calls = {
        (name, way): functools.partial(group.workers[name].ask, task, way=way, **given) for name, way in again
    }
    times = rounds(calls, count)
    ours = next((times[key] for key in times if key[0] == "hessjax" and found[key].get("right")), [])
    for key, line in found.items():
        yield timed(line, times.get(key, []), ours)


def layer_traces(quick: bool, path_of: Paths) -> Iterator[Row]:
    """The traces of all layers' weights, each to a standard error of 10 %: ours from the same products."""
    path = path_of("digits_in_deep_mlp")
    with Group(LAYER_TRACES[:-1] if quick else LAYER_TRACES, path, 40 if quick else 100) as group:
        yield from unusable(group, "digits_in_deep_mlp: layer traces")
        judged = functools.partial(judge_layers, problem=problems.read(path))
        asked = "digits_in_deep_mlp: layer traces"
        yield from answer(group, asked, "layer_traces", {}, judged, 1 if quick else 3)


NAMES = [
    "gradient",
    "Hessian",
    "Hessian, kept",
    "Hessian, batches",
    "Gauss–Newton",
    "Gauss–Newton, kept",
    "empirical Fisher",
    "empirical Fisher, kept",
]
ROUNDS = {"mlp": 9, "encoder": 5, "resnet": 3}


def products(quick: bool, path_of: Paths) -> Iterator[Row]:
    """One product, kinds and ways apart; a product that is not ours, to 1e-3, is marked."""
    for name, count in {"mlp": 2}.items() if quick else ROUNDS.items():
        with Group(PRODUCTS, path_of(name), 60 if quick else 150) as group:
            yield from unusable(group, f"{name}: product")
            for kind in NAMES:
                yield from product(group, f"{name}: {kind}", kind, count)


def product(group: Group, question: str, kind: str, count: int) -> Iterator[Row]:
    """Of every peer that has this one."""
    calls = {name: functools.partial(group.workers[name].ask, "product", name=kind) for name in group.usable}
    first = {name: call() for name, call in calls.items()}
    first = {name: said for name, said in first.items() if "absent" not in said}
    times = rounds({name: calls[name] for name, said in first.items() if "seconds" in said}, count)
    for name, said in first.items():
        more = {} if "failed" in said or kind == "gradient" else same(said, first.get("hessjax", {}))
        yield timed(row(question, name, kind, said, **more), times.get(name, []), times.get("hessjax", []))


def same(said: Answer, ours: Answer) -> Row:
    """How far norm and part along the vector are from ours."""
    if "norm" not in ours:
        return {}
    error = max(abs(said[key] - ours[key]) / ours["norm"] for key in ("norm",))
    error = max(error, abs(said["along"] - ours["along"]) / (abs(ours["along"]) + 1e-3 * ours["norm"]))
    return {"error": error, "right": error < 1e-3}


def estimates(quick: bool, path_of: Paths) -> Iterator[Row]:
    """Traces of matrices with as many products each: mean relative error, and coverage of ±2 errors."""
    path, budget, trials = path_of("spectra"), 24 if quick else 120, 20 if quick else 200
    matrices = ["i⁻²"] if quick else ["flat", "i⁻²", "0.9ⁱ", "50 ones, then 0.001"]
    with Group(ESTIMATES, path) as group:
        yield from unusable(group, "spectra: estimate")
        stored = problems.read(path).arrays
        for matrix in matrices:
            truth = float(np.trace(stored[f"matrix/{matrix}"]))
            for estimator in ("Hutchinson", "Hutch++", "XTrace"):
                given = {"matrix": matrix, "estimator": estimator, "budget": budget, "trials": trials}
                for name in group.usable:
                    said = group.workers[name].ask("estimate", **given)
                    if "absent" not in said:
                        yield estimated(f"{matrix}, {budget} products", name, estimator, said, truth)


def estimated(question: str, name: str, estimator: str, said: Answer, truth: float) -> Row:
    """Accuracy of many runs."""
    if "failed" in said:
        return row(question, name, estimator, said)
    error = float(np.mean(np.abs(np.asarray(said["means"]) / truth - 1)))
    held = None if said["errors"] is None else coverage(said["means"], said["errors"], truth)
    return row(question, name, estimator, said, error=error, coverage=held)


def inverse_fisher(quick: bool, path_of: Paths) -> Iterator[Row]:
    """Build and apply; a recursion is timed on some of the gradients and scaled up."""
    with Group(["hessjax", "jax", "torch"], path_of("gradients")) as group:
        yield from unusable(group, "inverse Fisher")
        for name in ("build", "apply"):
            calls = {
                peer: functools.partial(group.workers[peer].ask, "inverse_fisher", name=name)
                for peer in group.usable
            }
            first = {peer: said for peer, call in calls.items() if "absent" not in (said := call())}
            times = rounds({peer: calls[peer] for peer in first}, 2 if quick else 5)
            whole = {p: [t / first[p].get("share", 1) for t in ts] for p, ts in times.items()}
            for peer, said in first.items():
                way = "all gradients" if "share" not in said else "one gradient after the other"
                yield timed(
                    row(f"inverse Fisher: {name}", peer, way, said), whole[peer], whole.get("hessjax", [])
                )


def start(quick: bool, path_of: Paths) -> Iterator[Row]:
    """From the interpreter's start to the largest eigenvalue of the small convolutional net."""
    path, spent, said = path_of("digits_in_conv_net"), {}, {}
    for _ in range(1 if quick else 3):
        for name in ANSWERS[:2] if quick else ANSWERS[:-1]:
            worker = Worker(name, path)
            if "missing" not in worker.hello:
                said[name] = worker.ask("top", way=0, k=1)
                spent.setdefault(name, []).append(time.perf_counter() - worker.started)
            worker.close()
    for name, times in spent.items():
        line = row("start: first eigenvalue", name, "fresh interpreter", said[name])
        yield {**timed(line, times, spent.get("hessjax", [])), "first": statistics.median(times)}


SECTIONS = {
    "answers": answers,
    "products": products,
    "estimates": estimates,
    "inverse_fisher": inverse_fisher,
    "layers": layers,
    "layer_traces": layer_traces,
    "one_shot": one_shot,
    "training_step": training_step,
    "compact": compact,
    "start": start,
}
