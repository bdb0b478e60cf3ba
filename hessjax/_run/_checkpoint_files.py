"""Checkpoints on disk, by Orbax: what is in them, and which of them can be gone on from."""

import json
import os
import re
import shutil
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from hessjax._core import _archive, _files
from hessjax._run._identity import Identity, as_numbers, differences

KEPT = 2
"""Checkpoints on disk: the latest, and the one before in case the latest cannot be read."""

FOLDER = "hessjax-checkpoints"
"""Within the folder that is given: here Orbax deletes what it takes for its own."""

LOCK = "lock"
_PRODUCTS = "num_matvecs"
_FORMAT = 1
_STEP = re.compile(r"[1-9][0-9]*")


@runtime_checkable
class Gathering(Protocol):
    """A matvec that gathers something beside its products, which a resumed run must not lose."""

    def gathered(self, num_products: int) -> dict[str, np.ndarray]:
        """What it gathered in the first `num_products` products, those of a run before this one included."""

    def go_on(self, gathered: dict[str, np.ndarray]) -> None:
        """Take up what it had gathered."""


class Saved(NamedTuple):
    """What a run is gone on from.

    Attributes:
        leaves: of the estimator's state.
        gathered: what the matvec had gathered beside its products, by name.
        num_matvecs: the products in it.
    """

    leaves: list[Any]
    gathered: dict[str, np.ndarray]
    num_matvecs: int


def software() -> dict[str, str]:
    """What the bits of a result depend on beside the run."""
    device = jax.devices()[0]
    return {
        # Of the code that runs; what is installed may be older. Looked up, since it imports this module.
        "hessjax": sys.modules["hessjax"].__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": f"{device.platform} {device.device_kind}",
    }


# -- the store -----------------------------------------------------------------------------------


class Store:
    """A folder of checkpoints by their products; it must be locked."""

    def __init__(self, path: Path) -> None:
        import orbax.checkpoint as ocp  # here, because it takes half a second to import

        self.path, self._ocp = path, ocp
        self.clear_left_overs()
        # Not asynchronous: the state's memory is re-used by the next step. Not Orbax's manager: what it reads
        # of every step as it begins may be damaged.
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def close(self) -> None:
        """Let go of Orbax's threads."""
        self._checkpointer.close()

    def clear_left_overs(self) -> None:
        """Remove what was half written."""
        for entry in self.path.iterdir():
            if entry.is_dir() and self._ocp.utils.is_tmp_checkpoint(entry):
                shutil.rmtree(entry)

    def steps(self) -> list[int]:
        """The latest first."""
        found = [entry for entry in self.path.iterdir() if _STEP.fullmatch(entry.name) and entry.is_dir()]
        return sorted((int(entry.name) for entry in found), reverse=True)

    def save(self, step: int, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
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
            self._checkpointer.save(self.path / str(step), args=items)
        except Exception as error:  # a full disk is another error in each of Orbax's parts
            self.clear_left_overs()
            raise OSError(str(error)) from error
        # Orbax leaves some of it to the system: a power cut may not cost both checkpoints.
        _sync(self.path / str(step))
        for old in self.steps()[KEPT:]:
            shutil.rmtree(self.path / str(old))

    def header(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint, whole."""
        about = self._read(step, about=self._ocp.args.JsonRestore()).about
        if zlib.crc32(about["header"].encode()) != about["checksum"]:
            raise ValueError("the checksum of its header does not agree")
        return json.loads(about["header"])

    def arrays(self, step: int, header: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a checkpoint, every bit of them compared with what was written."""
        like = {name: _like_saved(dtype, shape) for name, (dtype, shape, _) in header["arrays"].items()}
        wanted = self._ocp.args.StandardRestore({name: x for name, x in like.items() if x.size})
        found = like | self._read(step, state=wanted).state
        arrays = {name: np.asarray(found[name]) for name in like}
        if wrong := [name for name, x in arrays.items() if checksum(x) != header["arrays"][name][2]]:
            raise ValueError(f"the checksums of arrays {', '.join(wrong)} do not agree")
        return arrays

    def _read(self, step: int, **items: Any) -> Any:
        return self._checkpointer.restore(self.path / str(step), args=self._ocp.args.Composite(**items))

    def put_aside(self, step: int) -> Path:
        """Rename a checkpoint, so that it does not count; nothing is overwritten."""
        aside, number = self.path / f"{step}.unreadable", 1
        while aside.exists():
            number, aside = number + 1, aside.with_suffix(f".unreadable-{number + 1}")
        (self.path / str(step)).rename(aside)
        return aside


def checksum(array: np.ndarray) -> int:
    """Of an array's bytes."""
    return zlib.crc32(_archive.as_bytes(array).data)


def _like_saved(dtype: str, shape: list[int]) -> np.ndarray:
    # Orbax reads the kind of it only: a view of one zero takes no memory.
    return np.broadcast_to(np.zeros((), _archive.dtype_of(dtype)), _archive.shape_of(shape))


def _sync(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _files.sync_folder(Path(parent))
    _files.sync_folder(folder.parent)


# -- writing -------------------------------------------------------------------------------------


def write(store: Store, run: Identity, saved: Saved) -> None:
    """A checkpoint of a run."""
    numbers = jax.device_get({f"state.{i}": as_numbers(x) for i, x in enumerate(saved.leaves)})
    numbers[_PRODUCTS] = saved.num_matvecs
    gathered = {f"gathered.{name}": x for name, x in saved.gathered.items()}
    arrays = {name: _archive.native(np.asarray(x)) for name, x in (numbers | gathered).items()}
    kinds = {name: [x.dtype.name, x.shape, checksum(x)] for name, x in arrays.items()}
    header = {"format": _FORMAT, "software": software(), "run": run, "arrays": kinds}
    store.save(saved.num_matvecs, header, arrays)


# -- reading -------------------------------------------------------------------------------------


def read(store: Store, run: Identity, fresh: list[Any]) -> Saved | None:
    """The latest checkpoint that can be read; a broken one before it is put aside, with a warning."""
    broken: dict[int, ValueError] = {}
    for step in store.steps():
        try:
            header, arrays = _whole(store, step)
        except ValueError as error:
            broken[step] = error
            continue
        _check_header(store.path, header, run)
        _put_aside(store, broken, step)
        leaves = [_like(arrays[f"state.{i}"], x) for i, x in enumerate(fresh)]
        prefix = "gathered."
        gathered = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
        return Saved(leaves, gathered, step)
    if broken:
        latest, reason = next(iter(broken.items()))
        raise ValueError(
            f"none of the checkpoints in `{store.path}` can be read, the latest (after {latest} products) "
            f"because {reason}. Delete the folder to start anew."
        )
    return None


def _whole(store: Store, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        header = store.header(step)
        if header["format"] != _FORMAT:
            return header, {}
        arrays = store.arrays(step, header)
        if arrays[_PRODUCTS] != step:
            raise ValueError(f"it is of {arrays[_PRODUCTS]} products")
        return header, arrays
    except MemoryError:
        raise
    except Exception as error:  # of what is damaged, Orbax says so by errors of every kind
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"it cannot be read ({type(error).__name__}: {reason})") from error


def _check_header(path: Path, header: dict[str, Any], run: Identity) -> None:
    """Refuse another run; warn of other software."""
    left = "It was left as it is. Give `checkpoint` another path, or delete the folder."
    made, now = header.get("software", {}), software()
    if header["format"] != _FORMAT:
        raise ValueError(
            f"the checkpoint in `{path}` must be of format {_FORMAT}, but it is of format "
            f"{header['format']}, by hessjax {made.get('hessjax')}; this is {now['hessjax']}.\n{left}"
        )
    changed = [f"{name} {made.get(name)}, now {x}" for name, x in now.items() if made.get(name) != x]
    if other := differences(header.get("run", {}), run):
        also = [f"made by {', '.join(changed)}"] if changed else []
        raise ValueError(
            f"the checkpoint in `{path}` must be of this run, but it is of another one:\n  "
            + "\n  ".join([*other, *also])
            + f"\n{left}"
        )
    if changed:
        warnings.warn(
            f"the checkpoint in `{path}` was made by other software: {'; '.join(changed)}. The run goes on "
            "from it, but its result may differ in the last digits from one that was never stopped.",
            stacklevel=2,
        )


def _like(array: np.ndarray, fresh: jax.Array) -> jax.Array:
    """The numbers as an array of the kind, and in the place, of the one that the run began with."""
    leaf = jnp.array(array)
    if jnp.issubdtype(fresh.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(fresh))
    # `device_put` commits, and what is committed without need cannot meet arrays of another device.
    return jax.device_put(leaf, fresh.sharding) if fresh.committed else leaf


def _put_aside(store: Store, broken: dict[int, ValueError], step: int) -> None:
    for other, error in broken.items():
        aside = store.put_aside(other)
        warnings.warn(
            f"the checkpoint after {other} products in `{store.path}` cannot be read ({error}) and is now "
            f"`{aside.name}`; the run goes on from the one after {step}.",
            stacklevel=2,
        )
