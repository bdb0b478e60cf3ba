"""Gradients example by example, and their uncentred covariance, the empirical Fisher."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int

from hessjax._core import _digests, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import check_flags, checked_count
from hessjax._core._sharding import Layouts
from hessjax._core._types import Block, LossFn, Matvec, Params, Vector
from hessjax.curvature._batches import add, divide, zero
from hessjax.curvature._product import (
    as_pytree,
    at_precision,
    check_call,
    check_precision,
    explained,
    sandwich,
    scalar,
)
from hessjax.curvature._weights import (
    Weights,
    by_example,
    num_examples,
    of_each,
    of_examples,
    scaled_rows,
    weighed,
)


def per_example_grads(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    weights: Weights | None = None,
    microbatch: int | None = None,
    precision: str | None = "highest",
) -> Block:
    """The gradient of every example's loss, as a block: leaves with a leading axis of examples.

    gᵢ = ∇ loss_fn(params, args[0][i : i + 1], *args[1:]). The loss sees one example as a batch of one, so
    models that expect a batch axis work as they are. If the loss is a mean over its examples, and none
    depends on the others (as BatchNorm in train mode makes them), the mean of the block is the gradient.
    Where examples count differently, by their tokens say, it is with `weights`: row i is then m wᵢ/Σw · gᵢ.
    (For a Fisher the rows are √(m wᵢ/Σw) gᵢ: `empirical_fisher_roots`.)

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the leading axis of `args[0]`.
        params: pytree of real floating-point arrays.
        *args: first the batch, the one argument that is cut into examples: its arrays share their leading
            axis, and those without axes go to every example. All further arguments (BatchNorm
            statistics, keys) are passed whole: dropout with one key drops alike in all examples.
        weights: `weights(batch) -> array`: how much each example counts in the loss's own mean, (m,), or each
            output position, (m, positions...), a padding mask. None: all alike. An example of weight zero is
            not there: its row is zero, whatever its loss.
        microbatch: the most examples to differentiate at once; None: all. 1 avoids the grouped
            convolutions that gradients of several examples become.
        precision: of matrix products and convolutions, as in `hessian`.

    Returns:
        The block, in the dtypes of the params, in loss per parameter.

    Raises:
        TypeError: `params` has leaves that are not floating point; `loss_fn` does not return a real scalar.
        ValueError: no batch, an empty one, or arrays in it that disagree; `microbatch` below 1; weights of
            another shape, negative, not finite, or all zero. (Inside `jit` such values give NaN.)

    Cost:
        The gradients, and num_examples · d numbers of memory; on several devices each holds of every gradient
        what it holds of the params, and of params that it shares with others only those of its own examples
        (with `microbatch` all). Activations of `microbatch` examples at once.
        The loop is unrolled: under an outer `jit` it compiles once for each microbatch.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ w - y) ** 2) / 2
        >>> batch = jnp.array([[1.0, 0.0], [2.0, 3.0]]), jnp.array([1.0, 0.0])
        >>> hj.per_example_grads(loss_fn, jnp.array([1.0, 1.0]), batch).tolist()
        [[0.0, 0.0], [10.0, 15.0]]
    """
    shares, block = example_grads(loss_fn, params, args, weights, microbatch, precision)
    return block if shares is None else scaled_rows(block, shares.shape[0] * by_example(shares))


def example_grads(
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    weights: Weights | None,
    microbatch: int | None,
    precision: str | None,
) -> tuple[Array | None, Block]:
    """The shares of the examples, and their gradients as they are."""
    microbatch = _checked(loss_fn, params, args, microbatch, precision)
    args, shares, count = of_examples(weights, args)
    return shares, _block(as_pytree(loss_fn), params, args, count, microbatch, precision)


def _block(
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    count: int,
    microbatch: int | None,
    precision: str | None,
) -> Block:
    if microbatch is None or microbatch >= count:
        return _grads(precision, Layouts.of_rows(params, args[0]), loss_fn, params, args)
    # Unrolled on the host: XLA's CPU code for a convolution's gradient is 15 to 45 times slower in a loop.
    layouts = Layouts.of_rows(params)
    block = _empty_block(count, layouts, params)
    for start, size in _cuts(count, microbatch):
        block = _fill(precision, size, layouts, block, start, loss_fn, params, args)
    return block


def empirical_fisher(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    weights: Weights | None = None,
    microbatch: int | None = None,
    linearize: bool = False,
    precision: str | None = "highest",
) -> Matvec:
    """The empirical Fisher v ↦ 1/m Σᵢ gᵢ (gᵢᵀ v), with gᵢ the gradient of example i at its own label.

    With `weights` it is Σ wᵢ gᵢgᵢᵀ / Σ wᵢ: an example of weight 2 counts as if it were there twice. Positive
    semidefinite, of rank m at most. It is not the Fisher information, nor near the Hessian unless the model
    fits its data well (Kunstner et al.): `fisher` draws labels from the model instead.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the leading axis of `args[0]`.
        params: pytree of real floating-point arrays.
        *args: first the batch, which alone is cut into examples: see `per_example_grads`.
        weights: as in `per_example_grads`. An example's positions have one gradient together, their mean.
        microbatch: the most examples to work on at once; None: all.
        linearize: keep the work that does not depend on v, as in `ggn`. Not with `microbatch`.
        precision: as in `hessian`.

    Returns:
        The matvec, a pytree as `hessian`'s is, in squared loss per parameter.

    Raises:
        TypeError: as `per_example_grads`.
        ValueError: as `per_example_grads`; `linearize` with `microbatch`; at a product, `vector` is not
            like `params`.

    Cost:
        A product is 5/3 gradients, 4/3 when linearized, by operation count, and no gradient is ever kept:
        memory as for a gradient of `microbatch` examples.

    References:
        Kunstner et al. (2019), Limitations of the empirical Fisher approximation, arXiv 1905.12558.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ w - y) ** 2) / 2
        >>> batch = jnp.array([[1.0, 0.0], [2.0, 3.0]]), jnp.array([1.0, 0.0])
        >>> A = hj.empirical_fisher(loss_fn, jnp.array([1.0, 1.0]), batch)  # gradients (0, 0), (10, 15)
        >>> A(jnp.array([1.0, 0.0])).tolist()
        [50.0, 75.0]
    """
    microbatch = _checked(loss_fn, params, args, microbatch, precision)
    check_flags(linearize=linearize)
    args, shares, _ = of_examples(weights, args)
    loss_fn = as_pytree(loss_fn)
    if microbatch is None:
        # 1/m Σ gᵢgᵢᵀ = Jᵀ(I/m)J with J the Jacobian of the per-example losses: the same product as the GGN's,
        # and no gradient is ever formed.
        mean = _mean_of(shares)
        return sandwich(Partial(_losses, loss_fn), mean, params, args, linearize, precision, "loss_fn")
    if linearize:
        raise ValueError(
            f"`microbatch` must be None with `linearize=True`, which keeps all activations, got {microbatch}."
        )
    shares = None if shares is None else by_example(shares)
    return Partial(_ProductInParts(microbatch, precision), loss_fn, params, args, shares)


def _checked(loss_fn: Any, params: Any, args: tuple[Any, ...], microbatch: Any, precision: Any) -> int | None:
    """The microbatch, all arguments being what they must be."""
    _tree.check_floating(params)
    if args:  # else `num_examples` says what is missing
        check_call("loss_fn", loss_fn, args)
        _digests.check_alike(params, args)
    check_precision(precision)
    return None if microbatch is None else checked_count("microbatch", microbatch)


def _cuts(count: int, microbatch: int) -> list[tuple[int, int]]:
    """(start, size) of every microbatch; the last may be short."""
    return [(start, min(microbatch, count - start)) for start in range(0, count, microbatch)]


def _cut(args: tuple[Any, ...], start: ArrayLike, size: int) -> tuple[Any, ...]:
    """The arguments with `size` examples of the batch."""

    def leaf(x: Array) -> Array:
        # The start is traced, the size is not: one program for all full microbatches, one for a short last.
        return jax.lax.dynamic_slice_in_dim(x, start, size) if jnp.ndim(x) else x

    return jax.tree.map(leaf, args[0]), *args[1:]


# -- gradients -----------------------------------------------------------------------------------


@explained("loss_fn")
@compiled(static_argnums=(0, 1))
def _grads(
    precision: str | None, layouts: Layouts, loss_fn: LossFn, params: Params, args: tuple[Any, ...]
) -> Block:
    with at_precision(precision):
        return layouts.laid(of_each(lambda example: jax.grad(scalar(loss_fn, example))(params), args))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_block(count: int, layouts: Layouts, params: Params) -> Block:
    # Of the params, for `jit` drops arguments without use, and knows by them on which devices it is.
    zeros = jax.tree.map(lambda x: jnp.where(False, x, jnp.zeros_like(x)), params)
    return layouts.laid(jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), zeros))


@compiled(static_argnums=(0, 1, 2), donate_argnums=3)
def _fill(
    precision: str | None,
    size: int,
    layouts: Layouts,
    block: Block,
    start: Int[Array, ""],
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
) -> Block:
    """The block with the gradients of `size` examples in their rows, in the memory of the block."""
    rows = jax.tree.leaves(_grads(precision, layouts, loss_fn, params, _cut(args, start, size)))
    leaves, structure = jax.tree.flatten(block)  # jax holds two dataclasses of as many fields for one type
    filled = [
        jax.lax.dynamic_update_slice_in_dim(x, new, start, 0) for x, new in zip(leaves, rows, strict=True)
    ]
    return jax.tree.unflatten(structure, filled)


# -- products ------------------------------------------------------------------------------------


def _losses(loss_fn: LossFn, params: Params, *args: Any) -> Float[Array, " m"]:
    return of_each(lambda example: scalar(loss_fn, example)(params), args)


def _mean_of(shares: Array | None) -> Partial:
    return Partial(_mean) if shares is None else Partial(_weighted_mean, by_example(shares))


def _mean(losses: Float[Array, " m"], _args: Any) -> Partial:
    return Partial(_divided, 1.0 / len(losses))


def _divided(factor: float | Float[Array, ""], tangents: Float[Array, " m"]) -> Float[Array, " m"]:
    return factor * tangents


def _weighted_mean(shares: Float[Array, " m"], _losses: Any, _args: Any) -> Partial:
    return Partial(weighed, shares)


@dataclasses.dataclass(frozen=True)
class _ProductInParts:
    """A product one microbatch after the other, each a compiled call: see `hessjax.run` on CPU loops."""

    microbatch: int
    precision: str | None

    def __call__(
        self,
        loss_fn: LossFn,
        params: Params,
        args: tuple[Any, ...],
        shares: Float[Array, " m"] | None,
        vector: Vector,
    ) -> Vector:
        _tree.check_vector(vector, params)
        count = num_examples(args)
        total = zero(params)  # float32 at least, narrowed once at the end
        for start, size in _cuts(count, self.microbatch):
            total = _add_part(self.precision, size, total, start, loss_fn, params, args, shares, vector)
        return divide(total, count if shares is None else 1.0, params)


@compiled(static_argnums=(0, 1), donate_argnums=2)
def _add_part(
    precision: str | None,
    size: int,
    total: Vector,
    start: Int[Array, ""],
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, " m"] | None,
    vector: Vector,
) -> Vector:
    batch, shares = _cut(((args[0], shares),), start, size)[0]
    losses, examples = Partial(_losses, loss_fn), (batch, *args[1:])
    product = sandwich(losses, _mean_of(shares), params, examples, False, precision, "loss_fn")(vector)
    # Without weights a mean over each part, so that parts count by their size; shares are of the whole.
    return add(total, float(size) if shares is None else 1.0, product)
