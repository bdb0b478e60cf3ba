"""Checkpoints of a run: what a killed run had done is not done again."""

import json
import os
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core._messages import check_path, checked_count
from hessjax._run._estimator import Beginning, Progress
from hessjax._run._identity import Identity, as_numbers, differences, identity

KEPT = 2
"""Checkpoints on disk: the latest, and the one before in case the latest cannot be read."""


# -- checkpoints ------------------------------------------------------------------------------------


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
    of a loss, and other data behind a matvec that is just a function, or that streams batches.

    Args:
        path: a folder of this run's own, made if it is not there. Delete it to start anew.
        every: products between two checkpoints. `run` calls its callbacks every few products, so it may be
            a few more. The end of the run is saved always.

    Returns:
        A callback.

    Raises:
        ValueError: `every` below 1; when the run starts, `path` holds another run, or one with more products
            than `max_matvecs`, or nothing that can be read.
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
    check_path("path", path)
    return _Checkpoint(Path(path).absolute(), checked_count("every", every))


class _Checkpoint:
    """A callback with memory: which run it saves, and after how many products it last did."""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every
        self._identity: Identity = {}
        self._saved = 0

    def __repr__(self) -> str:
        return f"checkpoint({str(self._path)!r}, every={self._every})"

    def restore(self, beginning: Beginning) -> tuple[Any, int] | None:
        """The state on disk and its products, if there is one; it must be of the run that begins here."""
        _refuse_unwritable(self._path)
        self._identity, self._saved = identity(beginning), 0
        found = _read(self._path, self._identity, jax.tree.leaves(beginning.state))
        if found is None:
            return None
        leaves, self._saved = found
        return jax.tree.unflatten(jax.tree.structure(beginning.state), leaves), self._saved

    def __call__(self, progress: Progress) -> None:
        new = progress.num_matvecs - self._saved
        if new >= self._every or (progress.done and new):
            _write(self._path, self._identity, progress, self._saved)
            self._saved = progress.num_matvecs


def _refuse_unwritable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(
            f"`path` of `checkpoint` must be a folder to write to, got `{path}`: {error}."
        ) from error


def _manager(path: Path) -> Any:
    import orbax.checkpoint as ocp  # here, because it takes a quarter of a second to import

    # The state's memory is re-used by the next step: it must be on disk before that, hence not asynchronous.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(path, options=options)


# -- writing -------------------------------------------------------------------------------------


def _write(path: Path, run: Identity, progress: Progress, before: int) -> None:
    import orbax.checkpoint as ocp

    arrays = _arrays(jax.tree.leaves(progress.state))
    about = {"run": run, "checksums": {name: _checksum(x) for name, x in arrays.items()}}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave({"json": json.dumps(about)})
    )
    try:
        with _manager(path) as manager:
            # By force: when to save is for `every` to say, and not for the manager's own interval.
            manager.save(progress.num_matvecs, args=items, force=True)
    except Exception as error:
        kept = f"the one after {before} products is still good" if before else "there is none before it"
        raise OSError(
            f"the checkpoint after {progress.num_matvecs} products could not be written to `{path}`; {kept}. "
            f"Mend what is wrong and run the same again: {error}"
        ) from error


def _arrays(leaves: list[Any]) -> dict[str, np.ndarray]:
    """The leaves on the host, by number; those without entries are left out."""
    # Without, as orbax refuses to save arrays of size 0.
    arrays = {f"{i:04d}": as_numbers(leaf) for i, leaf in enumerate(leaves) if leaf.size}
    return {name: np.asarray(x) for name, x in jax.device_get(arrays).items()}


def _checksum(array: np.ndarray) -> int:
    # As bytes, since an array of bfloat16 has no `.data`.
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


# -- reading -------------------------------------------------------------------------------------


def _read(path: Path, run: Identity, fresh: list[Any]) -> tuple[list[Any], int] | None:
    """The latest checkpoint that can be read; a broken one before it is put aside, with a warning."""
    with _manager(path) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        broken: dict[int, Exception] = {}
        for step in steps:
            try:
                about = _about(manager, step)
                if not (other := differences(about["run"], run)):
                    leaves = _restore(manager, step, about["checksums"], fresh)
            except Exception as error:
                broken[step] = error
                continue
            if other:
                raise ValueError(
                    f"the checkpoint in `{path}` must be of this run, but it is of another one:\n  "
                    + "\n  ".join(other)
                    + "\nIt was left as it is. Give `checkpoint` another path, or delete the folder."
                )
            _put_aside(path, broken, step)
            return leaves, step
    if broken:
        latest, reason = next(iter(broken.items()))
        raise ValueError(
            f"none of the checkpoints in `{path}` can be read, the latest (after {latest} products) because "
            f"of {type(reason).__name__}: {reason}\nDelete the folder to start anew."
        )
    return None


def _about(manager: Any, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    return json.loads(
        manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about["json"]
    )


def _restore(manager: Any, step: int, checksums: dict[str, int], fresh: list[Any]) -> list[Any]:
    import orbax.checkpoint as ocp

    numbers = {f"{i:04d}": jax.eval_shape(as_numbers, x) for i, x in enumerate(fresh) if x.size}
    # Only shapes and dtypes are read: a view of one zero takes no memory.
    like = {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in numbers.items()}
    arrays = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
    if wrong := [name for name, x in arrays.items() if _checksum(np.asarray(x)) != checksums[name]]:
        raise ValueError(f"the checksums of arrays {', '.join(wrong)} do not agree.")
    return [_like(arrays[f"{i:04d}"], x) if x.size else x for i, x in enumerate(fresh)]


def _like(array: np.ndarray, fresh: jax.Array) -> jax.Array:
    """The numbers as an array of the kind, and in the place, of the one that the run began with."""
    leaf = jnp.array(array)
    if jnp.issubdtype(fresh.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(fresh))
    # `device_put` commits, and what is committed without need cannot meet arrays of another device.
    return jax.device_put(leaf, fresh.sharding) if fresh.committed else leaf


def _put_aside(path: Path, broken: dict[int, Exception], step: int) -> None:
    for other, error in broken.items():
        warnings.warn(
            f"the checkpoint after {other} products in `{path}` cannot be read ({type(error).__name__}) and "
            f"is now `{other}.unreadable`; the run goes on from the one after {step}.",
            stacklevel=2,
        )
        (path / str(other)).rename(path / f"{other}.unreadable")
