"""Whether data come twice the same: two passes over batches, compared without keeping them."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessjax import _tree


def compare_passes(batches: Iterable[Any]) -> tuple[int, str]:
    """How many batches of a second pass differ from the first, and what is to be said about it."""
    changed, first = 0, ""
    passes = [list(_digests(batches)) for _ in range(2)]
    for index, (one, other) in enumerate(itertools.zip_longest(*passes)):
        if one == other:
            continue
        changed += 1
        first = first or f"batch {index} is the first to change: {_difference(one, other)}"
    if not changed:
        return 0, f"{len(passes[0])} batches, twice the same"
    return changed, f"{changed} of {max(map(len, passes))} batches change in a second pass; {first}"


def _digests(batches: Iterable[Any]) -> Iterator[dict[str, bytes]]:
    """Of every batch, a fingerprint of each leaf."""
    for batch in batches:
        yield dict(zip(_tree.leaf_paths(batch), map(_digest, jax.tree.leaves(batch)), strict=True))


def _digest(leaf: Any) -> bytes:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf)
    head = f"{array.dtype}{np.shape(leaf)}".encode()
    return hashlib.blake2b(head + array.tobytes(), digest_size=16).digest()


def _difference(one: dict[str, bytes] | None, other: dict[str, bytes] | None) -> str:
    if one is None or other is None:
        return f"the {'second' if other is None else 'first'} pass has ended before it"
    paths = [path for path in {**one, **other} if one.get(path) != other.get(path)]
    return f"its leaves {', '.join(paths)} differ" if paths != ["."] else "its numbers differ"
