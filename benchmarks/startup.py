"""How long does it take to start: the import, and the first eigenvalue?"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import table

IMPORT = """
import time
import jax, optax
start = time.perf_counter()
import hessjax
print(time.perf_counter() - start)
"""
FIRST_EIGENVALUE = Path(__file__).with_name("first_eigenvalue.py")


def measure(quick: bool) -> table.Measured:
    raw = {
        "import": [printed_by("-c", IMPORT) for _ in range(2 if quick else 9)],
        "first eigenvalue": [printed_by(str(FIRST_EIGENVALUE)) for _ in range(1 if quick else 5)],
    }
    return [
        figure_of("import hessjax, beyond jax and optax", raw["import"], 0.3),
        figure_of("from import to the first eigenvalue", raw["first eigenvalue"], 15.0),
    ], raw


def printed_by(*arguments: str) -> float:
    """The number that a fresh interpreter prints, no compiled code kept from earlier ones."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def figure_of(name: str, times: list[float], bar: float) -> table.Figure:
    note = f"{min(times):.2f}–{max(times):.2f} s in {len(times)} fresh interpreters"
    return table.Figure(name, statistics.median(times), "s", bar, note=note)


if __name__ == "__main__":
    table.main(__doc__, measure)
