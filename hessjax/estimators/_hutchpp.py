"""Hutch++: the large part of the trace from a sketch of the range, exactly; the rest by Hutchinson."""

import dataclasses
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _sharding, _tree
from hessjax._core._messages import checked_count
from hessjax._core._packing import Packed, Packing
from hessjax._core._results import Estimate
from hessjax._core._types import Block, Key, Params, Scalar, assign, settings
from hessjax._run._estimator import Estimator
from hessjax.estimators import _basis
from hessjax.estimators._moments import Moments, estimate, no_samples, push, stopping_error
from hessjax.estimators._samples import check_probe, drawn, when
from hessjax.estimators.probes import Probe, rademacher


class HutchppState(NamedTuple):
    """A basis of the range, the trace on it, and samples of the rest.

    Attributes:
        key: random key; the probe of product i uses `fold_in(key, i)`.
        vector: to be multiplied next: a probe, then a row of the basis, then a probe outside its span.
        basis: the rows of Qᵀ; a product inside the span of those before it leaves a row of zeros.
        largest: the largest norm of a product that went into the basis.
        captured: tr QᵀAQ so far.
        samples: moments of what the rest of the trace was sampled as.
        num_matvecs: products so far.
        packing: how the vectors are packed.
    """

    key: Key
    vector: Packed
    basis: _basis.Basis
    largest: Float[Array, ""]
    captured: Float[Array, ""]
    samples: Moments
    num_matvecs: Int[Array, ""]
    packing: Packing


@settings()
class Hutchpp(Estimator):
    """Hutch++, as an estimator of the trace: a third of the products finds where A is large.

    With Q an orthonormal basis of A·(k probes), k = `num_matvecs // 3`, and P = I − QQᵀ,

        tr A = tr QᵀAQ + tr PAP,

    the first by k products exactly, the second as the mean of vᵀPAPv over the products left. The error
    is about that of `hutchinson` for A without its k largest eigenvalues. `xtrace` makes more of as many
    products; this needs a third of its memory, and products beyond `num_matvecs` are samples more.

    Where there are no more parameters than products, as many unit vectors are multiplied instead: their
    forms are A's diagonal, and the trace is exact.

    Args:
        num_matvecs: the products to divide into three.
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.

    Returns:
        An `Estimator` with result `Estimate` (units of A's diagonal) and error its `stderr`, that of the
        sampled part, widened as `hutchinson` says (infinite before 20 samples for a run that is to stop on
        it): ±2 of it held the trace in 92 to 98 % of runs, from 4 samples on. Before the first
        sample there is no estimate: NaN.

    Raises:
        ValueError: `num_matvecs` below 3, or, when it meets the params, above three times their number.

    Cost:
        One product a step; 4·j·d operations for the j-th row of the basis and 4·k·d for a sample; memory
        (num_matvecs/3 + 5)·d.

    References:
        Meyer, Musco, Musco & Woodruff (2021), Hutch++: optimal stochastic trace estimation,
        arXiv 2010.09649, algorithm 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.where(jnp.arange(100) < 5, 1.0, 0.0))
        >>> estimate, _ = hj.run(hj.estimators.hutchpp(30), A, jax.random.key(0), jnp.zeros(100),
        ...                                                                                 max_matvecs=30)
        >>> round(float(estimate.mean), 4)
        5.0
    """

    num_matvecs: int = 100
    _: dataclasses.KW_ONLY
    probe: Probe = rademacher

    def __post_init__(self) -> None:
        assign(self, num_matvecs=checked_count("num_matvecs", self.num_matvecs, 3))
        check_probe(self.probe)

    @property
    def rank(self) -> int:
        """k, the number of probes that the basis is made of."""
        return self.num_matvecs // 3

    def init(self, key: Key, like: Params) -> HutchppState:
        """The first probe, and an empty basis."""
        packing = Packing.of(like)
        _check_size(self.num_matvecs, packing.size)
        vector = packing.pack(drawn(self.probe, jax.random.fold_in(key, 0), like))
        zero = jnp.zeros((), _tree.accumulator_dtype(like))
        if self._is_enough(packing):
            return HutchppState(
                key, _axis(vector, 0), (), zero, zero, no_samples(zero), jnp.int32(0), packing
            )
        basis = _basis.allocate(vector, self.rank, packing.packed_layouts)
        return HutchppState(key, vector, basis, zero, zero, no_samples(zero), jnp.int32(0), packing)

    def _is_enough(self, packing: Packing) -> bool:
        """Whether there is a product for every parameter."""
        return packing.size <= self.num_matvecs

    def query(self, state: HutchppState) -> Block:
        """A probe, a row of the basis, or a probe outside its span."""
        return jax.tree.map(lambda x: x[None], state.packing.unpack(state.vector))

    def update(self, state: HutchppState, products: Block) -> HutchppState:
        """By its place a product gives a row of the basis, a share of tr QᵀAQ, or a sample of the rest."""
        product, i = state.packing.pack(_tree.row(products, 0)), state.num_matvecs
        form = _tree.inner(state.vector, product)
        if self._is_enough(state.packing):
            captured = state.captured + jnp.where(i < state.packing.size, form, 0)
            return state._replace(captured=captured, num_matvecs=i + 1, vector=_axis(product, i + 1))
        state = when(i < self.rank, _sketch, state, product)
        # vᵀAv is vᵀPAPv already: v was projected before it was multiplied (algorithm 1, line 4).
        samples = when(i >= 2 * self.rank, push, state.samples, form)
        captured = state.captured + jnp.where((i >= self.rank) & (i < 2 * self.rank), form, 0)
        state = state._replace(captured=captured, samples=samples, num_matvecs=i + 1)
        return state._replace(vector=self._next_vector(state, product))

    def _next_vector(self, state: HutchppState, like: Packed) -> Packed:
        i, rank = state.num_matvecs, self.rank

        def fresh() -> Packed:
            probe = self.probe(jax.random.fold_in(state.key, i), state.packing.unpack(like))
            # While the basis grows its probes must not depend on it: they are projected onto nothing.
            return _basis.project_out(state.basis, jnp.where(i < rank, 0, rank), state.packing.pack(probe))[0]

        def row() -> Packed:
            return _basis.read(state.basis, i - rank)

        return jax.lax.cond((i >= rank) & (i < 2 * rank), row, fresh)

    def result(self, state: HutchppState) -> Estimate:
        """The trace on the basis and the mean of the rest."""
        rest = estimate(self._samples(state))
        mean = _numbers.or_nan(rest.num_samples > 0, state.captured + state.samples.mean)
        return rest._replace(mean=mean)

    def _samples(self, state: HutchppState) -> Moments:
        """Of the rest; so many samples of 0 once every axis was multiplied."""
        if not self._is_enough(state.packing):
            return state.samples
        count = state.num_matvecs
        return state.samples._replace(num_samples=jnp.where(count >= state.packing.size, count, 0))

    def error(self, state: HutchppState) -> Scalar:
        """The standard error of the rest."""
        rest = estimate(self._samples(state))
        if self._is_enough(state.packing):
            return rest.stderr
        return stopping_error(rest.stderr, rest.num_samples)

    def scale(self, state: HutchppState) -> Scalar:
        """The absolute value of the trace."""
        return jnp.abs(state.captured + state.samples.mean)


hutchpp = Hutchpp


def _axis(like: Packed, index: Int[Array, ""] | int) -> Packed:
    """The unit vector of one parameter; zero from the last on."""
    starts = accumulate((x.size for x in like), initial=0)
    places = [_sharding.places(x, start) for x, start in zip(like, starts, strict=False)]
    at = jnp.asarray(index, jnp.uint32)
    return tuple((place == at).astype(x.dtype) for place, x in zip(places, like, strict=True))


def _check_size(num_matvecs: int, dimension: int) -> None:
    if num_matvecs > 3 * dimension:
        raise ValueError(
            f"`num_matvecs` must be at most {3 * dimension}, three times the number of parameters, got "
            f"{num_matvecs}."
        )


def _sketch(state: HutchppState, product: Packed) -> HutchppState:
    """The product of a probe: a row of the basis, or of zeros if the rows before it span it."""
    # Judged against the largest product so far: a small one is not noise by itself, but beside a large one.
    largest = jnp.maximum(state.largest, _tree.norm(product))
    tiny = 64 * jnp.finfo(largest.dtype).eps * largest
    row, _, left = _basis.orthogonalise(state.basis, state.num_matvecs, product, tiny)
    # A row of zeros takes no part in any projection, and its product is zero: tr QᵀAQ stays exact.
    basis = _basis.write(state.basis, state.num_matvecs, _tree.scale(left > 0, row))
    return state._replace(basis=basis, largest=largest)
