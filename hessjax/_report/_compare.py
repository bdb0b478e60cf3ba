"""Reports side by side, in one page: checkpoints of a training, or networks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hessjax._report._html import Cell, Html, brief, chart, document, finite, real, table, tag, with_error

_FLOOR = 1e-6


class Compared(NamedTuple):
    """One report among others.

    Attributes:
        name: what it is called here.
        record: its record.
        step: where it stands on the axis of training steps; None without one.
    """

    name: str
    record: Mapping[str, Any]
    step: float | None = None

    def result(self, stage: str) -> Any:
        """What a stage found; None without it."""
        return self.record["stages"].get(stage, {}).get("result")


def comparison(reports: Sequence[Compared]) -> str:
    """The page.

    Raises:
        ValueError: fewer than two, or two of one name.
    """
    names = [report.name for report in reports]
    if len(reports) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"`compare` must be given two reports or more, each once, got {', '.join(names) or 'none'}."
        )
    charts: dict[str, Any] = {}
    body = [
        tag("h1", "Reports side by side"),
        tag("p", ", ".join(names), class_="quiet"),
        _overview(reports),
        *(
            made
            for draw in (_over_steps, _eigenvalues, _densities, _layers, _zeros)
            for made in draw(reports, charts)
        ),
    ]
    return document("Reports side by side", body, charts)


def _overview(reports: Sequence[Compared]) -> Html:
    rows = []
    for report in reports:
        loss, trace, pairs = (report.result(name) for name in ("loss", "trace", "eigenpairs"))
        rows.append(
            (
                report.name,
                f"{report.record['problem']['parameters']:,}",
                "–" if loss is None else with_error(loss["loss"], loss["stderr"]),
                "–" if loss is None else brief(loss["norm"]),
                "–" if trace is None else with_error(trace["total"]["mean"], trace["total"]["stderr"]),
                "–" if pairs is None else brief(pairs["values"][0], 4),
                "–" if pairs is None else brief(pairs["values"][-1]),
                *_metrics(report, reports),
            )
        )
    heads = (Cell("Report", "name"), "Params", "Loss", "Gradient", "Trace", "Largest λ", "Least λ")
    return table((*heads, *_metric_names(reports)), rows, "Overview")


def _metric_names(reports: Sequence[Compared]) -> list[str]:
    found = [name for report in reports for name in (report.result("loss") or {"metrics": {}})["metrics"]]
    return list(dict.fromkeys(found))


def _metrics(report: Compared, reports: Sequence[Compared]) -> list[str]:
    own = (report.result("loss") or {"metrics": {}})["metrics"]
    return [brief(own.get(name), 4) for name in _metric_names(reports)]


def _placed(
    charts: dict[str, Any], name: str, title: str, spec: dict[str, Any], alt: str, caption: str
) -> Html:
    charts[f"chart-{name}"] = spec
    return tag("section", tag("h2", title), chart(f"chart-{name}", alt, None, caption))


def _over_steps(reports: Sequence[Compared], charts: dict[str, Any]) -> list[Html]:
    placed = sorted((r for r in reports if r.step is not None), key=lambda r: r.step or 0.0)
    if len(placed) < 2:
        return []
    quantities = {
        "largest eigenvalue": lambda r: (
            r.result("eigenpairs") and finite(r.result("eigenpairs")["values"][0])
        ),
        "trace": lambda r: r.result("trace") and finite(r.result("trace")["total"]["mean"]),
        "loss": lambda r: r.result("loss") and finite(r.result("loss")["loss"]),
    }
    made = []
    for title, value in quantities.items():
        points = [(r.step, value(r)) for r in placed if value(r) is not None]
        if len(points) > 1:
            spec = {"kind": "lines", "series": [{"name": title, "points": points}],
                    "x": {"label": "training step"}, "y": {"label": title}}  # fmt: skip
            ends = ", ".join(f"{brief(y)} at step {x:g}" for x, y in (points[0], points[-1]))
            heading = f"{title[0].upper()}{title[1:]} over training"
            made.append(
                _placed(charts, f"steps-{title.split()[0]}", heading, spec, f"{title}: {ends}.", heading)
            )
    return made


def _eigenvalues(reports: Sequence[Compared], charts: dict[str, Any]) -> list[Html]:
    found = {r.name: r.result("eigenpairs") for r in reports if r.result("eigenpairs")}
    if not found:
        return []
    longest = max(len(pairs["values"]) for pairs in found.values())
    rows = [(i + 1, *(_valued(pairs, i) for pairs in found.values())) for i in range(longest)]
    return [tag("section", tag("h2", "Eigenvalues"), table((Cell("", "name"), *found), rows, "Eigenvalues"))]


def _valued(pairs: Mapping[str, Any], index: int) -> str:
    if index >= len(pairs["values"]):
        return "–"
    data = pairs["data_stderr"]
    return with_error(pairs["values"][index], None if data is None else data[index])


def _densities(reports: Sequence[Compared], charts: dict[str, Any]) -> list[Html]:
    found = {r.name: r.result("density") for r in reports if r.result("density")}
    if not found:
        return []
    top = max(real(y) for density in found.values() for y in density["share"])
    floor = _FLOOR * top
    series: list[dict[str, Any]] = [
        {
            "name": name,
            "points": [(real(x), max(real(y), floor)) for x, y in zip(d["grid"], d["share"], strict=True)],
        }
        for name, d in found.items()
    ]
    xs: list[float] = [x for one in series for x, _ in one["points"]]
    axis = {"label": "eigenvalue", "type": "symlog", "domain": [min(xs), max(xs)],
            "constant": min(d["threshold"] for d in found.values())}  # fmt: skip
    share = {"label": "share per unit of the axis", "type": "log", "domain": [floor, 2 * top]}
    spec = {"kind": "lines", "series": series, "x": axis, "y": share}
    alt = f"Spectral densities of {', '.join(found)}, between {brief(min(xs))} and {brief(max(xs))}."
    return [_placed(charts, "density", "Spectral density", spec, alt, "All eigenvalues of each report.")]


def _layers(reports: Sequence[Compared], charts: dict[str, Any]) -> list[Html]:
    found = {
        r.name: {row["path"]: row for row in r.result("trace")["leaves"]}
        for r in reports
        if r.result("trace")
    }
    if not found:
        return []
    paths = list(dict.fromkeys(path for leaves in found.values() for path in leaves))
    rows = [
        (
            path,
            *(with_error(x[path]["trace"], x[path]["stderr"]) if path in x else "–" for x in found.values()),
        )
        for path in paths
    ]
    dots = [
        {"label": path, "name": name, "value": finite(leaves[path]["per_parameter"])}
        for path in paths for name, leaves in found.items()
        if path in leaves and finite(leaves[path]["per_parameter"]) is not None
    ]  # fmt: skip
    spec = {"kind": "dots", "rows": dots, "x": {"label": "mean eigenvalue"}}
    alt = f"Mean eigenvalue of each layer's block, for {', '.join(found)}."
    caption = "Mean eigenvalue of the block of each layer."
    drawn = _placed(charts, "layers", "Trace by layer", spec, alt, caption)
    return [drawn, table((Cell("Layer", "name"), *found), rows, "Trace by layer")]


def _zeros(reports: Sequence[Compared], charts: dict[str, Any]) -> list[Html]:
    found = {
        r.name: r.result("pruning")["levels"] for r in reports if (r.result("pruning") or {}).get("levels")
    }
    if not found:
        return []
    series = [
        {"name": name, "points": [(x["sparsity"], finite(x["loss"])) for x in rows]}
        for name, rows in found.items()
    ]
    spec = {
        "kind": "lines",
        "series": series,
        "x": {"label": "zeros", "percent": True},
        "y": {"label": "loss"},
    }
    alt = f"Loss against zeros, for {', '.join(found)}."
    return [
        _placed(charts, "pruning", "Pruned at once", spec, alt, "The least weights by magnitude at zero.")
    ]
