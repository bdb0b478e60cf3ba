"""One peer in a process of its own: loads a problem, then does what each line on its standard input asks.

A line is `{"task": name, "given": {...}}`, a task a function of the peer's module `with_NAME.py`. The answer,
a line too, is what the function returned, with `seconds` and the megabytes by which memory rose.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from peers import problems
from peers.problems import Problem

PROCESS = Path("/proc/self")


def main(name: str, path: Path) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    problem = problems.read(path)
    hello, module, network = loaded(name, problem)
    answer(hello)
    for line in sys.stdin:
        answer(attempt(module, network, **json.loads(line)))


def loaded(name: str, problem: Problem) -> tuple[dict[str, Any], Any, Any]:
    """What to say first, the peer's module, and the problem in its framework."""
    try:
        module = importlib.import_module(f"peers.with_{name}")
        network = module.load(problem)
        loss = module.loss(network) if "x" in problem.arrays else None
    except ModuleNotFoundError as error:
        return {"missing": error.name}, None, None
    except Exception as error:
        return {"failed": reason(error)}, None, None
    return {"loss": loss, "ways": module.WAYS}, module, network


def attempt(module: Any, network: Any, task: str, given: dict[str, Any]) -> dict[str, Any]:
    """The answer, or what went wrong: a peer that fails is a finding."""
    if not hasattr(module, task):
        return {"absent": task}
    before, start = reset_peak(), time.perf_counter()
    try:
        found = getattr(module, task)(network, **given)
    except Exception as error:
        return {"failed": reason(error)}
    return {**found, "seconds": time.perf_counter() - start, "peak_mb": memory("VmHWM") - before}


def reason(error: Exception) -> str:
    """Its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def reset_peak() -> float:
    """Let the peak be counted from here, where the system can do that; and how much is in use now."""
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    return memory("VmRSS")


def memory(entry: str) -> float:
    """A line of this process's status, in megabytes; 0 where there is no such file."""
    try:
        found = re.search(rf"{entry}:\s*(\d+)", (PROCESS / "status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
