"""The pages of a report and of a pruning: the reading first, then what was measured, how, at what cost."""

from collections.abc import Iterator, Mapping, Sequence
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
from hessjax._report._pruned_sections import pruned_sections
from hessjax._report._sections import ORDER, SECTIONS, Section
from hessjax._report._words import TITLES

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
        _banner(record, "analyze"),
        tag("section", _numbers(record)),
        answers(record.get("reading", [])),
        *_pruned(record, charts),
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


def pruned_page(record: Mapping[str, Any]) -> str:
    """The page of a pruning, as far as it has got."""
    problem, charts, stages = record["problem"], dict[str, Any](), record["stages"]
    after = stages.get("network", {"result": {"how": "", "files": []}})["result"]
    title = f"{problem['name']}, pruned"
    parts = [
        tag("h1", title),
        tag("p", f"{after['how'][:1].upper()}{after['how'][1:]}.", class_="quiet") if after["how"] else "",
        _banner(record, "prune"),
        *pruned_sections(stages, problem["parameters"], charts),
        _cost(record),
        _made(record, [f"Beside this page: {', '.join([*after['files'], 'report.json'])}."]),
    ]
    return document(title, parts, charts)


def _pruned(record: Mapping[str, Any], charts: dict[str, Any]) -> Iterator[Html]:
    """Before and after, where a pruning was added to the report."""
    if (pruned := record.get("pruned")) is None:
        return
    after = pruned["stages"]["network"]["result"]
    said = f"{after['how'][:1].upper()}{after['how'][1:]}; the network is in `{pruned['folder']}`."
    inside = pruned_sections(pruned["stages"], record["problem"]["parameters"], charts, "h3")
    yield tag("section", tag("h2", "Pruned"), tag("p", said), *inside, id="section-pruned")


def _banner(record: Mapping[str, Any], command: str) -> Html:
    if record["complete"]:
        return Html("")
    told = f"This is not finished: what stands here is done, and `hessjax {command} … --resume` goes on."
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
    stages = {**record["stages"], **record.get("pruned", {"stages": {}})["stages"]}
    done = {name: entry for name, entry in stages.items() if "result" in entry}
    rows = [(TITLES[name], brief(x["products"], 4), f"{x['seconds']:.1f}") for name, x in done.items()]
    products, seconds = (sum(x[key] or 0 for x in done.values()) for key in ("products", "seconds"))
    total = ("all", brief(products, 5), f"{seconds:.1f}")
    said = "A product is one Hessian-vector product over all the data; a pass of losses counts as a quarter."
    heads = (Cell("Part", "name"), "Products", "Seconds")
    return tag(
        "section",
        tag("h2", "What it cost"),
        table(heads, [*rows, total], "Cost"),
        tag("p", said, class_="quiet small"),
    )


def _made(record: Mapping[str, Any], more: Sequence[str] | None = None) -> Html:
    made = record["environment"]
    versions = ", ".join(f"{name} {x}" for name, x in made["versions"].items() if x)
    seed = f"Seed {record.get('asked', {}).get('seed', 0)}. Numbers are in report.json, pictures beside it."
    lines = [
        f"{versions}; Python {made['python']}; {made['platform']}; {made['device']}, {made['cores']} cores.",
        *([seed] if more is None else more),
        "Charts by Observable Plot and D3 (ISC licence), which are in this page; it loads nothing.",
    ]
    return tag(
        "section", tag("h2", "How it was made"), join(tag("p", line, class_="quiet small") for line in lines)
    )
