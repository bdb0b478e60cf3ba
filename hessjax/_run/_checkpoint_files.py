"""Checkpoints: what is in them, and which of them can be gone on from."""

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import NamedSharding

from hessjax._core import _archive, _processes
from hessjax._core._digests import digests
from hessjax._run._identity import Identity, as_numbers, differences
from hessjax._run._store import Store, numpy_like

_PRODUCTS = "num_matvecs"
_FORMAT = 2
Found = TypeVar("Found")


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


class Run(NamedTuple):
    """The run that begins, beside which a checkpoint is held.

    Attributes:
        identity: what makes it this run.
        devices: what it runs on, in words.
        fresh: the leaves of the state that it begins with.
    """

    identity: Identity
    devices: str
    fresh: list[Any]


def software(devices: str) -> dict[str, str]:
    """What the bits of a result depend on beside the run."""
    return {
        # Of the code that runs; what is installed may be older. Looked up, since it imports this module.
        "hessjax": sys.modules["hessjax"].__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": devices,
    }


def devices_of(tree: Any) -> str:
    """The devices that the arrays of a tree lie on, in words: on others sums are rounded otherwise."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    devices: set[Any] = {device for x in arrays for device in x.sharding.device_set} or {jax.devices()[0]}
    kinds = ", ".join(sorted({f"{device.platform} {device.device_kind}" for device in devices}))
    if len(devices) == 1:
        return kinds
    meshes = [x.sharding.mesh.shape for x in arrays if isinstance(x.sharding, NamedSharding)]
    axes = sorted({" × ".join(f"{name} {n}" for name, n in shape.items()) for shape in meshes})
    processes = len({device.process_index for device in devices})
    where = [f"{processes} processes"] * (processes > 1) + axes
    return f"{len(devices)} × {kinds} ({'; '.join(where)})"


# -- writing -------------------------------------------------------------------------------------


def write(store: Store, run: Run, saved: Saved) -> None:
    """A checkpoint of a run; by all processes that hold parts of it."""
    arrays = {f"state.{i}": _as_stored(x) for i, x in enumerate(saved.leaves)}
    arrays |= {f"gathered.{name}": _as_stored(x) for name, x in saved.gathered.items()}
    arrays[_PRODUCTS] = np.asarray(saved.num_matvecs)
    pairs = zip(arrays.items(), digests(list(arrays.values())), strict=True)
    kinds = {name: [x.dtype.name, x.shape, digest] for (name, x), digest in pairs}
    header = {
        "format": _FORMAT,
        "software": software(run.devices),
        "run": run.identity,
        "arrays": kinds,
    }
    store.save(saved.num_matvecs, header, arrays)


def _as_stored(leaf: Any) -> Any:
    """Over devices of several processes as it is: each writes its parts. Otherwise on the host."""
    numbers = as_numbers(leaf)
    return numbers if _processes.spans(numbers) else _archive.native(np.asarray(numbers))


# -- reading -------------------------------------------------------------------------------------


def read(store: Store, run: Run) -> Saved | None:
    """The latest checkpoint that can be read; a broken one before it is put aside, with a warning."""
    broken: dict[int, str] = {}
    for step in store.steps():
        try:
            header = _attempted(store, functools.partial(store.header, step))
            if header["format"] == _FORMAT and not differences(header.get("run", {}), run.identity):
                arrays = _attempted(store, functools.partial(_arrays, store, step, header, run.fresh))
                _check_arrays(step, header, arrays)
        except UnreadableError as error:
            broken[step] = str(error)
            continue
        _check_header(store.path, header, run)
        _put_aside(store, broken, step)
        leaves = [_like(arrays[f"state.{i}"], x) for i, x in enumerate(run.fresh)]
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


class UnreadableError(Exception):
    """A checkpoint cannot be read, by one process at least; raised in all of them."""


def _attempted(store: Store, work: Callable[[], Found]) -> Found:
    found, reason = None, ""
    try:
        found = work()
    except MemoryError:
        raise
    except Exception as error:  # of what is damaged, Orbax says so by errors of every kind
        first_line = (str(error).splitlines() or [""])[0][:200]
        reason = f"it cannot be read ({type(error).__name__}: {first_line})"
    if reason := next(filter(None, store.group.exchanged(reason)), ""):
        raise UnreadableError(reason)
    return cast(Found, found)


def _arrays(store: Store, step: int, header: dict[str, Any], fresh: list[Any]) -> dict[str, Any]:
    """The arrays of a checkpoint, those of the state where the fresh ones lie."""
    like = {name: numpy_like(dtype, shape) for name, (dtype, shape, _) in header["arrays"].items()}
    parts = {f"state.{i}": as_numbers(x) for i, x in enumerate(fresh)}
    spanning = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in parts.items()
        if _processes.spans(x)
    }
    return store.arrays(step, like | spanning)


def _check_arrays(step: int, header: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Every bit compared with what was written."""
    found = dict(zip(arrays, digests(list(arrays.values())), strict=True))
    if wrong := [name for name, digest in found.items() if digest != header["arrays"][name][2]]:
        raise UnreadableError(f"it cannot be read (the checksums of arrays {', '.join(wrong)} do not agree)")
    if arrays[_PRODUCTS] != step:
        raise UnreadableError(f"it cannot be read (it is of {arrays[_PRODUCTS]} products)")


def _check_header(path: Path, header: dict[str, Any], run: Run) -> None:
    """Refuse another run; warn of other software."""
    left = "It was left as it is. Give `checkpoint` another path, or delete the folder."
    made, now = header.get("software", {}), software(run.devices)
    if header["format"] != _FORMAT:
        raise ValueError(
            f"the checkpoint in `{path}` must be of format {_FORMAT}, but it is of format "
            f"{header['format']}, by hessjax {made.get('hessjax')}; this is {now['hessjax']}.\n{left}"
        )
    changed = [f"{name} {made.get(name)}, now {x}" for name, x in now.items() if made.get(name) != x]
    if other := differences(header.get("run", {}), run.identity):
        also = [f"made by {', '.join(changed)}"] if changed else []
        if made.get("device") != now["device"] and any(line.startswith("state ") for line in other):
            also.append(
                "Vectors of params that are divided over devices are kept otherwise than of whole ones: "
                "divide the same leaves, over any number of devices, or start anew."
            )
        raise ValueError(
            f"the checkpoint in `{path}` must be of this run, but it is of another one:\n  "
            + "\n  ".join([*other, *also])
            + f"\n{left}"
        )
    if changed:
        warnings.warn(
            f"the checkpoint in `{path}` was made by other software or on other devices: "
            f"{'; '.join(changed)}. The run goes on from it, but its result may differ in the last digits "
            "from one that was never stopped.",
            stacklevel=2,
        )


def _like(array: Any, fresh: jax.Array) -> jax.Array:
    """The numbers as an array of the kind, and in the place, of the one that the run began with."""
    leaf = jnp.array(array) if isinstance(array, np.ndarray) else array
    if jnp.issubdtype(fresh.dtype, jax.dtypes.prng_key):
        leaf = jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(fresh))
    # `device_put` commits, and what is committed without need cannot meet arrays of another device.
    return jax.device_put(leaf, fresh.sharding) if fresh.committed and not _processes.spans(leaf) else leaf


def _put_aside(store: Store, broken: dict[int, str], step: int) -> None:
    for other, reason in broken.items():
        aside = store.put_aside(other)
        warnings.warn(
            f"the checkpoint after {other} products in `{store.path}` cannot be read ({reason}) and is now "
            f"`{aside}`; the run goes on from the one after {step}.",
            stacklevel=2,
        )
