"""The factors of all blocks together: from gradients, with more of them, at another κ; F⁻¹ = m(A + κI)⁻¹."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core._types import Scalar
from hessjax._fisher._blocking import Parts
from hessjax._fisher._factors import Dual, Root, Rows, Whole, absorbed, dual_of, root_of, shifted, whole_of

Factored: TypeAlias = tuple[Root | Dual, ...] | Whole
"""Factors by groups of equally wide blocks, or of the one block that holds all leaves."""

Count: TypeAlias = Int[Array, ""]
"""m, the number of gradients."""


def built(rows: tuple[Rows, ...], shift: Scalar, chunk_size: int, *, as_one: bool) -> Factored:
    """From nothing but these gradients, with all leaves as one block or in blocks."""
    return whole_of(rows, shift) if as_one else tuple(_part_of(part, shift, chunk_size) for part in rows)


def extended(parts: Factored, rows: tuple[Rows, ...], old: Scalar, new: Scalar, chunk_size: int) -> Factored:
    """With more gradients and another κ; a dual of enough gradients becomes a root."""
    if isinstance(parts, Whole):
        return whole_of(tuple(map(_stacked, parts.rows, rows)), new)
    return tuple(
        _part_of(_stacked(part.rows, more), new, chunk_size)
        if isinstance(part, Dual)
        else absorbed(shifted(part, old, new), more, chunk_size)
        for part, more in zip(parts, rows, strict=True)
    )


def all_absorbed(parts: Factored, rows: tuple[Rows, ...], chunk_size: int) -> Factored:
    """Roots with more gradients, κ left as it is."""
    return tuple(absorbed(part, more, chunk_size) for part, more in zip(_roots(parts), rows, strict=True))


def followed(parts: Factored, old: Scalar, new: Scalar, factor: float) -> tuple[Factored, Scalar]:
    """Roots at a κ that has grown by more than a factor, or as they are; and the κ they are at."""
    # A loop of one turn or none: the branches of a condition would copy the roots.
    return jax.lax.while_loop(
        lambda state: factor * state[1] < new,
        lambda state: (tuple(shifted(part, state[1], new) for part in state[0]), new),
        (tuple(_roots(parts)), old),
    )


def solved(parts: Factored, vector: Parts, shift: Scalar, count: Count) -> Parts:
    """F⁻¹v."""
    if isinstance(parts, Whole):
        solutions = parts.solve(vector, shift)
    else:
        solutions = tuple(part.solve(v, shift) for part, v in zip(parts, vector, strict=True))
    return tuple(count * x for x in solutions)


def diagonals(parts: Factored, shift: Scalar, count: Count) -> Parts:
    """The diagonal of F⁻¹."""
    if isinstance(parts, Whole):
        found = parts.diagonal(shift)
    else:
        found = tuple(part.diagonal(shift) for part in parts)
    return tuple(count * x for x in found)


def dense(parts: Factored, position: tuple[int, slice], shift: Scalar, count: Count) -> Float[Array, "_ _ _"]:
    """The blocks of F⁻¹ at a `Blocking.position`."""
    group, which = position
    if isinstance(parts, Whole):
        return count * parts.dense(group, shift)
    return count * parts[group].dense(which, shift)


def images(parts: Factored) -> Parts:
    """Az = m(F − λI)z for every block."""
    return parts.image if isinstance(parts, Whole) else tuple(part.image for part in parts)


def _part_of(rows: Rows, shift: Scalar, chunk_size: int) -> Root | Dual:
    """A root if the gradients are at least as many as a block's weights."""
    return root_of(rows, shift, chunk_size) if rows.shape[0] >= rows.shape[2] else dual_of(rows, shift)


def _roots(parts: Factored) -> list[Root]:
    """The parts, once there are enough gradients for all of them to be roots."""
    return [part for part in parts if isinstance(part, Root)]


def _stacked(rows: Rows, more: Rows) -> Rows:
    return jnp.concatenate([rows, more])
