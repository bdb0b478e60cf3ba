"""Pages made at build: the reference, the benchmarks from their JSON, the notebooks, the changelog."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import reference

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "notebooks")]


def setup(app: Any) -> dict[str, bool]:
    """Write everything before Sphinx looks for pages."""
    app.connect("config-inited", lambda app, config: _write_all())
    return {"parallel_read_safe": True}


def _write_all() -> None:
    reference.write(DOCS / "reference")
    _copy_notebooks(DOCS / "tutorials")
    _put(DOCS / "project" / "benchmarks.md", benchmarks())
    _put(DOCS / "_generated" / "peers.md", peers(DOCS / "_generated"))
    _put(DOCS / "_generated" / "claims.md", claims())
    _put(DOCS / "project" / "changelog.md", (ROOT / "CHANGELOG.md").read_text())
    _put(DOCS / "project" / "contributing.md", (ROOT / "CONTRIBUTING.md").read_text())


def _put(path: Path, text: str) -> None:
    """Only where it differs: Sphinx reads again what is newer."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def _copy_notebooks(folder: Path) -> None:
    """The notebooks as they are committed, and the figures that they show."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = path.read_text()
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if "outputs" in cell:
                cell["outputs"] = [output for output in cell["outputs"] if not _is_blank(output)]
        notebook["metadata"].pop("widgets", None)
        _put(folder / path.name, json.dumps(notebook))
        for figure in set(re.findall(r"figures/[\w-]+\.png", text)):
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copy(ROOT / "notebooks" / figure, folder / figure)


def _is_blank(output: dict) -> bool:
    """Whether nothing is left to show: a progress bar that has gone."""
    data = output.get("data", {"text/plain": "shown"})
    return "image/png" not in data and not "".join(data.get("text/plain", "")).strip()


def benchmarks() -> str:
    """The page of benchmarks: for each question its machine, its figures, its grid."""
    found = [
        json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    ]
    return "\n".join([_BENCHMARKS, *map(_section, found)])


def peers(folder: Path) -> str:
    """What `make peers` found, for the page of comparisons; a part for each machine."""
    from peers import report

    parts = []
    for path in sorted((ROOT / "benchmarks" / "results" / "peers").glob("*.json")):
        figure = path.with_suffix(".png")
        picture = f"![Time of each peer over ours](../_generated/peers-{figure.name})\n"
        if figure.exists():
            folder.mkdir(exist_ok=True)
            shutil.copy(figure, folder / f"peers-{figure.name}")
        parts += [picture * figure.exists(), report.markdown(json.loads(path.read_text()))]
    return "\n".join(parts) or "No result is committed yet: `make peers` makes one on your machine.\n"


def claims() -> str:
    """What a study found of a paper's claims, for the front page."""
    from studies import batch_norm_claims

    return batch_norm_claims.markdown(batch_norm_claims.read())


_BENCHMARKS = """# Benchmarks

Each section is one script of `benchmarks/` and answers one question. Figures are ratios within one run where
that is possible, so that they carry over to other machines better than seconds do. *At most* is the bar that
the project sets itself; a missed one stays on the page. This page is made from the JSON files in
`benchmarks/results` when the site is built. `make bench` measures on your machine.
"""


def _section(result: dict) -> str:
    lines = [f"\n## {result['question']}\n"]
    where = f"{result['device']}, {result['processor']}; jax {result['jax']}, Python {result['python']}"
    lines.append(f"`python benchmarks/{result['script']}.py` · {where} · {result['date']}\n")
    lines += ["| | measured | quartiles | at most | |", "|---|---:|---:|---:|---|"]
    lines += [_row(figure) for figure in result["figures"]]
    if "grid" in result:
        lines += ["", *_grid(result["grid"])]
    return "\n".join(lines) + "\n"


def _row(figure: dict) -> str:
    spread = " – ".join(f"{x:.3g}" for x in figure["spread"]) if figure["spread"] else ""
    bar = "" if figure["bar"] is None else f"{figure['bar']:.3g}" + ("" if figure["met"] else " (missed)")
    measured = f"{figure['value']:.3g} {figure['unit']}"
    return f"| {figure['name']} | {measured} | {spread} | {bar} | {figure['note']} |".replace("|w|", "w")


def _grid(grid: dict) -> list[str]:
    """Mean and sample standard deviation over the seeds."""
    head = f"| {grid['title']} | {' | '.join(grid['columns'])} |"
    rows = [f"| {name} | {' | '.join(map(_cell, cells))} |" for name, cells in grid["rows"].items()]
    return [head, "|---|" + "---:|" * len(grid["columns"]), *rows]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5:.1f}"
