"""Ctrl-C, `kill` and a reader that has gone: a command ends at once, and says what it leaves behind."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


def interruptible(work: Callable[[], Any], kept: str) -> None:
    """Do the work; upon SIGINT or SIGTERM say what was `kept`, and end the process.

    Python hears a signal only between two of its own steps, and one compilation may take seconds: the work
    therefore runs in a thread, and the main one waits for it. The process ends without waiting for the
    thread, so the work must write files whole or not at all.

    Args:
        work: what to do; what it raises is raised here.
        kept: what is left when it is interrupted, and how to go on.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with _heard(lambda number, _: _end(_SIGNALS[number], kept, 128 + number)):
        thread.start()
        thread.join()
    if failed:
        raise failed[0]


_SIGNALS = {int(signal.SIGINT): "interrupted", int(signal.SIGTERM): "terminated"}


@contextlib.contextmanager
def _heard(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """The handler instead of those that were there."""
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


def _end(how: str, kept: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):  # the terminal may have gone with its reader
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), SHOW_CURSOR)
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\nhessjax: {how}; {kept}.\n".encode(errors="replace"))
    # Not `sys.exit`, which waits for the compilation; nor a stream, whose lock the thread may hold.
    os._exit(code)


SHOW_CURSOR = b"\x1b[?25h"
"""A progress bar hides it."""


def quiet() -> None:
    """Let nothing more be written to a standard output that nobody reads: Python would complain at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
