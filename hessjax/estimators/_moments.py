"""The mean of independent samples and its standard error, widened where samples are few or skewed."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._results import Estimate
from hessjax._core._types import Scalar

MIN_SAMPLES = 20
"""Samples before a standard error may stop a run.

A run that stops when its standard error is small stops too early when the samples happen to lie close
together, and few samples often do.
"""


class Moments(NamedTuple):
    """Mean, spread and skewness of the samples so far, entry by entry of whatever tree the samples are.

    Attributes:
        mean: mean of the samples.
        spread: the root of the sum of squared deviations from the mean. The sum itself would leave float32
            where samples are of 1e-19 or 1e19.
        skewness: the sum of cubed deviations, in units of the spread: a number between -1 and 1.
        num_samples: number of samples.
    """

    mean: Any
    spread: Any
    skewness: Any
    num_samples: Int[Array, ""]


def no_samples(zeros: Any) -> Moments:
    """The moments before the first sample; `zeros` is a sample's worth of them."""
    return Moments(zeros, zeros, zeros, jnp.int32(0))


def push(moments: Moments, sample: Any) -> Moments:
    """Take in one sample (Welford 1962: no large squares are subtracted from each other)."""
    count = moments.num_samples + 1
    # Of the squared deviation from the old mean the share 1 − 1/n comes on top.
    delta = jax.tree.map(jnp.subtract, sample, moments.mean)
    mean = jax.tree.map(lambda m, d: m + d / count.astype(d.dtype), moments.mean, delta)
    spread = jax.tree.map(lambda s, d: longer(s, d * _root_of_share(count, d.dtype)), moments.spread, delta)
    skewness = jax.tree.map(
        lambda g, old, new, d: _more_skewed(g, over(old, new), over(d, new), count.astype(d.dtype)),
        moments.skewness, moments.spread, spread, delta,
    )  # fmt: skip
    return Moments(mean, spread, skewness, count)


def _root_of_share(count: Int[Array, ""], dtype: Any) -> Scalar:
    """√(1 − 1/n)."""
    return jnp.sqrt((count - 1).astype(dtype) / count.astype(dtype))


def _more_skewed(
    skewness: Float[Array, "..."], left: Float[Array, "..."], step: Float[Array, "..."], n: Scalar
) -> Float[Array, "..."]:
    """The skewness with one sample more, that lies `step` new spreads from the old mean."""
    # Pébay (2008), eq. 1.2: M₃ + δ³(n − 1)(n − 2)/n² − 3δM₂/n, all in units of the new spread.
    return skewness * left**3 + step**3 * ((n - 1) / n) * ((n - 2) / n) - 3 * step * left**2 / n


def longer(spread: Float[Array, "..."], deviation: Float[Array, "..."]) -> Float[Array, "..."]:
    """√(s² + x²), by squares of what is at most 1: exact in its scaling by any power of two."""
    size = jnp.abs(deviation)
    large, small = jnp.maximum(spread, size), jnp.minimum(spread, size)
    return large * jnp.sqrt(1 + (small / jnp.where(large > 0, large, 1)) ** 2)


def moments_of(samples: Float[Array, " n"], inside: Bool[Array, " n"], count: Int[Array, ""]) -> Moments:
    """Of so many samples, those inside."""
    mean = jnp.sum(jnp.where(inside, samples, 0)) / jnp.maximum(count, 1).astype(samples.dtype)
    deviations = jnp.where(inside, samples - mean, 0)
    spread = _tree.norm(deviations)
    return Moments(mean, spread, jnp.sum(over(deviations, spread) ** 3), count)


def over(a: Any, b: Any) -> Any:
    """a/b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


# -- the standard error ----------------------------------------------------------------------------


def estimate(moments: Moments) -> Estimate:
    """The mean (NaN without a sample) and its standard error (infinite with fewer than two).

    The error is s/√n times what makes ±2 of it hold the truth in 95 % of runs: Student's factor, and
    `1 + 2γ²/n` for samples of skewness γ.
    """
    n = moments.num_samples
    mean = jax.tree.map(lambda m: _numbers.or_nan(n > 0, m), moments.mean)
    stderr = jax.tree.map(
        lambda m, s, g: _widened(s, n) * (1 + 2 * skewness_share(s, m, g, n)),
        moments.mean, moments.spread, moments.skewness,
    )  # fmt: skip
    return Estimate(mean, stderr, n)


def _widened(spread: Float[Array, "..."], n: Int[Array, ""]) -> Float[Array, "..."]:
    return standard_error(spread, n) * students_factor(n, spread.dtype)


def standard_error(spread: Float[Array, "..."], count: Int[Array, ""]) -> Float[Array, "..."]:
    """Of a mean, from the root of the sum of squared deviations; infinite with fewer than two samples."""
    # As floats: n(n − 1) leaves int32 at 46,342 samples.
    n = count.astype(spread.dtype)
    return jnp.where(count > 1, spread / jnp.sqrt(jnp.maximum(n - 1, 1) * jnp.maximum(n, 1)), jnp.inf)


_STUDENT = (1.0, 1.25, 1.522, 1.567, 0.337, 1.308)
"""Of powers of 1/(n − 1): the first two are the expansion's, the others fitted, to 4e-5 from n = 2 on."""


def students_factor(count: ArrayLike, dtype: Any) -> Scalar:
    """What makes ±2 of a standard error from so many normal samples hold the mean in 95.45 % of runs.

    The quantile of Student's distribution of n − 1 degrees of freedom over that of the normal one, 2.
    """
    inverse = 1 / jnp.maximum(jnp.asarray(count).astype(dtype) - 1, 1)
    return jnp.polyval(np.array(_STUDENT[::-1], dtype), inverse)


_MOST_SKEWED = math.sqrt(8)
"""The skewness of χ² with one degree of freedom, that of vᵀAv where A has rank 1: no vᵀAv has more."""


def skewness_share(
    spread: Float[Array, "..."], mean: Float[Array, "..."], skewness: Float[Array, "..."], count: Any
) -> Float[Array, "..."]:
    """γ²/n for samples of skewness γ, whose mean and deviation are too small together.

    Errors want to be wider by a multiple of it: that is the form of the Edgeworth expansion's term. The
    skewness of few samples is too small itself, so γ is the least of three bounds: √8; 3s/|mean|, since vᵀAv
    of a positive semidefinite A has a skewness near 2σ/μ; and the sample's skewness and one and a half of
    its standard errors, √(6/n). The factors are from simulations of 4000 runs with ten spectra
    (benchmarks/error_bars.py).

    Args:
        spread: the root of the sum of squared deviations.
        mean: of what is at least 0 in every sample if A is positive semidefinite.
        skewness: as in `Moments`.
        count: number of samples.
    """
    n = jnp.maximum(count, 2).astype(spread.dtype)
    relative = jnp.where(mean == 0, jnp.inf, spread / jnp.where(mean == 0, 1, jnp.abs(mean)))
    seen = jnp.sqrt(n) * jnp.abs(skewness) + 1.5 * jnp.sqrt(6 / n)
    bound = jnp.minimum(jnp.minimum(seen, 3 * relative / jnp.sqrt(n - 1)), _MOST_SKEWED)
    return bound**2 / n


def stopping_error(stderr: Scalar, count: Int[Array, ""]) -> Scalar:
    """The error that a run stops on: the standard error, once there are samples enough to trust it."""
    return jnp.where(count >= MIN_SAMPLES, stderr, jnp.inf)
