"""A report that is killed, at whatever moment, ends as one that never was."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from kills import KILLS, Moments, stages
from reporting import small_problem

import hessjax as hj
from hessjax._report import _figures, _work
from hessjax._report._engine import Order, Watcher, analyze
from hessjax._report._plan import Asked

PROBLEM, ASKED = small_problem(), Asked(top=1, density=True, budget=90)

SCRIPT = """
import sys, time
from reporting import small_problem
from hessjax._report import _figures, _work
from hessjax._report._engine import Order, Watcher, analyze
from hessjax._report._plan import Asked
_work.SAVE_EVERY = 0.0  # at every product: it is over in a moment
_figures.figures = lambda name, *_: {f"{name}.png": b"picture"}
class Waiting(Watcher):
    def made(self, stage, products, total):
        if stage == "eigenpairs" and products >= 12:
            print("now", flush=True)
            time.sleep(600)
analyze(small_problem(), sys.argv[1], Asked(top=1, density=True, budget=90), Order(resume=True), Waiting())
"""


def drawn(name, *_):
    """A picture in no time: to draw takes a second."""
    return {f"{name}.png": b"picture"}


def resumed(folder):
    return analyze(PROBLEM, folder, ASKED, Order(resume=True), Watcher())


def results(record):
    return {name: entry.get("result") for name, entry in record["stages"].items()}


def kept(folder):
    file = folder / "report.json"
    return results(json.loads(file.read_text())) if file.exists() else {}


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A life from beginning to end, and what kills in it would have left."""
    folder, place = tmp_path_factory.mktemp("life") / "out", tmp_path_factory.mktemp("moments")
    with pytest.MonkeyPatch.context() as patch, Moments(folder, place).watched() as moments:
        patch.setattr(_work, "SAVE_EVERY", 0.0)
        patch.setattr(_figures, "figures", drawn)
        record = resumed(folder)
    return results(record), moments


def check(folder, expected):
    """What was there stays, the rest comes out the same to the last bit, nothing half written is left."""
    before = kept(folder)
    assert {name: expected[name] for name in before} == before
    record = resumed(folder)
    assert record["complete"]
    assert results(record) == expected
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", "-lock"))]


def test_a_kill_at_whatever_moment_loses_nothing(lived, monkeypatch):
    expected, moments = lived
    assert len(moments.copies) > 100
    monkeypatch.setattr(_figures, "figures", drawn)
    assert set(map(stages, moments.copies)) == set(range(-1, len(expected) + 1))
    for copy in moments.chosen(KILLS, stages):
        check(copy, expected)


def test_a_kill_by_the_system_loses_nothing(lived, tmp_path, monkeypatch):
    monkeypatch.setattr(_figures, "figures", drawn)
    root = pathlib.Path(hj.__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    folder = tmp_path / "killed"
    words = [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list(kept(folder)) == ["check", "loss", "trace", "pruning"]
    check(folder, lived[0])
