"""The sections of a report's page, one for each stage: sentences, tables, charts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hessjax._core._tables import percent, shape_text
from hessjax._report._html import Cell, Html, brief, finite, join, real, table, tag, with_error

CURVATURE = "loss per squared parameter"
NAME, TEXT = Cell("Layer", "name"), Cell("Detail", "text")


class Chart(NamedTuple):
    """A chart of a section.

    Attributes:
        spec: what the script draws.
        alt: what it shows, in words with numbers.
        caption: below it.
        picture: the PNG that stands in for it.
    """

    spec: dict[str, Any]
    alt: str
    caption: str
    picture: str = ""


class Section(NamedTuple):
    """What a stage shows: text and tables, and a chart before them."""

    body: Html
    chart: Chart | None = None


def _check(result: Any, record: Any) -> Section:
    rows = result["rows"]
    cells = [
        (row["name"], _verdict(row), brief(row["measured"]), brief(row["limit"]), row["detail"])
        for row in rows
    ]
    bad = [i for i, row in enumerate(rows) if not row["passed"]]
    heads = (Cell("Check", "name"), Cell("Result", "name"), "Measured", "Limit", TEXT)
    word = "All rows passed." if result["passed"] else f"{len(bad)} of {len(rows)} rows failed."
    return Section(join([tag("p", word), table(heads, cells, "Self-test", bad)]))


def _verdict(row: Mapping[str, Any]) -> str:
    limit = str(row["limit"])
    return (
        "untested"
        if limit == "nan"
        else "FAILED"
        if not row["passed"]
        else "note"
        if limit == "inf"
        else "ok"
    )


def _loss(result: Any, record: Any) -> Section:
    metrics = [(name, brief(value, 4)) for name, value in result["metrics"].items()]
    rows = [
        ("loss", with_error(result["loss"], result["stderr"])),
        ("norm of the gradient", brief(result["norm"])),
        ("of which noise of the sample, about", brief(result["noise"])),
        ("batches", f"{result['batches']:,}"),
        ("examples, or their weights", brief(result["examples"], 6)),
        *metrics,
    ]
    return Section(table((Cell("", "name"), "Value"), rows, "Loss and gradient"))


def _trace(result: Any, record: Any) -> Section:
    shapes = record["problem"]["shapes"]
    total = result["total"]
    rows = [
        (row["path"], shape_text(tuple(shapes.get(row["path"], ()))), f"{row['parameters']:,}",
         brief(row["trace"]), brief(row["stderr"], 2), brief(row["data_stderr"], 2),
         percent(real(row["share"])), brief(row["per_parameter"], 2))
        for row in result["leaves"]
    ]  # fmt: skip
    rows += [(name, "group", "", brief(x["mean"]), brief(x["stderr"], 2), brief(x["data_stderr"], 2),
              _share(x, total), "") for name, x in result["groups"].items()]  # fmt: skip
    heads = (NAME, Cell("Shape", "name"), "Params", "Trace", "± probes", "± data", "Share %", "Mean λ")
    said = (
        f"The trace is {with_error(total['mean'], total['stderr'])}, by {total['num_samples']} probes;"
        f" that of the data being a sample is {brief(total['data_stderr'], 2)}."
    )
    return Section(
        join([tag("p", said), table(heads, rows, "Curvature by layer")]), _by_layer(result["leaves"])
    )


def _share(estimate: Mapping[str, Any], total: Mapping[str, Any]) -> str:
    return percent(real(estimate["mean"]) / real(total["mean"])) if real(total["mean"]) else ""


def _by_layer(leaves: list[Any]) -> Chart:
    rows = [
        {"label": row["path"], "value": finite(row["per_parameter"]),
         "error": _per_weight(row)} for row in leaves if finite(row["per_parameter"]) is not None
    ]  # fmt: skip
    top = max(rows, key=lambda row: abs(row["value"] or 0), default={"label": "none", "value": 0})
    alt = f"Mean eigenvalue of each layer's block; the largest is {brief(top['value'])} in {top['label']}."
    caption = "Mean eigenvalue of the block of each layer, with two standard errors of the probes."
    return Chart(
        {"kind": "dots", "rows": rows, "x": {"label": "mean eigenvalue"}}, alt, caption, "layers.png"
    )


def _per_weight(row: Mapping[str, Any]) -> float | None:
    error = finite(row["stderr"])
    return None if error is None or not row["parameters"] else error / row["parameters"]


def _pruning(result: Any, record: Any) -> Section:
    levels = result["levels"]
    if not levels:
        return Section(tag("p", f"Nothing was pruned: {result.get('why_not', '')}."))
    names = list(levels[0]["metrics"])
    dense = real(record["stages"]["loss"]["result"]["loss"])
    rows = [
        (percent(row["sparsity"]), brief(row["loss"]), brief(row["rise"], 2), brief(row["predicted"], 2),
         *(brief(row["metrics"][name], 4) for name in names)) for row in levels
    ]  # fmt: skip
    heads = ("Zeros %", "Loss", "Rise", "Predicted rise", *names)
    measured = [(row["sparsity"], finite(row["loss"])) for row in levels]
    expected = [(row["sparsity"], dense + real(row["predicted"])) for row in levels]
    series = [
        {"name": "measured", "points": measured},
        {"name": "predicted by the mean curvature", "points": expected},
    ]
    spec = {
        "kind": "lines",
        "series": series,
        "x": {"label": "zeros", "percent": True},
        "y": {"label": "loss"},
    }
    ends = " and ".join(f"{brief(x['loss'])} at {percent(x['sparsity'])} %" for x in (levels[0], levels[-1]))
    alt = f"Loss against zeros: {ends}; {brief(dense)} without any."
    caption = f"The least weights by magnitude at zero, without any training. Dense: {brief(dense)}."
    note = tag("p", result["why_not"]) if "why_not" in result else Html("")
    body = join([table(heads, rows, "Pruned at once"), note])
    return Section(body, Chart(spec, alt, caption, "pruning.png"))


def _eigenvalues(result: Any, record: Any) -> Section:
    data = result["data_stderr"] or [None] * len(result["values"])
    columns = zip(result["values"], result["residuals"], result["converged"], data, strict=True)
    rows = [
        (i, brief(v, 5), brief(r, 2), "yes" if c else "no", brief(d, 2))
        for i, (v, r, c, d) in enumerate(columns, 1)
    ]
    bad = [i for i, good in enumerate(result["converged"]) if not good]
    heads = (Cell("", "name"), "Eigenvalue", "Residual", "Converged", "± data")
    note = f"An eigenvalue lies within the residual of each value; in {CURVATURE}."
    return Section(join([table(heads, rows, "Eigenvalues", bad), tag("p", note, class_="quiet small")]))


def _density(result: Any, record: Any) -> Section:
    points = [(real(x), real(y)) for x, y in zip(result["grid"], result["share"], strict=True)]
    top = max(y for _, y in points)
    floor = top * 1e-6
    shown = [(x, max(y, floor)) for x, y in points]
    low, high = points[0][0], points[-1][0]
    spec = {
        "kind": "lines", "filled": True, "series": [{"name": "density", "points": shown}],
        "marks": _marks(record),
        "x": {"label": "eigenvalue", "type": "symlog", "constant": result["threshold"],
              "domain": [low, high]},
        "y": {"label": "share per unit of the axis", "type": "log", "domain": [floor, 2 * top]},
    }  # fmt: skip
    most = brief(max(points, key=lambda point: point[1])[0], 2)
    alt = f"Density of all eigenvalues between {brief(low)} and {brief(high)}; most lie near {most}."
    caption = "All eigenvalues: the axis is linear near zero, logarithmic beyond. Lines: those of the table."
    said = f"The trace by the density is {with_error(result['trace']['mean'], result['trace']['stderr'])}."
    return Section(tag("p", said), Chart(spec, alt, caption, "density.png"))


def _marks(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = record["stages"].get("eigenpairs", {}).get("result", {}).get("values", [])
    return [{"x": finite(x), "title": f"eigenvalue {brief(x, 5)}"} for x in found if finite(x) is not None]


def _per_layer(result: Any, record: Any) -> Section:
    leaves = result["leaves"]
    rows = [
        (row["path"], f"{row['parameters']:,}", brief(row["largest"]), brief(row["least"])) for row in leaves
    ]
    spec = {"kind": "dots", "x": {"label": "eigenvalue"}, "rows": [
        {"label": row["path"], "name": name, "value": finite(row[name])}
        for row in leaves for name in ("largest", "least")
    ]}  # fmt: skip
    top = max(leaves, key=lambda row: real(row["largest"]), default={"path": "none", "largest": 0})
    most = f"the largest is {brief(top['largest'])} in {top['path']}"
    alt = f"Largest and least eigenvalue of each layer's block; {most}."
    caption = (
        f"Ends of the spectrum of each layer's block, bounds from inside by {result['steps']} Lanczos steps."
    )
    return Section(
        table((NAME, "Params", "Largest", "Least"), rows, "Spectrum by layer"),
        Chart(spec, alt, caption, "per-layer.png"),
    )


def _landscape(result: Any, record: Any) -> Section:
    xs, *rest = ([real(x) for x in axis] for axis in result["distances"])
    if not rest:
        points = list(zip(xs, map(finite, result["losses"]), strict=True))
        spec: dict[str, Any] = {"kind": "lines", "series": [{"name": "loss", "points": points}],
                                "x": {"label": "distance"}, "y": {"label": "loss"}}  # fmt: skip
    else:
        z = [[finite(x) for x in row] for row in result["losses"]]
        log = all(x is not None and x > 0 for row in z for x in row)
        spec = {
            "kind": "map", "xs": xs, "ys": rest[0], "z": z, "log": log, "label": "loss",
            "x": {"label": "along the steepest direction"}, "y": {"label": "along the second steepest"},
        }  # fmt: skip
    flat = [real(x) for row in result["losses"] for x in (row if isinstance(row, list) else [row])]
    alt = f"The loss around the weights, from {brief(min(flat))} to {brief(max(flat))}."
    caption = (
        "The loss across the plane of the two steepest eigenvectors, as far as it is expected to double."
    )
    return Section(Html(""), Chart(spec, alt, caption, "landscape.png"))


def _layers(result: Any, record: Any) -> Section:
    quality = result["kfac"] or {"leaves": []}
    errors = {row["path"]: row for row in quality["leaves"]}
    rows = []
    for row in result["leaves"]:
        error = errors.get(row["path"])
        told = "" if error is None else with_error(error["error"], error["stderr"])
        rows.append(
            (row["path"], "; ".join(dict.fromkeys(row["uses"])), row["times"] or "", told, row["reason"])
        )
    heads = (NAME, Cell("Takes part in", "text"), "Times", "K-FAC error", Cell("Not covered", "text"))
    said = (
        f"K-FAC was not measured: {result['why_not']}." if result["kfac"] is None else
        f"K-FAC is off by {percent(real(quality['error']))} % of the Fisher matrix's norm; "
        f"{percent(real(quality['outside']))} % of its square lies between the layers, which no block has."
    )  # fmt: skip
    return Section(join([tag("p", said), table(heads, rows, "Layers")]))


SECTIONS: dict[str, Callable[[Any, Any], Section]] = {
    "check": _check,
    "loss": _loss,
    "trace": _trace,
    "pruning": _pruning,
    "eigenpairs": _eigenvalues,
    "density": _density,
    "per_layer": _per_layer,
    "landscape": _landscape,
    "layers": _layers,
}

ORDER = ("eigenpairs", "density", "trace", "per_layer", "landscape", "pruning", "loss", "layers", "check")
"""On the page, what is looked at first comes first."""
