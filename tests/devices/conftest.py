"""Meshes by turns: a case for automatic and for explicit axes runs on one of them, the next on the other."""

import os
import pathlib
import re

import pytest

HERE = pathlib.Path(__file__).parent
AXES = re.compile(r"\b(Auto|Explicit)\b")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out one of each pair: compiling both takes minutes. HESSJAX_ALL_MESHES=1 keeps them."""
    if os.environ.get("HESSJAX_ALL_MESHES"):
        return
    pairs: dict[str, list[pytest.Item]] = {}
    for item in items:
        if HERE in item.path.parents and AXES.search(item.name):
            pairs.setdefault(AXES.sub("*", item.nodeid), []).append(item)
    both = [sorted(pair, key=lambda item: item.name) for pair in pairs.values() if len(pair) == 2]
    left_out = {pair[i % 2].nodeid for i, pair in enumerate(both)}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
        items[:] = [item for item in items if item.nodeid not in left_out]
