"""An orthonormal basis that grows by one vector at a time and costs no more than its filled part.

Rows are kept in chunks, each its own array, so that work touches only the chunks that hold something
(unfilled memory costs bandwidth) and nothing is ever sliced, copied or allocated twice.
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax import _tree
from hessjax._typing import Block, Params, Scalar, Vector
from hessjax.spectral.probes import hashed_signs

CHUNK = 16
"""Rows to a chunk: below, the products with a chunk no longer run at the memory's full bandwidth."""

STRIP = 2**16
"""Columns that are rotated at a time."""

Basis: TypeAlias = tuple[Block, ...]


def allocate(like: Params, num_rows: int) -> Basis:
    """A basis of `num_rows` zero rows like `like`, in at least float32."""
    wide = jax.eval_shape(_tree.wide, like)
    return tuple(
        jax.tree.map(lambda x, n=stop - start: jnp.zeros((n, *x.shape), x.dtype), wide)
        for start, stop in _bounds(num_rows)
    )


def read(basis: Basis, index: Array) -> Vector:
    """Row `index`."""
    readers = [lambda i, j=j: _tree.row(basis[j], i - j * CHUNK) for j in range(len(basis))]
    return jax.lax.switch(index // CHUNK, readers, index)


def write(basis: Basis, index: Array, vector: Vector) -> Basis:
    """The basis with row `index` replaced; in place where the memory is donated."""

    def write_chunk(chunk: Block, start: int, stop: int) -> Block:
        local = jnp.where(
            (start <= index) & (index < stop), index - start, stop - start
        )  # else: past the end
        return jax.tree.map(
            lambda rows, x: rows.at[local].set(x.astype(rows.dtype), mode="drop"), chunk, vector
        )

    return tuple(
        write_chunk(chunk, *bounds) for chunk, bounds in zip(basis, _bounds(_rows(basis)), strict=True)
    )


def project_out(basis: Basis, count: Array, vector: Vector) -> tuple[Vector, Float[Array, " rows"]]:
    """`vector` less its components along the first `count` rows, and these components.

    One pass of classical Gram–Schmidt. Chunks beyond `count` are not touched.
    """
    bounds = list(_bounds(_rows(basis)))
    parts = []
    for chunk, (start, stop) in zip(basis, bounds, strict=True):
        inside = jnp.arange(start, stop) < count
        zeros = jnp.zeros(stop - start, _tree.accumulator_dtype(vector))
        part = jax.lax.cond(start < count, _tree.block_inner, lambda *_, z=zeros: z, chunk, vector)
        parts.append(jnp.where(inside, part, 0))
    for chunk, part, (start, _) in zip(basis, parts, bounds, strict=True):
        vector = jax.lax.cond(start < count, _subtract, lambda _c, _p, v: v, chunk, part, vector)
    return vector, jnp.concatenate(parts)


class Orthogonal(NamedTuple):
    """What `orthogonalise` makes of a vector.

    Attributes:
        vector: of norm 1, orthogonal to the rows.
        components: (rows,) what was taken out along each row.
        norm: what was left of the vector; 0 if nothing was, and `vector` is a fresh direction.
    """

    vector: Vector
    components: Float[Array, " rows"]
    norm: Scalar


def orthogonalise(basis: Basis, count: Array, vector: Vector, tiny: Scalar) -> Orthogonal:
    """A unit vector orthogonal to the first `count` rows: passes of `project_out` until one loses little.

    A pass that leaves at least 0.7 of the norm was accurate; "twice is enough" (Parlett 1998, §6.9). A
    vector of which no more than `tiny` is left was inside the span: a fresh direction takes its place.
    """

    def unsettled(loop: tuple[Orthogonal, Array, Array]) -> Array:
        _, settled, passes = loop
        return ~settled & (passes < 5)

    def one_pass(loop: tuple[Orthogonal, Array, Array]) -> tuple[Orthogonal, Array, Array]:
        # `norm` is positive here until the vector collapses, then minus the fresh direction's.
        (vector, components, before), _, passes = loop
        fresh = before < 0
        vector, part = project_out(basis, count, vector)
        after = _tree.norm(vector)
        collapsed = ~fresh & (after <= tiny)
        settled = ~collapsed & (after >= 0.7 * jnp.abs(before))
        vector = jax.lax.cond(collapsed, lambda v: hashed_signs(count, v), lambda v: v, vector)
        size = jnp.sqrt(jnp.asarray(_tree.size(vector), after.dtype))
        norm = jnp.where(collapsed, -size, jnp.where(fresh, -after, after))
        return Orthogonal(vector, components + jnp.where(fresh, 0, part), norm), settled, passes + 1

    nothing = jnp.zeros(_rows(basis), _tree.accumulator_dtype(vector))
    begin = Orthogonal(vector, nothing, _tree.norm(vector))
    (vector, components, norm), _, _ = jax.lax.while_loop(
        unsettled, one_pass, (begin, jnp.asarray(False), jnp.int32(0))
    )
    length = jnp.where(norm == 0, 1, jnp.abs(norm))
    return Orthogonal(_tree.scale(1 / length, vector), components, jnp.maximum(norm, 0))


def orthonormal(block: Block) -> Block:
    """The rows made orthonormal, in order: Gram–Schmidt, in three passes.

    A row that the ones before it span (A maps it to zero, or to one of them) gives way to a fresh direction.
    """
    num_rows = jax.tree.leaves(block)[0].shape[0]

    def clean(i: Array, block: Block) -> Block:
        row = _tree.row(block, i)
        row = _tree.scale(1 / jnp.maximum(_tree.norm(row), jnp.finfo(jnp.float32).tiny), row)
        for _ in range(3):
            components = jnp.where(jnp.arange(num_rows) < i, _tree.block_inner(block, row), 0)
            row = _tree.add_scaled(row, -1, _tree.combine(components, block))
            gone = _tree.norm(row) <= 64 * jnp.finfo(components.dtype).eps
            row = jax.tree.map(
                lambda x, fresh, gone=gone: jnp.where(gone, fresh, x), row, hashed_signs(i, row)
            )
            row = _tree.scale(1 / _tree.norm(row), row)
        return jax.tree.map(lambda rows, x: rows.at[i].set(x), block, row)

    return jax.lax.fori_loop(0, num_rows, clean, block)


def combine(basis: Basis, coefficients: Float[Array, "n rows"]) -> Block:
    """The n linear combinations of the rows, as a block."""
    bounds = _bounds(_rows(basis))
    parts = [_tree.combine(coefficients[:, i:j], c) for c, (i, j) in zip(basis, bounds, strict=True)]
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)


def rotate(basis: Basis, coefficients: Float[Array, "n rows"]) -> Basis:
    """The basis whose first n rows are these combinations of the old ones; the others are zero.

    In place, one strip of columns after the other: a basis is too large to have twice.
    """
    num_rows = _rows(basis)
    square = jnp.pad(coefficients, ((0, num_rows - len(coefficients)), (0, 0)))
    leaves = [_rotate_leaf(chunks, square) for chunks in zip(*map(jax.tree.leaves, basis), strict=True)]
    structure = jax.tree.structure(basis[0])
    return tuple(jax.tree.unflatten(structure, chunk) for chunk in zip(*leaves, strict=True))


def _rotate_leaf(chunks: tuple[Array, ...], square: Array) -> tuple[Array, ...]:
    flat = tuple(chunk.reshape(len(chunk), -1) for chunk in chunks)
    bounds, length = _bounds(len(square)), flat[0].shape[1]

    def strip(flat: tuple[Array, ...], start: Any, width: int) -> tuple[Array, ...]:
        columns = [jax.lax.dynamic_slice_in_dim(chunk, start, width, 1) for chunk in flat]
        new = jnp.matmul(square.astype(flat[0].dtype), jnp.concatenate(columns), precision="highest")
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(chunk, new[a:b], start, 1)
            for chunk, (a, b) in zip(flat, bounds, strict=True)
        )

    whole, rest = divmod(length, STRIP)
    if whole:
        flat = jax.lax.fori_loop(0, whole, lambda i, flat: strip(flat, i * STRIP, STRIP), flat)
    flat = strip(flat, whole * STRIP, rest) if rest else flat
    return tuple(new.reshape(old.shape) for new, old in zip(flat, chunks, strict=True))


def _subtract(chunk: Block, components: Array, vector: Vector) -> Vector:
    return _tree.add_scaled(vector, -1, _tree.combine(components, chunk))


def _rows(basis: Basis) -> int:
    return sum(jax.tree.leaves(chunk)[0].shape[0] for chunk in basis)


def _bounds(num_rows: int) -> list[tuple[int, int]]:
    sizes = [min(CHUNK, num_rows - start) for start in range(0, num_rows, CHUNK)]
    return list(pairwise(accumulate(sizes, initial=0)))
