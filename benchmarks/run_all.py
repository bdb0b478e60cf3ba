"""What do all benchmarks say? Runs every one in turn; shows their figures, and writes the page of them."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import table

README = Path(__file__).parent / "README.md"
SCRIPTS = (
    "product_cost",
    "estimator_cost",
    "eigenpairs_products",
    "trace_accuracy",
    "error_bars",
    "density_accuracy",
    "density_memory",
    "inverse_fisher_cost",
    "pruning_cost",
    "compact_speed",
    "one_shot_pruning",
    "layerwise_pruning",
    "influence_accuracy",
    "pruning_in_training",
    "transfer_learning",
    "layerwise_encoder",
    "compilations",
    "many_devices",
    "startup",
)


LONG = ("many_devices", "layerwise_encoder")
"""A minute even in short, and made of what others run: tests, and `layerwise_pruning` with another task."""

CHEAP = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
"""Most of a short run is compiling."""


def run(script: str) -> bool:
    """Whether it ended well."""
    began = time.perf_counter()
    print(f"{script} ...", end=" ", flush=True)
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *sys.argv[1:]]
    ended_well = subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    print(f"{time.perf_counter() - began:.0f} s", flush=True)
    return ended_well


def into_readme(results: Sequence[dict[str, Any]]) -> None:
    """Put the table between its two marks, and every grid between its own, where the page has some."""
    text = table.between(README.read_text(), "benchmarks", table.markdown(results))
    for script, matrix in table.grids(results).items():
        text = table.between(text, f"grid {script}", matrix)
    README.write_text(text)


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    if quick:
        os.environ.setdefault("XLA_FLAGS", CHEAP)
    asked = [script for script in SCRIPTS if not (quick and script in LONG)]
    failed = [script for script in asked if not run(script)]
    table.show(table.load(quick, asked))
    if not quick and not failed:
        into_readme(table.load(quick, SCRIPTS))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
