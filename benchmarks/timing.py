"""How long do calls take, side by side? Interleaved, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Call = Callable[[], Any]
Times = dict[str, list[float]]


class Ratio(NamedTuple):
    """A ratio of two timings: its median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float


def seconds(call: Call) -> float:
    """Wall time of one call, its results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def first_calls(calls: Mapping[str, Call]) -> dict[str, float]:
    """Wall time of the very first call of each: tracing and compilation, and one execution."""
    return {name: seconds(call) for name, call in calls.items()}


def interleave(calls: Mapping[str, Call], rounds: int) -> Times:
    """Wall times of A, B, C, A, B, C, ...: the i-th entries of all lists were taken next to each other."""
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def ratio(times: Times, name: str, base: str) -> Ratio:
    """How many times `base` a call takes, compared round by round."""
    pairs = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(median, low, high)


def milliseconds(times: list[float]) -> float:
    """The median, in milliseconds."""
    return 1e3 * statistics.median(times)
