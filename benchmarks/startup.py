"""How long does it take to start: the import, and the first eigenvalue?"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table

IMPORT = """
import time
import jax, optax
start = time.perf_counter()
import hessjax
print(time.perf_counter() - start)
"""
KEEP_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
FIRST_EIGENVALUE = Path(__file__).with_name("first_eigenvalue.py")


def measure(quick: bool) -> table.Measured:
    rounds = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        kept = {"JAX_COMPILATION_CACHE_DIR": folder, **KEEP_ALL}
        raw = {
            "import": [printed_by("-c", IMPORT) for _ in range(2 if quick else 9)],
            "first eigenvalue": [time_of(str(FIRST_EIGENVALUE)) for _ in range(rounds)],
            "kept": [time_of(str(FIRST_EIGENVALUE), **kept) for _ in range(rounds + 1)][1:],
        }
    return [
        figure_of("import hessjax, beyond jax and optax", raw["import"], 0.3),
        figure_of("from the interpreter's start to the first eigenvalue", raw["first eigenvalue"], 5.0),
        figure_of("the same, programs kept on disk", raw["kept"], None),
    ], raw


def time_of(script: str, **environment: str) -> float:
    """Seconds from the start of a fresh interpreter to what it prints, once it has the eigenvalue."""
    start = time.time()
    return printed_by(script, **environment) - start


def printed_by(*arguments: str, **environment: str) -> float:
    """The number that a fresh interpreter prints, with no compiled code but what the environment keeps."""
    environment = {"JAX_ENABLE_COMPILATION_CACHE": str(bool(environment)), **environment}
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE
    )
    return float(done.stdout)


def figure_of(name: str, times: list[float], bar: float | None) -> table.Figure:
    note = f"{min(times):.2f}–{max(times):.2f} s in {len(times)} fresh interpreters"
    return table.Figure(name, statistics.median(times), "s", bar, note=note)


if __name__ == "__main__":
    table.main(__doc__, measure)
