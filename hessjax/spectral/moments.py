"""Running moments of independent samples, and what they say of the mean."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hessjax._typing import Estimate, Scalar

MIN_SAMPLES = 20
"""Samples before a standard error may stop a run.

A run that stops when its standard error is small stops too early when the samples happen to lie close
together, and few samples often do. With normal samples and a look every 5 products, ±2 standard errors
then hold the truth in as few as 88 % of runs; from 20 samples on in 93.5 % or more, whatever the tolerance.
(Simulated, 20,000 runs for each of 11 tolerances. Samples as skewed as χ² with 10 degrees of freedom: 86 %,
then 92.6 %; with one degree, the samples of a matrix of rank 1: 71 %, then 85 %. Student's factor on top
changed these by less than a point.)
"""


class Moments(NamedTuple):
    """Mean and spread of the samples so far, entry by entry of whatever tree the samples are.

    Attributes:
        mean: mean of the samples.
        squares: sum of squared deviations from the mean.
        num_samples: number of samples.
    """

    mean: Any
    squares: Any
    num_samples: Int[Array, ""]


def no_samples(zeros: Any) -> Moments:
    """The moments before the first sample; `zeros` is a sample's worth of them."""
    return Moments(zeros, zeros, jnp.int32(0))


def push(moments: Moments, sample: Any) -> Moments:
    """Take in one sample (Welford 1962: no large squares are subtracted from each other)."""
    count = moments.num_samples + 1
    delta = jax.tree.map(jnp.subtract, sample, moments.mean)
    mean = jax.tree.map(lambda m, d: m + d / count, moments.mean, delta)
    squares = jax.tree.map(lambda s, d, x, m: s + d * (x - m), moments.squares, delta, sample, mean)
    return Moments(mean, squares, count)


def estimate(moments: Moments) -> Estimate:
    """The mean (NaN without a sample) and its standard error (infinite with fewer than two)."""
    n = moments.num_samples
    mean = jax.tree.map(lambda m: jnp.where(n > 0, m, jnp.nan), moments.mean)
    return Estimate(mean, jax.tree.map(lambda s: standard_error(s, n), moments.squares), n)


def standard_error(squares: Array, count: Array) -> Array:
    """Of a mean, from the sum of squared deviations; infinite with fewer than two samples."""
    return jnp.where(
        count > 1, jnp.sqrt(squares / (jnp.maximum(count - 1, 1) * jnp.maximum(count, 1))), jnp.inf
    )


def stopping_error(stderr: Array, count: Array) -> Scalar:
    """The error that a run stops on: the standard error, once there are samples enough to trust it."""
    return jnp.where(count >= MIN_SAMPLES, stderr, jnp.inf)
