"""What does pruning give and cost: at one go, in training, and once the zeros are gone?"""

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from peers import problems
from peers.asking import Answer, Group, rounds
from peers.problems import Problem
from peers.rows import Row, row, timed, unusable

RULES = ["magnitude", "WoodFisher", "OBS, joint", "OBS, joint, recomputed"]
STEPS = ["bare", *problems.EVERY]
ROUNDS = {"mlp": 7, "encoder": 3}


def one_shot(quick: bool, path_of: Any) -> Iterator[Row]:
    """Accuracy of the same networks after pruning without training, and what that took."""
    path = path_of("digits_to_prune")
    problem = problems.read(path)
    seeds = len({name.split("/")[1] for name in problem.arrays if name.startswith("net/")})
    with Group(["hessjax", "torch"], path, 60) as group:
        yield from unusable(group, "one-shot: magnitude")
        for rule in RULES[:2] if quick else RULES:
            calls = {
                name: functools.partial(group.workers[name].ask, "one_shot", rule=rule)
                for name in group.usable
            }
            first = {name: [call(seed=seed) for seed in range(seeds)] for name, call in calls.items()}
            first = {name: said for name, said in first.items() if "absent" not in said[0]}
            again = {name: functools.partial(calls[name], seed=0) for name in first}
            times = rounds(again, 1 if quick else 3)
            for name, said in first.items():
                yield timed(pruned(problem, name, rule, said), times[name], times["hessjax"])


def pruned(problem: Problem, name: str, rule: str, said: list[Answer]) -> Row:
    """The networks of all seeds, run on the test images by the same code whoever pruned them."""
    failed = [answer for answer in said if "failed" in answer]
    if failed:
        return row(f"one-shot: {rule}", name, rule, failed[0])
    sparsities = problem.options["sparsities"]
    found = [
        [network(problem, seed, answer["kernels"][i]) for seed, answer in enumerate(said)]
        for i in range(len(sparsities))
    ]
    shares = [[share_of_zeros(kernels) for kernels in nets] for nets in found]
    right = all(abs(x - sparsity) < 1e-3 for xs, sparsity in zip(shares, sparsities, strict=True) for x in xs)
    accuracies = [[accuracy(problem, kernels) for kernels in nets] for nets in found]
    return row(f"one-shot: {rule}", name, rule, said[0], accuracies=accuracies, right=right)


def network(problem: Problem, seed: int, flat: list[list[float]]) -> list[np.ndarray]:
    """The kernels in their shapes."""
    shapes = [kernel.shape for kernel in problem.part(f"net/{seed}").values()]
    return [np.asarray(values, np.float32).reshape(shape) for values, shape in zip(flat, shapes, strict=True)]


def share_of_zeros(kernels: list[np.ndarray]) -> float:
    return sum(int(np.sum(k == 0)) for k in kernels) / sum(k.size for k in kernels)


def accuracy(problem: Problem, kernels: list[np.ndarray]) -> float:
    """In percent of the test images."""
    x, y = (problem.arrays[f"test/{name}"] for name in "xy")
    for kernel in kernels[:-1]:
        x = np.maximum(x @ kernel, 0)
    return 100 * float(np.mean(np.argmax(x @ kernels[-1], axis=1) == y))


def training_step(quick: bool, path_of: Any) -> Iterator[Row]:
    """A step of Adam, bare, with the masks at rest, and with new ones, each layer to 90 %."""
    for name, count in {"mlp": 2}.items() if quick else ROUNDS.items():
        with Group(["hessjax", "jax", "torch"], path_of(name), 60 if quick else 150) as group:
            yield from unusable(group, f"{name}: bare step")
            yield from steps(group, name, count)


def steps(group: Group, problem: str, count: int) -> Iterator[Row]:
    """Every kind of step of every peer, in turns; what masks add is told in each one's bare steps."""
    calls = {
        (kind, name): functools.partial(group.workers[name].ask, "training_step", name=kind)
        for kind in STEPS
        for name in group.usable
    }
    first = {key: call() for key, call in calls.items()}
    for call in calls.values():  # past what the second step of a loop may compile
        call()
    times = rounds({key: calls[key] for key, said in first.items() if "seconds" in said}, count)
    for (kind, name), said in first.items():
        own, more = times.get((kind, name), []), {}
        if own and kind != "bare":
            zeros = group.workers[name].ask("zeros", name=kind).get("zeros", 0.0)
            added = statistics.median(a / b - 1 for a, b in zip(own, times["bare", name], strict=True))
            more = {"added": added, "zeros": zeros, "right": zeros > problems.SPARSITY - 1e-2}
        found = row(f"{problem}: {kind}", name, kind, said, **more)
        yield timed(found, own, times.get((kind, "hessjax"), []))


def compact(quick: bool, path_of: Any) -> Iterator[Row]:
    """ResNet-20 without half of the channels inside its blocks: how long to cut, how fast and large after."""
    with Group(["hessjax", "torch", "torch_pruning"], path_of("resnet"), 60 if quick else 150) as group:
        yield from unusable(group, "compact: after")
        calls = {
            (kind, name): functools.partial(group.workers[name].ask, "compact", name=kind)
            for kind in ("cut", "before", "after")
            for name in group.usable
        }
        first = {key: call() for key, call in calls.items()}
        done = {key: calls[key] for key, said in first.items() if "seconds" in said}
        times = rounds({key: call for key, call in done.items() if key[0] == "cut"}, 1 if quick else 3)
        times |= rounds({key: call for key, call in done.items() if key[0] != "cut"}, 2 if quick else 9)
        sizes = {name: group.workers[name].ask("compact", name="size") for name in group.usable}
        for name in group.usable:
            yield cut(name, {kind: first[kind, name] for kind, n in first if n == name}, times, sizes)


def cut(name: str, first: dict[str, Answer], times: Any, sizes: dict[str, Answer]) -> Row:
    """One row: the forward pass after the cut over ours, and over its own before."""
    failed = next((said for said in [*first.values(), sizes[name]] if "failed" in said), None)
    if failed:
        return row("compact: after", name, "half of the inner channels", failed)
    before, after = times["before", name], times["after", name]
    more = {
        "cut": statistics.median(times["cut", name]),
        "cut_first": first["cut"]["seconds"],
        "before": statistics.median(before),
        "share": statistics.median(a / b for a, b in zip(after, before, strict=True)),
        "weights": sizes[name]["weights"],
        "right": abs(sizes[name]["norm"] / sizes["hessjax"]["norm"] - 1) < 1e-4,
    }
    found = row("compact: after", name, "half of the inner channels", first["cut"], **more)
    return timed(found, after, times["after", "hessjax"])
