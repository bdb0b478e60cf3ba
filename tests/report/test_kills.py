"""A report that is killed, again and again, ends as one that never was."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import hessjax as hj

KILLS = int(os.environ.get("HESSJAX_KILLS", "1"))
"""20 take minutes: `HESSJAX_KILLS=20 pytest tests/report/test_kills.py`."""

SCRIPT = """
import sys, time
from reporting import small_problem
import hessjax as hj
from hessjax._report import _work
from hessjax._report._engine import Order, Watcher, analyze
from hessjax._report._plan import Asked
_work.SAVE_EVERY = 0.0  # at every product: it is over in a moment
class Slow(Watcher):
    def begun(self, stage): print(stage, flush=True)
    def made(self, stage, products, total): print(stage, flush=True); time.sleep(0.02)
analyze(small_problem(), sys.argv[1], Asked(top=1, density=True, budget=90), Order(resume=True), Slow())
print("done", flush=True)
"""


def started(folder):
    root = pathlib.Path(hj.__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True, env=env
    )


def killed_at(folder, line):
    """Kill it after so many lines; whether it came to its end before."""
    process = started(folder)
    for count, text in enumerate(process.stdout):
        if text == "done\n":
            break
        if count == line:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait(timeout=120)


def results(folder):
    record = json.loads((folder / "report.json").read_text())
    return record["complete"], {name: entry.get("result") for name, entry in record["stages"].items()}


def test_random_kills_lose_nothing(tmp_path):
    chosen, whole, folder = random.Random(0), tmp_path / "whole", tmp_path / "killed"
    assert killed_at(whole, -1) == 0
    complete, expected = results(whole)
    assert complete
    seen = {}
    for _ in range(KILLS):
        if killed_at(folder, chosen.randrange(1, 40)) == 0:
            break
        _, kept = results(folder)
        assert {name: kept[name] for name in seen} == seen  # what was there stays as it was
        seen = kept
    assert killed_at(folder, -1) == 0
    assert results(folder) == (True, expected)  # to the last bit
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]
