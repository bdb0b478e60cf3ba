"""What do all benchmarks say? Runs every one in turn; shows their figures, and puts them into the README."""

import subprocess
import sys
from pathlib import Path

import table

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SCRIPTS = (
    "product_cost",
    "estimator_cost",
    "eigenpairs_products",
    "trace_accuracy",
    "density_accuracy",
    "density_memory",
    "inverse_fisher_cost",
    "pruning_cost",
    "compact_speed",
    "one_shot_pruning",
    "transfer_learning",
    "compilations",
    "startup",
)


def run(script: str) -> bool:
    """Whether it ended well."""
    print(f"{script} ...", flush=True)
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *sys.argv[1:]]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def into_readme(text: str) -> None:
    """Put the table between the README's two marks."""
    readme = Path(__file__).parent.parent / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}")


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    failed = [script for script in SCRIPTS if not run(script)]
    table.show(table.load(quick, SCRIPTS))
    if not quick and not failed:
        into_readme(table.markdown(table.load(quick, SCRIPTS)))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
