"""Executes every notebook here and keeps its outputs; with --quick in a short form that keeps nothing."""

import argparse
import os
import pathlib
import time

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent


def execute(path: pathlib.Path, quick: bool) -> float:
    """Run one notebook from top to bottom; the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": FOLDER}}).execute()
    if not quick:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day, which change at every run
        nbformat.write(notebook, path)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small settings; the files stay as they are")
    quick = parser.parse_args().quick
    if quick:
        os.environ["HESSJAX_QUICK"] = "1"
        # Most of a short run is compiling.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    for path in sorted(FOLDER.glob("*.ipynb")):
        print(f"{path.name}: executed in {execute(path, quick):.0f} s", flush=True)


if __name__ == "__main__":
    main()
