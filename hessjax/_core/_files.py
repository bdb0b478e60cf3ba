"""Paths that people give, files written whole or not at all, and locks that end with their process."""

import contextlib
import fcntl
import os
import re
import secrets
import socket
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hessjax._core._messages import check_path

PARTIAL = ".partial"
"""The end of the name of a file that is being written."""

# Two letters at least before the colon, and one slash: `pathlib` makes `gs:/bucket` of `gs://bucket`.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(argument: str, path: Any) -> Path:
    """A path of this machine, absolute now (the working folder may change), `~` replaced by the home.

    Raises:
        TypeError: what is no path at all.
        ValueError: an empty path, a URL, a `~user` that nobody has.
    """
    check_path(argument, path)
    text = os.fspath(path)
    if "\0" in text:
        raise ValueError(f"`{argument}` must be a path without NUL, got {text!r}.")
    if _URL.match(text):
        raise ValueError(
            f"`{argument}` must be a path of this machine, got the URL `{text}`: write to a local path and "
            "copy it there."
        )
    try:
        return Path(os.path.abspath(Path(text).expanduser()))  # `resolve` would follow links
    except RuntimeError:
        raise ValueError(f"`{argument}` must begin with a `~` that has a home, got `{text}`.") from None


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A file that is there as a whole, on disk, when this returns; until then, and if it fails, the old one.

    A link stays one, and what it points to is replaced; a file that was there keeps its mode.
    """
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must be in a folder that exists, got `{target}`: make the folder first."
        )
    if target.exists() and not target.is_file():
        with target.open("wb") as file:  # a pipe or a device cannot be replaced; a folder is an error
            write(file)
        return
    if target.exists():
        target.open("r+b").close()  # a rename would replace even what may not be written to
    partial = target.with_name(f".{target.name[:120]}.{secrets.token_hex(4)}{PARTIAL}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Names on disk, too: a rename is on disk only once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # file systems that cannot need not
        os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def locked(path: Path, argument: str) -> Iterator[str]:
    """Hold the lock file `path` for the time of a block; it ends with the process, however that ends.

    Yields:
        What it says of its holder.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    file, holder = _acquired(path, argument), f"process {os.getpid()} on {socket.gethostname()}"
    try:
        file.truncate(0)
        file.write(holder.encode())
        file.flush()
        yield holder
    finally:
        path.unlink(missing_ok=True)  # before it is let go: nobody can hold it yet
        file.close()


def _acquired(path: Path, argument: str) -> BinaryIO:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before removes the file: a lock on a removed one keeps nobody out.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
            file.close()
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "another process"
            file.close()
            raise BlockingIOError(_busy(path, argument, holder)) from None
        except OSError as error:
            warnings.warn(
                f"`{path}` cannot be locked ({error}): see to it that no other process uses {argument}.",
                stacklevel=4,
            )
            return file


def _busy(path: Path, argument: str, holder: str) -> str:
    ended = " It has ended, so one that it started has the file open still." if _has_ended(holder) else ""
    return (
        f"{argument} must be used by one run at a time, but {holder} holds its lock, `{path}`.{ended} Wait "
        "for it, end it, or give another path."
    )


def _has_ended(holder: str) -> bool:
    found = re.fullmatch(r"process (\d+) on (.*)", holder)
    if not found or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
