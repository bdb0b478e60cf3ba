"""A folder of checkpoints by Orbax: written by all processes that hold a part, whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessjax._core import _archive, _files
from hessjax._core._processes import Group

KEPT = 2
"""Checkpoints on disk: the latest, and the one before in case the latest cannot be read."""

FOLDER = "hessjax-checkpoints"
"""Within the folder that is given: here Orbax deletes what it takes for its own."""

LOCK = "lock"
PATIENCE = 10
"""Seconds in which every process must see what the first wrote: shared file systems may show it late."""

_ARGUMENT = "`path` of `checkpoint`"
_STEP = re.compile(r"[1-9][0-9]*")


class Store:
    """A folder of checkpoints by their products; it must be locked.

    Args:
        path: the folder, which all processes see.
        group: the processes that write together; each of them reads on its own.
    """

    def __init__(self, path: Path, group: Group) -> None:
        import orbax.checkpoint as ocp  # here, because it takes half a second to import

        self.path, self.group, self._ocp = path, group, ocp
        # Not asynchronous: the state's memory is re-used by the next step. Not Orbax's manager: what it reads
        # of every step as it begins may be damaged.
        self._writer = self._checkpointer(group.members)
        # One that cannot read may not keep the others waiting.
        self._reader = self._checkpointer((jax.process_index(),))

    def _checkpointer(self, members: tuple[int, ...]) -> Any:
        options = self._ocp.options.MultiprocessingOptions(
            primary_host=members[0], active_processes=set(members), barrier_sync_key_prefix="hessjax"
        )
        handler = self._ocp.CompositeCheckpointHandler(
            state=self._ocp.StandardCheckpointHandler(multiprocessing_options=options),
            about=self._ocp.JsonCheckpointHandler(multiprocessing_options=options),
            composite_options=self._ocp.CompositeOptions(multiprocessing_options=options),
        )
        return self._ocp.Checkpointer(handler, multiprocessing_options=options)

    def close(self) -> None:
        """Let go of Orbax's threads."""
        self._writer.close()
        self._reader.close()

    def steps(self) -> list[int]:
        """The latest first, as the first process sees them."""
        return self.group.from_first(self._steps)

    def _steps(self) -> list[int]:
        found = [entry for entry in self.path.iterdir() if _STEP.fullmatch(entry.name) and entry.is_dir()]
        return sorted((int(entry.name) for entry in found), reverse=True)

    def save(self, step: int, header: dict[str, Any], arrays: Mapping[str, Any]) -> None:
        """A checkpoint beside the others, and only then the oldest deleted.

        Raises:
            OSError: it could not be written; the others are as they were.
        """
        args, text = self._ocp.args, json.dumps(header)
        items = args.Composite(
            # Without those of no entries, which Orbax refuses.
            state=args.StandardSave({name: x for name, x in arrays.items() if x.size}),
            about=args.JsonSave({"header": text, "checksum": zlib.crc32(text.encode())}),
        )
        try:
            self._writer.save(self.path / str(step), args=items)
        except Exception as error:  # a full disk is another error in each of Orbax's parts
            if self.group.is_first:
                _clear_left_overs(self.path)
            raise OSError(str(error)) from error
        if self.group.is_first:
            # Orbax leaves some of it to the system: a power cut may not cost both checkpoints.
            _sync(self.path / str(step))
            for old in self._steps()[KEPT:]:
                shutil.rmtree(self.path / str(old))

    def header(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint, whole."""
        about = self._read(step, about=self._ocp.args.JsonRestore()).about
        if zlib.crc32(about["header"].encode()) != about["checksum"]:
            raise ValueError("the checksum of its header does not agree")
        return json.loads(about["header"])

    def arrays(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a checkpoint, as numpy's, or over devices where `like` says so."""
        wanted = self._ocp.args.StandardRestore({name: x for name, x in like.items() if np.prod(x.shape)})
        return {**like, **self._read(step, state=wanted).state}

    def _read(self, step: int, **items: Any) -> Any:
        return self._reader.restore(self.path / str(step), args=self._ocp.args.Composite(**items))

    def put_aside(self, step: int) -> str:
        """Rename a checkpoint, so that it does not count; nothing is overwritten. The new name."""
        return self.group.from_first(lambda: self._put_aside(step))

    def _put_aside(self, step: int) -> str:
        aside, number = self.path / f"{step}.unreadable", 1
        while aside.exists():
            number, aside = number + 1, aside.with_suffix(f".unreadable-{number + 1}")
        (self.path / str(step)).rename(aside)
        return aside.name


@contextlib.contextmanager
def opened(path: Path, group: Group) -> Iterator[Store]:
    """The store within a folder, which the first process locks for all, for the time of a block.

    Raises:
        OSError: the folder cannot be written to.
        BlockingIOError: somebody else holds the lock.
        ValueError: these processes cannot write there together.
    """
    if 0 not in group.members:
        raise ValueError(
            "`checkpoint` must be used by a run in which process 0 takes part, since it alone writes what "
            f"does not span processes, got one of process {group.members[0]}: make the run there, or place "
            "`like`, usually the params, over all processes, "
            "`jax.device_put(params, NamedSharding(mesh, P()))`."
        )
    with contextlib.ExitStack() as held:
        holder = group.from_first(lambda: _locked(held, path))
        _check_seen(path / FOLDER, group, holder)
        yield held.enter_context(contextlib.closing(Store(path / FOLDER, group)))


def _locked(held: contextlib.ExitStack, path: Path) -> str:
    """Make the folder and lock it; who holds it."""
    folder = path / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = held.enter_context(_files.locked(folder / LOCK, _ARGUMENT))
        _clear_left_overs(folder)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(f"{_ARGUMENT} must be a folder to write to, got `{path}`: {error}.") from error
    return holder


def _check_seen(folder: Path, group: Group, holder: str) -> None:
    seen = group.exchanged("" if _sees(folder / LOCK, holder) else "not seen")
    if blind := [str(member) for member, word in zip(group.members, seen, strict=True) if word]:
        raise ValueError(
            f"{_ARGUMENT} must be a folder that all {len(seen)} processes of the run see, as on a shared "
            f"file system, got `{folder}`, in which process {', '.join(blind)} does not see what process 0 "
            "writes."
        )


def _sees(lock: Path, holder: str) -> bool:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if lock.read_text() == holder:
                return True
        time.sleep(0.1)
    return False


def _clear_left_overs(folder: Path) -> None:
    """Remove what was half written."""
    from orbax.checkpoint import utils

    for entry in folder.iterdir():
        if entry.is_dir() and utils.is_tmp_checkpoint(entry):
            shutil.rmtree(entry)


def numpy_like(dtype: str, shape: list[int]) -> np.ndarray:
    """What asks for an array in the host's memory: Orbax reads the kind of it only."""
    # A view of one zero takes no memory.
    return np.broadcast_to(np.zeros((), _archive.dtype_of(dtype)), _archive.shape_of(shape))


def _sync(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _files.sync_folder(Path(parent))
    _files.sync_folder(folder.parent)
