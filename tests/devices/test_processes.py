"""Two processes of `jax.distributed` give the numbers of one, and what one saved the others go on from."""

import contextlib
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import two_processes

import hessjax as hj

HERE = pathlib.Path(__file__).parent
LIMIT = 500
"""Seconds for a start of two processes, on a machine that is busy."""


def started(part, folder):
    """Start both, wait for them, and kill what is left; their exit codes, and what they wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent.parent), "TERM": "dumb"}
    logs = [folder / f"{part}-{index}.log" for index in (0, 1)]
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(one(part, index, port, folder, env)) for index in (0, 1)]
        until = time.monotonic() + LIMIT
        while any(process.poll() is None for process in both) and time.monotonic() < until:
            # One that fails alone would have the other wait for minutes; one that is killed is waited for.
            if any((process.poll() or 0) > 0 for process in both):
                break
            time.sleep(0.05)
    return [process.returncode for process in both], [log.read_text() for log in logs]


@contextlib.contextmanager
def one(part, index, port, folder, env):
    command = [sys.executable, HERE / "two_processes.py", part, str(index), port, folder]
    with (folder / f"{part}-{index}.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def local_run():
    params, batch = two_processes.numbers()
    return jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, batch)


def over_devices(kind, number):
    mesh = programs.mesh_of(kind, (number,), ("data",))
    params, batch = two_processes.numbers()
    placed = programs.placed(params, mesh, two_processes.SPECS)
    return placed, programs.placed(batch, mesh, jax.sharding.PartitionSpec("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two processes found before one of them was killed, and after both were started again."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "file").write_text("")
    params, batch = over_devices("Auto", 2)
    # A checkpoint by one process on two devices, gone on from by two on four.
    stop = lambda progress: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        two_processes.krylov(params, batch, hj.checkpoint(folder / "of-one", every=5), stop)
    found = {"folder": folder}
    for part in ("first", "second"):
        codes, texts = started(part, folder)
        found[f"{part} codes"], found[f"{part} texts"] = codes, texts
        outputs = [folder / f"{part}-{i}" for i in (0, 1)]
        assert all(path.exists() for path in outputs), "\n".join(text[-3000:] for text in texts)
        found[part] = [pickle.loads(path.read_bytes()) for path in outputs]
        if part == "first":
            shutil.copytree(folder / "krylov", folder / "copy")
    return found


@pytest.mark.parametrize("layout", ["Auto, spanning", "Explicit, spanning", "local"])
def test_two_processes_give_the_numbers_of_one(runs, layout):
    params, batch = local_run()
    for name in runs["first"][0][layout]:
        wanted = jax.tree.leaves(two_processes.CALLS[name](params, batch))
        for found in runs["first"]:
            pairs = zip(wanted, jax.tree.leaves(found[layout][name]), strict=True)
            for want, got in pairs:
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_each_process_reads_its_own_part_of_the_data(runs):
    params, batch = local_run()
    seven = jax.tree.map(lambda x: x[:7], batch)
    wanted = hj.hessian(two_processes.loss_fn, params, seven)(params)
    for found in runs["first"]:
        for name, want in wanted.items():
            np.testing.assert_allclose(found["parts"][name], want, rtol=1e-4, atol=1e-5)
        assert found["fewer"] == (
            "`batches` must be as many on every process, but there is no batch 1 on [0]."
        )


def test_a_killed_process_ends_the_other_which_says_so(runs):
    assert runs["first codes"][0] in (1, -signal.SIGABRT)  # an error of the collective, or jax's own end
    assert runs["first codes"][1] == -signal.SIGKILL
    assert re.search("another task died|closed by peer", runs["first texts"][0])
    assert runs["second codes"] == [0, 0]


@pytest.mark.parametrize("name", two_processes.RUNS)
def test_both_started_again_end_with_the_result_of_a_run_that_nobody_killed(runs, name):
    """To the last bit, in every field, from the checkpoint before the kill."""
    for before, after in zip(runs["first"], runs["second"], strict=True):
        assert after[name] == before["whole"][name]
        assert after[f"{name}, first heard"] == (5 if name == "krylov" else 12)


@pytest.mark.parametrize(("kind", "number"), [("Auto", 2), ("Explicit", 4)])
def test_a_checkpoint_of_two_processes_goes_on_in_one(runs, tmp_path, kind, number):
    shutil.copytree(runs["folder"] / "copy", tmp_path / "copy")
    wanted = two_processes.krylov(*local_run())[0].values
    heard, (params, batch) = [], over_devices(kind, number)
    with (
        jax.set_mesh(params["w"].sharding.mesh),
        pytest.warns(UserWarning, match="on other devices: device 4 × cpu cpu .2 processes; data 4., now"),
    ):
        found = two_processes.krylov(params, batch, hj.checkpoint(tmp_path / "copy"), heard.append)
    assert heard[0].num_matvecs == 5
    np.testing.assert_allclose(found[0].values, wanted, rtol=1e-4)


def test_on_one_device_it_goes_on_or_says_why_not(runs, tmp_path):
    folder, (params, batch) = runs["folder"], local_run()
    shutil.copytree(folder / "trace", tmp_path / "trace")
    with pytest.warns(UserWarning, match="on other devices: device 4 × .*, now cpu cpu"):
        found = two_processes.run(params, batch, hj.checkpoint(tmp_path / "trace"))
    np.testing.assert_allclose(found.mean, two_processes.run(params, batch).mean, rtol=1e-5)
    with pytest.raises(
        ValueError, match="(?s)must be of this run.*state .*divide the same leaves, over any num"
    ):
        two_processes.krylov(params, batch, hj.checkpoint(folder / "copy"))


def test_a_checkpoint_of_one_process_goes_on_in_two(runs):
    wanted = two_processes.krylov(*local_run())[0].values
    for found, text in zip(runs["first"], runs["first texts"], strict=True):
        np.testing.assert_allclose(found["of one process"], wanted, rtol=1e-4)
        assert "device 2 × cpu cpu (data 2), now 4 × cpu cpu (2 processes; data 4)" in text


def test_files_bring_every_number_back(runs):
    assert all(found["files"] for found in runs["first"])
    back = hj.load_npz(runs["folder"] / "params.npz")
    for name, x in local_run()[0].items():
        np.testing.assert_array_equal(back[name], x)


def test_what_cannot_be_done_is_refused_in_both(runs):
    words = {
        "to_sparse": "`params` must lie in one process, but v spans several",
        "compact": "`params` must lie in one process, but v spans several",
        "args": "`args` must be the same in all processes, or span them as `params` do, but 0 differs",
        "busy": "`path` of `checkpoint` must be used by one run at a time",
        "keys": "must be of the same run in every process, but process 0's (`saved`) is not process 1's",
        "unseen": "`path` of `checkpoint` must be a folder that all 2 processes of the run see",
        "no folder": "`path` of `checkpoint` must be a folder to write to",
    }
    first, other = (found["messages"] for found in runs["first"])
    for name, message in words.items():
        assert message in first[name]
        assert message in other[name]
    assert "must be used by a run in which process 0 takes part" in other["alone"]
