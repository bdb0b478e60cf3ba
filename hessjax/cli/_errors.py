"""What goes wrong, in one line and an exit code; `--debug` shows the traceback."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from hessjax._report._engine import CheckFailedError
from hessjax.cli._interrupt import quiet

UNEXPECTED, REFUSED, CHECK_FAILED = 1, 2, 3


@contextlib.contextmanager
def told(debug: bool, out: Path | None = None) -> Iterator[None]:
    """End the command with a line for whatever is raised in the block."""
    if not debug:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises, a page of it
    try:
        yield
    except (typer.Exit, typer.Abort, SystemExit):
        raise
    except BrokenPipeError as error:  # the reader, `head` say, has enough
        quiet()
        raise typer.Exit(UNEXPECTED) from error
    except Exception as error:
        if debug or os.environ.get("HESSJAX_DEBUG"):
            raise
        code = _code(error)
        print(f"hessjax: {_line(error, out)}", file=sys.stderr)
        if code == UNEXPECTED:
            print("hessjax: `--debug` shows where that came from.", file=sys.stderr)
        raise typer.Exit(code) from error


def _code(error: Exception) -> int:
    if isinstance(error, CheckFailedError):
        return CHECK_FAILED
    asked_for = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
    return REFUSED if isinstance(error, asked_for) else UNEXPECTED


def _line(error: Exception, out: Path | None) -> str:
    if isinstance(error, OSError) and error.strerror and out is not None:
        kept = "" if not (out / "report.json").is_file() else (
            "; what was done is kept there, and `--resume` goes on"
        )  # fmt: skip
        return f"cannot write to `{out}`: {error.strerror}{kept}"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"
