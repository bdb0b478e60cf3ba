"""The folder of a report: whose it is, what is in it, and that a kill at any moment leaves it whole."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessjax._core import _files
from hessjax._core._types import Params, Vector
from hessjax._report._problem import differences
from hessjax._report._record import prepare, write_json

RECORD, PAGE, STATE = "report.json", "report.html", "state"
STEEPEST = "eigenvectors.npz"
FORMAT = 1


class FolderError(ValueError):
    """The folder holds what is not to be overwritten, or nothing to go on from."""


class Folder:
    """A report's folder, held by one process at a time.

    Attributes:
        path: where it is.
        record: what `report.json` holds.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record

    @property
    def stages(self) -> dict[str, Any]:
        """What each stage left that is done."""
        return self.record["stages"]

    @property
    def state(self) -> Path:
        """Where the runs of stages are saved."""
        return self.path / STATE

    def save(self) -> None:
        """Write `report.json` anew."""
        write_json(self.path / RECORD, self.record)

    def add_figure(self, name: str, picture: bytes) -> None:
        """A picture, whole or not at all."""
        _files.write_whole(self.path / name, lambda file: file.write(picture))

    def add_stage(self, name: str, entry: Mapping[str, Any]) -> None:
        """Keep what a stage found, and let its checkpoints go."""
        self.stages[name] = dict(entry)
        self.save()
        # Only now: until the result is on disk they are all there is of it.
        shutil.rmtree(self.state / name, ignore_errors=True)

    def write_page(self, text: str) -> None:
        """Write `report.html` anew."""
        _files.write_whole(self.path / PAGE, lambda file: file.write(text.encode()))

    def keep_vectors(self, block: Vector) -> None:
        """Two eigenvectors, which the landscape is drawn along."""
        # By number: a leaf may have the name of one of numpy's arguments. Float32, for numpy has no bfloat16.
        arrays: Any = {f"leaf_{i}": np.asarray(x, np.float32) for i, x in enumerate(jax.tree.leaves(block))}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        self.state.mkdir(exist_ok=True)
        _files.write_whole(self.state / STEEPEST, lambda file: file.write(buffer.getvalue()))

    def kept_vectors(self, params: Params) -> Vector | None:
        """Those, in the dtypes of the params; None if there are none that can be read."""
        try:
            with np.load(self.state / STEEPEST) as arrays:
                leaves = [arrays[f"leaf_{i}"] for i in range(len(jax.tree.leaves(params)))]
        except (OSError, KeyError, ValueError):
            return None
        pairs = zip(leaves, jax.tree.leaves(params), strict=True)
        typed = [jax.numpy.asarray(x, leaf.dtype) for x, leaf in pairs]
        return jax.tree.unflatten(jax.tree.structure(params), typed)


@contextlib.contextmanager
def opened(
    path: Path, head: Mapping[str, Any], fingerprint: Mapping[str, Any], *, resume: bool, force: bool
) -> Iterator[Folder]:
    """Hold a folder for a report on the problem of this fingerprint.

    Args:
        path: the folder; made if it is not there.
        head: what a new record begins with.
        fingerprint: of the problem.
        resume: go on with what is there.
        force: remove an earlier report first; other files stay.

    Raises:
        FolderError: the folder is not empty, and neither is allowed; it is another problem's.
        BlockingIOError: another process is at work in it.
        OSError: it cannot be written to.
    """
    prepare(path)
    with _files.locked(path / ".hessjax-lock", "`out`"):
        for partial in path.glob(f".*{_files.PARTIAL}"):  # of a kill in the middle of a write
            partial.unlink()
        earlier = _earlier(path)
        if force:
            _remove(path)
            earlier = None
        elif _content(path) and not resume:
            raise FolderError(
                f"`out` must be an empty folder, but `{path}` holds {', '.join(_content(path)[:4])}: "
                "`--resume` goes on with a report, `--force` replaces it, `--out` takes another folder."
            )
        elif earlier is None and RECORD in _content(path):
            raise FolderError(f"`{path / RECORD}` cannot be read as a report: `--force` replaces it.")
        if earlier is not None:
            _check_same(path, earlier, fingerprint)
        fresh = {"format": FORMAT, **head, "fingerprint": dict(fingerprint), "stages": {}, "complete": False}
        folder = Folder(path, {**fresh, **(earlier or {}), "complete": False})
        folder.save()
        yield folder


def _content(path: Path) -> list[str]:
    """What is in a folder but for what is hidden, and states that a kill left before the first record."""
    return sorted(x.name for x in path.iterdir() if not x.name.startswith(".") and x.name != STATE)


def _earlier(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / RECORD).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and found.get("format") == FORMAT and "stages" in found
    return found if whole else None


def _check_same(path: Path, earlier: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    changed = list(differences(earlier.get("fingerprint", {}), fingerprint))
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise FolderError(
            f"`{path}` holds the report of another problem; these differ:\n{listed}\n"
            "`--force` replaces it, `--out` takes another folder."
        )


def _remove(path: Path) -> None:
    """An earlier report's files, and no others."""
    earlier = _earlier(path) or {}
    figures = [name for entry in earlier.get("stages", {}).values() for name in entry.get("figures", [])]
    for name in (RECORD, PAGE, *map(str, figures)):
        if "/" not in name:
            (path / name).unlink(missing_ok=True)
    if (path / STATE).is_dir():
        shutil.rmtree(path / STATE)


def read_record(path: Path) -> dict[str, Any]:
    """The record in a folder.

    Raises:
        FolderError: there is none.
    """
    found = _earlier(path)
    if found is None:
        raise FolderError(
            f"`{path}` must hold a `{RECORD}` of `hessjax analyze`, and has none that can be read."
        )
    return found
