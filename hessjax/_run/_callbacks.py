"""Checkpoints of a run: what a killed run had done is not done again."""

import contextlib
import os
import types
from pathlib import Path
from typing import Any

import jax

from hessjax._core import _files, _processes
from hessjax._core._messages import checked_count
from hessjax._core._processes import Group
from hessjax._run import _checkpoint_files
from hessjax._run._checkpoint_files import Gathering, Run, devices_of
from hessjax._run._estimator import Beginning, Progress
from hessjax._run._identity import check_alike, identity
from hessjax._run._store import opened


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
    of hessjax or jax, or other devices, are warned of: the result may then differ in its last digits.

    Where `like`, the matvec's arrays or the key span several processes (`jax.distributed`), all of these
    make the call: each writes its parts, and process 0 sees to the rest. A checkpoint may be gone on from on
    another mesh, by more or fewer devices and processes, as long as the same leaves are divided: vectors of
    leaves that lie whole on a device are packed together, and one of the other kind is refused.

    Args:
        path: a folder, made if it is not there; `~` is the home; several processes must all see it. All is
            written by Orbax to `hessjax-checkpoints` in it; other files are not touched. Delete that to start
            anew.
        every: products between two checkpoints. `run` calls its callbacks every few products, so it may be
            a few more. The end of the run is saved always.

    Returns:
        A callback.

    Raises:
        ValueError: `every` below 1; `path` is empty, or a URL; when the run starts, `path` holds another run,
            or one with more products than `max_matvecs`, or nothing that can be read; processes that begin
            different runs, or do not see one folder; a run without process 0.
        BlockingIOError: another run, of this process or another one, uses `path`.
        OSError: `path` cannot be written to, which shows before the first product; the disk is full, in which
            case the checkpoint before is still good.
        TimeoutError: one of several processes does not come to where the others wait for it.

    Cost:
        Of disk twice the state, three times while saving: a checkpoint is written beside the others and
        renamed, and only then the oldest deleted. Of memory a copy on the host, of each process's parts. The
        run waits meanwhile. Checksums are made where the arrays lie, by two passes over them.

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


class _Open:
    """A run that is saved: in which folder, what makes it this one, after how many products it last was."""

    def __init__(self) -> None:
        self.held = contextlib.ExitStack()
        self.store: Any = None
        self.run: Any = None
        self.matvec: Any = None
        self.saved = 0


class _Checkpoint:
    """A callback with memory: the run that it saves, and those around it, if it is given to several."""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every
        self._open: list[_Open] = []

    def __enter__(self) -> "_Checkpoint":
        self._open.append(_Open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._open.pop().held.close()

    def __repr__(self) -> str:
        return f"checkpoint({str(self._path)!r}, every={self._every})"

    def restore(self, beginning: Beginning) -> tuple[Any, int] | None:
        """The state on disk and its products, if there is one; it must be of the run that begins here."""
        # Not in `__enter__`: only now are the arrays known, and by them who takes part.
        group, here = _processes.holders(tuple(beginning)), self._open[-1]
        here.store = here.held.enter_context(opened(self._path, group))
        here.run = Run(identity(beginning), devices_of(tuple(beginning)), jax.tree.leaves(beginning.state))
        check_alike(group, here.run.identity)
        here.matvec = beginning.matvec
        found = _checkpoint_files.read(here.store, here.run)
        if found is None:
            return None
        if isinstance(here.matvec, Gathering):
            here.matvec.go_on(found.gathered)
        here.saved = found.num_matvecs
        return jax.tree.unflatten(jax.tree.structure(beginning.state), found.leaves), here.saved

    def __call__(self, progress: Progress) -> None:
        here = self._open[-1]
        new = progress.num_matvecs - here.saved
        if new >= self._every or (progress.done and new):
            self._write(here, progress)
            here.saved = progress.num_matvecs

    def _write(self, here: _Open, progress: Progress) -> None:
        count = progress.num_matvecs
        gathered = here.matvec.gathered(count) if isinstance(here.matvec, Gathering) else {}
        saved = _checkpoint_files.Saved(jax.tree.leaves(progress.state), gathered, count)
        _check_holders(here.store.group, saved.leaves)
        try:
            _checkpoint_files.write(here.store, here.run, saved)
        except OSError as error:
            before = here.saved
            kept = f"the one after {before} products is still good" if before else "there is none before it"
            raise OSError(
                f"the checkpoint after {count} products could not be written to `{self._path}`; {kept}. "
                f"Mend what is wrong and run the same again: {error}"
            ) from error


def _check_holders(group: Group, leaves: list[Any]) -> None:
    """A matvec may bring in arrays of other processes that nothing showed of when the run began."""
    if (found := _processes.holders(leaves)) != group and len(found.members) > 1:
        raise ValueError(
            f"`like`, usually the params, must lie on processes {', '.join(map(str, found.members))} for "
            "`checkpoint`, since the matvec's products do, but lies on this one alone: place it, "
            "`jax.device_put(params, NamedSharding(mesh, P()))`."
        )
