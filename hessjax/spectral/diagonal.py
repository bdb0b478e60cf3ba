"""The diagonal of a matvec, entry by entry, with standard errors."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._numbers import checked_count
from hessjax._typing import Block, Estimate, Estimator, Key, Matvec, Params, Scalar, Tolerance
from hessjax.estimator import run
from hessjax.spectral import moments
from hessjax.spectral.probes import Probe, rademacher


class DiagonalState(NamedTuple):
    """The probe under way, and the regression of (Av)_i on v_i in every entry i.

    Attributes:
        key: random key; probe n uses `fold_in(key, n)`.
        probe: the vector to be multiplied next.
        slope: Σ v⊙Av / Σ v⊙v, the estimate of the diagonal.
        weight: Σ v⊙v.
        residual: Σ (Av − slope⊙v)².
        num_samples: number of samples.
    """

    key: Key
    probe: Any
    slope: Any
    weight: Any
    residual: Any
    num_samples: Int[Array, ""]


@functools.lru_cache(maxsize=64)
def hutchinson_diagonal(probe: Probe = rademacher) -> Estimator:
    """The diagonal as Σ v⊙Av / Σ v⊙v over random v.

    (Av)_i = a_ii·v_i + noise from the row's other entries, so this is the slope of a regression through the
    origin, and its standard error is √(Σ (Av − slope⊙v)² / ((n − 1)·Σ v⊙v)). With signs v⊙v = 1: a mean
    and its standard error, and the variance of one sample of entry i is Σ_{j≠i} a_ij².

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate`, `mean` and `stderr` trees like the params (at least float32).
        Its error is the 2-norm of `stderr` over all entries (infinite before 20 samples), the scale of a
        relative tolerance the 2-norm of `mean`.

    Cost:
        One product a sample; memory 5·d: probe, product, and three numbers for every parameter.

    References:
        Bekas, Kokiopoulou & Saad (2007), An estimator for the diagonal of a matrix.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: jnp.arange(3.0) * v)
        >>> estimator = hj.hutchinson_diagonal()
        >>> hj.run(estimator, A, jax.random.key(0), jnp.zeros(3), max_matvecs=2)[0].mean.tolist()
        [0.0, 1.0, 2.0]
    """

    def init(key: Key, like: Params) -> DiagonalState:
        zeros = jax.tree.map(jnp.zeros_like, _tree.wide(like))
        return DiagonalState(key, probe(jax.random.fold_in(key, 0), like), zeros, zeros, zeros, jnp.int32(0))

    def query(state: DiagonalState) -> Block:
        return jax.tree.map(lambda x: x[None], state.probe)

    def update(state: DiagonalState, products: Block) -> DiagonalState:
        count = state.num_samples + 1
        following = probe(jax.random.fold_in(state.key, count), state.probe)
        weight = jax.tree.map(lambda w, v: w + v**2, state.weight, state.probe)
        # The share of the weight that is new; an entry that no probe has touched has none.
        gain = jax.tree.map(lambda w, v: v / jnp.where(w > 0, w, 1), weight, state.probe)
        surprise = jax.tree.map(lambda y, s, v: y - s * v, _tree.row(products, 0), state.slope, state.probe)
        slope = jax.tree.map(lambda s, g, e: s + g * e, state.slope, gain, surprise)
        residual = jax.tree.map(
            lambda r, e, g, v: r + e**2 * (1 - g * v), state.residual, surprise, gain, state.probe
        )
        return DiagonalState(state.key, following, slope, weight, residual, count)

    def result(state: DiagonalState) -> Estimate:
        n = state.num_samples
        mean = jax.tree.map(lambda s: jnp.where(n > 0, s, jnp.nan), state.slope)
        stderr = jax.tree.map(
            lambda r, w: jnp.where(
                n > 1, jnp.sqrt(r / (jnp.maximum(n - 1, 1) * jnp.where(w > 0, w, 1))), jnp.inf
            ),
            state.residual,
            state.weight,
        )
        return Estimate(mean, stderr, n)

    def error(state: DiagonalState) -> Scalar:
        return moments.stopping_error(_tree.norm(result(state).stderr), state.num_samples)

    def scale(state: DiagonalState) -> Scalar:
        return _tree.norm(state.slope)

    return Estimator(init, query, update, result, error, scale)


def diagonal(
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
    """The diagonal of a matvec, with a standard error for every entry.

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: the most samples to take, one product each.
        tol: stop when the 2-norm of all standard errors is at most this: absolute, or `relative` to the
            2-norm of the diagonal. A run takes 20 samples before it stops.
        probe: see `hutchinson_diagonal`.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        `Estimate(mean, stderr, num_samples)`: two trees like the params, in loss per squared parameter.

    Raises:
        ValueError: `num_probes` below 1.
        NonFiniteProductError: see `run`.

    Cost:
        At most `num_probes` products; memory 5·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "scale": -v["scale"]})
        >>> like = {"bias": jnp.zeros(2), "scale": jnp.zeros(())}
        >>> jax.tree.map(lambda x: x.tolist(), hj.diagonal(A, jax.random.key(0), like, num_probes=2).mean)
        {'bias': [2.0, 2.0], 'scale': -1.0}
    """
    num_probes = checked_count("num_probes", num_probes)
    return run(
        hutchinson_diagonal(probe),
        matvec,
        key,
        like,
        max_matvecs=num_probes,
        tol=tol,
        callbacks=callbacks,
        on_device=on_device,
    )[0]
