"""The trace of a matvec, in all and leaf by leaf, with standard errors."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._typing import Block, Estimate, Estimator, Key, Matvec, Params, Scalar, Tolerance
from hessjax.estimator import run
from hessjax.spectral.probes import Probe, rademacher


class TraceByLeaf(NamedTuple):
    """The trace and its parts.

    Attributes:
        total: the trace of the whole matrix.
        leaves: for the path of each leaf, the trace of its diagonal block; these sum to the total.
    """

    total: Estimate
    leaves: dict[str, Estimate]


class HutchinsonState(NamedTuple):
    """Running moments of the samples vᵀAv: of the whole (first) and of each leaf.

    Attributes:
        key: random key; sample i uses `fold_in(key, i)`.
        probe: the vector to be multiplied next.
        mean: (1 + leaves,) mean of the samples.
        squares: (1 + leaves,) sum of squared deviations from the mean.
        num_samples: number of samples.
    """

    key: Key
    probe: Any
    mean: Float[Array, " n"]
    squares: Float[Array, " n"]
    num_samples: Int[Array, ""]


@functools.lru_cache(maxsize=64)
def hutchinson(probe: Probe = rademacher) -> Estimator:
    """Hutchinson's trace estimator: the mean of vᵀAv over random v.

    The variance of one sample with signs is 2(‖A‖²_F − Σ aᵢᵢ²). The error reported is the standard error
    of the mean. (The relative change of the running mean, which others stop on, stops at a median of 14
    probes with errors of 6 to 37 %.)

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate` (units of A's diagonal) and error its `stderr`.

    Cost:
        One product a sample; memory 2·d.

    References:
        Hutchinson (1989), A stochastic estimator of the trace of the influence matrix.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: jnp.sum(v) * jnp.ones(8))
        >>> estimate, _ = hj.run(hj.hutchinson(), A, jax.random.key(0), jnp.zeros(8), max_matvecs=400)
        >>> abs(float(estimate.mean) - 8.0) < 3 * float(estimate.stderr)
        True
    """
    return _hutchinson(probe, by_leaf=False)


@functools.lru_cache(maxsize=64)
def hutchinson_by_leaf(probe: Probe = rademacher) -> Estimator:
    """`hutchinson`, with the trace of every leaf's diagonal block from the same products.

    v_l·(Av)_l is an unbiased estimate of tr A_ll, so all layers cost what the total costs. The run's error
    is the standard error of the total.

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` whose result is an `Estimate` of arrays (1 + leaves,): the total, then the leaves in
        the order of `jax.tree.leaves`.

    Cost:
        As `hutchinson`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"a": 2 * v["a"], "b": 3 * v["b"]})
        >>> like = {"a": jnp.zeros(2), "b": jnp.zeros(5)}
        >>> hj.run(hj.hutchinson_by_leaf(), A, jax.random.key(0), like, max_matvecs=2)[0].mean.tolist()
        [19.0, 4.0, 15.0]
    """
    return _hutchinson(probe, by_leaf=True)


def _hutchinson(probe: Probe, by_leaf: bool) -> Estimator:
    def init(key: Key, like: Params) -> HutchinsonState:
        zeros = jnp.zeros(1 + len(jax.tree.leaves(like)), _tree.accumulator_dtype(like))
        return HutchinsonState(key, probe(jax.random.fold_in(key, 0), like), zeros, zeros, jnp.int32(0))

    def query(state: HutchinsonState) -> Block:
        return jax.tree.map(lambda x: x[None], state.probe)

    def update(state: HutchinsonState, products: Block) -> HutchinsonState:
        parts = jnp.stack(_tree.inner_by_leaf(state.probe, _tree.row(products, 0)))
        sample = jnp.concatenate([jnp.sum(parts, keepdims=True), parts]).astype(state.mean.dtype)
        count = state.num_samples + 1
        delta = sample - state.mean
        mean = state.mean + delta / count
        squares = state.squares + delta * (sample - mean)  # Welford (1962)
        following = probe(jax.random.fold_in(state.key, count), state.probe)
        return HutchinsonState(state.key, following, mean, squares, count)

    def result(state: HutchinsonState) -> Estimate:
        n = state.num_samples
        mean = jnp.where(n > 0, state.mean, jnp.nan)
        stderr = jnp.where(
            n > 1, jnp.sqrt(state.squares / (jnp.maximum(n - 1, 1) * jnp.maximum(n, 1))), jnp.inf
        )
        return Estimate(mean, stderr, n) if by_leaf else Estimate(mean[0], stderr[0], n)

    def error(state: HutchinsonState) -> Scalar:
        return result(state).stderr.reshape(-1)[0]

    def scale(state: HutchinsonState) -> Scalar:
        return jnp.abs(state.mean[0])

    return Estimator(init, query, update, result, error, scale)


def trace(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> Estimate:
    """The trace of a matvec, with its standard error (Hutchinson's estimator).

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: the most samples to take, one product each.
        tol: stop when the standard error is at most this: absolute, or `relative` to the trace.
        probe: see `hutchinson`.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        `Estimate(mean, stderr, num_samples)`, in loss per squared parameter.

    Raises:
        ValueError: `num_probes` below 1.
        NonFiniteProductError: see `run`.

    Cost:
        At most `num_probes` products; memory 2·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))
        >>> float(hj.trace(A, jax.random.key(0), jnp.zeros(10)).mean)  # exact: A is diagonal
        55.0
    """
    return trace_by_leaf(
        matvec, key, like, num_probes, tol=tol, probe=probe, callbacks=callbacks, on_device=on_device
    ).total


def trace_by_leaf(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> TraceByLeaf:
    """The trace of every leaf's diagonal block, for the price of the total's.

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: the most samples to take, one product each.
        tol: stop when the total's standard error is at most this, see `trace`.
        probe: see `hutchinson`.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        `TraceByLeaf(total, leaves)`, `leaves` by path.

    Raises:
        ValueError: `num_probes` below 1.
        NonFiniteProductError: see `run`.

    Cost:
        As `trace`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "kernel": 3 * v["kernel"]})
        >>> like = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
        >>> parts = hj.trace_by_leaf(A, jax.random.key(0), like, num_probes=2)
        >>> {path: float(part.mean) for path, part in parts.leaves.items()}
        {'bias': 4.0, 'kernel': 12.0}
    """
    if num_probes < 1:
        raise ValueError(f"`num_probes` must be at least 1, got {num_probes}.")
    paths = _tree.leaf_paths(like)
    if len(set(paths)) < len(paths):
        raise ValueError(f"`like` must have a path of its own for every leaf, got {', '.join(paths)}.")
    estimate, _ = run(
        hutchinson_by_leaf(probe),
        matvec,
        key,
        like,
        max_matvecs=num_probes,
        tol=tol,
        callbacks=callbacks,
        on_device=on_device,
    )
    parts = [
        Estimate(mean, stderr, estimate.num_samples)
        for mean, stderr in zip(estimate.mean, estimate.stderr, strict=True)
    ]
    return TraceByLeaf(parts[0], dict(zip(paths, parts[1:], strict=True)))
