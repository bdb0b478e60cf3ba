"""The inverse of the empirical Fisher, by Woodbury's identity: applied, read off, and updated."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _tree
from hessjax._core._types import Block, Scalar, Vector
from hessjax._fisher import _accuracy, _factored
from hessjax._fisher._blocking import Blocking
from hessjax._fisher._damping import Damping, Totals
from hessjax._fisher._factored import Factored
from hessjax._fisher._factors import Dual, Whole
from hessjax._fisher._streams import gathered, num_grads, stream


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
        residuals: how far every block is off, about: F⁻¹Fz − z for a fixed vector z of signs, relative to
            what an error of 1 in every entry of F⁻¹, in units of √(F⁻¹_ii F⁻¹_jj), makes of Fz. It does not
            depend on the weights' scales. (With one block in all: in units of 1/λ.)
        blocking: how the weights are cut into blocks.
        chunk_size: the most gradients that enter at once.
    """

    parts: Factored
    shift: Scalar
    totals: Totals
    setting: Damping
    scale: Scalar
    residuals: tuple[Float[Array, " _"], ...]
    blocking: Blocking = dataclasses.field(metadata={"static": True})
    chunk_size: int = dataclasses.field(metadata={"static": True})

    @property
    def damping(self) -> Scalar:
        """λ, absolute."""
        return self.shift / self.totals.num_grads

    @property
    def num_grads(self) -> Int[Array, ""]:
        """m, the number of gradients."""
        return self.totals.num_grads

    @property
    def block_size(self) -> int | None:
        """The most weights in a block; None: all weights are one block."""
        return self.blocking.block_size

    @property
    def accurate(self) -> Bool[Array, ""]:
        """Whether every block is; those that are not hold NaN. Outside `jit` an error has said so."""
        return _accuracy.all_accurate(self.residuals)

    def apply(self, vector: Vector) -> Vector:
        """F⁻¹v, in at least float32.

        Cost: 4·d·B operations (root), 4·m·d (dual).
        """
        _tree.check_like(vector, self.blocking.like, "vector", "grads")
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
        blocks = stream(grads, self.blocking.like)
        return streamed(_extended(gathered(blocks, self._missing), self), blocks)

    @property
    def _missing(self) -> int | None:
        """How many gradients more there must be until no dual is left; None: it stays one."""
        if isinstance(self.parts, Whole):
            return None
        duals = [part.rows.shape[0] for part in self.parts if isinstance(part, Dual)]
        return self.blocking.widest - duals[0] if duals else 0


# -- driving ---------------------------------------------------------------------------------------


def streamed(inverse: InverseFisher, blocks: Iterator[Block]) -> InverseFisher:
    """With the blocks that are left; only then is it known how accurate the inverse is."""
    more = False
    for block in blocks:
        inverse, more = _with_more(block, inverse), True
    inverse = _settled(inverse) if more else inverse
    parts, residuals = _accuracy.measured(inverse.parts, inverse.shift, inverse.num_grads)
    _accuracy.check(parts, residuals, inverse.blocking, inverse.shift, inverse.num_grads)
    return dataclasses.replace(inverse, parts=parts, residuals=residuals)


# -- what is compiled ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def built(
    blocking: Blocking, chunk_size: int, grads: Block, setting: Damping, scale: Scalar
) -> InverseFisher:
    """From one block of gradients; not measured yet."""
    rows, totals = _read(blocking, grads, scale)
    shift = totals.shift(setting, blocking.packing.size)
    parts = _factored.built(rows, shift, chunk_size, as_one=blocking.block_size is None)
    return InverseFisher(parts, shift, totals, setting, scale, (), blocking, chunk_size)


@jax.jit
def _extended(grads: Block, inverse: InverseFisher) -> InverseFisher:
    """With more gradients, and κ = mλ; not measured yet."""
    rows, totals, shift = _more(inverse, grads)
    parts = _factored.extended(inverse.parts, rows, inverse.shift, shift, inverse.chunk_size)
    return dataclasses.replace(inverse, parts=parts, shift=shift, totals=totals)


@functools.partial(jax.jit, donate_argnums=1)
def _with_more(grads: Block, inverse: InverseFisher) -> InverseFisher:
    """With more gradients, in the memory of the roots; before them κ follows if it is to double."""
    rows, totals, target = _more(inverse, grads)
    parts, shift = _factored.followed(inverse.parts, inverse.shift, target, 2.0)
    parts = _factored.all_absorbed(parts, rows, inverse.chunk_size)
    return dataclasses.replace(inverse, parts=parts, shift=shift, totals=totals)


@functools.partial(jax.jit, donate_argnums=0)
def _settled(inverse: InverseFisher) -> InverseFisher:
    """With κ = mλ again."""
    shift = inverse.totals.shift(inverse.setting, inverse.blocking.packing.size)
    parts, shift = _factored.followed(inverse.parts, inverse.shift, shift, 1.0)
    return dataclasses.replace(inverse, parts=parts, shift=shift)


def _more(inverse: InverseFisher, grads: Block) -> tuple[tuple[Array, ...], Totals, Scalar]:
    """More gradients, what all of them add up to, and their κ."""
    rows, new = _read(inverse.blocking, grads, inverse.scale)
    totals = jax.tree.map(jnp.add, inverse.totals, new)
    return rows, totals, totals.shift(inverse.setting, inverse.blocking.packing.size)


def _read(blocking: Blocking, grads: Block, scale: Scalar) -> tuple[tuple[Array, ...], Totals]:
    """The gradients, cut and times √b, and what they add up to."""
    count = num_grads(grads)
    rows = tuple(jnp.sqrt(scale).astype(x.dtype) * x for x in jax.vmap(blocking.cut)(grads))
    squares = sum((jnp.sum(x**2).astype(scale.dtype) for x in rows), jnp.zeros_like(scale))
    return rows, Totals(jnp.int32(count), squares)


@jax.jit
def _apply(inverse: InverseFisher, vector: Vector) -> Vector:
    blocking, cut = inverse.blocking, inverse.blocking.cut(vector)
    return blocking.join(_factored.solved(inverse.parts, cut, inverse.shift, inverse.num_grads))


@jax.jit
def _diagonal(inverse: InverseFisher) -> Vector:
    return inverse.blocking.join(_factored.diagonals(inverse.parts, inverse.shift, inverse.num_grads))


@functools.partial(jax.jit, static_argnums=0)
def _dense(index: int, inverse: InverseFisher) -> Array:
    position = inverse.blocking.position(index)
    if position is None:
        return jnp.zeros((0, 0, 0), inverse.blocking.packing.dtypes[index])
    return _factored.dense(inverse.parts, position, inverse.shift, inverse.num_grads)
