"""Streams of gradients: block after block, each checked, and how much its gradients count."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._messages import shown
from hessjax._core._sources import check_source, opened
from hessjax._core._types import Block, Scalar
from hessjax._fisher._blocking import row
from hessjax._fisher._rows import num_grads
from hessjax._fisher._shards import Shards, end_to_end


class Counted(NamedTuple):
    """A block of gradients.

    Attributes:
        block: the rows √w g, so that they add up to Σ w ggᵀ.
        total: Σ w; None where every gradient counts once.
    """

    block: Block
    total: Scalar | None


def stream(grads: Any, like: Any = None, weights: Any = None) -> Iterator[Counted]:
    """The blocks of gradients, each checked against the first, or against `like`."""
    # Arrays can be iterated over too, and a list or a dict is a tree: a block. A stream is for jax a leaf.
    is_stream = (callable(grads) or isinstance(grads, Iterable)) and not hasattr(grads, "shape")
    is_stream = is_stream and jax.tree_util.all_leaves([grads])
    if is_stream:
        check_source(grads, "grads")
    blocks, reference, empty = opened(grads, "grads") if is_stream else [grads], "the gradients before", True
    for index, (block, weight) in enumerate(_pairs(blocks, weights, is_stream)):
        place = f"[{index}]" if is_stream else ""
        count = num_grads(block, f"grads{place}")
        like = row(block) if like is None else like
        _tree.check_like(row(block), like, f"grads{place}", reference)
        counted = _counted(block, count, weight, f"weights{place}") if count else None
        if counted is not None:
            empty = False
            yield counted
    if empty:
        raise ValueError("`grads` must hold at least one gradient that counts, got none.")


def _pairs(blocks: Iterable[Any], weights: Any, is_stream: bool) -> Iterator[tuple[Any, Any]]:
    if weights is None:
        yield from ((block, None) for block in blocks)
        return
    if not is_stream:
        weights = [weights]
    elif not isinstance(weights, Iterable):
        raise TypeError(
            "`weights` must be an iterable like the stream of blocks, with an array or a number for each, "
            f"got a {type(weights).__name__}."
        )
    try:
        yield from zip(blocks, weights, strict=True)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ValueError(f"`weights` must have one entry for each block of `grads`: {error}.") from None


def _numbers(weight: Any, name: str) -> np.ndarray:
    found = np.asarray(jax.device_get(weight))
    if not (jnp.issubdtype(found.dtype, jnp.number) or found.dtype == bool) or found.dtype.kind == "c":
        raise TypeError(f"`{name}` must be real numbers, got {shown(weight)}.")
    return found.astype(float)


def _counted(block: Block, count: int, weight: Any, name: str) -> Counted | None:
    """The block with its weights in it; None if it does not count at all."""
    if weight is None:
        return Counted(block, None)
    if not isinstance(weight, jax.core.Tracer):
        weight = _numbers(weight, name)
        if not np.all((weight >= 0) & np.isfinite(weight)):
            raise ValueError(f"`{name}` must be finite and at least 0, got {weight}.")
        if not weight.any():
            return None
    if jnp.shape(weight) not in ((), (count,)):
        raise ValueError(
            f"`{name}` must be one number for each of the {count} gradients, ({count},), or one for all of "
            f"them together, got shape {jnp.shape(weight)}."
        )
    each = weight if jnp.ndim(weight) else jnp.full(count, weight / count)
    return Counted(*_weighted(block, jnp.asarray(each, _tree.accumulator_dtype(block))))


@jax.jit
def _weighted(block: Block, weights: Float[Array, " m"]) -> tuple[Block, Scalar]:
    def rows(x: Array) -> Array:
        factors = jnp.sqrt(weights).reshape(-1, *[1] * (x.ndim - 1))
        scaled = (factors * x.astype(factors.dtype)).astype(x.dtype)
        return jnp.where(factors == 0, 0, scaled)  # what does not count may be NaN, and zero times NaN is NaN

    return jax.tree.map(rows, block), jnp.sum(weights)


def gathered(blocks: Iterator[Counted], count: int | None) -> Counted:
    """At least `count` gradients in one block, as far as there are any; None: all."""
    gathered = [next(blocks)]
    held = jax.tree.leaves(gathered[0].block)[0].shape[0]
    while (count is None or held < count) and (more := next(blocks, None)) is not None:
        gathered.append(more)
        held += jax.tree.leaves(more.block)[0].shape[0]
    if len(gathered) == 1:
        return gathered[0]
    shards = [
        tuple(map(Shards.of, leaves))
        for leaves in zip(*(jax.tree.leaves(x.block) for x in gathered), strict=True)
    ]
    return _joined(tuple(shards), gathered)


@functools.partial(jax.jit, static_argnums=0)
def _joined(shards: tuple[tuple[Shards | None, ...], ...], counted: list[Counted]) -> Counted:
    blocks, totals = zip(*counted, strict=True)
    total = None if totals[0] is None else jnp.sum(jnp.stack(totals))
    leaves = zip(*map(jax.tree.leaves, blocks), strict=True)
    joined = [end_to_end(mine, rows) for mine, rows in zip(shards, leaves, strict=True)]
    return Counted(jax.tree.unflatten(jax.tree.structure(blocks[0]), joined), total)
