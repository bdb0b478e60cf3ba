"""The examples run as scripts do, with few steps."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = {
    "curvature_during_training": ["--steps", "4", "--every", "2"],
    "prune_train_state": ["--steps", "6"],
    "one_shot": ["--steps", "5"],
    "layer_report": ["--steps", "5", "--probes", "4"],
    "recipe": ["--epochs", "2"],
}


def test_all_examples_are_here_and_short():
    scripts = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == QUICK.keys()
    assert max(scripts.values()) < 80


@pytest.mark.parametrize("name", QUICK)
def test_an_example_runs(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *QUICK[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 2
