"""The file of a sensitivity: one process at a time adds to it, and a record beside it says what it is of."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hessjax._core import _files
from hessjax._run._identity import Identity, differences
from hessjax.analysis import _sensitivity_csv
from hessjax.analysis._sensitivity_csv import SensitivityRow

_BY_LEAF = "pattern "
"""What begins the names of entries that only rows of one leaf depend on."""


@contextlib.contextmanager
def opened(
    path: Path, record: Identity, parameters: list[str], has_model: bool
) -> Iterator[list[SensitivityRow]]:
    """The rows of an earlier run, while nobody else adds to them.

    Raises:
        ValueError: for a file of something else, or of other params.
        BlockingIOError: somebody else uses it.
    """
    lock = path.with_name(f".{path.name[:200]}.lock")
    try:
        held = contextlib.ExitStack()
        held.enter_context(_files.locked(lock, "`path` of `sensitivity`"))
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(f"`path` must be a file in a folder to write to, got `{path}`: {error}.") from error
    with held:
        yield _rows(path, record, parameters, has_model)


def append(path: Path, row: SensitivityRow) -> None:
    """One more line, on disk when this returns; the header before it, if it is the first."""
    is_new = not path.exists() or not path.stat().st_size
    text = "".join(_sensitivity_csv.lines_of([row])[0 if is_new else 1 :])
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _files.sync_folder(path.parent)


def _rows(path: Path, record: Identity, parameters: list[str], has_model: bool) -> list[SensitivityRow]:
    content = path.read_bytes() if path.exists() else b""
    end = _sensitivity_csv.whole_lines(content)
    saved = _record(path) if content else None
    if saved is None and content and not end:
        shown = content[:60].decode(errors="replace")
        wanted = ",".join(_sensitivity_csv.FIRST)
        raise _sensitivity_csv.refusal(path, 1, f"the columns must be `{wanted},<metrics>`, got `{shown}`")
    # What went together in this run, or in one before.
    together = {name.removeprefix(_BY_LEAF) for name in (saved or {}) | record if name.startswith(_BY_LEAF)}
    rows = _sensitivity_csv.read(path, content[:end], {*parameters, *together}, has_model)
    if content:
        _check_record(path, saved, record)
        _repair(path, content, end, rows)
    both = json.dumps((saved or {}) | record, indent=1)
    if both != json.dumps(saved, indent=1):
        _files.write_whole(_beside(path), lambda file: file.write(both.encode()))
    return rows


def _repair(path: Path, content: bytes, end: int, rows: list[SensitivityRow]) -> None:
    """Cut off what a killed run left of a line, which is measured again; of a file without rows, all."""
    if end < len(content) or not rows:
        os.truncate(path, end if rows else 0)


# -- what the rows are of --------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _record(path: Path) -> Identity | None:
    """What the rows of a file are of, if that was written down."""
    try:
        found = json.loads(_beside(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    is_record = isinstance(found, dict) and all(isinstance(x, str) for x in found.values())
    return found if is_record else None


def _check_record(path: Path, saved: Identity | None, record: Identity) -> None:
    left = "It was left as it is: give another path, or delete it."
    if saved is None:
        raise ValueError(
            f"`path` must be a file that `sensitivity` began, but there is no record of the params that "
            f"`{path}` is of: `{_beside(path).name}` is missing, or something else. {left}"
        )
    # Leaves and levels may be added: what is by leaf needs to agree where both have it.
    both = [
        {name: x for name, x in entries.items() if not name.startswith(_BY_LEAF) or name in others}
        for entries, others in ((saved, record), (record, saved))
    ]
    if other := differences(*both):
        raise ValueError(
            f"`path` must be a file of these params and settings, but `{path}` is of others:\n  "
            + "\n  ".join(other[:10])
            + f"\n{left}"
        )
