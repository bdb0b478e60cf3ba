"""Ctrl-C and `kill` end a command at once, with a message, a cursor and the shell's own exit code."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from hessjax.cli import _interrupt

# The module by its file: importing the package takes seconds, in which no signal is waited for.
SCRIPT = """
import importlib.util, os, time
spec = importlib.util.spec_from_file_location("interrupt", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
def work():
    os.write(1, b"begun")  # at once: of `print` the end of the line may come after the signal
    {work}
module.interruptible(work, "what was kept")
print("done")
"""


def started(work, stdout):
    script = SCRIPT.format(file=_interrupt.__file__, work=work)
    return subprocess.Popen([sys.executable, "-c", script], stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_the_process_while_the_work_goes_on(number, code, word):
    leader, follower = pty.openpty()
    process = started("time.sleep(60)", follower)
    assert os.read(leader, 5) == b"begun"
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert time.monotonic() - start < 5  # a twentieth of a second on a machine that has nothing else to do
    assert process.stderr.read() == f"\nhessjax: {word}; what was kept.\n"
    assert os.read(leader, 100).endswith(_interrupt.SHOW_CURSOR)
    process.stderr.close()
    os.close(leader)
    os.close(follower)


def test_work_that_ends_or_fails_does_so_here_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []
    _interrupt.interruptible(lambda: seen.append(1), "")
    assert seen == [1]
    for error in (OSError("disk"), SystemExit(3), KeyError("x")):

        def work(error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            _interrupt.interruptible(work, "")
        assert caught.value is error
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
