"""K-FAC and EKFAC, ours and curvlinops': are they the same, and what do they take?"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from peers.asking import Answer, Group, rounds
from peers.rows import Row, row, timed, unusable

PEERS = ["hessjax", "curvlinops"]
FISHERS = ["exact", "empirical"]
POSITIONS = ["expand", "reduce"]
TASKS = ["factors", "K-FAC", "inverse", "EKFAC"]
AGREEMENT = {"EKFAC": 1e-4}
"""How far right answers may be apart, beyond 1e-5: squares of rotated gradients are summed in float32."""


def layers(quick: bool, path_of: Any) -> Iterator[Row]:
    """Factors, products and inverse products of a strided convolutional net and a perceptron."""
    for name in ["digits_in_conv_net"] if quick else ["digits_in_conv_net", "mlp"]:
        with Group(PEERS, path_of(name)) as group:
            yield from unusable(group, f"{name}: K-FAC")
            for fisher in FISHERS:
                for positions in POSITIONS:
                    # EKFAC of mean inputs has singular moments: its eigenvectors, and so it, are not unique.
                    for task in TASKS[: 3 if positions == "reduce" else None]:
                        yield from asked(group, f"{name}: {task}, {fisher}", task, fisher, positions, quick)


def asked(group: Group, question: str, task: str, fisher: str, positions: str, quick: bool) -> Iterator[Row]:
    """Of both: the first call builds what later ones use, so products are timed, and factors built anew."""
    given = {"name": task, "fisher": fisher, "positions": positions}
    calls = {n: functools.partial(group.workers[n].ask, "layers", **given) for n in group.usable}
    first = {name: call() for name, call in calls.items()}
    times = rounds({n: calls[n] for n, said in first.items() if "seconds" in said}, 1 if quick else 3)
    for name, said in first.items():
        more = {} if "failed" in said else agreement(said, first["hessjax"], task)
        yield timed(row(question, name, positions, said, **more), times[name], times["hessjax"])


def agreement(said: Answer, ours: Answer, task: str) -> Row:
    """The largest relative difference of what each says of its matrices, as numbers."""
    pairs = [(np.asarray(said[key]), np.asarray(ours[key])) for key in ours if key in said["compared"]]
    error = max(float(np.max(np.abs(a - b) / np.abs(b))) for a, b in pairs)
    return {"error": error, "right": error <= AGREEMENT.get(task, 1e-5)}


def of_matrix(matrix: np.ndarray) -> list[float]:
    """Trace, norm, and a number that depends on the order of rows: equal where matrices are."""
    matrix = np.asarray(matrix, np.float64)
    probe = np.cos(np.arange(len(matrix)))
    return [float(np.trace(matrix)), float(np.linalg.norm(matrix)), float(probe @ matrix @ probe)]
