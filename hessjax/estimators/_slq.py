"""Stochastic Lanczos quadrature: the density of all eigenvalues from a few Lanczos runs."""

import dataclasses
import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hessjax._core import _tree
from hessjax._core._messages import check_flags, checked_count
from hessjax._core._packing import Packing
from hessjax._core._types import Block, Key, Matvec, Params, Scalar, assign, readable_defaults, settings
from hessjax._run._arguments import RunOptions, checked_options
from hessjax._run._drivers import run
from hessjax._run._estimator import Estimator
from hessjax.estimators._density import SpectralDensity
from hessjax.estimators._moments import estimate, moments_of
from hessjax.estimators._quadrature import Quadrature, Recurrence, with_basis, without_basis
from hessjax.estimators._samples import check_probe, drawn, when
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


@settings(arrays=("leaf",))
class Slq(Estimator):
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
        leaf: index, in the order of `jax.tree.leaves`, of the only leaf whose diagonal block is looked at: an
            integer array, so that all leaves share compiled code. None for the whole matrix.
        stacks: of every leaf the axes that count layers, from the back; then `leaf` counts layers, one after
            the other, of which a leaf that stacks none is one.

    Returns:
        An `Estimator` with result `SpectralDensity` and error the standard error of the mean eigenvalue
        over the finished probes (infinite before the second).

    Raises:
        ValueError: a number below 1; `at_once` does not fit; `num_matvecs` above the number of parameters.

    Cost:
        `num_probes · num_matvecs` products; memory (num_matvecs + 6)·d, or 6·at_once·d without
        reorthogonalisation, of which the state is 2·at_once·d.

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

    init_only = ("leaf",)
    less_memory = "`reorthogonalise=False`, which keeps two vectors instead of a basis"

    num_probes: int = 1
    num_matvecs: int = 80
    _: dataclasses.KW_ONLY
    probe: Probe = gaussian
    reorthogonalise: bool = True
    at_once: int = 1
    leaf: Int[Array, ""] | None = None
    stacks: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_probes", "num_matvecs", "at_once"):
            assign(self, **{name: checked_count(name, getattr(self, name))})
        check_probe(self.probe)
        check_flags(reorthogonalise=self.reorthogonalise)
        if self.num_probes % self.at_once:
            raise ValueError(f"`at_once` must divide `num_probes`, {self.num_probes}, got {self.at_once}.")
        if self.at_once > 1 and self.reorthogonalise:
            raise ValueError(
                f"`at_once` must be 1 where every probe keeps a basis, got {self.at_once}: pass "
                "`reorthogonalise=False`."
            )

    @property
    def _recurrence(self) -> Recurrence:
        return with_basis if self.reorthogonalise else without_basis

    def init(self, key: Key, like: Params) -> SlqState:
        """The recurrences of the first probes, begun."""
        packing = Packing.of(like)
        if self.num_matvecs > packing.size:
            raise ValueError(
                f"`num_matvecs` must be at most {packing.size}, the number of parameters, got "
                f"{self.num_matvecs}."
            )
        # As floats: a network may have more parameters than an int32 can count.
        sizes = np.array([math.prod(shape) for shape in packing.shapes])
        if self.stacks:
            pairs = zip(packing.shapes, self.stacks, strict=True)
            numbers = [math.prod(shape[i] for i in axes) for shape, axes in pairs]
            sizes = np.repeat(sizes // np.maximum(numbers, 1), numbers)
        dtype, leaf = _tree.accumulator_dtype(like), self.leaf
        dimension = jnp.asarray(sizes.sum() if leaf is None else jnp.asarray(sizes, dtype)[leaf], dtype)
        # With a leaf chosen all vectors are zero elsewhere, and A_ll is met without a program of its own.
        space = self._recurrence.start(
            self._draw(key, packing, 0, like, leaf), self.num_matvecs, packing.packed_layouts
        )
        nothing = jnp.zeros((self.num_probes, self.num_matvecs), dtype)
        return SlqState(key, space, packing, nothing, nothing, jnp.int32(0), leaf, dimension)

    def _draw(
        self, key: Key, packing: Packing, group: Any, like: Params, leaf: Int[Array, ""] | None
    ) -> Block:
        """The group's probes, one after the other: whoever draws, the numbers are the same."""
        indices = group * self.at_once + jnp.arange(self.at_once, dtype=jnp.int32)
        return jax.lax.map(
            lambda i: packing.pack(
                _within(leaf, self.stacks, drawn(self.probe, jax.random.fold_in(key, i), like))
            ),
            indices,
        )

    def query(self, state: SlqState) -> Block:
        """The vectors of the recurrences under way."""
        return _within(
            state.leaf, self.stacks, state.packing.unpack_block(self._recurrence.rows(state.space))
        )

    def update(self, state: SlqState, products: Block) -> SlqState:
        """A step of the recurrences; the last one stores their quadratures and begins the next probes."""
        # P_l A P_l v: the query was masked, and so is the product.
        packed = jax.vmap(state.packing.pack)(_within(state.leaf, self.stacks, products))
        group = state.num_matvecs // (self.at_once * self.num_matvecs)  # the one that these belong to
        count = state.num_matvecs + self.at_once
        state = state._replace(space=self._recurrence.extend(state.space, packed), num_matvecs=count)
        full = (count % (self.at_once * self.num_matvecs) == 0) & (group < self.num_probes // self.at_once)
        return when(full, self._next_group, state, group)

    def _next_group(self, state: SlqState, group: Int[Array, ""]) -> SlqState:
        state = _store(state, group * self.at_once, self._recurrence.quadrature(state.space))
        like = state.packing.unpack(state.packing.zeros())
        vectors = self._draw(state.key, state.packing, group + 1, like, state.leaf)
        return state._replace(space=self._recurrence.restart(state.space, vectors))

    def _num_finished(self, state: SlqState) -> Int[Array, ""]:
        return jnp.minimum(
            state.num_matvecs // self.num_matvecs // self.at_once * self.at_once, self.num_probes
        )

    def result(self, state: SlqState) -> SpectralDensity:
        """Finished probes; while the first are under way, their quadrature so far."""
        finished = self._num_finished(state)
        # An unfinished probe would enter with fewer nodes: it counts only while there is no other.
        begun = (finished == 0) & (state.num_matvecs > 0)
        so_far = _store(state, 0, self._recurrence.quadrature(state.space))
        nodes, weights = (
            jnp.where(begun, *pair) for pair in ((so_far.nodes, state.nodes), (so_far.weights, state.weights))
        )
        num = finished + self.at_once * jnp.int32(begun)
        return SpectralDensity(nodes, weights, num, state.num_matvecs, state.dimension)

    def error(self, state: SlqState) -> Scalar:
        """The standard error of the mean eigenvalue over the finished probes."""
        n = self._num_finished(state)
        means = jnp.sum(state.weights * state.nodes, axis=1)
        finished = jnp.arange(self.num_probes, dtype=jnp.int32) < n
        return estimate(moments_of(means, finished, n)).stderr

    def scale(self, state: SlqState) -> Scalar:
        """The largest absolute node."""
        return jnp.max(jnp.abs(state.nodes))


slq = Slq


def _within(leaf: Int[Array, ""] | None, stacks: tuple[tuple[int, ...], ...], tree: Any) -> Any:
    """A vector or block with zeros in all leaves, or layers, but this one."""
    if leaf is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    first, kept = 0, []
    for x, axes in zip(leaves, stacks or ((),) * len(leaves), strict=True):
        numbers = _numbers(x, axes)
        kept.append(jnp.where(first + numbers == leaf, x, 0))
        first += numbers.size
    return jax.tree.unflatten(structure, kept)


def _numbers(x: Array, axes: tuple[int, ...]) -> np.ndarray:
    """The number of the layer of every entry, in a shape that fits the leaf."""
    counts = [x.shape[axis] for axis in axes]
    numbers = np.arange(math.prod(counts), dtype=np.int32).reshape(counts)
    places = [axis % x.ndim for axis in axes]
    # In front of a block's vectors, or of nothing, the axes are the same from the back.
    return np.expand_dims(numbers, tuple(i for i in range(x.ndim) if i not in places))


def _store(state: SlqState, first: Any, quadrature: Quadrature) -> SlqState:
    where = first + jnp.arange(len(quadrature.nodes), dtype=jnp.int32)
    return state._replace(
        # Dropped past the end: more products than asked for change nothing.
        nodes=state.nodes.at[where].set(quadrature.nodes, mode="drop"),
        weights=state.weights.at[where].set(quadrature.weights, mode="drop"),
    )


@readable_defaults
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
    **options: Unpack[RunOptions],
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
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        A `SpectralDensity`: nodes and weights; computed from them `.curve()`, `.signed_log_curve()`,
        `.cumulative(grid)` with `.bounds(grid)`, and `.moment(power)`, `.trace_of(function)`,
        `.log_determinant(damping)`, `.schatten_norm(p)`, `.effective_dimension(damping)`.

    Raises:
        ValueError: see `slq`.
        NonFiniteProductError: see `run`.

    Cost:
        `num_probes · num_matvecs` products; memory (num_matvecs + 6)·d, or 6·at_once·d without
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
    checked = checked_options("spectral_density", options)
    method = slq(num_probes, num_matvecs, probe=probe, reorthogonalise=reorthogonalise, at_once=at_once)
    return run(method, matvec, key, like, max_matvecs=num_probes * num_matvecs, **checked)[0]
