"""The folder of a report: whose it is, what is in it, and that a kill at any moment leaves it whole."""

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessjax._core import _files, _tree
from hessjax._core._types import Params, Vector
from hessjax._report._problem import differences
from hessjax._report._record import prepare, read_json, write_json

RECORD, PAGE = "report.json", "report.html"
STATE = ".hessjax-state"  # a name that nobody else has: what is in it is removed
STEEPEST = "eigenvectors.npz"
FORMAT = 1

COMMANDS = {"analysis": "hessjax analyze", "pruning": "hessjax prune"}
"""By kind of record, what leaves it."""

NETWORKS = ("checkpoint", "compacted")
PRUNED = ("masks.npz", "sparse.npz", "summary.txt", "sensitivity.csv", *NETWORKS)
"""What a pruning leaves beside its record and page; the networks are folders of Orbax."""


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

    def close(self) -> None:
        """All is done: let go of what runs were saved to."""
        shutil.rmtree(self.state, ignore_errors=True)

    def write_page(self, text: str) -> None:
        """Write `report.html` anew."""
        _files.write_whole(self.path / PAGE, lambda file: file.write(text.encode()))

    def keep_vectors(self, block: Vector) -> None:
        """Two eigenvectors, which the landscape is drawn along."""
        # By number: a leaf may have the name of one of numpy's arguments. Widened, for numpy has no bfloat16.
        leaves = [np.asarray(x, _tree.wide(x).dtype) for x in jax.tree.leaves(block)]
        arrays: Any = {f"leaf_{i}": x for i, x in enumerate(leaves)}
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
        head: what a new record begins with, its `kind` among it.
        fingerprint: of the problem.
        resume: go on with what is there.
        force: remove an earlier report first; other files stay.

    Raises:
        FolderError: the folder is not empty, and neither is allowed; it is another problem's or command's.
        BlockingIOError: another process is at work in it.
        OSError: it cannot be written to.
    """
    prepare(path)
    with _files.locked(path / ".hessjax-lock", "`out`"):
        # Of a kill in the middle of a write.
        for partial in (*path.glob(f".*{_files.PARTIAL}"), *(path / STATE).rglob(f".*{_files.PARTIAL}")):
            partial.unlink()
        check_room(path, resume, force)
        earlier = _earlier(path)
        if force:
            _remove(path, head["kind"])
            earlier = None
        elif earlier is None and RECORD in _content(path):
            raise FolderError(f"`{path / RECORD}` cannot be read as a report: `--force` replaces it.")
        if earlier is not None:
            _check_kind(path, earlier, head["kind"])
            _check_same(path, earlier, fingerprint)
        fresh = {"format": FORMAT, **head, "fingerprint": dict(fingerprint), "stages": {}, "complete": False}
        folder = Folder(path, {**fresh, **(earlier or {}), "complete": False})
        folder.save()
        yield folder


def check_room(path: Path, resume: bool, force: bool) -> None:
    """Raise a FolderError for a folder that holds something, where neither says what is to be done."""
    if not (resume or force) and (there := _content(path)):
        raise FolderError(
            f"`out` must be an empty folder, but `{path}` holds {', '.join(there[:4])}: "
            "`--resume` goes on with a report, `--force` replaces it, `--out` takes another folder."
        )


def _content(path: Path) -> list[str]:
    """What is in a folder but for what is hidden."""
    if not path.is_dir():
        return []
    return sorted(x.name for x in path.iterdir() if not x.name.startswith("."))


def _earlier(path: Path) -> dict[str, Any] | None:
    found = read_json(path / RECORD)
    whole = isinstance(found, dict) and found.get("format") == FORMAT and "stages" in found
    return found if whole else None


def _kind(record: Mapping[str, Any]) -> str:
    return str(record.get("kind", "analysis"))


def _check_kind(path: Path, earlier: Mapping[str, Any], kind: str) -> None:
    if _kind(earlier) != kind:
        raise FolderError(
            f"`out` must be a folder of `{COMMANDS[kind]}`, but `{path}` is one of "
            f"`{COMMANDS.get(_kind(earlier), 'another command')}`: `--out` takes another folder."
        )


def _check_same(path: Path, earlier: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    changed = list(differences(earlier.get("fingerprint", {}), fingerprint))
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise FolderError(
            f"`{path}` holds the report of another problem; these differ:\n{listed}\n"
            "`--force` replaces it, `--out` takes another folder."
        )


def _remove(path: Path, kind: str) -> None:
    """An earlier report's files, and no others."""
    earlier = _earlier(path)
    if earlier is None:
        foreign = [name for name in NETWORKS if kind == "pruning" and (path / name).exists()]
        if foreign:
            raise FolderError(
                f"`out` must not hold a `{'`, a `'.join(foreign)}` of yours, which `--force` would replace, "
                f"but `{path}` does: `--out` takes another folder."
            )
        _unlink(path / STATE)
        return
    _check_kind(path, earlier, kind)
    figures = [name for entry in earlier["stages"].values() for name in entry.get("figures", [])]
    names = [PAGE, *(PRUNED if kind == "pruning" else ()), *figures, *earlier.get("removed", [])]
    # First without its results: a kill in the middle may not leave a record of what is gone.
    write_json(path / RECORD, {**earlier, "stages": {}, "removed": names, "complete": False})
    for name in (*names, STATE):
        if "/" not in name:
            _unlink(path / name)


def _unlink(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record of an analysis in a folder.

    Raises:
        FolderError: there is none.
    """
    found = _earlier(path)
    if found is None or _kind(found) != "analysis":
        raise FolderError(
            f"`{path}` must hold a `{RECORD}` of `hessjax analyze`, and has none that can be read."
        )
    return found
