"""What do the results say? Figures with their bars, kept as JSON, shown as tables."""

import argparse
import datetime
import inspect
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


class Figure(NamedTuple):
    """One number that answers a part of the question.

    Attributes:
        name: what was measured, in plain words.
        value: the number.
        unit: what it counts.
        bar: the most it may be; None where it is only reported.
        spread: quartiles of the value over the rounds, where there are rounds.
        note: what else the reader wants to see beside it.
    """

    name: str
    value: float
    unit: str
    bar: float | None = None
    spread: tuple[float, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        return None if self.bar is None else self.value <= self.bar


class Grid(NamedTuple):
    """A matrix of one quantity: methods down, settings across.

    Attributes:
        title: what a cell holds, with its unit.
        columns: the settings.
        rows: for each method a list of values, one for each seed, in each column; an empty one where nothing
            was measured.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Sequence[float]]]


Measured = tuple[list[Figure], dict[str, Any]] | tuple[list[Figure], dict[str, Any], Grid]
"""The figures, the raw timings that they were computed from, and a grid where there is one."""


def main(question: str, measure: Callable[[bool], Measured]) -> None:
    """The command line of one benchmark: measure, print, keep."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: does it run? The figures mean little"
    )
    quick = parser.parse_args().quick
    show([keep(question, measure, quick, *measure(quick))])


def keep(
    question: str,
    measure: Callable[[bool], Measured],
    quick: bool,
    figures: list[Figure],
    raw: dict[str, Any],
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Write down what was measured; a benchmark that takes long does so whenever a part is done."""
    result = {
        "script": Path(inspect.getfile(measure)).stem,
        "question": question.strip().splitlines()[0],
        "quick": quick,
        "date": datetime.date.today().isoformat(),
        **machine(),
        "figures": [{**figure._asdict(), "met": figure.met} for figure in figures],
        **({} if grid is None else {"grid": grid._asdict()}),
        "raw": raw,
    }
    path = folder(quick) / f"{result['script']}.{slug(result['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(result), indent=1) + "\n")
    return result


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    kind = jax.devices()[0].device_kind
    return {
        "device": f"CPU, {os.cpu_count()} cores" if kind == "cpu" else kind,
        "processor": _processor(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
    }


def folder(quick: bool) -> Path:
    """Where results are kept; those of quick runs apart."""
    return RESULTS / "quick" if quick else RESULTS


def load(quick: bool, scripts: Sequence[str]) -> list[dict[str, Any]]:
    """The results kept for these scripts, on all devices, in the scripts' order."""
    paths = [path for script in scripts for path in sorted(folder(quick).glob(f"{script}.*.json"))]
    return [json.loads(path.read_text()) for path in paths]


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the figures, a section for each question."""
    quick = any(result["quick"] for result in results)
    table = Table(title="Quick run: tiny sizes, figures that mean little" if quick else None)
    for header in ("", "Measured", "Quartiles", "At most", "", ""):
        table.add_column(header, overflow="fold")
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{result['question']}[/]", *[""] * 4, f"[bold]{result['device']}[/]")
        for figure in result["figures"]:
            mark = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[figure["met"]]
            table.add_row(figure["name"], *_cells(figure), mark, f"[dim]{figure['note']}[/]")
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    console.print(table)


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The figures for README.md beside it: those that have a bar, a line above them for each question."""
    lines = ["| | Measured | At most |", "|---|---|---|"]
    for result in results:
        lines.append(f"| **{result['question']}** ({result['device']}) | | |")
        for figure in result["figures"]:
            if figure["bar"] is not None:
                value, _, bar = _cells(figure)
                lines.append(f"| {figure['name']} | {value} | {bar}{'' if figure['met'] else ' (missed)'} |")
    return "\n".join(lines)


def grids(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The matrices for README.md beside it: by script, one below the other where several devices have one."""
    found: dict[str, list[str]] = {}
    for result in results:
        if "grid" in result:
            found.setdefault(result["script"], []).append(_matrix(result["grid"], result["device"]))
    return {script: "\n\n".join(matrices) for script, matrices in found.items()}


def between(text: str, name: str, content: str) -> str:
    """The text with this content between the marks of that name; as it was, if it has no such marks."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, mark, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    return f"{before}{mark}\n{content.strip()}\n{last}{after}" if mark and last else text


def slug(name: str) -> str:
    """A name fit for a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cells(figure: dict[str, Any]) -> tuple[str, str, str]:
    spread = "–".join(_short(x) for x in figure["spread"]) if figure["spread"] else ""
    bar = "" if figure["bar"] is None else f"{_short(figure['bar'])} {figure['unit']}".strip()
    return f"{_short(figure['value'])} {figure['unit']}".strip(), spread, bar


def _matrix(grid: dict[str, Any], device: str) -> str:
    """Mean ± standard deviation in every cell."""
    num = len(grid["columns"])
    body = [[name, *map(_cell, cells), *[""] * (num - len(cells))] for name, cells in grid["rows"].items()]
    head, *rest = (
        f"| {' | '.join(row)} |" for row in [[f"{grid['title']} ({device})", *grid["columns"]], *body]
    )
    return "\n".join([head, "|---|" + "---:|" * num, *rest])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _short(value: float) -> str:
    return f"{value:d}" if isinstance(value, int) else f"{value:.3g}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def _rounded(tree: Any) -> Any:
    """Every float to five digits, so that the files stay readable."""
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_rounded(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree
