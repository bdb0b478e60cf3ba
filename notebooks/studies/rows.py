"""Where a study keeps what it has measured: rows of a JSON file, written as soon as each exists."""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks" / "results"
sys.path.append(str(ROOT / "benchmarks"))  # the networks, data and loops of the benchmarks are used here

import table


class Rows:
    """Rows by name; those that are in the file are not measured again.

    Args:
        name: of the file.
        settings: of the measuring; a file of others is refused.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.path = FOLDER / f"{name}.json"
        settings = json.loads(json.dumps(settings))
        fresh = {"settings": settings, "machine": table.machine(), "rows": {}}
        self.content = json.loads(self.path.read_text()) if self.path.exists() else fresh
        if self.content["settings"] != settings:
            raise ValueError(
                f"The rows of {self.path} must have been measured with the settings of the script, "
                f"{settings}, got {self.content['settings']}: move the file away to measure anew."
            )

    def missing(self, names: Iterator[str]) -> Iterator[str]:
        """The names without a row, each told as its turn comes."""
        for name in names:
            if name not in self.content["rows"]:
                print(f"{name} ...", flush=True)
                yield name

    def keep(self, name: str, row: Mapping[str, Any]) -> None:
        """Write the row down, the file replaced in one go."""
        self.content["rows"][name] = dict(row)
        rows = ",\n".join(f"  {json.dumps(key)}: {_dumped(row)}" for key, row in self.content["rows"].items())
        head = (f" {json.dumps(key)}: {json.dumps(self.content[key])}" for key in ("settings", "machine"))
        self.path.parent.mkdir(exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text("{\n" + ",\n".join([*head, ' "rows": {\n' + rows + "\n }"]) + "\n}\n")
        draft.replace(self.path)


def load(name: str) -> dict[str, dict[str, Any]]:
    """The rows that are kept."""
    return json.loads((FOLDER / f"{name}.json").read_text())["rows"]


def _dumped(tree: Any) -> str:
    """One line for each row, floats to four digits, so that the file stays small."""
    return json.dumps(_rounded(tree), separators=(",", ":"))


def _rounded(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_rounded(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


# -- for the notebooks ---------------------------------------------------------------------------


def mean(values: Sequence[float]) -> str:
    """Mean ± standard error over the seeds."""
    spread = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def shown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Any:
    """A table in a notebook."""
    from IPython.display import Markdown

    rule = ["---", *["---:"] * (len(columns) - 1)]
    return Markdown("\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rule, *lines]))
