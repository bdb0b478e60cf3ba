"""The rows as tables, in Markdown, and as a figure. The JSON is enough; the figure needs matplotlib."""

import functools
import statistics
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from peers import problems

Row = dict[str, Any]
NAMES = {
    "hessjax": "hessjax",
    "pyhessian": "PyHessian",
    "curvlinops": "curvlinops",
    "eigenthings": "hessian-eigenthings",
    "matfree": "matfree",
    "traceax": "traceax",
    "torch": "PyTorch by hand",
    "torch_pruning": "torch-pruning",
    "jax": "JAX by hand",
}
PROBLEMS = {
    "digits_in_conv_net": "Conv net with BatchNorm, 1106 weights, 1030 digits in batches of 256, and of 6",
    "digits_in_mlp": "MLP 64-256-256-10, 85 002 weights, 1797 digits in one batch",
    "digits_in_deep_mlp": "MLP 64-64-…-64-10 with eight hidden layers, 1797 digits in one batch",
    "mlp": "MLP 784-1024-1024-10, 1.9 million weights, 512 images",
    "encoder": "Encoder 6 × 384, 12.6 million weights, 16 × 32 tokens",
    "resnet": "ResNet-20, 0.27 million weights, 128 images of 32 × 32",
}
ASKED = {
    "top-5": "the five largest eigenvalues, to 1e-4",
    "top-10": "the ten largest eigenvalues, to 1e-4",
    "trace": "trace, to a standard error of 5 %",
    "density": "spectral density of three probes, to W₁ of 0.5 % of the range",
    "layer traces": "the traces of all layers' weights, each to a standard error of 10 %",
}


def markdown(result: dict[str, Any]) -> str:
    """All sections."""
    sections = {"answers": answers, "products": products, "estimates": estimates}
    sections |= {"inverse_fisher": plain("Inverse Fisher"), "layers": answers, "layer_traces": answers}
    sections |= {"one_shot": one_shot, "training_step": training_step, "compact": compact}
    sections |= {"start": plain("Start")}
    parts = [
        make(result["sections"][name]) for name, make in sections.items() if result["sections"].get(name)
    ]
    return "\n\n".join([head(result), *parts]) + "\n"


def head(result: dict[str, Any]) -> str:
    """Where it was measured, and with what."""
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['device']}, {result['processor']}, Python {result['python']}, {result['date']}"
    small = " Sizes are smaller than the titles say: the figures mean little." * result["quick"]
    return f"`make peers{' QUICK=1' * result['quick']}` on {where}; {packages}.{small}"


def answers(rows: list[Row]) -> str:
    """A table for each network; a block for each thing that was asked."""
    columns = ["", "way", "first", "later", "× ours", "products", "MB", "error", ""]
    return "\n\n".join(
        f"### {PROBLEMS[problem]}\n\n" + grid(columns, list(_answer_lines(list(group))))
        for problem, group in groupby(rows, lambda line: line["question"].split(": ")[0])
    )


def _answer_lines(rows: list[Row]) -> Iterator[list[str]]:
    for asked, group in groupby(rows, lambda line: line["question"].split(": ")[1]):
        yield [f"**{ASKED.get(asked, asked)}**"]
        for line in group:
            yield [
                peer(line),
                way(line),
                first(line),
                later(line),
                ratio(line),
                str(line.get("products", "")),
                f"{line['peak_mb']:.0f}" if "peak_mb" in line else "",
                number(line.get("error"), 2),
                verdict(line),
            ]


def verdict(line: Row) -> str:
    """What to know about the row."""
    if "failed" in line:
        return line["failed"]
    wrong = [] if line.get("right", True) else ["**not right**"]
    return "; ".join([*wrong, *([line["note"]] if line.get("note") else [])])


def products(rows: list[Row]) -> str:
    """Milliseconds: kinds down, peers across, for each network."""
    return "\n\n".join(
        f"### {PROBLEMS[problem]}: milliseconds for one product\n\n" + _product_grid(list(group))
        for problem, group in groupby(rows, lambda line: line["question"].split(": ")[0])
    )


def _product_grid(rows: list[Row]) -> str:
    measured = [line for line in rows if line["way"]]
    peers = list(dict.fromkeys(line["peer"] for line in measured))
    kinds = list(dict.fromkeys(line["way"] for line in measured))
    cells = {(line["way"], line["peer"]): _product_cell(line) for line in measured}
    lines = [[kind, *(cells.get((kind, peer), "") for peer in peers)] for kind in kinds]
    said = [
        f"{NAMES[line['peer']]}, {line['way'] or 'all'}: {text}."
        for line in rows
        if (text := line.get("failed", line.get("note")))
    ]
    return "\n\n".join([grid(["", *map(NAMES.get, peers)], lines), *said])


def _product_cell(line: Row) -> str:
    if "later" not in line:
        return "fails"
    marks = " (busy)" * line.get("busy", False) + " (differs)" * (not line.get("right", True))
    return f"{1e3 * line['later']:.3g}{marks}"


def estimates(rows: list[Row]) -> str:
    """Mean relative error, and how often ±2 standard errors held the truth."""
    columns = ["", *dict.fromkeys(f"{NAMES[line['peer']]}, {line['way']}" for line in rows if line["way"])]
    lines = []
    for question, group in groupby((line for line in rows if line["way"]), lambda line: line["question"]):
        cells = {f"{NAMES[line['peer']]}, {line['way']}": _estimate_cell(line) for line in group}
        lines.append([question, *(cells.get(column, "") for column in columns[1:])])
    turned = [list(cells) for cells in zip(columns, *lines, strict=True)]
    return (
        "### Traces with as many products each\n\nMean relative error; in brackets, how many of ±2 reported "
        "standard errors hold the truth.\n\n" + grid(turned[0], turned[1:])
    )


def _estimate_cell(line: Row) -> str:
    if "failed" in line:
        return "fails"
    held = line.get("coverage")
    return number(line["error"], 2) + ("" if held is None else f" ({100 * held:.0f} %)")


def plain(title: str) -> Any:
    """A section with one line for each row."""
    columns = {"": asked, " ": peer, "way": way, "seconds": later, "× ours": ratio, "  ": verdict}
    return lambda rows: f"### {title}\n\n" + listed(rows, columns)


def one_shot(rows: list[Row]) -> str:
    """Accuracies at each sparsity, mean and spread over the seeds."""
    sparsities = [f"{s:.0%}" for s in problems.TO_PRUNE["sparsities"]]
    right = {s: functools.partial(_accuracy, index=i) for i, s in enumerate(sparsities)}
    columns = {"": peer, "rule": way, **right, "first": first, "later": later, "× ours": ratio, " ": verdict}
    words = (
        "Percent of 360 digits right after pruning an MLP 64-40-20-10, ± over three seeds. Of WoodFisher's "
        "rule both sides take the same gradients, damping and matrices, and the time is that of one network."
    )
    return f"### Pruning at one go, without training\n\n{words}\n\n" + listed(rows, columns)


def _accuracy(line: Row, index: int) -> str:
    if index >= len(line.get("accuracies", [])):
        return ""
    values = line["accuracies"][index]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def training_step(rows: list[Row]) -> str:
    """Milliseconds of a step, and what the masks add to a bare one."""
    added = lambda line: f"{100 * line['added']:+.0f} %" if "added" in line else ""  # noqa: E731
    columns = {
        "": peer,
        "step": way,
        "first": first,
        "later": later,
        "× ours": ratio,
        "added": added,
        " ": verdict,
    }
    return "\n\n".join(
        f"### {PROBLEMS[problem]}: a training step, each layer at 90 % zeros\n\n"
        + listed(list(group), columns)
        for problem, group in groupby(rows, lambda line: line["question"].split(": ")[0])
    )


def compact(rows: list[Row]) -> str:
    """The forward pass before and after."""
    columns = {
        "": peer,
        "to cut, first": lambda line: seconds(line.get("cut_first")),
        "again": lambda line: seconds(line.get("cut")),
        "before": lambda line: seconds(line.get("before")),
        "after": later,
        "after / before": lambda line: number(line.get("share"), 2),
        "× ours": ratio,
        "weights": lambda line: " → ".join(f"{n:,}" for n in line.get("weights", [])),
        " ": verdict,
    }
    title = "ResNet-20 without half of the channels inside its blocks: a forward pass of 128 images"
    return f"### {title}\n\n" + listed(rows, columns)


# -- cells -----------------------------------------------------------------------------------------


def listed(rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """A line for each row."""
    return grid(list(columns), [[cell(line) for cell in columns.values()] for line in rows])


def asked(line: Row) -> str:
    return line["question"].split(": ")[-1]


def peer(line: Row) -> str:
    return NAMES[line["peer"]]


def way(line: Row) -> str:
    return line["way"]


def first(line: Row) -> str:
    return seconds(line.get("first"))


def later(line: Row) -> str:
    return seconds(line.get("later")) + " (busy)" * line.get("busy", False)


def ratio(line: Row) -> str:
    return number(line.get("ratio"))


def grid(columns: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown; short lines are filled up."""
    full = [line + [""] * (len(columns) - len(line)) for line in lines]
    rows = [columns, ["---"] * len(columns), *full]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def rounded(tree: Any) -> Any:
    """Every float to five digits, so that the file stays readable."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree


def show(result: dict[str, Any]) -> None:
    """On the terminal."""
    print(markdown(result))


def draw(result: dict[str, Any], path: Path) -> None:
    """Theirs over ours, one dot for each row that is right: to the right of the line we are faster."""
    from matplotlib.figure import Figure

    chosen = [name for name in ("answers", "layer_traces", "products") if result["sections"].get(name)]
    lines = [line for name in chosen for line in result["sections"][name]]
    lines = [line for line in lines if "ratio" in line and line["peer"] != "hessjax"]
    questions = list(dict.fromkeys(line["question"] for line in lines))[::-1]
    if not questions:
        return
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(questions)), layout="constrained")
    axes = figure.add_subplot()
    for i, peer in enumerate(name for name in NAMES if any(line["peer"] == name for line in lines)):
        for right in (True, False):
            dots = [x for x in lines if x["peer"] == peer and x.get("right", True) == right]
            places = [questions.index(line["question"]) for line in dots]
            face = {"facecolors": f"C{i}"} if right else {"facecolors": "none"}
            label = {"label": NAMES[peer]} if right else {}
            axes.scatter([line["ratio"] for line in dots], places, edgecolors=f"C{i}", **face, **label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(questions)), [question.replace("_", " ") for question in questions])
    axes.set_xlabel("time of the peer over ours (hollow: the answer was not right)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=130)
