"""Params and batches over several devices give the numbers of one, whether axes are automatic or explicit."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_several_devices_give_the_numbers_of_one(kind):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    here = pathlib.Path(__file__).parent
    # The devices of a process are counted once: other tests want theirs to have one.
    script = subprocess.run(
        [sys.executable, here / "meshes.py", kind],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(here.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 0, script.stderr[-3000:]
    found = json.loads(script.stdout.splitlines()[-1])
    assert len(found) >= 29
    assert {name: error for name, error in found.items() if not error < 1e-5} == {}
