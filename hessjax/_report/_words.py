"""A report in lines of text, for terminals: one for each stage, and the reading."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hessjax._core._tables import percent
from hessjax._report._html import brief, real, with_error
from hessjax._report._record import zero_share

TITLES = {
    "check": "Self-test",
    "loss": "Loss and gradient",
    "trace": "Trace by layer",
    "pruning": "What could be pruned",
    "eigenpairs": "Eigenvalues",
    "density": "Spectral density",
    "per_layer": "Spectrum by layer",
    "landscape": "Loss around the weights",
    "layers": "Layers and K-FAC",
    "before": "Before",
    "curvature": "Curvature by layer",
    "search": "Search by the loss",
    "training": "Training",
    "network": "After",
}
"""Of all stages, those of an analysis and then those of a pruning."""

SIGNS = {"good": "+", "care": "!", "unknown": "?"}


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Head, stages, answers."""
    problem = record["problem"]
    yield f"{problem['name']}: {problem['parameters']:,} parameters in {len(problem['shapes'])} leaves"
    for name, entry in record["stages"].items():
        yield f"  {stage_line(name, entry)}"
    for line in record.get("reading", []):
        yield f"{SIGNS[line['verdict']]} {line['question']} {line['answer']}"


def stage_line(name: str, entry: Mapping[str, Any]) -> str:
    """What a stage found, in a line."""
    if "skipped" in entry:
        return f"{name}: left out, {entry['skipped']}"
    return f"{name}: {_SAID[name](entry['result'])}"


def _check(result: Any) -> str:
    failed = [row["name"] for row in result["rows"] if not row["passed"]]
    return f"FAILED: {', '.join(failed)}" if failed else f"passed, {len(result['rows'])} rows"


def _loss(result: Any) -> str:
    metrics = "".join(f", {name} {brief(value, 4)}" for name, value in result["metrics"].items())
    value = with_error(result["loss"], result["stderr"])
    return f"{value}, gradient {brief(result['norm'])}{metrics}"


def _trace(result: Any) -> str:
    top = max(result["leaves"], key=lambda row: real(row["share"]), default=None)
    most = "" if top is None else f", {percent(real(top['share']))} % of it in {top['path']}"
    return with_error(result["total"]["mean"], result["total"]["stderr"]) + most


def _pruning(result: Any) -> str:
    rows = [f"{brief(row['rise'], 2)} at {100 * row['sparsity']:g} %" for row in result["levels"][::2]]
    return f"the loss rises by {', '.join(rows)}" if rows else "nothing to prune"


def _eigenpairs(result: Any) -> str:
    values, good = result["values"], sum(result["converged"])
    return f"{brief(values[0], 4)} to {brief(values[-1])}, {good} of {len(values)} converged"


def _layers(result: Any) -> str:
    quality = result["kfac"]
    told = "" if quality is None else f", K-FAC off by {percent(real(quality['error']))} %"
    return f"{result['covered']} of {len(result['leaves'])} leaves covered{told}"


def _per_layer(result: Any) -> str:
    top = max(result["leaves"], key=lambda row: real(row["largest"]), default=None)
    return "no leaves" if top is None else f"sharpest {top['path']}, {brief(top['largest'])}"


def _landscape(result: Any) -> str:
    flat = [real(x) for row in result["losses"] for x in (row if isinstance(row, list) else [row])]
    return f"the loss goes from {brief(min(flat))} to {brief(max(flat))}"


def _numbers(result: Any) -> str:
    metrics = "".join(f", {name} {brief(value, 4)}" for name, value in result["metrics"].items())
    return f"loss {brief(result['loss'], 4)}{metrics}"


def _network(result: Any) -> str:
    return f"{_numbers(result)}, {percent(zero_share(result['zeros']))} % zeros"


def _curvature(result: Any) -> str:
    top = max(result["leaves"], key=lambda path: real(result["leaves"][path]), default=None)
    return "none" if top is None else f"highest in {top}, {brief(result['leaves'][top])}"


_SAID: dict[str, Callable[[Any], str]] = {
    "check": _check,
    "loss": _loss,
    "trace": _trace,
    "pruning": _pruning,
    "eigenpairs": _eigenpairs,
    "density": lambda result: f"trace {with_error(result['trace']['mean'], result['trace']['stderr'])}",
    "per_layer": _per_layer,
    "landscape": _landscape,
    "layers": _layers,
    "before": _numbers,
    "curvature": _curvature,
    "search": lambda result: (
        f"{percent(real(result['sparsity']))} % zeros after {len(result['trials'])} trials"
    ),
    "training": lambda result: f"{result['steps']:,} steps",
    "network": _network,
}
