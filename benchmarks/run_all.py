"""What do all benchmarks say? Runs every one in turn, then shows their figures in one table."""

import subprocess
import sys
from pathlib import Path

import table

SCRIPTS = ("product_cost", "lanczos_cost", "pruning_cost", "compilations", "startup")


def run(script: str) -> bool:
    """Whether it ended well."""
    print(f"{script} ...", flush=True)
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *sys.argv[1:]]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    failed = [script for script in SCRIPTS if not run(script)]
    table.show(table.load("--quick" in sys.argv, SCRIPTS))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
