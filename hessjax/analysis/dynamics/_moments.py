"""The formulas of the noise scale: moments of centred gradients, the jackknife, and the result."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _tree
from hessjax._core._numbers import power_of_two
from hessjax._core._results import Estimate, by_shapes, counted, is_known, is_single
from hessjax._core._tables import Column, Row, Table, number, printable
from hessjax._core._types import Block, Scalar


@printable
class NoiseScale(NamedTuple):
    """How many examples it takes until the noise of a gradient is as large as the gradient.

    Attributes:
        scale: the batch size, noise over gradient, in examples. The error is infinite where the gradient
            is within two standard errors of 0, and so is the scale where it is estimated at 0 or less.
        gradient: ‖G‖², of the gradient over all data; of `critical_batch_size` GᵀHG. No bias: it may come out
            below 0.
        noise: tr Σ, of the covariance of one example's gradient; of `critical_batch_size` tr HΣ.
        leaves: by path, the same of each leaf alone.
    """

    scale: Estimate
    gradient: Estimate
    noise: Estimate
    leaves: dict[str, "NoiseScale"] = {}  # noqa: RUF012 - never written to

    def _table(self) -> Table | str:
        if not (is_known(self) and is_single(self.scale.num_samples)):
            return by_shapes(self)
        heads = [Column("Leaf", "name"), Column("Noise scale"), Column("±")]
        heads += [
            Column("Gradient", rank=1),
            Column("± ", rank=2),
            Column("Noise", rank=1),
            Column(" ±", rank=2),
        ]
        rows = [Row((name, *_cells(x))) for name, x in self.leaves.items()]
        whole = Row(("all", *_cells(self)), "bold")
        return Table(tuple(heads), (*rows, whole), notes=(f"{counted(self.scale.num_samples, 'sample')}.",))


def _cells(found: NoiseScale) -> tuple[str, ...]:
    return tuple(number(x) for part in found[:3] for x in (part.mean, part.stderr))


class _Moments(NamedTuple):
    """Inner products of gradients in centred form: nothing large is subtracted from anything large.

    Attributes:
        squares: (m,) hᵢ·Hhᵢ with hᵢ = gᵢ − ḡ.
        along: (m,) ḡ·Hhᵢ.
        mean: ḡ·Hḡ.
    """

    squares: Float[Array, " m"]
    along: Float[Array, " m"]
    mean: Scalar


@jax.jit
def noise_scales(grads: Block, batch_size: Any, weights: Array) -> list[NoiseScale]:
    """Of all leaves together, then of each."""
    leaves = _present(grads, weights)
    # Each in units of its own: one leaf's gradients may be 1e-20 of another's. One of zeros has none.
    unit = _unit(leaves)
    units = [jnp.minimum(_unit([x]), unit) for x in leaves]
    each = [_moments(x, x, own, own, weights) for x, own in zip(leaves, units, strict=True)]
    alike = [
        _Moments(*((own / unit) ** 2 * x for x in found)) for own, found in zip(units, each, strict=True)
    ]
    return [
        _estimated(found, weights, batch_size, own**2)
        for found, own in zip((_total(alike), *each), (unit, *units), strict=True)
    ]


@jax.jit
def critical_ratio(grads: Block, products: Block, batch_size: Any, weights: Array) -> NoiseScale:
    sides = [_present(block, weights) for block in (grads, products)]
    units = [_unit(x) for x in sides]
    each = [_moments(x, y, units[0], units[1], weights) for x, y in zip(*sides, strict=True)]
    return _estimated(_total(each), weights, batch_size, units[0] * units[1])


def _present(block: Block, weights: Array) -> list[Array]:
    """The leaves, with zeros for rows that are not there, which may hold anything."""
    there = weights > 0
    return [
        jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
        for x in jax.tree.leaves(block)
    ]


def _unit(leaves: Sequence[Array]) -> Scalar:
    """A power of two about as large as the largest entry: squares of small gradients leave float32."""
    dtype = _tree.accumulator_dtype(list(leaves))
    tops = [jnp.max(jnp.abs(jnp.where(jnp.isfinite(x), x, 0)), initial=0).astype(dtype) for x in leaves]
    return power_of_two(jnp.stack(tops))


def _moments(x: Array, y: Array, unit: Scalar, other: Scalar, weights: Array) -> _Moments:
    """Of one leaf of the gradients and of their products."""
    x, mean_x = _centred(x.astype(unit.dtype) / unit, weights)
    y, mean_y = _centred(y.astype(other.dtype) / other, weights)
    axes = tuple(range(1, x.ndim))
    return _Moments(jnp.sum(x * y, axes), jnp.sum(mean_x[None] * y, axes), jnp.sum(mean_x * mean_y))


def _centred(x: Array, weights: Array) -> tuple[Array, Array]:
    """Rows less their mean by weight, and the mean.

    A row of weight w is (w/w̄)(g − ḡ): of such rows the plain covariance is that of the weighted mean, to
    first order; where weights are 0 and 1 it is exactly that of the rows which are there.
    """
    weights = weights.astype(x.dtype)
    count = jnp.sum(weights > 0).astype(x.dtype)
    scale = (weights * count / jnp.sum(weights)).reshape(-1, *[1] * (x.ndim - 1))
    mean = jnp.sum(scale * x, axis=0) / count
    return scale * (x - mean[None]), mean


def _total(each: Sequence[_Moments]) -> _Moments:
    return _Moments(*(sum(parts[1:], parts[0]) for parts in zip(*each, strict=True)))


def _estimated(found: _Moments, weights: Array, batch_size: Any, unit: Scalar) -> NoiseScale:
    there, dtype = weights > 0, found.mean.dtype
    count = jnp.sum(there)
    n = count.astype(dtype)
    squares = jnp.sum(found.squares)
    # Without gradient i: Σ‖h‖² − n/(n−1)‖hᵢ‖², and a mean that is ḡ − hᵢ/(n−1).
    less = (squares - found.squares * n / (n - 1)) / (n - 2)
    mean = found.mean - 2 * found.along / (n - 1) + found.squares / (n - 1) ** 2
    noise = squares / (n - 1)
    gradient, without = found.mean - noise / n, mean - less / (n - 1)
    of_noise, of_gradient = (_deviations(there, n, x) for x in (less, without))
    size = jnp.asarray(batch_size, dtype)
    return NoiseScale(
        ratio_of(Deviating(size * noise, size * of_noise), Deviating(gradient, of_gradient), count),
        Estimate(unit * gradient, unit * _tree.norm(of_gradient), count),
        Estimate(unit * size * noise, unit * size * _tree.norm(of_noise), count),
    )


def _deviations(there: Bool[Array, " m"], n: Scalar, left_out: Float[Array, " m"]) -> Float[Array, " m"]:
    """What each sample adds to an error: the jackknife's variances are inner products of these."""
    mean = jnp.sum(jnp.where(there, left_out, 0)) / n
    return jnp.sqrt((n - 1) / n) * jnp.where(there, left_out - mean, 0)


class Deviating(NamedTuple):
    """An estimate, and deviations whose inner products are its variance, and covariances with others."""

    mean: Scalar
    deviations: Float[Array, " m"]

    def relative(self) -> Float[Array, " m"]:
        """The deviations over the estimate; 0 where that is 0."""
        return self.deviations / jnp.where(self.mean == 0, 1, self.mean)


def ratio_of(numerator: Deviating, denominator: Deviating, count: Int[Array, ""]) -> Estimate:
    """The ratio of two means, with an error of which two reach as far as Fieller's interval.

    That holds all ρ = ratio / estimate for which (1 − ρ)² ≤ 4 (v_aa − 2ρ v_ab + ρ² v_bb), v being relative
    variances: what two standard errors of a − ratio · b leave open. To first order it is the delta method's;
    it has no end once b is within two standard errors of 0.
    """
    a, b = numerator.relative(), denominator.relative()
    aa, ab, bb = jnp.sum(a * a), jnp.sum(a * b), jnp.sum(b * b)
    ends = 1 - 4 * bb
    root = jnp.sqrt(jnp.maximum(aa - 2 * ab + bb + 4 * (ab * ab - aa * bb), 0))
    reach = (2 * jnp.abs(bb - ab) + root) / jnp.where(ends > 0, ends, 1)
    below = denominator.mean
    # NaN stays: a denominator that is no number is not one of no size.
    ratio = jnp.where(below <= 0, jnp.inf, numerator.mean / jnp.where(below == 0, 1, below))
    open_ended = (below <= 0) | (ends <= 0) | (count < 2)
    return Estimate(ratio, jnp.where(open_ended, jnp.inf, jnp.abs(ratio) * reach), count)


@jax.jit
def from_norms(small: Any, large: Any, small_size: Any, large_size: Any) -> list[NoiseScale]:
    pairs = zip(jax.tree.leaves(_tree.wide(small)), jax.tree.leaves(_tree.wide(large)), strict=True)
    each = [_steps(x, y, small_size, large_size) for x, y in pairs]
    gradients, noises = (sum(parts[1:], parts[0]) for parts in zip(*each, strict=True))
    return [_of_steps(*parts) for parts in ((gradients, noises), *each)]


def _steps(small: Array, large: Array, b: Any, big: Any) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Of every step ‖G‖² and tr Σ."""
    b, big = (jnp.asarray(x, small.dtype) for x in (b, big))
    return (big * large - b * small) / (big - b), (small - large) / (1 / b - 1 / big)


def _of_steps(gradients: Float[Array, " n"], noises: Float[Array, " n"]) -> NoiseScale:
    count = jnp.int32(len(gradients))
    gradient, noise = (_mean_of_steps(x, count) for x in (gradients, noises))
    errors = [jnp.where(count > 1, _tree.norm(x.deviations), jnp.inf) for x in (gradient, noise)]
    means = Estimate(gradient.mean, errors[0], count), Estimate(noise.mean, errors[1], count)
    return NoiseScale(ratio_of(noise, gradient, count), *means)


def _mean_of_steps(samples: Float[Array, " n"], count: Int[Array, ""]) -> Deviating:
    n = count.astype(samples.dtype)
    mean = jnp.mean(samples)
    return Deviating(mean, (samples - mean) / jnp.sqrt(n * jnp.maximum(n - 1, 1)))
