"""Stochastic Lanczos quadrature: the density of all eigenvalues from a few Lanczos runs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._packing import Packing
from hessjax._typing import Block, Estimator, Key, Matvec, Params, Scalar, Vector
from hessjax.estimator import run
from hessjax.spectral import krylov
from hessjax.spectral.density import SpectralDensity
from hessjax.spectral.probes import Probe, gaussian
from hessjax.spectral.recurrence import Krylov, extend, pending, ritz, start


class SlqState(NamedTuple):
    """The Krylov space of the probe under way, and the quadratures of those before it."""

    key: Key
    space: Krylov
    packing: Packing
    nodes: Float[Array, "probes m"]
    weights: Float[Array, "probes m"]
    num_matvecs: Int[Array, ""]


@functools.lru_cache(maxsize=64)
def slq(num_probes: int = 1, num_matvecs: int = 80, *, probe: Probe = gaussian) -> Estimator:
    """Stochastic Lanczos quadrature, as an estimator of the spectral density.

    Every probe is the start of a Lanczos run of `num_matvecs` steps; the Ritz values with the squared first
    components of T's eigenvectors are the Gauss quadrature of the spectrum as the probe sees it. For large
    d one probe is enough.

    Args:
        num_probes: number of random start vectors, one after the other.
        num_matvecs: Lanczos steps for each: the resolution.
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `SpectralDensity` and error the standard error of the mean eigenvalue
        over the finished probes (infinite before the second).

    Raises:
        ValueError: a number below 1; `num_matvecs` above the number of parameters.

    Cost:
        `num_probes · num_matvecs` products; memory (num_matvecs + 1)·d.

    References:
        Golub & Meurant (2010), Matrices, Moments and Quadrature; Chen, Trogdon & Ubaru (2021),
        arXiv 2105.06595.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.repeat(jnp.array([1.0, 5.0]), 50))
        >>> density, _ = hj.run(hj.slq(1, 2), A, jax.random.key(0), jnp.zeros(100), max_matvecs=2)
        >>> density.nodes.round(4).tolist()
        [[1.0, 5.0]]
    """
    for name, number in (("num_probes", num_probes), ("num_matvecs", num_matvecs)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")

    def init(key: Key, like: Params) -> SlqState:
        packing = Packing.of(like)
        if num_matvecs > packing.size:
            raise ValueError(
                f"`num_matvecs` must be at most {packing.size}, the number of parameters, got {num_matvecs}."
            )
        first = packing.pack(probe(jax.random.fold_in(key, 0), like))
        space = start(_tree.block_of(first), num_matvecs)
        nothing = jnp.zeros((num_probes, num_matvecs), space.projected.dtype)
        return SlqState(key, space, packing, nothing, nothing, jnp.int32(0))

    def query(state: SlqState) -> Block:
        return state.packing.unpack_block(pending(state.space))

    def update(state: SlqState, products: Block) -> SlqState:
        product = _tree.row(products, 0)
        index = state.num_matvecs // num_matvecs  # the probe that this product belongs to
        space = extend(state.space, state.packing.pack(product))
        count = state.num_matvecs + 1
        state = state._replace(space=space, num_matvecs=count)
        return jax.lax.cond(count % num_matvecs == 0, _next_probe, lambda s, *_: s, state, index, product)

    def _next_probe(state: SlqState, index: Array, like: Params) -> SlqState:
        nodes, vectors = ritz(state.space)
        following = probe(jax.random.fold_in(state.key, index + 1), like)
        return state._replace(
            space=_restart(state.space, state.packing.pack(following)),
            nodes=state.nodes.at[index].set(nodes, mode="drop"),
            weights=state.weights.at[index].set(vectors[0] ** 2, mode="drop"),
        )

    def result(state: SlqState) -> SpectralDensity:
        """Finished probes; while the first is under way, its quadrature so far."""
        finished = state.num_matvecs // num_matvecs
        nodes, vectors = ritz(state.space)
        inside = jnp.arange(num_matvecs) < state.space.size
        first = (finished == 0) & (jnp.arange(num_probes) == 0)[:, None]
        nodes = jnp.where(first, jnp.where(inside, nodes, 0), state.nodes)
        weights = jnp.where(first, jnp.where(inside, vectors[0] ** 2, 0), state.weights)
        under_way = (finished == 0) & (state.num_matvecs > 0)
        return SpectralDensity(
            nodes, weights, jnp.minimum(finished, num_probes) + under_way, state.num_matvecs
        )

    def error(state: SlqState) -> Scalar:
        n = jnp.minimum(state.num_matvecs // num_matvecs, num_probes)
        means = jnp.sum(state.weights * state.nodes, axis=1)
        squares = jnp.sum(
            jnp.where(jnp.arange(num_probes) < n, (means - jnp.sum(means) / jnp.maximum(n, 1)) ** 2, 0)
        )
        return jnp.where(n > 1, jnp.sqrt(squares / jnp.maximum(n * (n - 1), 1)), jnp.inf)

    def scale(state: SlqState) -> Scalar:
        return jnp.max(jnp.abs(state.nodes))

    return Estimator(init, query, update, result, error, scale)


def _restart(space: Krylov, vector: Vector) -> Krylov:
    """The same memory, begun anew from another vector."""
    vector = _tree.scale(1 / _tree.norm(vector), vector)
    basis = krylov.write(space.basis, jnp.int32(0), vector)
    return Krylov(basis, jnp.zeros_like(space.projected), jnp.zeros_like(space.size))


def spectral_density(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 1,
    num_matvecs: int = 80,
    *,
    probe: Probe = gaussian,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> SpectralDensity:
    """The distribution of all eigenvalues of a matvec, by stochastic Lanczos quadrature.

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: number of random start vectors; one is enough for large networks.
        num_matvecs: Lanczos steps for each: the resolution.
        probe: see `slq`.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        A `SpectralDensity`: nodes and weights, and `.curve()`, `.signed_log_curve()`, `.cumulative(grid)`,
        `.moment(power)` computed from them.

    Raises:
        ValueError: a number below 1; `num_matvecs` above the number of parameters.
        NonFiniteProductError: see `run`.

    Cost:
        `num_probes · num_matvecs` products; memory (num_matvecs + 1)·d.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.linspace(0.0, 1.0, 1000))
        >>> density = hj.spectral_density(A, jax.random.key(0), jnp.zeros(1000), num_matvecs=20)
        >>> abs(float(density.moment()) - 0.5) < 0.03
        True
        >>> grid, curve = density.curve()
    """
    return run(
        slq(num_probes, num_matvecs, probe=probe),
        matvec,
        key,
        like,
        max_matvecs=num_probes * num_matvecs,
        callbacks=callbacks,
        on_device=on_device,
    )[0]
