"""An orthonormal basis that grows by one vector at a time and costs no more than its filled part.

Rows are kept in chunks, each its own array, so that work touches only the chunks that hold something
(unfilled memory costs bandwidth) and nothing is ever sliced, copied or allocated twice.
"""

from itertools import accumulate, pairwise
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax import _tree
from hessjax._typing import Block, Params, Scalar, Vector

CHUNK = 16
"""Rows to a chunk: below, the products with a chunk no longer run at the memory's full bandwidth."""

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


def orthogonalise(basis: Basis, count: Array, vector: Vector) -> tuple[Vector, Float[Array, " rows"], Scalar]:
    """`project_out`, and once more where the first pass lost digits; with the norm of what is left.

    "Twice is enough" (Parlett 1998, §6.9): a pass that leaves at least 0.7 of the norm was accurate.
    """
    before = _tree.norm(vector)
    vector, components = project_out(basis, count, vector)
    after = _tree.norm(vector)

    def again(vector: Vector) -> tuple[Vector, Array, Scalar]:
        vector, more = project_out(basis, count, vector)
        return vector, components + more, _tree.norm(vector)

    return jax.lax.cond(after < 0.7 * before, again, lambda v: (v, components, after), vector)


def combine(basis: Basis, coefficients: Float[Array, "n rows"]) -> Block:
    """The n linear combinations of the rows, as a block."""
    bounds = _bounds(_rows(basis))
    parts = [_tree.combine(coefficients[:, i:j], c) for c, (i, j) in zip(basis, bounds, strict=True)]
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)


def _subtract(chunk: Block, components: Array, vector: Vector) -> Vector:
    return _tree.add_scaled(vector, -1, _tree.combine(components, chunk))


def _rows(basis: Basis) -> int:
    return sum(jax.tree.leaves(chunk)[0].shape[0] for chunk in basis)


def _bounds(num_rows: int) -> list[tuple[int, int]]:
    sizes = [min(CHUNK, num_rows - start) for start in range(0, num_rows, CHUNK)]
    return list(pairwise(accumulate(sizes, initial=0)))
