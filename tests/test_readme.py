"""The README's examples run as they stand, each by itself."""

import pathlib
import re

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(block, capsys):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    return names, capsys.readouterr().out


def test_the_page_is_short_and_its_first_example_too():
    assert len(README.splitlines()) <= 150
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 12


def test_curvature_in_ten_lines(capsys):
    names, printed = run(BLOCKS[0], capsys)
    assert bool(names["pairs"].converged.all())
    assert "eigenvalues" in printed


def test_pruning_in_ten_lines(capsys):
    names, printed = run(BLOCKS[1], capsys)
    kernels = [leaf for leaf in jax.tree.leaves(names["params"]) if leaf.ndim > 1]
    assert sum(int((k == 0).sum()) for k in kernels) == round(np.float32(0.8) * sum(k.size for k in kernels))
    assert "kernel" in printed


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)(.*?)\)", README))
def test_pictures_and_pages_are_there(target):
    assert (ROOT / target).is_file()
