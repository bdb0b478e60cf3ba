"""Bytes of arrays and shapes on each device, and what the devices have."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))

HOST = "pinned_host"
"""The memory of the host that devices reach, as jax calls it."""


class MemoryLimitWarning(UserWarning):
    """What was asked for does not fit into a device's memory; the text names what would need less.

    Attributes:
        needed: bytes on each device.
        there: the bytes that each has.
    """

    def __init__(self, what: str, needed: int, there: int, less: str) -> None:
        has, advice = shown_bytes(there), f" Less take: {less}." if less else ""
        super().__init__(
            f"{what} needs {shown_bytes(needed)} of each device's memory, which has {has}.{advice}"
        )
        self.needed = needed
        self.there = there


def shown_bytes(count: int) -> str:
    """`3.20 GB`."""
    unit, name = next((pair for pair in UNITS if count >= pair[0]), (1, "bytes"))
    return f"{count} {name}" if unit == 1 else f"{count / unit:#.3g} {name}"


# -- arrays ----------------------------------------------------------------------------------------


def on_each(tree: Any) -> int:
    """The bytes of all leaves, each counted once, on each device that they are divided over."""
    return sum(_bytes(leaf) for leaf in _leaves(tree) if not _is_on_host(leaf))


def on_host(tree: Any) -> int:
    """Likewise of those in the memory of the host."""
    return sum(_bytes(leaf) for leaf in _leaves(tree) if _is_on_host(leaf))


def share_of(tree: Any) -> float:
    """What part of the leaves each device holds."""
    whole = sum(_bytes(leaf, whole=True) for leaf in _leaves(tree))
    return sum(map(_bytes, _leaves(tree))) / max(whole, 1)


def _leaves(tree: Any) -> list[Any]:
    # A matvec holds the params that it is asked about: the same arrays.
    return list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def _bytes(leaf: Any, whole: bool = False) -> int:
    shape, sharding = jnp.shape(leaf), getattr(leaf, "sharding", None)
    shape = shape if whole or sharding is None else sharding.shard_shape(shape)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return math.prod(shape) * int(dtype.itemsize)


def _is_on_host(leaf: Any) -> bool:
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


# -- devices ---------------------------------------------------------------------------------------


def limit_of(tree: Any) -> int | None:
    """The bytes that jax may take of each device that the leaves lie on; None where none says."""
    return min((stats["bytes_limit"] for stats in _stats(tree)), default=None)


def free_on(tree: Any) -> int | None:
    """The bytes left of each, likewise."""
    return min((stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in _stats(tree)), default=None)


def _stats(tree: Any) -> Iterator[dict[str, int]]:
    placed = [leaf.sharding for leaf in _leaves(tree) if getattr(leaf, "sharding", None) is not None]
    sets = [sharding.device_set for sharding in placed if not is_abstract(sharding)]
    for device in set().union(*sets) or set(jax.local_devices()[:1]):
        is_ours = device.process_index == jax.process_index()
        if is_ours and "bytes_limit" in (stats := memory_stats(device) or {}):
            yield stats


def is_abstract(sharding: Any) -> bool:
    """Whether it names axes and no devices."""
    return isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)


def memory_stats(device: jax.Device) -> dict[str, int] | None:
    """What a device says of its memory; a CPU says nothing."""
    return device.memory_stats()


def warn_unless_it_fits(estimator: Any, shapes: Callable[[], Any], like: Any) -> None:
    """Warn of a state (its shapes, if asked for) that is larger than what is free where `like` lies."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(like)):
        return
    if (free := free_on(like)) is None:
        return
    # Divided as the params are.
    needed = int(share_of(like) * on_each(shapes()))
    if needed > free:
        name = type(estimator).__name__.lower()
        warning = MemoryLimitWarning(f"the state of `{name}`", needed, free, estimator.less_memory)
        warnings.warn(warning, stacklevel=4)
