"""Checkpoints of a run: what a killed run had done is not done again."""

import contextlib
import os
import types
from pathlib import Path
from typing import Any

import jax

from hessjax._core import _files
from hessjax._core._messages import checked_count
from hessjax._run import _checkpoint_files
from hessjax._run._checkpoint_files import Gathering
from hessjax._run._estimator import Beginning, Progress
from hessjax._run._identity import Identity, identity


def checkpoint(path: str | os.PathLike[str], *, every: int = 10) -> "_Checkpoint":
    """A callback that saves a run to disk; the same run, started again, goes on from there.

    Run the same script again after a kill: `run`, or any one-liner, finds the checkpoint, takes up the state
    and spends only the products that are left. The result is the one that the run would have had without
    the kill, to the last bit (on the same machine and software). A finished run is restored as such, without
    a product (those by which `eigenpairs`, `spectrum` and `solve` measure residuals are made again); one
    stopped at `max_matvecs` goes on if that is now larger.

    A checkpoint belongs to one run. Another run is refused, and the checkpoint left as it is: other params
    (every bit counts), another random key, another estimator or settings of it that bear on its steps (a
    tolerance may change, but for the solvers, which carry theirs along), other numbers in the state it begins
    with (a right-hand side, a damping), and, for a matvec that hessjax makes of one batch, another loss by
    name or another batch (16 numbers of each array are compared). What is not noticed: a change in the code
    of a loss, and other data behind a matvec that is just a function, or that streams batches. Other versions
    of hessjax or jax, or another device, are warned of: the result may then differ in its last digits.

    Args:
        path: a folder, made if it is not there; `~` is the home. All is written by Orbax to
            `hessjax-checkpoints` in it; other files are not touched. Delete that to start anew.
        every: products between two checkpoints. `run` calls its callbacks every few products, so it may be
            a few more. The end of the run is saved always.

    Returns:
        A callback.

    Raises:
        ValueError: `every` below 1; `path` is empty, or a URL; when the run starts, `path` holds another run,
            or one with more products than `max_matvecs`, or nothing that can be read.
        BlockingIOError: another run, of this process or another one, uses `path`.
        OSError: `path` cannot be written to, which shows before the first product; the disk is full, in which
            case the checkpoint before is still good.

    Cost:
        Of disk twice the state, three times while saving: a checkpoint is written beside the others and
        renamed, and only then the oldest deleted. Of memory a copy on the host. The run waits meanwhile. One
        process only.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = hj.checkpoint(folder, every=5)
        ...     first = hj.trace(A, jax.random.key(0), jnp.zeros(10), 10, callbacks=[saved])
        ...     more = hj.trace(A, jax.random.key(0), jnp.zeros(10), 15, callbacks=[saved])  # 5 products
        >>> int(first.num_samples), int(more.num_samples)
        (10, 15)
    """
    return _Checkpoint(_files.local_path("path", path), checked_count("every", every))


class _Checkpoint:
    """A callback with memory: which run it saves, after how many products it last did, and the lock."""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every
        self._store: Any = None
        self._identity: Identity = {}
        self._matvec: Any = None
        self._saved = 0
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "_Checkpoint":
        argument, folder = "`path` of `checkpoint`", self._path / _checkpoint_files.FOLDER
        # Not yet `self._held`: where this is busy, an outer run of the same callback may hold it.
        with contextlib.ExitStack() as held:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(_files.locked(folder / _checkpoint_files.LOCK, argument))
                store = held.enter_context(contextlib.closing(_checkpoint_files.Store(folder)))
            except BlockingIOError:
                raise
            except OSError as error:
                raise OSError(
                    f"{argument} must be a folder to write to, got `{self._path}`: {error}."
                ) from error
            self._store, self._held = store, held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._matvec = self._store = None  # or they would be kept alive, the params among them
        self._held.close()

    def __repr__(self) -> str:
        return f"checkpoint({str(self._path)!r}, every={self._every})"

    def restore(self, beginning: Beginning) -> tuple[Any, int] | None:
        """The state on disk and its products, if there is one; it must be of the run that begins here."""
        self._identity, self._saved, self._matvec = identity(beginning), 0, beginning.matvec
        found = _checkpoint_files.read(self._store, self._identity, jax.tree.leaves(beginning.state))
        if found is None:
            return None
        if isinstance(self._matvec, Gathering):
            self._matvec.go_on(found.gathered)
        self._saved = found.num_matvecs
        return jax.tree.unflatten(jax.tree.structure(beginning.state), found.leaves), self._saved

    def __call__(self, progress: Progress) -> None:
        new = progress.num_matvecs - self._saved
        if new >= self._every or (progress.done and new):
            self._write(progress)
            self._saved = progress.num_matvecs

    def _write(self, progress: Progress) -> None:
        count = progress.num_matvecs
        gathered = self._matvec.gathered(count) if isinstance(self._matvec, Gathering) else {}
        saved = _checkpoint_files.Saved(jax.tree.leaves(progress.state), gathered, count)
        try:
            _checkpoint_files.write(self._store, self._identity, saved)
        except OSError as error:
            before = self._saved
            kept = f"the one after {before} products is still good" if before else "there is none before it"
            raise OSError(
                f"the checkpoint after {count} products could not be written to `{self._path}`; {kept}. "
                f"Mend what is wrong and run the same again: {error}"
            ) from error
