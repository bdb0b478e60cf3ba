"""`python -m peers [--quick] [--only SECTION ...]`: ask all, print the tables, keep them with a figure."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Every framework computes on the same device.
os.environ["JAX_PLATFORMS"] = "cpu"

import table

from peers import problems, report, summary
from peers.questions import SECTIONS

README = Path(__file__).parents[2] / "README.md"
CHEAP = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "OMP_NUM_THREADS": "1",
}
"""Most of a short run is compiling; and two threads wait for each other where there is little to do."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="peers", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: does it run? The figures mean little"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    given = parser.parse_args()
    if given.quick:
        os.environ.update({**CHEAP, **os.environ})
    result: dict[str, Any] = read(given.quick) if given.only != list(SECTIONS) else {"sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        for section in given.only:
            began = time.perf_counter()
            print(f"{section} ...", flush=True)
            rows = list(SECTIONS[section](given.quick, lambda name: made(Path(folder), name, given.quick)))
            result["sections"][section] = rows
            result |= {"quick": given.quick, "date": datetime.date.today().isoformat(), **table.machine()}
            result["versions"] = versions()
            keep(result)
            print(f"{section}: {time.perf_counter() - began:.0f} s")
    report.show(result)
    if not given.quick:
        README.write_text(table.between(README.read_text(), "peers", summary.markdown(result)))


def made(folder: Path, name: str, quick: bool) -> Path:
    """The problem's file, made in a process of its own the first time it is asked for."""
    path = folder / f"{name}.npz"
    if not path.exists():
        places = [
            str(Path(__file__).parents[1]),
            str(Path(__file__).parents[2]),
            os.environ.get("PYTHONPATH", ""),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        command = [sys.executable, "-m", "peers.problems", name, str(path), *(["--quick"] if quick else [])]
        subprocess.run(command, env=environment, check=True)
    return path


def versions() -> dict[str, str]:
    """Of all that take part, where they are installed."""
    from importlib import metadata

    found = {}
    for package in problems.PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def place(quick: bool) -> Path:
    """Where the result is kept: beside the other benchmarks' quick ones, or in a folder of its own."""
    return table.folder(quick) / "peers" / f"{table.slug(table.machine()['device'])}.json"


def read(quick: bool) -> dict[str, Any]:
    """The last result, into which a run of some sections goes."""
    path = place(quick)
    return json.loads(path.read_text()) if path.exists() else {"sections": {}}


def keep(result: dict[str, Any]) -> None:
    """As JSON and as a figure."""
    path = place(result["quick"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.rounded(result), indent=1, ensure_ascii=False) + "\n")
    report.draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
