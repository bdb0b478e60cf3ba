"""Hutchinson's estimator of the trace, and of the parts that come with it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core import _numbers, _tree
from hessjax._core._results import Estimate
from hessjax._core._types import Block, Key, Params, Scalar, settings
from hessjax.estimators import _moments
from hessjax.estimators._moments import Moments
from hessjax.estimators._samples import Sampling


class HutchinsonState(NamedTuple):
    """The probe under way, and the moments of the samples vᵀAv.

    Attributes:
        key: random key; sample i uses `fold_in(key, i)`.
        probe: the vector to be multiplied next.
        samples: moments of the whole's samples, then of each leaf's and of each group's.
    """

    key: Key
    probe: Any
    samples: Moments


@settings()
class Hutchinson(Sampling):
    """Hutchinson's trace estimator: the mean of vᵀAv over random v.

    The variance of one sample with signs is 2(‖A‖²_F − Σ aᵢᵢ²). The error reported is the standard error
    of the mean, s/√n, times what makes ±2 of it hold the truth in 92 to 98 % of runs: Student's factor of
    n − 1 degrees of freedom, and 1 + 2γ²/n for skewed samples, as where few eigenvalues make up the trace. γ
    is the least of √8, three times deviation over mean, and the samples' skewness plus 1.5·√(6/n). (The
    relative change of the running mean, which others stop on, stops at a median of 14 probes with errors of
    6 to 37 %.) A run does not stop on it before 20 samples.

    Of d parameters signs make at most 2^(d−1)
    different samples: where d is 2 or 3 a few samples are often all equal, and then the standard error is 0
    though the mean is not exact (for the 3×3 matrix of ones in 32 % of runs of 4 samples, 18 % of 6, 0.3 %
    of 20). So few parameters are better multiplied one by one, as `hutchpp` does.

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate` (units of A's diagonal) and error its `stderr` (infinite
        before 20 samples).

    Cost:
        One product a sample; memory 3·d: probe, product, the next probe.

    References:
        Hutchinson (1989), A stochastic estimator of the trace of the influence matrix.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: jnp.sum(v) * jnp.ones(8))
        >>> estimate, _ = hj.run(hj.estimators.hutchinson(), A, jax.random.key(0), jnp.zeros(8),
        ...                                                                                  max_matvecs=400)
        >>> abs(float(estimate.mean) - 8.0) < 3 * float(estimate.stderr)
        True
    """

    def init(self, key: Key, like: Params) -> HutchinsonState:
        """The first probe, and no samples."""
        # All samples in one array: one update instead of one for every leaf.
        zeros = jnp.zeros(1 + self._num_parts(like), _tree.accumulator_dtype(like))
        return HutchinsonState(key, self.draw(key, 0, like), _moments.no_samples(zeros))

    def update(self, state: HutchinsonState, products: Block) -> HutchinsonState:
        """One sample vᵀAv more, and the next probe."""
        # Leaf by leaf and then their sum: the parts cost nothing beyond the total.
        product, dtype = _tree.row(products, 0), state.samples.mean.dtype
        leaves = jnp.stack(_tree.inner_by_leaf(state.probe, product))
        parts = [jnp.sum(leaves, keepdims=True), *self._parts(leaves, state.probe, product)]
        samples = _moments.push(state.samples, jnp.concatenate([part.astype(dtype) for part in parts]))
        return HutchinsonState(state.key, self.draw(state.key, samples.num_samples, state.probe), samples)

    def result(self, state: HutchinsonState) -> Estimate:
        """The mean and its standard error."""
        parts = _moments.estimate(state.samples)
        with _numbers.meant():  # NaN before the first sample
            return parts._replace(mean=parts.mean[0], stderr=parts.stderr[0])

    def error(self, state: HutchinsonState) -> Scalar:
        """The standard error of the total."""
        parts = _moments.estimate(state.samples)
        return _moments.stopping_error(parts.stderr[0], parts.num_samples)

    def scale(self, state: HutchinsonState) -> Scalar:
        """The absolute value of the total."""
        # Where eigenvalues cancel the trace is small beside its error: such a run spends all its products.
        return jnp.abs(state.samples.mean[0])

    def _num_parts(self, like: Params) -> int:
        return 0

    def _parts(self, leaves: Float[Array, " leaves"], probe: Any, product: Any) -> list[Float[Array, " n"]]:
        """Beside the total, what is sampled of the leaves' shares."""
        return []


@settings()
class HutchinsonByLeaf(Hutchinson):
    """`hutchinson`, with the trace of every leaf's diagonal block from the same products.

    v_l·(Av)_l is an unbiased estimate of tr A_ll, so all layers cost what the total costs. The sample of a
    group is the sum over its leaves probe by probe, so its standard error knows how they vary together.
    The run's error is that of the total.

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.
        groups: of each group of leaves, their indices in the order of `jax.tree.leaves`.
        stacks: of each leaf the axes that count layers, whose traces are wanted too; () for none of any.

    Returns:
        An `Estimator` whose result is an `Estimate` of arrays (1 + leaves + groups + layers,): the total, the
        leaves in the order of `jax.tree.leaves`, the groups, the layers of each leaf that stacks some.

    Cost:
        As `hutchinson`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"a": 2 * v["a"], "b": 3 * v["b"]})
        >>> like = {"a": jnp.zeros(2), "b": jnp.zeros(5)}
        >>> hj.run(hj.estimators.hutchinson_by_leaf(), A, jax.random.key(0), like,
        ...                                                              max_matvecs=2)[0].mean.tolist()
        [19.0, 4.0, 15.0]
    """

    groups: tuple[tuple[int, ...], ...] = ()
    stacks: tuple[tuple[int, ...], ...] = ()

    def result(self, state: HutchinsonState) -> Estimate:
        """The means and their standard errors: the total, the leaves, the groups."""
        return _moments.estimate(state.samples)

    def _num_parts(self, like: Params) -> int:
        layers = zip(jax.tree.leaves(like), self.stacks, strict=False)
        stacked = sum(math.prod(x.shape[axis] for axis in axes) for x, axes in layers if axes)
        return len(jax.tree.leaves(like)) + len(self.groups) + stacked

    def _parts(self, leaves: Float[Array, " leaves"], probe: Any, product: Any) -> list[Float[Array, " n"]]:
        # Summed probe by probe, before the moments: leaves vary together.
        groups = [jnp.sum(leaves[jnp.array(group)], keepdims=True) for group in self.groups]
        pairs = zip(jax.tree.leaves(probe), jax.tree.leaves(product), self.stacks, strict=False)
        return [leaves, *groups, *(_inner_by_layer(v, x, axes) for v, x, axes in pairs if axes)]


def _inner_by_layer(v: Array, x: Array, axes: tuple[int, ...]) -> Float[Array, " layers"]:
    """⟨v_l, x_l⟩ for every layer l of a leaf, accumulated in at least float32."""
    dtype = _tree.common_dtype(v, x, jnp.float32)
    within = tuple(axis for axis in range(v.ndim) if axis not in axes)
    return jnp.sum(v.astype(dtype) * x.astype(dtype), axis=within).ravel()


hutchinson = Hutchinson
hutchinson_by_leaf = HutchinsonByLeaf
