"""The page of a report: the reading first, then what was measured, then how, and at what cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessjax._report._html import (
    Cell,
    Html,
    brief,
    chart,
    document,
    join,
    read_picture,
    table,
    tag,
    with_error,
)
from hessjax._report._sections import ORDER, SECTIONS, Section

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
}
VERDICTS = {"good": "✓", "care": "!", "unknown": "?"}


def page(record: Mapping[str, Any], folder: Path) -> str:
    """The record as a page that needs nothing else; figures are read from the folder."""
    problem = record["problem"]
    charts: dict[str, Any] = {}
    parts = [
        tag("h1", problem["name"]),
        tag(
            "p",
            f"Curvature report: {problem['parameters']:,} parameters in {len(problem['shapes'])} leaves.",
            class_="quiet",
        ),
        _banner(record),
        tag("section", _numbers(record)),
        answers(record.get("reading", [])),
        *(
            _section(name, record, folder, charts)
            for name in ORDER
            if "result" in record["stages"].get(name, {})
        ),
        _left_out(record),
        _cost(record),
        _made(record),
    ]
    return document(f"{problem['name']}: curvature report", parts, charts)


def _banner(record: Mapping[str, Any]) -> Html:
    if record["complete"]:
        return Html("")
    told = "This report is not finished: what stands here is done, and `hessjax analyze … --resume` goes on."
    return tag("p", told, class_="banner")


def _numbers(record: Mapping[str, Any]) -> Html:
    found = {name: entry["result"] for name, entry in record["stages"].items() if "result" in entry}
    cards = []
    if loss := found.get("loss"):
        cards.append(("loss", with_error(loss["loss"], loss["stderr"])))
        cards += [(name, brief(value, 4)) for name, value in loss["metrics"].items()]
    if pairs := found.get("eigenpairs"):
        cards.append(("largest eigenvalue", brief(pairs["values"][0], 4)))
    if trace := found.get("trace"):
        cards.append(("trace", with_error(trace["total"]["mean"], trace["total"]["stderr"])))
    boxes = [tag("div", tag("b", value), tag("span", name, class_="quiet small")) for name, value in cards]
    return tag("div", *boxes, class_="numbers")


def answers(lines: Any) -> Html:
    """The reading: questions with their answers and rules."""
    if not lines:
        return Html("")
    boxes = [
        tag(
            "div",
            tag(
                "h3",
                tag("span", f"{VERDICTS[line['verdict']]} ", class_="verdict", aria_hidden="true"),
                line["question"],
            ),
            tag("p", line["answer"]),
            tag("details", tag("summary", "The rule"), tag("p", line["rule"], class_="small")),
            class_=f"answer {line['verdict']}",
        )
        for line in lines
    ]
    return tag("section", tag("h2", "In plain words"), tag("div", *boxes, class_="answers"))


def _section(name: str, record: Mapping[str, Any], folder: Path, charts: dict[str, Any]) -> Html:
    made: Section = SECTIONS[name](record["stages"][name]["result"], record)
    return tag("section", tag("h2", TITLES[name]), *placed(name, made, folder, charts), id=f"section-{name}")


def placed(name: str, made: Section, folder: Path, charts: dict[str, Any]) -> list[Html]:
    """A section's chart and text; what the script is to draw is added to `charts`."""
    if made.chart is None:
        return [made.body]
    charts[f"chart-{name}"] = made.chart.spec
    picture = read_picture(folder, made.chart.picture) if made.chart.picture else None
    return [chart(f"chart-{name}", made.chart.alt, picture, made.chart.caption), made.body]


def _left_out(record: Mapping[str, Any]) -> Html:
    left = {TITLES[name]: entry["skipped"] for name, entry in record["stages"].items() if "skipped" in entry}
    if not left:
        return Html("")
    items = [tag("p", f"{title}: {reason}.") for title, reason in left.items()]
    return tag("section", tag("h2", "Left out"), *items)


def _cost(record: Mapping[str, Any]) -> Html:
    rows = [
        (TITLES[name], brief(entry["products"], 4), f"{entry['seconds']:.1f}")
        for name, entry in record["stages"].items()
        if "result" in entry
    ]
    done = [entry for entry in record["stages"].values() if "result" in entry]
    total = ("all", brief(sum(x["products"] for x in done), 5), f"{sum(x['seconds'] for x in done):.1f}")
    said = "A product is one Hessian-vector product over all the data; a pass of losses counts as a quarter."
    heads = (Cell("Part", "name"), "Products", "Seconds")
    return tag(
        "section",
        tag("h2", "What it cost"),
        table(heads, [*rows, total], "Cost"),
        tag("p", said, class_="quiet small"),
    )


def _made(record: Mapping[str, Any]) -> Html:
    made = record["environment"]
    versions = ", ".join(f"{name} {x}" for name, x in made["versions"].items() if x)
    asked = record.get("asked", {})
    lines = [
        f"{versions}; Python {made['python']}; {made['platform']}; {made['device']}, {made['cores']} cores.",
        f"Seed {asked.get('seed', 0)}. Numbers are in report.json beside this page, pictures as PNG files.",
        "Charts by Observable Plot and D3 (ISC licence), which are in this page; it loads nothing.",
    ]
    return tag(
        "section", tag("h2", "How it was made"), join(tag("p", line, class_="quiet small") for line in lines)
    )
