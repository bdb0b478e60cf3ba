"""Orthonormal rows of packed vectors: written, read, projected out, combined and rotated."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _reshaping, _sharding, _tree
from hessjax._core._sharding import Shardings
from hessjax._core._types import Block, Params, Scalar, Vector
from hessjax.estimators._samples import hashed_signs

CHUNK = 16
"""Rows to a chunk: below, the products with a chunk no longer run at the memory's full bandwidth."""

WHOLE = 2**20
"""A basis of no more numbers is one chunk: it stays in the cache, and its programs are half as long."""

STRIP = 2**16
"""Columns that are rotated at a time."""

Basis: TypeAlias = tuple[Block, ...]


def allocate(like: Params, num_rows: int, layouts: Shardings = (), dtype: Any = None) -> Basis:
    """A basis of `num_rows` zero rows like `like`, where its leaves are said to lie.

    In at least float32 or, if a dtype is given, in that: sums over narrow rows are still taken in float32.
    """
    leaves, structure = jax.tree.flatten(jax.eval_shape(_tree.wide, like))
    leaves = leaves if dtype is None else [_sharding.shape_of(x, dtype) for x in leaves]
    pairs = list(zip(leaves, layouts or [None] * len(leaves), strict=True))
    chunk = num_rows if num_rows * sum(math.prod(x.shape) for x in leaves) <= WHOLE else CHUNK
    return tuple(
        jax.tree.unflatten(
            structure, [_sharding.zero_rows(min(chunk, num_rows - start), x, layout) for x, layout in pairs]
        )
        for start in range(0, num_rows, max(chunk, 1))
    )


def read(basis: Basis, index: Int[Array, ""]) -> Vector:
    """Row `index`, in at least float32."""
    if len(basis) == 1:
        return _tree.wide(_tree.row(basis[0], index))
    # A switch over whole chunks: only the one that holds the row is read.
    readers = [lambda i, j=j: _tree.row(basis[j], i - j * CHUNK) for j in range(len(basis))]
    return _tree.wide(jax.lax.switch(index // CHUNK, readers, index))


def is_narrow(rows: Basis | Block) -> bool:
    """Whether they are kept in less than float32."""
    return any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(rows))


def write(basis: Basis, index: Int[Array, ""], vector: Vector) -> Basis:
    """The basis with row `index` replaced; in place where the memory is donated."""

    def write_chunk(chunk: Block, start: int, stop: int) -> Block:
        # Past the end nothing is written: one scatter to every chunk, and no branch that would copy it.
        local = jnp.where((start <= index) & (index < stop), index - start, stop - start)
        return jax.tree.map(
            lambda rows, x: rows.at[local].set(
                x.astype(rows.dtype), mode="drop", out_sharding=_sharding.explicit(rows)
            ),
            chunk,
            vector,
        )

    return tuple(write_chunk(chunk, *bounds) for chunk, bounds in zip(basis, _bounds(basis), strict=True))


def project_out(basis: Basis, count: Int[Array, ""], vector: Vector) -> tuple[Vector, Float[Array, " rows"]]:
    """`vector` less its components along the first `count` rows, and these components.

    One pass of classical Gram–Schmidt. Chunks beyond `count` are not touched.
    """
    # All components of the same vector first: classical Gram–Schmidt reads the basis in matrix products,
    # the modified form row by row.
    bounds = _bounds(basis)
    if len(basis) == 1:
        inside = jnp.arange(bounds[0][1], dtype=jnp.int32) < count
        part = jnp.where(inside, _inner(basis[0], vector), 0)
        return _subtract(basis[0], part, vector), part
    parts = []
    for chunk, (start, stop) in zip(basis, bounds, strict=True):
        inside = jnp.arange(start, stop, dtype=jnp.int32) < count
        zeros = jnp.zeros(stop - start, _tree.accumulator_dtype(vector))
        # Rows that are not filled yet are zero: to multiply them would cost their bandwidth for nothing.
        part = jax.lax.cond(start < count, _inner, lambda *_, z=zeros: z, chunk, vector)
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


def orthogonalise(basis: Basis, count: Int[Array, ""], vector: Vector, tiny: Scalar) -> Orthogonal:
    """A unit vector orthogonal to the first `count` rows: passes of `project_out` until one loses little.

    A pass that leaves at least 0.7 of the norm was accurate; "twice is enough" (Parlett 1998, §6.9). A
    vector of which no more than `tiny` is left was inside the span: a fresh direction takes its place.
    """

    def unsettled(loop: tuple[Orthogonal, Bool[Array, ""], Int[Array, ""]]) -> Bool[Array, ""]:
        _, settled, passes = loop
        return ~settled & (passes < 5)

    def one_pass(
        loop: tuple[Orthogonal, Bool[Array, ""], Int[Array, ""]],
    ) -> tuple[Orthogonal, Bool[Array, ""], Int[Array, ""]]:
        # `norm` is positive here until the vector collapses, then minus the fresh direction's.
        (vector, components, before), _, passes = loop
        fresh = before < 0
        vector, part = project_out(basis, count, vector)
        after = _tree.norm(vector)
        # What a pass leaves has errors of eps · before along the rows: where it left much they are
        # small beside it, where it left little another pass takes them out.
        collapsed = ~fresh & (after <= tiny)
        settled = ~collapsed & (after >= 0.7 * jnp.abs(before))
        vector = jax.lax.cond(collapsed, lambda v: hashed_signs(count, v), lambda v: v, vector)
        # The norm of a vector of signs.
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
    if num_rows == 1:  # a tenth of the program, for what most runs begin with
        return _tree.block_of(_alone(_tree.row(block, 0)))

    def clean(i: Int[Array, ""], block: Block) -> Block:
        row = _tree.row(block, i)
        row = _tree.scale(1 / jnp.maximum(_tree.norm(row), float(jnp.finfo(jnp.float32).tiny)), row)
        # Two passes are enough where a row keeps a part of its own; the third is for fresh directions.
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


def _alone(vector: Vector) -> Vector:
    """Of norm 1; one of zeros gives way to a fresh direction."""
    norm = _tree.norm(vector)
    vector = jax.tree.map(lambda x, fresh: jnp.where(norm > 0, x, fresh), vector, hashed_signs(0, vector))
    return _tree.scale(1 / _tree.norm(vector), vector)


def combine(basis: Basis, coefficients: Float[Array, "n rows"]) -> Block:
    """The n linear combinations of the rows, as a block."""
    bounds = _bounds(basis)

    def one(coefficients: Float[Array, " rows"]) -> Vector:
        # Tied to the turn of the loop: the compiler would else widen narrow rows once, before it.
        rows, coefficients = jax.lax.optimization_barrier((basis, coefficients))
        parts = [_sum_of(coefficients[i:j], c) for c, (i, j) in zip(rows, bounds, strict=True)]
        return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)

    # One by one: all at once would have all their parts, by chunk, in memory beside themselves.
    return jax.lax.map(one, coefficients)


def rotate(basis: Basis, coefficients: Float[Array, "n rows"], layouts: Shardings = ()) -> Basis:
    """The basis whose first n rows are these combinations of the old ones; the others are zero.

    In place, one strip of columns after the other: a basis is too large to have twice.
    """
    num_rows = _rows(basis)
    # One square matrix for all strips: rows of zeros clear what is dropped.
    square = jnp.pad(coefficients, ((0, num_rows - len(coefficients)), (0, 0)))
    columns = list(zip(*map(jax.tree.leaves, basis), strict=True))
    leaves = list(map(_rotate_on_devices, columns, layouts or [None] * len(columns), [square] * len(columns)))
    structure = jax.tree.structure(basis[0])
    return tuple(jax.tree.unflatten(structure, chunk) for chunk in zip(*leaves, strict=True))


def _rotate_on_devices(
    chunks: tuple[Array, ...], layout: NamedSharding | None, square: Float[Array, "rows rows"]
) -> tuple[Array, ...]:
    """Every device rotates the columns that it holds: strips cut by none would be gathered."""
    if layout is None or not _sharding.is_split(layout):
        return _rotate_leaf(chunks, square)
    spec = PartitionSpec(None, *layout.spec)
    rotated = jax.shard_map(
        _rotate_leaf, mesh=layout.mesh, in_specs=((spec,) * len(chunks), PartitionSpec()), out_specs=spec
    )
    return rotated(chunks, square)


def _rotate_leaf(chunks: tuple[Array, ...], square: Float[Array, "rows rows"]) -> tuple[Array, ...]:
    if chunks[0].ndim == 1:
        return _split(_times(square, chunks), chunks)  # a leaf without axes: the rows are all that there is
    # Never laid flat: that would gather a leaf that is sharded over devices.
    axis = _reshaping.longest_axis(chunks[0], first=1)
    length = chunks[0].shape[axis]
    width = min(length, max(1, STRIP * length * len(chunks[0]) // max(chunks[0].size, 1)))

    def strip(chunks: tuple[Array, ...], start: Any, width: int) -> tuple[Array, ...]:
        columns = [jax.lax.dynamic_slice_in_dim(chunk, start, width, axis) for chunk in chunks]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(chunk, new, start, axis)
            for chunk, new in zip(chunks, _split(_times(square, columns), chunks), strict=True)
        )

    whole, rest = divmod(length, width) if width else (0, 0)
    if whole:
        chunks = jax.lax.fori_loop(0, whole, lambda i, chunks: strip(chunks, i * width, width), chunks)
    return strip(chunks, whole * width, rest) if rest else chunks


def _times(square: Float[Array, "rows rows"], chunks: Sequence[Array]) -> Float[Array, "rows ..."]:
    # A strip at a time, so that narrow rows may be widened: their sums are taken in float32.
    wide = _tree.wide(jnp.concatenate(chunks))
    turned = jnp.tensordot(square.astype(wide.dtype), wide, axes=1, precision="highest")
    return turned.astype(chunks[0].dtype)


def _split(rows: Float[Array, "rows ..."], chunks: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(rows[a:b] for a, b in _bounds(chunks))


def _subtract(chunk: Block, components: Float[Array, " rows"], vector: Vector) -> Vector:
    return _tree.add_scaled(vector, -1, _sum_of(components, chunk))


def _inner(chunk: Block, vector: Vector) -> Float[Array, " rows"]:
    """The inner products of the rows with a vector."""
    if not is_narrow(chunk):
        return _tree.block_inner(chunk, vector)

    def leaf(rows: Array, x: Array) -> Array:
        # Not a matrix product, which would have the rows in float32 beside themselves: the cast is fused.
        return jnp.sum(rows.astype(x.dtype) * x[None], axis=tuple(range(1, rows.ndim)))

    parts: list[Array] = jax.tree.leaves(jax.tree.map(leaf, chunk, vector))
    return sum(parts[1:], parts[0])


def _sum_of(coefficients: Float[Array, " rows"], chunk: Block) -> Vector:
    """The rows times these, added up, in at least float32."""
    if not is_narrow(chunk):
        return _tree.combine(coefficients, chunk)

    def leaf(rows: Array) -> Array:
        each = coefficients.reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.sum(each * rows.astype(coefficients.dtype), axis=0)

    return jax.tree.map(leaf, chunk)


def _rows(basis: Basis) -> int:
    return _bounds(basis)[-1][1]


def _bounds(chunks: Sequence[Any]) -> list[tuple[int, int]]:
    """Of every chunk the numbers of its first row, and of the row behind its last."""
    sizes = [jax.tree.leaves(chunk)[0].shape[0] for chunk in chunks]
    return list(pairwise(accumulate(sizes, initial=0)))
