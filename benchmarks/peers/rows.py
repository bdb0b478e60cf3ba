"""What was found, a row for each peer and way of asking; spreads, ratios, and whether a machine was busy."""

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

Row = dict[str, Any]
BUSY = 1 / 3
"""A spread above this share of the median says that something else ran."""


def row(question: str, peer: str, way: str, answer: dict[str, Any], **more: Any) -> Row:
    """The first call; `timed` adds the later ones."""
    kept = {k: answer[k] for k in ("products", "peak_mb", "note", "failed") if answer.get(k) is not None}
    return {"question": question, "peer": peer, "way": way, "first": answer.get("seconds"), **kept, **more}


def unusable(group: Any, question: str) -> Iterator[Row]:
    """A row for each peer that is missing or does not have the same loss."""
    for name, trouble in group.problems.items():
        if trouble is not None:
            yield row(question, name, "", {"failed": trouble})


def timed(found: Row, times: list[float], ours: list[float]) -> Row:
    """With the median of later calls, the middle half of them, and theirs over ours round by round."""
    if not times:
        return found
    low, median, high = quartiles(times)
    more: Row = {"later": median, "quartiles": [low, high], "busy": (high - low) > BUSY * median}
    if ours:
        pairs = [a / b for a, b in zip(times, ours, strict=False)]
        more |= {"ratio": statistics.median(pairs)}
    return {**found, **more}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Of one value too."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


def wasserstein(nodes: list[float], weights: list[float], spectrum: np.ndarray) -> float:
    """W₁ as a share of the range: the area between the two staircases."""
    share = np.asarray(weights, float)
    places = np.concatenate([np.asarray(nodes, float), spectrum])
    order = np.argsort(places)
    steps = np.concatenate([share / share.sum(), np.full(len(spectrum), -1 / len(spectrum))])
    between = np.abs(np.cumsum(steps[order]))[:-1]
    return float(np.sum(between * np.diff(places[order])) / np.ptp(spectrum))


def coverage(means: list[float], errors: list[float], truth: float) -> float:
    """The share of runs whose ±2 standard errors hold the truth."""
    return float(np.mean(np.abs(np.asarray(means) - truth) <= 2 * np.asarray(errors)))
