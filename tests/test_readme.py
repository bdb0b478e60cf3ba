"""The README's Python blocks run as they stand, one after the other, in one namespace."""

import pathlib
import re

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_block_runs_and_the_first_screen_is_short():
    assert len(BLOCKS) >= 4
    assert len(BLOCKS[0].strip().splitlines()) < 25
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert bool(names["pairs"].converged.all())
    assert abs(float(names["density"].moment() * names["size"]) - float(names["estimate"].mean)) < 0.5 * abs(
        float(names["estimate"].mean)
    )
    kernels = [leaf for leaf in names["jax"].tree.leaves(names["params"]) if leaf.ndim > 1]
    zeros, total = sum(int((k == 0).sum()) for k in kernels), sum(k.size for k in kernels)
    assert zeros == round(np.float32(0.9) * total)


def test_every_picture_is_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) >= 3
    assert all((ROOT / picture).is_file() for picture in pictures)
