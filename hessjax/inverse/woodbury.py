"""The inverse of the empirical Fisher from blocks of gradients, by Woodbury's identity."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax import _tree
from hessjax._typing import Block, Relative, Scalar, Vector
from hessjax.inverse.blocking import Blocking, Parts, signs
from hessjax.inverse.factors import Dual, Root, Whole, absorbed, dual_of, root_of, shifted, whole_of

RESIDUAL_LIMIT = 0.1
"""A block whose inverse misses F⁻¹Fz = z by more than this fraction of z is not handed out."""


class Damping(NamedTuple):
    """λ = absolute + factor · mean diag F; one of the two is zero."""

    absolute: Scalar
    factor: Scalar

    @classmethod
    def of(cls, damping: Any, dtype: Any) -> "Damping":
        """Checked, as arrays."""
        is_relative = isinstance(damping, Relative)
        value = damping.factor if is_relative else damping
        if jnp.ndim(value) or (not isinstance(value, jax.core.Tracer) and not 0 < value < math.inf):
            raise ValueError(
                f"`damping` must be a positive finite number or `relative(r)`, got {damping}: without it the "
                f"Fisher of fewer gradients than weights has no inverse."
            )
        value, zero = jnp.asarray(value, dtype), jnp.zeros((), dtype)
        return cls(zero, value) if is_relative else cls(value, zero)


class Totals(NamedTuple):
    """What was summed over the gradients: their number, and their squared entries times `batch_size`."""

    count: Int[Array, ""]
    squares: Scalar

    def shift(self, damping: Damping, num_params: int) -> Scalar:
        """κ = mλ."""
        return self.count * damping.absolute + damping.factor * self.squares / num_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InverseFisher:
    """F⁻¹ of F = b/m Σ gᵢgᵢᵀ + λI, block-diagonal or whole; a pytree, made by `inverse_fisher`.

    Attributes:
        parts: the factors, by groups of equally wide blocks.
        shift: κ = mλ, as the factors have it.
        totals: the number of gradients and the sum of their squares.
        setting: the damping asked for.
        scale: b, how many examples each gradient is a mean over.
        residuals: for every block ‖F⁻¹Fz − z‖ / ‖z‖ for a fixed vector z of signs: 0 were it exact.
        blocking: how the weights are cut into blocks.
        chunk_size: the most gradients that enter at once.
    """

    parts: tuple[Root | Dual, ...] | Whole
    shift: Scalar
    totals: Totals
    setting: Damping
    scale: Scalar
    residuals: tuple[Float[Array, " blocks"], ...]
    blocking: Blocking = dataclasses.field(metadata={"static": True})
    chunk_size: int = dataclasses.field(metadata={"static": True})

    @property
    def damping(self) -> Scalar:
        """λ, absolute."""
        return self.shift / self.totals.count

    @property
    def num_grads(self) -> Int[Array, ""]:
        """m, the number of gradients."""
        return self.totals.count

    @property
    def block_size(self) -> int | None:
        """The most weights in a block; None: all weights are one block."""
        return self.blocking.block_size

    @property
    def accurate(self) -> Bool[Array, ""]:
        """Whether every block is; those that are not hold NaN. Outside `jit` an error has said so."""
        return jnp.all(jnp.concatenate(self.residuals) <= RESIDUAL_LIMIT)

    def apply(self, vector: Vector) -> Vector:
        """F⁻¹v, in at least float32.

        Cost: 4·d·B operations (root), 4·m·d (dual).
        """
        _tree.check_like(vector, self._like, "vector", "grads")
        return _apply(self, vector)

    def diagonal(self) -> Vector:
        """The diagonal of F⁻¹, like the params, in at least float32.

        Cost: 2·d·B operations (root); m·d·min(m, B), and once more the memory of the gradients (dual).
        """
        return _diagonal(self)

    def blocks(self, index: int) -> Float[Array, "blocks width width"]:
        """F⁻¹ of leaf number `index` (in the order of `jax.tree.leaves`), block by block.

        The last block is filled up with places that no weight has: zero outside the diagonal, 1/λ on it.
        With `block_size=None`: the leaf's part of the whole inverse, as one block.

        Cost: B numbers of memory and 2·B² operations (dual: 2·m·B) for each weight of the leaf.
        """
        count = len(self.blocking.packing.shapes)
        if not -count <= index < count:
            raise IndexError(f"`index` must be that of one of {count} leaves, got {index}.")
        return _dense(index % count, self)

    def update(self, grads: Any) -> "InverseFisher":
        """As if built from all gradients at once: m grows, and λ is what the damping asked for makes it.

        Args:
            grads: a block of gradients or a stream of blocks, as `inverse_fisher` takes them.

        Raises:
            TypeError, ValueError: as `inverse_fisher`.

        Cost: as `inverse_fisher` for the new gradients, and 5·B² operations for each weight, in blocks, to
            keep λ as m grows. The dual is made anew.
        """
        blocks = _stream(grads, self._like)
        return _streamed(_extended(_gathered(blocks, self._missing), self), blocks)

    @property
    def _missing(self) -> float:
        """How many gradients more there must be until no dual is left."""
        if isinstance(self.parts, Whole):
            return math.inf
        duals = [part.rows.shape[0] for part in self.parts if isinstance(part, Dual)]
        return self.blocking.widest - duals[0] if duals else 0

    @property
    def _like(self) -> Any:
        packing = self.blocking.packing
        leaves = map(jax.ShapeDtypeStruct, packing.shapes, packing.dtypes)
        return jax.tree.unflatten(packing.structure, leaves)


def inverse_fisher(
    grads: Any,
    damping: Any = Relative(0.01),  # noqa: B008 - immutable
    block_size: int | None = None,
    *,
    chunk_size: int = 64,
    batch_size: Any = 1,
) -> InverseFisher:
    """The inverse of F = b/m Σ gᵢgᵢᵀ + λI, the damped empirical Fisher of m gradients.

    A stub.
    """
    _tree_checks(block_size, chunk_size)
    blocks = _stream(grads, None)
    first = next(blocks)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first)
    blocking = Blocking.of(like, block_size)
    dtype = _tree.accumulator_dtype(like)
    setting = Damping.of(damping, dtype)
    first = _gathered(itertools.chain([first], blocks), blocking.widest if block_size else math.inf)
    scale = jnp.asarray(batch_size, dtype)
    return _streamed(_built(blocking, chunk_size, first, setting, scale), blocks)


# -- streams -------------------------------------------------------------------------------------


def _stream(grads: Any, like: Any) -> Iterator[Block]:
    """The blocks of gradients, each checked against the first, or against `like`."""
    is_stream = isinstance(grads, Iterable) and not hasattr(grads, "shape")
    blocks = iter(grads) if is_stream and jax.tree_util.all_leaves([grads]) else iter([grads])
    for index, block in enumerate(blocks):
        name = "grads" if block is grads else f"grads[{index}]"
        count = _num_grads(block, name)
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), block)
        if like is None:
            like = row
        _tree.check_like(row, like, name, "the first gradients")
        if count:
            yield block
    if like is None:
        raise ValueError("`grads` must hold at least one gradient, got an empty stream.")


def _num_grads(block: Block, name: str) -> int:
    _tree.check_floating(block, name)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(block)}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            f"`{name}` must be a block, its leaves with one common leading axis of gradients, got the shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(block)]}: one gradient `g` is the block "
            f"`jax.tree.map(lambda x: x[None], g)`."
        )
    return counts.pop()[0]


def _gathered(blocks: Iterator[Block], count: float) -> Block:
    """At least `count` gradients in one block, as far as there are any."""
    gathered = [next(blocks)]
    held = jax.tree.leaves(gathered[0])[0].shape[0]
    while held < count and (block := next(blocks, None)) is not None:
        gathered.append(block)
        held += jax.tree.leaves(block)[0].shape[0]
    return gathered[0] if len(gathered) == 1 else _joined(gathered)


@jax.jit
def _joined(blocks: list[Block]) -> Block:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *blocks)


def _streamed(inverse: InverseFisher, blocks: Iterator[Block]) -> InverseFisher:
    """With the blocks that are left; κ follows m when that has doubled, and at the end."""
    settled = total = None
    for block in blocks:
        total = int(inverse.num_grads) if total is None else total
        settled = total if settled is None else settled
        inverse = _with_more(block, inverse)
        total += jax.tree.leaves(block)[0].shape[0]
        if total >= 2 * settled:
            inverse, settled = _settled(inverse), total
    return _checked(inverse if settled in (None, total) else _settled(inverse))


def _checked(inverse: InverseFisher) -> InverseFisher:
    return inverse


def _tree_checks(block_size: int | None, chunk_size: int) -> None:
    pass


# -- what is compiled ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def _built(
    blocking: Blocking, chunk_size: int, grads: Block, setting: Damping, scale: Scalar
) -> InverseFisher:
    rows, totals = _read(blocking, grads, scale)
    shift = totals.shift(setting, blocking.packing.size)
    if blocking.block_size is None:
        parts = whole_of(rows, shift)
    else:
        parts = tuple(_part_of(part, shift, chunk_size) for part in rows)
    return _measured(InverseFisher(parts, shift, totals, setting, scale, (), blocking, chunk_size))


@jax.jit
def _extended(grads: Block, inverse: InverseFisher) -> InverseFisher:
    rows, new = _read(inverse.blocking, grads, inverse.scale)
    totals = jax.tree.map(jnp.add, inverse.totals, new)
    shift = totals.shift(inverse.setting, inverse.blocking.packing.size)
    if isinstance(inverse.parts, Whole):
        rows = tuple(map(_stacked, inverse.parts.rows, rows))
        parts = whole_of(rows, shift)
    else:
        parts = tuple(
            _part_of(_stacked(part.rows, more), shift, inverse.chunk_size)
            if isinstance(part, Dual)
            else shifted(absorbed(part, more, inverse.chunk_size), inverse.shift, shift)
            for part, more in zip(inverse.parts, rows, strict=True)
        )
    return _measured(dataclasses.replace(inverse, parts=parts, shift=shift, totals=totals))


@functools.partial(jax.jit, donate_argnums=1)
def _with_more(grads: Block, inverse: InverseFisher) -> InverseFisher:
    """With more gradients, in the memory of the roots; κ is left behind."""
    rows, new = _read(inverse.blocking, grads, inverse.scale)
    parts = tuple(
        absorbed(part, more, inverse.chunk_size) for part, more in zip(inverse.parts, rows, strict=True)
    )
    return dataclasses.replace(inverse, parts=parts, totals=jax.tree.map(jnp.add, inverse.totals, new))


@functools.partial(jax.jit, donate_argnums=0)
def _settled(inverse: InverseFisher) -> InverseFisher:
    """With κ = mλ again."""
    shift = inverse.totals.shift(inverse.setting, inverse.blocking.packing.size)
    parts = tuple(shifted(part, inverse.shift, shift) for part in inverse.parts)
    return _measured(dataclasses.replace(inverse, parts=parts, shift=shift))


@jax.jit
def _apply(inverse: InverseFisher, vector: Vector) -> Vector:
    return inverse.blocking.join(_solve(inverse, inverse.blocking.cut(vector)))


@jax.jit
def _diagonal(inverse: InverseFisher) -> Vector:
    count, shift, parts = inverse.totals.count, inverse.shift, inverse.parts
    if isinstance(parts, Whole):
        diagonals = parts.diagonal(shift)
    else:
        diagonals = tuple(part.diagonal(shift.astype(part.image.dtype)) for part in parts)
    return inverse.blocking.join(tuple(count * x for x in diagonals))


@functools.partial(jax.jit, static_argnums=0)
def _dense(index: int, inverse: InverseFisher) -> Array:
    position, shift = inverse.blocking.position(index), inverse.shift
    if position is None:
        return jnp.zeros((0, 0, 0), inverse.blocking.packing.dtypes[index])
    group, which = position
    if isinstance(inverse.parts, Whole):
        return inverse.totals.count * inverse.parts.dense(group, shift)
    part = inverse.parts[group]
    return inverse.totals.count * part.dense(which, shift.astype(part.image.dtype))


def _read(blocking: Blocking, grads: Block, scale: Scalar) -> tuple[tuple[Array, ...], Totals]:
    """The gradients, cut and times √b, and what they add up to."""
    count = jax.tree.leaves(grads)[0].shape[0]
    rows = tuple(jnp.sqrt(scale).astype(x.dtype) * x for x in jax.vmap(blocking.cut)(grads))
    squares = sum(jnp.sum(x**2).astype(scale.dtype) for x in rows)
    return rows, Totals(jnp.int32(count), squares)


def _part_of(rows: Array, shift: Scalar, chunk_size: int) -> Root | Dual:
    """A root if the gradients are at least as many as a block's weights."""
    shift = shift.astype(rows.dtype)
    return root_of(rows, shift, chunk_size) if rows.shape[0] >= rows.shape[2] else dual_of(rows, shift)


def _stacked(rows: Array, more: Array) -> Array:
    return jnp.concatenate([rows, more])


def _solve(inverse: InverseFisher, parts: Parts) -> Parts:
    count, shift = inverse.totals.count, inverse.shift
    if isinstance(inverse.parts, Whole):
        solved = inverse.parts.solve(parts, shift)
    else:
        solved = tuple(
            part.solve(v, shift.astype(v.dtype)) for part, v in zip(inverse.parts, parts, strict=True)
        )
    return tuple(count * x for x in solved)


def _measured(inverse: InverseFisher) -> InverseFisher:
    """With the residuals of F⁻¹Fz = z."""
    images = inverse.parts.image if isinstance(inverse.parts, Whole) else [p.image for p in inverse.parts]
    z = [jnp.broadcast_to(signs(x.shape[-1], x.dtype), x.shape) for x in images]
    products = [
        (x + inverse.shift.astype(x.dtype) * s) / inverse.totals.count for x, s in zip(images, z, strict=True)
    ]
    misses = [x - s for x, s in zip(_solve(inverse, tuple(products)), z, strict=True)]
    residuals = tuple(jnp.sqrt(jnp.mean(x**2, axis=-1)) for x in misses)
    return dataclasses.replace(inverse, residuals=residuals)
