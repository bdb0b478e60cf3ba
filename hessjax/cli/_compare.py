"""`hessjax compare`: reports side by side."""

import json as json_text
import re
from pathlib import Path

from rich.console import Console

from hessjax._core import _files
from hessjax._report._compare import Compared, comparison
from hessjax._report._folder import read_record
from hessjax.cli._analyze import print_line


def run_comparison(folders: list[Path], out: Path, steps: str, *, json: bool, console: Console) -> None:
    """Read, and write the page."""
    at = _steps(folders, steps)
    names = _names(folders)
    rows = zip(names, folders, at, strict=True)
    reports = [Compared(name, read_record(folder), step) for name, folder, step in rows]
    page = comparison(reports)
    _files.write_whole(out, lambda file: file.write(page.encode()))
    if json:
        print(json_text.dumps({report.name: report.record for report in reports}, ensure_ascii=False))
    else:
        print_line(console, f"Written to {out}")


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path where these differ, else all of it."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _steps(folders: list[Path], steps: str) -> list[float | None]:
    """What `--steps` says, or the numbers at the ends of all names."""
    if steps:
        parts = steps.split(",")
        if len(parts) != len(folders):
            raise ValueError(f"`--steps` must give a number for each of {len(folders)} folders, got {steps}.")
        try:
            return [float(part) for part in parts]
        except ValueError:
            raise ValueError(f"`--steps` must be numbers with commas between, got {steps}.") from None
    found = [re.search(r"(\d+)$", folder.resolve().name) for folder in folders]
    return [float(x[1]) for x in found if x] if all(found) else [None] * len(folders)
