"""Traces by single samples, until their standard error is small, for libraries that give samples only."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

STDERR, LAYER_STDERR = 0.05, 0.1
"""Of a trace, and of the trace of each layer, as a share of it."""

LEAST = 20
"""Samples, before their spread says anything."""


def sampled(sample: Callable[[], Sequence[float]], share: float, least: int = LEAST) -> dict[str, Any]:
    """Mean, standard error and number of as many samples as it takes."""
    samples: list[float] = []
    while len(samples) < least or stderr(samples) > share * abs(np.mean(samples)):
        samples += sample()
    return {"mean": float(np.mean(samples)), "stderr": stderr(samples), "products": len(samples)}


def stderr(samples: Sequence[float]) -> float:
    """Of the mean."""
    return float(np.std(samples, ddof=1) / len(samples) ** 0.5)


def layer_by_layer(layers: Sequence[Any], sampler: Callable[[Any], Callable[[], Sequence[float]]]) -> Any:
    """The traces of one after the other, each to its standard error."""
    return together([sampled(sampler(layer), LAYER_STDERR) for layer in layers])


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer about all layers: means, standard errors, and the products of all."""
    products = sum(one["products"] for one in found)
    return {"layers": [[one["mean"], one["stderr"]] for one in found], "products": products}
