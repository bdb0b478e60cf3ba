"""Gradients that come block after block."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hessjax._core import _tree
from hessjax._core._types import Block, Vector


def stream(grads: Any, like: Any = None) -> Iterator[Block]:
    """The blocks of gradients, each checked against the first, or against `like`."""
    is_stream = isinstance(grads, Iterable) and not hasattr(grads, "shape")
    is_stream = is_stream and jax.tree_util.all_leaves([grads])
    reference, empty = "the gradients before", True
    for index, block in enumerate(grads if is_stream else [grads]):
        name = f"grads[{index}]" if is_stream else "grads"
        count = num_grads(block, name)
        like = row(block) if like is None else like
        _tree.check_like(row(block), like, name, reference)
        if count:
            empty = False
            yield block
    if empty:
        raise ValueError("`grads` must hold at least one gradient, got none.")


def row(block: Block) -> Vector:
    """Shapes and dtypes of one gradient."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), block)


def num_grads(block: Block, name: str = "grads") -> int:
    """The common length of the leading axes.

    Raises:
        TypeError: leaves that are not floating point.
        ValueError: the axes disagree, or there is none.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(block)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(
            f"`{name}` must be a block, its leaves with one common leading axis of gradients, got the shapes "
            f"{shapes}. One gradient is a block too: `jax.tree.map(lambda x: x[None], gradient)`."
        )
    if shapes[0][0]:
        _tree.check_floating(block, name)
    return shapes[0][0]


def gathered(blocks: Iterator[Block], count: int | None) -> Block:
    """At least `count` gradients in one block, as far as there are any; None: all."""
    gathered = [next(blocks)]
    held = jax.tree.leaves(gathered[0])[0].shape[0]
    while (count is None or held < count) and (block := next(blocks, None)) is not None:
        gathered.append(block)
        held += jax.tree.leaves(block)[0].shape[0]
    return gathered[0] if len(gathered) == 1 else _joined(gathered)


@jax.jit
def _joined(blocks: list[Block]) -> Block:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *blocks)
