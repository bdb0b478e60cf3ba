"""Paths, files that are whole or as they were, and locks."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from hessjax._core import _files


def test_what_is_no_path():
    for path in (None, 3, ["a"], object(), b"a"):
        with pytest.raises(TypeError, match="`file` must be a path, a string or a `pathlib.Path`, got"):
            _files.local_path("file", path)
    assert _files.local_path("file", "/a/../b") == _files.local_path("file", "/b")
    assert _files.local_path("file", "a:b").name == "a:b"


def writer(content, fail=None):
    def write(file):
        file.write(content)
        if fail:
            raise fail

    return write


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "x"
    for fail in (OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")):
        with pytest.raises(type(fail)):
            _files.write_whole(file, writer(b"half", fail))
        assert list(tmp_path.iterdir()) == []
    _files.write_whole(file, writer(b"old"))
    with pytest.raises(KeyboardInterrupt):
        _files.write_whole(file, writer(b"half", KeyboardInterrupt()))
    assert file.read_bytes() == b"old"
    file.chmod(0o600)
    _files.write_whole(file, writer(b"new"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    long = tmp_path / ("n" * 255)
    _files.write_whole(long, writer(b"long"))
    assert long.read_bytes() == b"long"
    with pytest.raises(FileNotFoundError, match="`path` must be in a folder that exists, got `.*none/x`"):
        _files.write_whole(tmp_path / "none" / "x", writer(b""))


def test_links_and_devices_stay_what_they_are(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("target")  # not yet there
    _files.write_whole(link, writer(b"through"))
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == b"through"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    _files.write_whole(pipe, writer(b"flows"))
    assert os.read(reader, 9) == b"flows"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_lock_ends_with_its_process_and_tells_of_orphans(tmp_path):
    """The parent is killed; its child still has the file open."""
    lock = tmp_path / "lock"
    script = f"""
        import os, pathlib, signal, time
        from hessjax._core._files import locked
        with locked(pathlib.Path({str(lock)!r}), "`it`"):
            if not os.fork():
                print(os.getpid(), flush=True)
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        with (
            pytest.raises(BlockingIOError, match=f"`it` must be used .* process {process.pid} on "),
            locked(lock),
        ):
            pass
        process.kill()
        process.wait()
        with (
            pytest.raises(BlockingIOError, match="It has ended, so one that it started has the file"),
            locked(lock),
        ):
            pass
        os.kill(child, signal.SIGKILL)
    for _ in range(100):  # nobody waits for the child: it is gone a moment later
        with contextlib.suppress(BlockingIOError), locked(lock):
            break
        time.sleep(0.05)
    with locked(lock), pytest.raises(BlockingIOError), locked(lock):
        pass
    with locked(lock):
        assert lock.exists()
    assert not lock.exists()


def locked(path):
    return _files.locked(path, "`it`")
