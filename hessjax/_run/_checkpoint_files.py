"""Checkpoints as files: what is in them, how they are written, and which of them can be gone on from."""

import re
import sys
import warnings
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

LOCK = "hessjax.lock"
_FORMAT = 1
_NAME = re.compile(r"hessjax-(\d+)\.npz")
_LEFT_OVER = re.compile(rf"\.hessjax-\d+\.npz\.[0-9a-f]+{re.escape(_files.PARTIAL)}")


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


def steps(path: Path) -> dict[int, Path]:
    """The files of checkpoints by their products, the latest first; what else is there is not ours."""
    found = {int(m[1]): file for file in path.iterdir() if (m := _NAME.fullmatch(file.name))}
    return dict(sorted(found.items(), reverse=True))


# -- writing -------------------------------------------------------------------------------------


def write(path: Path, run: Identity, saved: Saved) -> None:
    """A checkpoint beside the others, and only then the oldest deleted."""
    arrays = {f"state.{i}": as_numbers(x) for i, x in enumerate(saved.leaves)}
    arrays = {name: np.asarray(x) for name, x in (jax.device_get(arrays) | _named(saved.gathered)).items()}
    header = {
        "format": _FORMAT,
        "software": software(),
        "run": run,
        "arrays": {name: [x.dtype.name, x.shape] for name, x in arrays.items()},
    }
    target = path / f"hessjax-{saved.num_matvecs}.npz"
    _files.write_whole(target, lambda file: _archive.write_archive(file, header, arrays, compressed=False))
    for file in list(steps(path).values())[KEPT:]:
        file.unlink()


def _named(gathered: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"gathered.{name}": x for name, x in gathered.items()}


def clear_left_overs(path: Path) -> None:
    """Remove what a killed process had half written."""
    for file in path.iterdir():
        if _LEFT_OVER.fullmatch(file.name):
            file.unlink()


# -- reading -------------------------------------------------------------------------------------


def read(path: Path, run: Identity, fresh: list[Any]) -> Saved | None:
    """The latest checkpoint that can be read; a broken one before it is put aside, with a warning."""
    broken: dict[int, ValueError] = {}
    for step, file in steps(path).items():
        try:
            header, arrays = _arrays(file)
        except ValueError as error:
            broken[step] = error
            continue
        _check_header(path, header, run)
        _put_aside(path, broken, step)
        leaves = [_like(arrays[f"state.{i}"], x) for i, x in enumerate(fresh)]
        prefix = "gathered."
        gathered = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
        return Saved(leaves, gathered, step)
    if broken:
        latest, reason = next(iter(broken.items()))
        raise ValueError(
            f"none of the checkpoints in `{path}` can be read, the latest (after {latest} products) because "
            f"{reason}. Delete the folder to start anew."
        )
    return None


def _arrays(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with _archive.Archive(file) as archive:
        header = archive.header
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            return header if isinstance(header, dict) else {}, {}
        try:
            kinds = {name: (*_kind(dtype, shape),) for name, (dtype, shape) in header["arrays"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its header cannot be read ({type(error).__name__}: {error})") from error
        return header, {name: archive.array(name, shape, dtype) for name, (dtype, shape) in kinds.items()}


def _kind(dtype: Any, shape: Any) -> tuple[np.dtype, tuple[int, ...]]:
    return _archive.dtype_of(dtype), _archive.shape_of(shape)


def _check_header(path: Path, header: dict[str, Any], run: Identity) -> None:
    """Refuse another run; warn of other software."""
    left = "It was left as it is. Give `checkpoint` another path, or delete the folder."
    made, now = header.get("software", {}), software()
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"the checkpoint in `{path}` must be of format {_FORMAT}, but it is of format "
            f"{header.get('format')}, by hessjax {made.get('hessjax')}; this is {now['hessjax']}.\n{left}"
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


def _put_aside(path: Path, broken: dict[int, ValueError], step: int) -> None:
    for other, error in broken.items():
        aside = path / f"hessjax-{other}.npz.unreadable"
        number = 1
        while aside.exists():  # an earlier one: nothing is overwritten
            number, aside = number + 1, aside.with_suffix(f".unreadable-{number + 1}")
        (path / f"hessjax-{other}.npz").rename(aside)
        warnings.warn(
            f"the checkpoint after {other} products in `{path}` cannot be read ({error}) and is now "
            f"`{aside.name}`; the run goes on from the one after {step}.",
            stacklevel=2,
        )
