"""From gradients, in one block or a stream of blocks, to the inverse of their damped Fisher."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _tree
from hessjax._core._tables import Table, printable
from hessjax._core._types import Amount, Scalar, Vector
from hessjax._fisher import _factors, _readout
from hessjax._fisher._blocking import Blocking, Parts, Rows, taken
from hessjax._fisher._factors import Dual, Factor, Like
from hessjax._fisher._readout import Verdict
from hessjax._fisher._rows import Totals, read
from hessjax._fisher._stream import Counted, gathered, stream


@printable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class InverseFisher:
    """F⁻¹ of F = b/m Σ gᵢgᵢᵀ + λI, block-diagonal or whole; a pytree, made by `inverse_fisher`.

    Attributes:
        parts: the factors, by groups of equally wide blocks; one with one block in all.
        shift: κ = mλ, as the factors have it.
        totals: the number of gradients and of weights, and the sum of their squares.
        setting: the damping asked for.
        scale: b, how many examples each gradient is a mean over.
        residuals: how far every block is off, about: F⁻¹Fz − z for a fixed vector z of signs, relative to
            what an error of 1 in every entry of F⁻¹, in units of √(F⁻¹_ii F⁻¹_jj), makes of Fz, whatever the
            weights' scales. (A dual of one block in all: in units of 1/λ.) Infinite where λ is lost in the
            rounding errors of F.
        blocking: how the weights are cut into blocks.
        chunk_size: the most gradients that enter at once.
    """

    parts: tuple[Factor, ...]
    shift: Scalar
    totals: Totals
    setting: Amount
    scale: Scalar
    residuals: tuple[Float[Array, " _"], ...]
    blocking: Blocking = dataclasses.field(metadata={"static": True})
    chunk_size: int = dataclasses.field(metadata={"static": True})

    @property
    def damping(self) -> Scalar:
        """λ, absolute."""
        return self.shift / self.totals.number

    @property
    def num_grads(self) -> Int[Array, ""] | Scalar:
        """m, the number of gradients, or where they have weights Σ w."""
        return self.totals.num_grads

    @property
    def block_size(self) -> int | None:
        """The most weights in a block; None: all weights are one block."""
        return self.blocking.block_size

    @property
    def accurate(self) -> Bool[Array, ""]:
        """Whether every block is; those that are not hold NaN. Outside `jit` an error has said so."""
        return _readout.all_accurate(self.residuals)

    def _table(self) -> Table | str:
        return _readout.table(self)

    def apply(self, vector: Vector) -> Vector:
        """F⁻¹v, in at least float32. Cost: 4·d·B operations (root), 4·m·d (dual)."""
        _tree.check_vector(vector, self.blocking.like, reference="grads")
        return _apply(self, vector)

    def diagonal(self) -> Vector:
        """The diagonal of F⁻¹, like the params, in at least float32.

        Cost: 2·d·B operations (root); m·d·min(m, B), and the gradients' memory again (dual).
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

    def add(self, grads: Any, weights: Any = None) -> "InverseFisher":
        """As if built from all gradients at once: m grows, and λ is what the damping asked for makes it.

        Args:
            grads: a block of gradients or a stream of blocks, as `inverse_fisher` takes them.
            weights: likewise; None: each counts once.

        Raises:
            TypeError, ValueError: as `inverse_fisher`.

        Cost: as `inverse_fisher` for the new gradients, and 5·B² operations for each weight, in blocks, to
            keep λ as m grows. The dual is made anew.
        """
        blocks = stream(grads, self.blocking.like, weights)
        return streamed(_extended(gathered(blocks, self._missing), self), blocks)

    @property
    def _missing(self) -> int | None:
        """How many gradients more there must be until no dual is left; None: all, for they make one block."""
        if self.blocking.block_size is None:
            return None
        held = [part.rows[0].shape[1] for part in self.parts if isinstance(part, Dual)]
        return self.blocking.widest - held[0] if held else 0

    def solved(self, vector: Parts) -> Parts:
        """F⁻¹v of a vector that is cut."""
        return self._of_all(_solved, self.blocking.coupled(vector))

    def combined(self, rows: tuple[Rows, ...], c: Sequence[Float[Array, "_ _"]]) -> Parts:
        """F⁻¹Gᵀc."""
        return self._of_all(_combined, self.blocking.coupled(rows), c)

    def diagonals(self) -> Parts:
        """The diagonal of F⁻¹, cut."""
        return self._of_all(_readout.diagonal)

    def _of_all(self, function: Callable[..., Parts], *args: Sequence[Any]) -> Parts:
        found = self.blocking.over(function, self.parts, *args, common=(self.shift,))
        return tuple(self.totals.times(x) for part in found for x in part)


def _solved(like: Like, part: Factor, v: Parts, shift: Scalar) -> Parts:
    return part.solve(v, shift)


def _combined(like: Like, part: Factor, rows: tuple[Rows, ...], c: Array, shift: Scalar) -> Parts:
    return part.solve_combination(c, rows, shift)


def streamed(inverse: InverseFisher, blocks: Iterator[Counted]) -> InverseFisher:
    """With the blocks that are left; only then is it known how accurate the inverse is."""
    more = False
    for block in blocks:
        inverse, more = _with_more(block, inverse), True
    inverse = _measured(_settled(inverse) if more else inverse)
    if not isinstance(inverse.shift, jax.core.Tracer) and not inverse.accurate:
        verdict_of(inverse).check(inverse.blocking)
    return inverse


# -- what is compiled ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def built(
    blocking: Blocking, chunk_size: int, grads: Counted, setting: Amount, scale: Scalar
) -> InverseFisher:
    """From one block of gradients; not measured yet."""
    rows, totals = read(blocking, grads.block, scale, count=grads.total)
    return inverse_of(rows, totals, setting, scale, blocking, chunk_size)


def inverse_of(
    rows: tuple[Rows, ...],
    totals: Totals,
    setting: Amount,
    scale: Scalar,
    blocking: Blocking,
    chunk_size: int = 64,
    shift: Scalar | None = None,
) -> InverseFisher:
    """From rows that are cut, and their κ or another one; not measured yet."""
    shift = totals.shift(setting) if shift is None else shift
    made = functools.partial(_factors.factor_of, chunk_size)
    parts = tuple(blocking.over(made, blocking.coupled(rows), common=(shift,)))
    return InverseFisher(parts, shift, totals, setting, scale, (), blocking, chunk_size)


@jax.jit  # not donated: whoever calls `add` keeps the inverse before
def _extended(grads: Counted, inverse: InverseFisher) -> InverseFisher:
    """With more gradients, and κ = mλ; not measured yet."""
    rows, totals, shift = _more(inverse, grads)
    blocking, made = inverse.blocking, functools.partial(_factors.extended, inverse.chunk_size)
    parts = blocking.over(made, inverse.parts, blocking.coupled(rows), common=(inverse.shift, shift))
    return dataclasses.replace(inverse, parts=tuple(parts), shift=shift, totals=totals)


@functools.partial(jax.jit, donate_argnums=1)  # roots are the largest arrays: no second copy
def _with_more(grads: Counted, inverse: InverseFisher) -> InverseFisher:
    """With more gradients, in the memory of the roots; before them κ follows if it is to double."""
    rows, totals, target = _more(inverse, grads)
    parts, shift = _followed(inverse, target, 2.0)  # about log₂ m times in all
    blocking, made = inverse.blocking, functools.partial(_factors.absorbed, inverse.chunk_size)
    parts = blocking.over(made, parts, blocking.coupled(rows))
    return dataclasses.replace(inverse, parts=tuple(parts), shift=shift, totals=totals)


@functools.partial(jax.jit, donate_argnums=0)
def _settled(inverse: InverseFisher) -> InverseFisher:
    """With κ = mλ again."""
    parts, shift = _followed(inverse, inverse.totals.shift(inverse.setting), 1.0)
    return dataclasses.replace(inverse, parts=tuple(parts), shift=shift)


def _followed(inverse: InverseFisher, target: Scalar, factor: float) -> tuple[list[Factor], Scalar]:
    """Roots at a κ that has grown by more than a factor, or as they are; and the κ they are at."""
    followed = functools.partial(_factors.followed, factor)
    parts = inverse.blocking.over(followed, inverse.parts, common=(inverse.shift, target))
    return parts, jnp.where(factor * inverse.shift < target, target, inverse.shift)


def _more(inverse: InverseFisher, grads: Counted) -> tuple[tuple[Rows, ...], Totals, Scalar]:
    """More gradients, what all of them add up to, and their κ."""
    rows, new = read(inverse.blocking, grads.block, inverse.scale, count=grads.total)
    totals = inverse.totals.plus(new)
    return rows, totals, totals.shift(inverse.setting)


def measured(inverse: InverseFisher) -> InverseFisher:
    """With its residuals, and NaN for what they show to be no inverse."""
    found = inverse.blocking.over(
        functools.partial(_readout.measured, is_whole=inverse.block_size is None),
        inverse.parts,
        common=(inverse.shift, inverse.num_grads),
    )
    parts, residuals = zip(*found, strict=True)
    return dataclasses.replace(inverse, parts=parts, residuals=residuals)


_measured = jax.jit(measured, donate_argnums=0)  # nobody holds what was not measured yet


@jax.jit
def verdict_of(inverse: InverseFisher) -> Verdict:
    """What an error about it would say."""
    sizes = functools.partial(_readout.sizes, is_whole=inverse.block_size is None)
    found = inverse.blocking.over(sizes, inverse.parts, common=(inverse.num_grads,))
    return Verdict(inverse.residuals, tuple(x for part in found for x in part), inverse.damping)


_apply = jax.jit(lambda inverse, vector: inverse.blocking.join(inverse.solved(inverse.blocking.cut(vector))))
_diagonal = jax.jit(lambda inverse: inverse.blocking.join(inverse.diagonals()))


@functools.partial(jax.jit, static_argnums=0)
def _dense(index: int, inverse: InverseFisher) -> Array:
    position = inverse.blocking.position(index)
    if position is None:
        return jnp.zeros((0, 0, 0), inverse.blocking.packing.dtypes[index])
    group, places = position
    part, place = (0, group) if inverse.block_size is None else (group, 0)
    found = inverse.blocking.over(
        functools.partial(_readout.dense, place), inverse.parts, common=(inverse.shift,)
    )
    return inverse.totals.times(taken(found[part], places))
