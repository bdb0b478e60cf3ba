"""What a page shows of a pruning: before and after, the training, what was tried, zeros by layer."""

from collections.abc import Iterator, Mapping
from typing import Any

from hessjax._core._tables import percent
from hessjax._report._html import Cell, Html, brief, chart, finite, real, table, tag


def pruned_sections(
    stages: Mapping[str, Any], parameters: int, charts: dict[str, Any], head: str = "h2"
) -> Iterator[Html]:
    """The parts of it that are there.

    Args:
        stages: of the record of a pruning.
        parameters: of the dense network.
        charts: what the script is to draw is added here.
        head: the tag of their heads.
    """
    found = {name: entry["result"] for name, entry in stages.items()}
    if "before" in found:
        yield _before_and_after(found["before"], found.get("network"))
    if "training" in found:
        yield from _training(found["training"]["history"], found["before"], charts, head)
    if "search" in found:
        yield from _trials(found["search"]["trials"], charts, head)
    if "network" in found:
        heads = (Cell("Layer", "name"), "Weights", "Zeros", "Zeros %")
        yield tag(head, "Zeros by layer")
        yield table(heads, map(_row, found["network"]["zeros"]), "Zeros by layer")
        yield from _small(found["network"]["compacted"], parameters, head)


def _before_and_after(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Html:
    if after is None:
        rows = [("loss", brief(before["loss"], 4)), *((k, brief(x, 4)) for k, x in before["metrics"].items())]
        return table((Cell("", "name"), "Before"), rows, "Before")
    pairs = {"loss": (before["loss"], after["loss"])}
    pairs |= {k: (x, after["metrics"][k]) for k, x in before["metrics"].items() if k in after["metrics"]}
    changes = [(k, brief(a, 4), brief(b, 4), brief(real(b) - real(a), 2)) for k, (a, b) in pairs.items()]
    made = table((Cell("", "name"), "Before", "After", "Change"), changes, "Before and after")
    if after["predicted_rise"] is None:
        return made
    said = f"The mean curvature predicted a rise of the loss by {brief(after['predicted_rise'], 2)}."
    return Html(made + tag("p", said))


def _training(
    history: list[Mapping[str, Any]], before: Mapping[str, Any], charts: dict[str, Any], head: str
) -> Iterator[Html]:
    if not history:
        return
    yield tag(head, "While it trained")
    found = {name: [(0, finite(value))] for name, value in before["metrics"].items()}
    for name, points in found.items():
        points += [(row["step"], finite(row["metrics"].get(name))) for row in history]
    zeros = [(row["step"], row["zeros"]) for row in history]
    for number, (name, points) in enumerate([(_ZEROS, zeros), *found.items()]):
        y = {"label": name, "percent": name == _ZEROS}
        charts[f"chart-training-{number}"] = {"kind": "lines", "series": [{"name": name, "points": points}],
                                              "x": {"label": "step of training"}, "y": y}  # fmt: skip
        alt = f"{name} over training, from {brief(points[0][1], 4)} to {brief(points[-1][1], 4)}."
        yield chart(f"chart-training-{number}", alt, None, alt)


_ZEROS = "zeros among what is pruned"


def _trials(trials: list[Mapping[str, Any]], charts: dict[str, Any], head: str) -> Iterator[Html]:
    placed = sorted(trials, key=lambda trial: real(trial["sparsity"]))
    series = [
        {"name": name, "points": [(trial["sparsity"], finite(trial[key])) for trial in placed]}
        for name, key in (("measured", "rise"), ("predicted", "predicted"))
    ]
    charts["chart-trials"] = {"kind": "lines", "series": series, "x": {"label": "zeros", "percent": True},
                              "y": {"label": "rise of the loss"}}  # fmt: skip
    alt = f"Rise of the loss at {len(placed)} sparsities, measured and predicted."
    yield tag(head, "What was tried")
    yield chart("chart-trials", alt, None, alt)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    share = row["zeros"] / row["number"] if row["number"] else 0.0
    return row["path"], f"{row['number']:,}", f"{row['zeros']:,}", percent(share)


def _small(small: Mapping[str, Any] | None, parameters: int, head: str) -> Iterator[Html]:
    if small is None:
        return
    if "why_not" in small:
        yield tag("p", f"No smaller network: {small['why_not']}.")
        return
    rows = [(path, str(before), str(after)) for path, (before, after) in small["shapes"].items()]
    said = f"{small['parameters']:,} parameters are left of {parameters:,}; "
    said += f"the outputs differ by {brief(small['difference'], 2)}, relative."
    yield tag(head, "The smaller network")
    yield tag("p", said)
    yield table((Cell("Layer", "name"), "Before", "After"), rows, "Shapes")
