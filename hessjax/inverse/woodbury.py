"""The inverse of the empirical Fisher from blocks of gradients, by Woodbury's identity."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax import _tree
from hessjax._typing import Block, Relative, Scalar, Vector
from hessjax.inverse.blocking import Blocking, Parts, signs
from hessjax.inverse.factors import Dual, Root, Whole, absorbed, dual_of, root_of, shifted, whole_of
from hessjax.inverse.streams import gathered, num_grads, row, stream

INACCURATE = 0.01
"""A block whose inverse is off by more than this fraction is not handed out."""

MARGIN = 8
"""Damping of this times eps·‖F‖ is suggested then."""


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

    num_grads: Int[Array, ""]
    squares: Scalar

    def shift(self, damping: Damping, num_params: int) -> Scalar:
        """κ = mλ."""
        return self.num_grads * damping.absolute + damping.factor * self.squares / num_params


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

    parts: tuple[Root | Dual, ...] | Whole
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
        return jnp.all(jnp.concatenate(self.residuals) <= INACCURATE)

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
        blocks = stream(grads, self._like)
        return _streamed(_extended(gathered(blocks, self._missing), self), blocks)

    @property
    def _missing(self) -> int | None:
        """How many gradients more there must be until no dual is left; None: it stays one."""
        if isinstance(self.parts, Whole):
            return None
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

    With `block_size=B` F is block-diagonal: B consecutive weights of a leaf are a block, none crosses leaves.
    A block with at least as many gradients as weights keeps a B × B root of its inverse, updated by chunks of
    gradients; one with fewer keeps the gradients and an m × m factor, as the whole network does with
    `block_size=None`. What gradients are, is open: any vectors r with F = 1/m Σ rrᵀ + λI will do, such as
    `ggn_roots` and `sampled_grads` give.

    Args:
        grads: a block (a tree like the params, its leaves with a leading axis of m gradients), as
            `per_example_grads` returns; or a stream of blocks, any iterable that is not itself a tree of
            arrays: an iterator, a generator, a data loader. (A list is a tree: pass `iter(blocks)`.) A stream
            is read once, and no more of it is kept than makes up B gradients (all, if `block_size=None`).
        damping: λ, in the units of F, or `relative(r)`: r times the mean of F's undamped diagonal over all
            parameters, of all leaves. A stream's λ is that of all its gradients.
        block_size: the most weights in a block, B; a smaller leaf is one block. None: one block in all.
        chunk_size: how many gradients enter a root at once. More are faster on an accelerator; in float32
            fewer are more accurate.
        batch_size: b, if every gradient is the mean over b examples: that makes gᵢgᵢᵀ smaller by b.

    Returns:
        An `InverseFisher`, a pytree, computed and kept in at least float32.

    Raises:
        TypeError: gradients that are not floating point.
        ValueError: no gradient; leaves, or blocks of a stream, that disagree; NaN or infinity among the
            gradients (names the leaf); `damping` not positive, or relative to gradients that are all zero;
            λ too small for the precision (names the block, and a damping that should do). Traced code cannot
            raise: inside `jit` such a block holds NaN, and `accurate` is False.

    Cost:
        Root: 6·m·B operations for each weight, memory B numbers for each weight. Dual: 2·m·min(m, B)
        operations and m numbers for each weight, and m² for each block. A stream costs 5·B² operations more
        for each weight whenever m has doubled, for κ = mλ grows with it.

        In float32 the relative error is about 1e-7·√(λmax/λ) times a modest factor, at worst 1e-7·λmax/λ.

    References:
        Singh & Alistarh (2020), WoodFisher, arXiv 2004.14340; Frantar et al. (2021), M-FAC, arXiv
        2107.03356; Andrews (1968), A square root formulation of the Kalman covariance equations.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 2.0]])}  # F = 2I + λI
        >>> inverse = hj.inverse_fisher(grads, damping=2.0, block_size=2)
        >>> inverse.apply({"w": jnp.array([4.0, 8.0])})["w"].round(4).tolist()
        [1.0, 2.0]
        >>> inverse.update({"w": jnp.zeros((2, 2))}).diagonal()["w"].round(4).tolist()  # F = I + λI
        [0.3333, 0.3333]
    """
    for name, value in {"block_size": block_size, "chunk_size": chunk_size, "batch_size": batch_size}.items():
        if value is not None and not isinstance(value, jax.core.Tracer) and not value >= 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    blocks = stream(grads)
    first = next(blocks)
    like = row(first)
    dtype, blocking = _tree.accumulator_dtype(like), Blocking.of(like, block_size)
    setting = Damping.of(damping, dtype)
    first = gathered(itertools.chain([first], blocks), blocking.widest if block_size else None)
    return _streamed(_built(blocking, chunk_size, first, setting, jnp.asarray(batch_size, dtype)), blocks)


# -- driving ---------------------------------------------------------------------------------------


def _streamed(inverse: InverseFisher, blocks: Iterator[Block]) -> InverseFisher:
    """With the blocks that are left; κ follows m when that has doubled, and at the end."""
    settled = total = None
    for block in blocks:
        total = int(inverse.num_grads) if total is None else total
        settled = total if settled is None else settled
        inverse = _with_more(block, inverse)
        total += num_grads(block)
        if total >= 2 * settled:
            inverse, settled = _settled(inverse), total
    return _checked(inverse if settled in (None, total) else _settled(inverse))


def _checked(inverse: InverseFisher) -> InverseFisher:
    """Itself, unless it is traced or good; else an error that names the first bad block."""
    if any(isinstance(x, jax.core.Tracer) for x in inverse.residuals) or bool(inverse.accurate):
        return inverse
    blocking, paths = inverse.blocking, _tree.leaf_paths(inverse._like)
    sizes = dict(sorted(blocking.by_leaf(_sizes(inverse)).items()))
    bad = [paths[i] for i, x in sizes.items() if not jnp.all(jnp.isfinite(x))]
    if bad:
        raise ValueError(
            f"`grads` must be finite, got NaN, infinity or numbers with squares beyond the dtype's range in "
            f"{', '.join(bad)}."
        )
    if not inverse.shift > 0:
        raise ValueError(
            "`damping` must be absolute here, a positive number: it is relative to gradients that are all "
            "zero, or too small to be squared."
        )
    raise ValueError(_too_small(inverse, sizes, paths))


def _too_small(inverse: InverseFisher, sizes: dict[int, Array], paths: list[str]) -> str:
    """What is not accurate, and the damping that would do for all blocks."""
    where = "the whole network"
    if inverse.block_size:
        by_leaf = inverse.blocking.by_leaf(inverse.residuals)
        bad = {i: ~(by_leaf[i] <= INACCURATE) for i in sizes}
        first = next(i for i in sizes if bad[i].any())
        total, blocks = sum(int(x.sum()) for x in bad.values()), sum(x.size for x in bad.values())
        where = f"block {int(bad[first].argmax())} of {paths[first]} ({total} of all {blocks} blocks)"
    damping = float(inverse.damping)
    enough = max(MARGIN * float(jnp.finfo(x.dtype).eps * jnp.linalg.norm(x)) for x in sizes.values())
    return (
        f"`damping` must be about {max(enough, 4 * damping):.1e} or larger in this precision, got "
        f"{damping:.1e}: the inverse would not be accurate for {where}. Smaller `chunk_size` or `block_size` "
        f"help a little, gradients in float64 help for good."
    )


# -- what is compiled ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def _built(
    blocking: Blocking, chunk_size: int, grads: Block, setting: Damping, scale: Scalar
) -> InverseFisher:
    rows, totals = _read(blocking, grads, scale)
    shift = totals.shift(setting, blocking.packing.size)
    parts: Whole | tuple[Root | Dual, ...]
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
    parts: Whole | tuple[Root | Dual, ...]
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
        absorbed(part, more, inverse.chunk_size) for part, more in zip(_roots(inverse), rows, strict=True)
    )
    return dataclasses.replace(inverse, parts=parts, totals=jax.tree.map(jnp.add, inverse.totals, new))


@functools.partial(jax.jit, donate_argnums=0)
def _settled(inverse: InverseFisher) -> InverseFisher:
    """With κ = mλ again."""
    shift = inverse.totals.shift(inverse.setting, inverse.blocking.packing.size)
    parts = tuple(shifted(part, inverse.shift, shift) for part in _roots(inverse))
    return _measured(dataclasses.replace(inverse, parts=parts, shift=shift))


@jax.jit
def _apply(inverse: InverseFisher, vector: Vector) -> Vector:
    return inverse.blocking.join(_solve(inverse, inverse.blocking.cut(vector)))


@jax.jit
def _diagonal(inverse: InverseFisher) -> Vector:
    count, shift, parts = inverse.totals.num_grads, inverse.shift, inverse.parts
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
        return inverse.totals.num_grads * inverse.parts.dense(group, shift)
    part = inverse.parts[group]
    return inverse.totals.num_grads * part.dense(which, shift.astype(part.image.dtype))


def _read(blocking: Blocking, grads: Block, scale: Scalar) -> tuple[tuple[Array, ...], Totals]:
    """The gradients, cut and times √b, and what they add up to."""
    count = num_grads(grads)
    rows = tuple(jnp.sqrt(scale).astype(x.dtype) * x for x in jax.vmap(blocking.cut)(grads))
    squares = sum((jnp.sum(x**2).astype(scale.dtype) for x in rows), jnp.zeros_like(scale))
    return rows, Totals(jnp.int32(count), squares)


def _part_of(rows: Array, shift: Scalar, chunk_size: int) -> Root | Dual:
    """A root if the gradients are at least as many as a block's weights."""
    shift = shift.astype(rows.dtype)
    return root_of(rows, shift, chunk_size) if rows.shape[0] >= rows.shape[2] else dual_of(rows, shift)


def _roots(inverse: InverseFisher) -> list[Root]:
    """The parts, once there are enough gradients for all of them to be roots."""
    return [part for part in inverse.parts if isinstance(part, Root)]


def _stacked(rows: Array, more: Array) -> Array:
    return jnp.concatenate([rows, more])


def _solve(inverse: InverseFisher, parts: Parts) -> Parts:
    count, shift = inverse.totals.num_grads, inverse.shift
    if isinstance(inverse.parts, Whole):
        solved = inverse.parts.solve(parts, shift)
    else:
        solved = tuple(
            part.solve(v, shift.astype(v.dtype)) for part, v in zip(inverse.parts, parts, strict=True)
        )
    return tuple(count * x for x in solved)


def _measured(inverse: InverseFisher) -> InverseFisher:
    """With the residuals, and NaN for what they show to be no inverse."""
    images, count, parts = _images(inverse), inverse.totals.num_grads, inverse.parts
    z = [jnp.broadcast_to(signs(x.shape[-1], x.dtype), x.shape) for x in images]
    products = [(x + inverse.shift.astype(x.dtype) * s) / count for x, s in zip(images, z, strict=True)]
    misses = [x - s for x, s in zip(_solve(inverse, tuple(products)), z, strict=True)]
    if isinstance(parts, Whole):
        residual = inverse.damping * _tree.norm(misses) / _tree.norm(products)
        parts = parts._replace(cholesky=_kept(parts.cholesky, residual))
        return dataclasses.replace(inverse, parts=parts, residuals=(residual[None],))
    diagonals = [count * part.diagonal(inverse.shift.astype(part.image.dtype)) for part in parts]
    residuals = tuple(map(_relative_miss, misses, products, map(jnp.sqrt, diagonals)))
    parts = tuple(
        part._replace(**{name: _kept(getattr(part, name), residual)})
        for part, residual in zip(parts, residuals, strict=True)
        for name in ("root" if isinstance(part, Root) else "cholesky",)
    )
    return dataclasses.replace(inverse, parts=parts, residuals=residuals)


def _relative_miss(miss: Array, product: Array, units: Array) -> Array:
    return jnp.sqrt(jnp.mean((miss / units) ** 2, axis=-1) / jnp.mean((product * units) ** 2, axis=-1))


def _kept(factor: Array, residual: Array) -> Array:
    return jnp.where((residual <= INACCURATE)[..., None, None], factor, jnp.nan)


def _images(inverse: InverseFisher) -> tuple[Array, ...]:
    """Az = m(F − λI)z for every block."""
    parts = inverse.parts
    return parts.image if isinstance(parts, Whole) else tuple(part.image for part in parts)


@jax.jit
def _sizes(inverse: InverseFisher) -> tuple[Array, ...]:
    """‖Fz‖ of every block, about the Frobenius norm of F; the trace of every leaf with one block in all."""
    count, parts = inverse.totals.num_grads, inverse.parts
    if isinstance(parts, Whole):
        return tuple(jnp.sum(rows**2)[None] / count for rows in parts.rows)
    return tuple(jnp.linalg.norm(part.image, axis=-1) / count for part in parts)
