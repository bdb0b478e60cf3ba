"""The exact mean of a matvec over a data set that streams from the host."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from hessjax._core import _tree
from hessjax._core._messages import checked_count, checked_function, shown
from hessjax._core._sharding import UNKNOWN, Layouts
from hessjax._core._sources import Source, check_reiterable
from hessjax._core._types import Forms, Matvec, Vector
from hessjax.curvature._data import weighed
from hessjax.curvature._kept import Kept
from hessjax.curvature._weights import Weights, check_weights


def over_batches(
    make_matvec: Callable[[Any], Matvec],
    batches: Source,
    *,
    weights: Weights | None = None,
    keep_bytes: int | None = None,
) -> Matvec:
    """The mean of `make_matvec(batch)` over a data set, every example counting once, or by its weight.

    Batches weigh by what they hold, Σ_b W_b A_b v / Σ_b W_b with W_b the sum of `weights(batch)`, so the
    result does not depend on how the data is cut, and a short last batch counts for what it holds. (An
    unweighted mean is off by 92 % in Hv with a last batch of 6 in 1030.)

    Args:
        make_matvec: `batch -> matvec` of a loss that is a mean over the batch's examples, by `weights`.
        batches: a source of data that starts afresh for every product: a list, a data loader (Grain's,
            torch's), or a function that opens one (`dataset.as_numpy_iterator`, a generator function).
            Batches are pytrees of any shape; each new shape compiles once. `hj.batches` fills a short last
            one up, and lays batches out over devices.
        weights: `weights(batch) -> array`: how much the batch counts, as one number, or that of each of its
            examples or output positions (a padding mask), to be summed. None: the common length of the
            leading axes. A batch whose weights are zero is passed over.
        keep_bytes: memory for the matvecs of the first batches: as many as fit are made at the first product
            and kept, which pays where they are made with `linearize=True`. If all fit the data is read once;
            else it must come in the same order at every pass. None: nothing is kept.

    Returns:
        A matvec to be called from the host: it passes over the data once for every product. Without
        `keep_bytes` it keeps no batch: while one's product runs the next is read, and never are more than
        these two there. It cannot be traced (`on_device=True` needs a matvec of one batch). What `eigenpairs`
        and `trace` make of it carries the sampling error of the data beside their own: for `trace` the
        batches must then come in the same order every time.

    Raises:
        TypeError: `batches` is no source of data, or can be gone through only once; `weights` is no function;
            at a product, with `keep_bytes`, matvecs that are no pytrees.
        ValueError: `batches` that never end; at a product: no batches, a batch without examples, or one
            whose arrays disagree; weights that are negative, not finite, or zero for all batches;
            batches that come in another order than those kept.

    Cost:
        One product of every batch, one vector (float32 at least) for the sum, and a copy of every batch in
        the host's memory. Of kept, linearized matvecs a Hessian's product takes a sixth less, a Gauss–Newton
        matrix's a quarter; each keeps a batch and the activations of its gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, x):
        ...     return jnp.mean(x) * w**2 / 2
        >>> batches = [jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0])]
        >>> A = hj.over_batches(lambda batch: hj.hessian(loss_fn, jnp.array(1.0), batch), batches)
        >>> float(A(jnp.array(1.0)))
        3.0
    """
    checked_function("make_matvec", make_matvec, "(batch) -> matvec")
    check_reiterable(batches)
    check_weights(weights)
    kept = None if keep_bytes is None else Kept(checked_count("keep_bytes", keep_bytes))
    return _BatchMean(make_matvec, batches, weights, kept)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: batches need not be hashable
class _BatchMean:
    make_matvec: Callable[[Any], Matvec]
    batches: Source
    weights: Weights | None
    kept: Kept | None = dataclasses.field(repr=False)

    def __call__(self, vector: Vector) -> Vector:
        _tree.check_floating(vector, "vector")
        total, count = None, 0.0
        for weight, product in self._products(vector):
            # Weights enter as floats: traced, so that a batch of another size compiles nothing here.
            total = zero(product) if total is None else jax.block_until_ready(total)
            total, count = add(total, weight, product), count + weight
        return divide(total, count, vector)

    def by_batch(self, vector: Vector) -> tuple[Vector, Forms]:
        total, weights, parts = None, [], []
        for weight, product in self._products(vector):
            parts.append(_parts(vector, product))  # a few numbers of each product; the product itself goes
            weights.append(weight)
            total = zero(product) if total is None else jax.block_until_ready(total)
            total = add(total, weight, product)
        forms = Forms(jnp.stack(parts), jnp.asarray(weights, parts[0].dtype))
        return divide(total, sum(weights), vector), forms

    def _products(self, vector: Vector) -> Iterator[tuple[float, Vector]]:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(vector)):
            raise TypeError(
                "a matvec over batches reads its data on the host and cannot be traced: call it outside "
                "`jit`, with `on_device=False`."
            )
        # Whoever adds a product waits for the sum before it, while this one runs: the next batch is then read
        # beside it, and what batches came before are gone. Left alone the host would run ahead, and fill the
        # device with batches.
        batches = weighed(self.batches, self.weights)
        if self.kept is not None:
            yield from self.kept.products(batches, functools.partial(_made, self.make_matvec), vector)
            return
        for weight, batch in batches:
            # A matvec for every batch and product: it is a pytree, its code is compiled once per shape.
            yield weight, _made(self.make_matvec, batch)(vector)


def _made(make_matvec: Callable[[Any], Matvec], batch: Any) -> Matvec:
    matvec = make_matvec(batch)
    if not callable(matvec):
        raise TypeError(
            "`make_matvec` must return a matvec, such as `hessjax.hessian(loss_fn, params, batch)`, got "
            f"{shown(matvec)}."
        )
    return matvec


def zero(vector: Vector) -> Vector:
    """A sum of no vectors, in float32 at least, that lies like this one."""
    return _zero(Layouts.of(vector), vector)


@functools.partial(jax.jit, static_argnums=0)
def _zero(layouts: Layouts, vector: Vector) -> Vector:
    # bfloat16 has 8 bits: a sum of some hundred batches in it would stop growing.
    zeros = _tree.zeros_like(_tree.wide(vector))
    if layouts == UNKNOWN:
        return zeros
    return jax.lax.optimization_barrier((layouts.laid(zeros), vector))[0]  # the vector says on which mesh


@functools.partial(jax.jit, donate_argnums=0)
def add(total: Vector, weight: ArrayLike, product: Vector) -> Vector:
    """`total + weight · product`, in the memory of `total`."""
    return _tree.add_scaled(total, weight, product)


@jax.jit
def _parts(vector: Vector, product: Vector) -> Float[Array, " leaves"]:
    return jnp.stack(_tree.inner_by_leaf(vector, product))


@functools.partial(jax.jit, donate_argnums=0)
def divide(total: Vector, count: ArrayLike, like: Vector) -> Vector:
    """`total / count`, in the dtypes of `like`."""
    return _tree.cast_like(_tree.scale(1.0 / count, total), like)
