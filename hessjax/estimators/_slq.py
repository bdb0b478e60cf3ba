"""Stochastic Lanczos quadrature: the density of all eigenvalues from a few Lanczos runs."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hessjax._core import _tree
from hessjax._core._messages import checked_count
from hessjax._core._packing import Packing
from hessjax._core._types import Block, Estimator, Key, Matvec, Params, Scalar
from hessjax._run._drivers import Callback
from hessjax._run._estimator import run
from hessjax.estimators._density import SpectralDensity
from hessjax.estimators._quadrature import Quadrature, with_basis, without_basis
from hessjax.estimators.probes import Probe, gaussian


class SlqState(NamedTuple):
    """The Lanczos recurrences under way, and the quadratures of the probes before.

    Attributes:
        key: random key; probe i is drawn with `fold_in(key, i)`.
        space: of the recurrence.
        packing: of the vectors.
        nodes: (probes, m) of the finished probes, zero for the others.
        weights: (probes, m) likewise.
        num_matvecs: products so far.
        leaf: index of the only leaf whose block is looked at; None for the whole matrix.
        dimension: number of parameters of that.
    """

    key: Key
    space: Any
    packing: Packing
    nodes: Float[Array, "probes m"]
    weights: Float[Array, "probes m"]
    num_matvecs: Int[Array, ""]
    leaf: Int[Array, ""] | None
    dimension: Float[Array, ""]


@functools.lru_cache(maxsize=64)
def slq(
    num_probes: int = 1,
    num_matvecs: int = 80,
    *,
    probe: Probe = gaussian,
    reorthogonalise: bool = True,
    at_once: int = 1,
) -> Estimator:
    """Stochastic Lanczos quadrature, as an estimator of the spectral density.

    Every probe is the start of a Lanczos run of `num_matvecs` steps; the Ritz values with the squared first
    components of T's eigenvectors are the Gauss quadrature of the spectrum as the probe sees it. For large
    d one probe is enough.

    Args:
        num_probes: number of random start vectors.
        num_matvecs: Lanczos steps for each: the resolution.
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.
        reorthogonalise: keep all rows of the basis and make each new one orthogonal to them. Without, two
            vectors are all there is, and rounding brings copies of converged Ritz values. Copies share the
            weight of the one: the density, its moments and its sums stay right (Greenbaum 1989), the number
            of nodes says nothing.
        at_once: probes whose vectors are multiplied together, as one block. It must divide `num_probes`,
            and needs `reorthogonalise=False`: more than one basis is too much memory, and the work on
            filled rows alone cannot be shared by several.

    Returns:
        An `Estimator` with result `SpectralDensity` and error the standard error of the mean eigenvalue
        over the finished probes (infinite before the second).

    Raises:
        ValueError: a number below 1; `at_once` does not fit; `num_matvecs` above the number of parameters.

    Cost:
        `num_probes · num_matvecs` products; memory (num_matvecs + 1)·d, or 2·at_once·d without
        reorthogonalisation, besides the vectors multiplied and their products.

    References:
        Golub & Meurant (2010), Matrices, Moments and Quadrature; Chen, Trogdon & Ubaru (2021),
        arXiv 2105.06595.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.repeat(jnp.array([1.0, 5.0]), 50))
        >>> density, _ = hj.run(hj.estimators.slq(1, 2), A, jax.random.key(0), jnp.zeros(100), max_matvecs=2)
        >>> density.nodes.round(4).tolist()
        [[1.0, 5.0]]
    """
    _check(num_probes, num_matvecs, reorthogonalise, at_once)
    recurrence = with_basis if reorthogonalise else without_basis
    num_groups = num_probes // at_once

    def init(key: Key, like: Params, leaf: Array | None = None) -> SlqState:
        packing = Packing.of(like)
        if num_matvecs > packing.size:
            raise ValueError(
                f"`num_matvecs` must be at most {packing.size}, the number of parameters, got {num_matvecs}."
            )
        sizes = np.array([np.prod(shape) for shape in packing.shapes])
        dtype = _tree.accumulator_dtype(like)
        dimension = jnp.asarray(sizes.sum() if leaf is None else jnp.asarray(sizes, dtype)[leaf], dtype)
        space = recurrence.start(draw(key, packing, 0, like, leaf), num_matvecs)
        nothing = jnp.zeros((num_probes, num_matvecs), dtype)
        return SlqState(key, space, packing, nothing, nothing, jnp.int32(0), leaf, dimension)

    def draw(key: Key, packing: Packing, group: Any, like: Params, leaf: Array | None) -> Block:
        """The group's probes, one after the other: whoever draws, the numbers are the same."""
        indices = group * at_once + jnp.arange(at_once)
        return jax.lax.map(
            lambda i: packing.pack(_within(leaf, probe(jax.random.fold_in(key, i), like))), indices
        )

    def query(state: SlqState) -> Block:
        return _within(state.leaf, state.packing.unpack_block(recurrence.rows(state.space)))

    def update(state: SlqState, products: Block) -> SlqState:
        packed = jax.vmap(state.packing.pack)(_within(state.leaf, products))
        group = state.num_matvecs // (at_once * num_matvecs)  # the one that these products belong to
        count = state.num_matvecs + at_once
        state = state._replace(space=recurrence.extend(state.space, packed), num_matvecs=count)
        full = (count % (at_once * num_matvecs) == 0) & (group < num_groups)

        def finish(loop: tuple[SlqState, Array]) -> tuple[SlqState, Array]:
            state, _ = loop
            state = _store(state, group * at_once, recurrence.quadrature(state.space))
            vectors = draw(state.key, state.packing, group + 1, _tree.row(products, 0), state.leaf)
            return state._replace(space=recurrence.restart(state.space, vectors)), jnp.asarray(False)

        # A `cond` would copy the space at every step, taken or not; a loop only when it is entered.
        return jax.lax.while_loop(lambda loop: loop[1], finish, (state, full))[0]

    def result(state: SlqState) -> SpectralDensity:
        """Finished probes; while the first are under way, their quadrature so far."""
        finished = jnp.minimum(state.num_matvecs // num_matvecs // at_once * at_once, num_probes)
        begun = (finished == 0) & (state.num_matvecs > 0)
        so_far = _store(state, 0, recurrence.quadrature(state.space))
        nodes, weights = (
            jnp.where(begun, *pair) for pair in ((so_far.nodes, state.nodes), (so_far.weights, state.weights))
        )
        num = finished + at_once * begun
        return SpectralDensity(nodes, weights, num, state.num_matvecs, state.dimension)

    def error(state: SlqState) -> Scalar:
        n = jnp.minimum(state.num_matvecs // num_matvecs // at_once * at_once, num_probes)
        means = jnp.sum(state.weights * state.nodes, axis=1)
        squares = jnp.sum(
            jnp.where(jnp.arange(num_probes) < n, (means - jnp.sum(means) / jnp.maximum(n, 1)) ** 2, 0)
        )
        return jnp.where(n > 1, jnp.sqrt(squares / jnp.maximum(n * (n - 1), 1)), jnp.inf)

    def scale(state: SlqState) -> Scalar:
        return jnp.max(jnp.abs(state.nodes))

    return Estimator(init, query, update, result, error, scale)


def _check(num_probes: int, num_matvecs: int, reorthogonalise: bool, at_once: int) -> None:
    numbers = (("num_probes", num_probes), ("num_matvecs", num_matvecs), ("at_once", at_once))
    for name, number in numbers:
        checked_count(name, number)
    if num_probes % at_once:
        raise ValueError(f"`at_once` must divide `num_probes`, {num_probes}, got {at_once}.")
    if at_once > 1 and reorthogonalise:
        raise ValueError(
            f"`at_once` must be 1 where every probe keeps a basis, got {at_once}: pass "
            "`reorthogonalise=False`."
        )


def _within(leaf: Array | None, tree: Any) -> Any:
    """A vector or block with zeros in all leaves but this one."""
    if leaf is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.where(i == leaf, x, 0) for i, x in enumerate(leaves)])


def _store(state: SlqState, first: Any, quadrature: Quadrature) -> SlqState:
    where = first + jnp.arange(len(quadrature.nodes))
    return state._replace(
        nodes=state.nodes.at[where].set(quadrature.nodes, mode="drop"),
        weights=state.weights.at[where].set(quadrature.weights, mode="drop"),
    )


def spectral_density(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 1,
    num_matvecs: int = 80,
    *,
    probe: Probe = gaussian,
    reorthogonalise: bool = True,
    at_once: int = 1,
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
        reorthogonalise: see `slq`: without, memory for two vectors is enough.
        at_once: see `slq`.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        A `SpectralDensity`: nodes and weights; computed from them `.curve()`, `.signed_log_curve()`,
        `.cumulative(grid)` with `.bounds(grid)`, and `.moment(power)`, `.trace_of(function)`,
        `.log_determinant(damping)`, `.schatten_norm(p)`, `.effective_dimension(damping)`.

    Raises:
        ValueError: see `slq`.
        NonFiniteProductError: see `run`.

    Cost:
        `num_probes · num_matvecs` products; memory (num_matvecs + 1)·d, or 2·at_once·d without
        reorthogonalisation.

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
        slq(num_probes, num_matvecs, probe=probe, reorthogonalise=reorthogonalise, at_once=at_once),
        matvec,
        key,
        like,
        max_matvecs=num_probes * num_matvecs,
        callbacks=callbacks,
        on_device=on_device,
    )[0]
