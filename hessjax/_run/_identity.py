"""What makes a run the run it is, as text and a few numbers: to tell an old one from another one."""

import dataclasses
import functools
import inspect
import json
import types
import zlib
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _processes, _sharding, _tree
from hessjax._core._digests import digests
from hessjax._core._processes import Group
from hessjax._core._types import Amount
from hessjax._run._estimator import Beginning

Identity: TypeAlias = dict[str, str | list[float]]
"""By name: text that must be equal, or numbers that must be close."""

SAMPLE = 16
"""Entries of each array that are compared; as numbers, since another machine may round them otherwise."""


def identity(beginning: Beginning) -> Identity:
    """The identity of a run: methods, arrays of the matvec, the state it begins with, key, params."""
    estimator, matvec, key, like, state = beginning
    found: Identity = {"estimator": describe(estimator)}
    found |= {"matvec": describe(matvec), "key": digests([as_numbers(key)])[0]}
    found |= fingerprint(like, "params")
    # A Partial is a pytree: the batch and the params in it can be looked at.
    arrays = {f"matvec {path}": x for path, x in _leaves(matvec) if _is_array(x)}
    arrays |= {f"state {path}": x for path, x in _leaves(state)}
    found |= {name: _kind(x) for name, x in arrays.items()}
    samples = _processes.by_devices(_samples, [as_numbers(x) for x in arrays.values()])
    pairs = zip(arrays, map(_processes.on_host, samples), strict=True)
    return found | {f"{name}, numbers in it": np.asarray(x, float).tolist() for name, x in pairs}


def fingerprint(tree: Any, name: str) -> Identity:
    """Kind and digest of every array of a tree, by path: every bit counts, but no layout over devices."""
    arrays = {path: as_numbers(x) for path, x in _leaves(tree) if _is_array(x)}
    pairs = zip(arrays.items(), digests(list(arrays.values())), strict=True)
    return {f"{name} {path}": f"{_kind(x)} {digest}" for (path, x), digest in pairs}


def differences(saved: Identity, now: Identity) -> list[str]:
    """What differs, a line each; the states of two estimators have nothing to compare."""
    names = sorted(saved.keys() | now.keys())
    if any(saved.get(name) != now.get(name) for name in names if name.startswith("estimator")):
        names = [name for name in names if not name.startswith("state")]
    lines = []
    for name in names:
        a, b = saved.get(name, "(none)"), now.get(name, "(none)")
        if isinstance(a, str) or isinstance(b, str):
            if a != b:
                lines.append(f"{name}: saved {_shown(a)}, now {_shown(b)}")
        elif not _close(a, b):
            lines.append(f"{name}: saved {_shown(a)}, now {_shown(b)}")
    return lines


def check_alike(group: Group, found: Identity) -> None:
    """Raise a ValueError unless all processes of a group begin the same run."""
    text = json.dumps(found)
    if len(set(group.exchanged(str(zlib.crc32(text.encode()))))) == 1:
        return
    first = json.loads(group.exchanged(text)[0])
    lines = "\n  ".join(differences(first, found))
    # All of them raise: those that do not differ would wait for the others forever.
    found_by = zip(group.members, group.exchanged(lines), strict=True)
    if other := next(((member, lines) for member, lines in found_by if lines), None):
        raise ValueError(
            f"`checkpoint` must be of the same run in every process, but process {group.members[0]}'s "
            f"(`saved`) is not process {other[0]}'s (`now`):\n  {other[1]}"
        )


def as_numbers(leaf: Any) -> Any:
    """A leaf as an array of numbers: typed random keys as their data."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def describe(thing: Any, depth: int = 4) -> str:
    """Functions by name and the settings they close over, the same in every process."""
    if depth == 0:
        return type(thing).__name__
    inside = functools.partial(describe, depth=depth - 1)
    thing = inspect.unwrap(thing) if callable(thing) else thing  # of `jax.jit`, for one
    if isinstance(thing, types.FunctionType):
        cells = [_content(cell) for cell in thing.__closure__ or ()]
        settings = [f"{k}={inside(v)}" for k, v in zip(thing.__code__.co_freevars, cells, strict=True)]
        name = thing.__qualname__
        if thing.__name__ == "<lambda>":
            name = f"lambda using {' '.join(thing.__code__.co_names)}"
        return f"{name}({', '.join(settings)})" if settings else name
    if isinstance(thing, functools.partial):  # a `Partial` is one
        parts = [inside(x) for x in thing.args if callable(x)]
        return f"{inside(thing.func)}({', '.join(parts)})" if parts else inside(thing.func)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
        # What an estimator begins with is in the state; a tolerance says when to stop, not what to do.
        kept = {n: x for n, x in fields.items() if n not in getattr(thing, "init_only", ())}
        shown = [f"{name}={inside(x)}" for name, x in kept.items() if not isinstance(x, Amount)]
        return f"{type(thing).__name__}({', '.join(shown)})"
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return repr(thing)
    if isinstance(thing, tuple):
        return f"({', '.join(map(inside, thing))})"
    return getattr(thing, "__qualname__", type(thing).__name__)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(_tree.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _kind(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"


@jax.jit
def _samples(leaves: list[Any]) -> list[jax.Array]:
    """Entries of every array, evenly spread."""
    return [_entries(jnp.asarray(leaf)) for leaf in leaves]


def _entries(leaf: jax.Array) -> jax.Array:
    if not leaf.ndim:
        return leaf[None]
    at = np.unique(np.linspace(0, max(leaf.size - 1, 0), SAMPLE).astype(int))[: leaf.size]
    # Told where they go: explicit meshes look nothing up along an axis that is sharded otherwise.
    return leaf.at[np.unravel_index(at, leaf.shape)].get(out_sharding=_sharding.everywhere(leaf))


def _close(a: list[float], b: list[float]) -> bool:
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape:
        return False
    finite = np.abs(x[np.isfinite(x)])
    return np.allclose(x, y, rtol=1e-5, atol=1e-6 * finite.max(initial=0), equal_nan=True)


def _shown(value: str | list[float]) -> str:
    if isinstance(value, str):
        return value
    return f"[{', '.join(f'{x:.6g}' for x in value[:4])}{', …' if len(value) > 4 else ''}]"
