"""Vectors r with 1/m Σ rrᵀ = GGN or Fisher: what an inverse Fisher is built from, beside gradients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core import _digests, _reshaping, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_any_key, checked_count, checked_number
from hessjax._core._sharding import Layouts
from hessjax._core._types import Block, Key, LossFn, ModelFn, Params
from hessjax.curvature import likelihoods
from hessjax.curvature._ggn import check_likelihood
from hessjax.curvature._gradients import example_grads
from hessjax.curvature._product import as_pytree, at_precision, check_call, check_precision, explained
from hessjax.curvature._weights import (
    Weights,
    by_example,
    by_position,
    of_each,
    of_examples,
    present,
    scaled_rows,
)
from hessjax.curvature.likelihoods import Likelihood


def ggn_roots(
    model_fn: ModelFn,
    params: Params,
    *args: Any,
    likelihood: Likelihood = likelihoods.categorical,
    weights: Weights | None = None,
    temperature: float | int | Float[Array, ""] = 1.0,
    precision: str | None = "highest",
) -> Block:
    """Exact square roots of the Fisher, which is also the GGN of the likelihood: 1/m Σ rrᵀ = 1/n Σ JᵀHJ.

    H is the Fisher information of an example's outputs, H = SSᵀ; the block holds √c · JᵀS, column by
    column, for c outputs. With a `temperature` T it is taken at outputs/T, the Jacobian where it is: for
    classes that evens out the probabilities of a model that fits its data, whose curvature otherwise
    vanishes (4 served pruning best). With `weights` the mean is Σ wᵢ JᵀHJ / Σ wᵢ: a row is √(c·n·w/Σw) · JᵀS,
    zero where the weight is, and 1/m Σ rrᵀ over all m rows is that mean.

    Args:
        model_fn: `model_fn(params, *args) -> outputs`, one array; the last axis is that of `likelihood`, all
            others count as examples. It sees one example as a batch of one, as in `per_example_grads`.
        params: pytree of real floating-point arrays.
        *args: first the batch, which alone is cut into examples: see `per_example_grads`.
        likelihood: what the outputs mean, as in `fisher`.
        weights: `weights(batch) -> array`, as in `fisher`: for each example, or each output position.
        temperature: T, positive.
        precision: of matrix products and convolutions, as in `hessian`.

    Returns:
        The block, n·c vectors for n examples, in log-likelihood (nats) per parameter, example by example.

    Raises:
        TypeError: `params` has leaves that are not floating point; the outputs are not one array.
        ValueError: no batch, an empty one, or arrays in it that disagree; `temperature` is not positive and
            finite; weights of another shape, negative, not finite, or all zero.

    Cost:
        A forward pass and c backward passes for each example, an eigendecomposition of c × c for each, and
        n·c·d numbers of memory: take a batch at a time, a generator of blocks is a stream for
        `inverse_fisher`.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.zeros((1, 2)), jnp.array([[2.0]])
        >>> roots = hj.ggn_roots(model_fn, w, x)[:, 0]
        >>> (abs(roots.T @ roots) / 2).round(4).tolist()  # 4·(diag(p) − ppᵀ), up to signs
        [[1.0, 1.0], [1.0, 1.0]]
    """
    _check(model_fn, params, args, likelihood, precision)
    checked_number("temperature", temperature)
    args, shares, _ = of_examples(weights, args)
    if not isinstance(temperature, jax.core.Tracer) and not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
    information = as_pytree(likelihood.information)
    layouts = Layouts.of_rows(params, args[0])
    return _ggn_roots(precision, layouts, as_pytree(model_fn), information, params, args, shares, temperature)


def sampled_grads(
    model_fn: ModelFn,
    params: Params,
    *args: Any,
    key: Key,
    likelihood: Likelihood = likelihoods.categorical,
    weights: Weights | None = None,
    num_samples: int = 1,
    precision: str | None = "highest",
) -> Block:
    """Gradients of the log-likelihood at labels drawn from the model: E[1/m Σ rrᵀ] is the Fisher.

    Args:
        model_fn: as in `ggn_roots`.
        params: pytree of real floating-point arrays.
        *args: as in `ggn_roots`.
        key: random key; the same key draws the same labels.
        likelihood: what the outputs mean, as in `fisher`.
        weights: as in `ggn_roots`.
        num_samples: how many labels to draw for each example.
        precision: as in `ggn_roots`.

    Returns:
        The block, one vector for each example and label, in log-likelihood (nats) per parameter.

    Raises:
        TypeError, ValueError: as `ggn_roots`; `num_samples` below 1.

    Cost:
        One gradient for each vector, and num_examples · num_samples · d numbers of memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> w, x = jnp.zeros((1, 2)), jnp.array([[2.0]])
        >>> rows = hj.sampled_grads(lambda w, x: x @ w, w, x, key=jax.random.key(0), num_samples=3)
        >>> abs(rows).tolist()
        [[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]]
    """
    _check(model_fn, params, args, likelihood, precision)
    num_samples = checked_count("num_samples", num_samples)
    args, shares, count = of_examples(weights, args)
    keys = jax.random.split(checked_any_key(key), count)
    score = as_pytree(likelihood.score)
    layouts = Layouts.of_rows(params, args[0])
    return _sampled_grads(
        precision, layouts, num_samples, as_pytree(model_fn), score, params, args, shares, keys
    )


def empirical_fisher_roots(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    weights: Weights | None = None,
    microbatch: int | None = None,
    precision: str | None = "highest",
) -> Block:
    """Square roots of the empirical Fisher, one for each example: 1/m Σ rrᵀ = Σ wᵢ gᵢgᵢᵀ / Σ wᵢ.

    rᵢ = √(m wᵢ/Σw) gᵢ: what `inverse_fisher`, `obs` and `obd` take where examples count differently, as the
    sentences of padded batches do. Without weights they are the rows of `per_example_grads`. The mean of rows
    with weights is not the gradient: for `saliencies.gradient` take `per_example_grads`; `wood_taylor`, which
    reads both from one block, knows no weights.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the leading axis of `args[0]`.
        params: pytree of real floating-point arrays.
        *args: first the batch, which alone is cut into examples: see `per_example_grads`.
        weights: `weights(batch) -> array`, as in `per_example_grads`.
        microbatch: as in `per_example_grads`.
        precision: as in `hessian`.

    Returns:
        The block of m vectors, in loss per parameter.

    Raises:
        TypeError, ValueError: as `per_example_grads`.

    Cost:
        As `per_example_grads`.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, batch):
        ...     return jnp.sum(batch["mask"] * batch["x"]) * w / jnp.sum(batch["mask"])
        >>> batch = {"x": jnp.array([[2.0, 2.0], [6.0, 0.0]]), "mask": jnp.array([[1, 1], [1, 0]])}
        >>> rows = hj.empirical_fisher_roots(loss_fn, 1.0, batch, weights=lambda batch: batch["mask"])
        >>> float((rows**2).mean())  # (2·2² + 1·6²) / 3
        14.6667
    """
    shares, block = example_grads(loss_fn, params, args, weights, microbatch, precision)
    return block if shares is None else scaled_rows(block, jnp.sqrt(shares.shape[0] * by_example(shares)))


def _check(model_fn: Any, params: Any, args: tuple[Any, ...], likelihood: Any, precision: Any) -> None:
    _tree.check_floating(params)
    if args:  # else `num_examples` says what is missing
        check_call("model_fn", model_fn, args)
        _digests.check_alike(params, args)
    check_likelihood(likelihood)
    check_precision(precision)


@explained("model_fn")
@compiled(static_argnums=(0, 1))
def _ggn_roots(
    precision: str | None,
    layouts: Layouts,
    model_fn: Partial,
    information: Partial,
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."] | None,
    temperature: Float[Array, ""],
) -> Block:
    def of_example(example: tuple[Any, ...]) -> Block:
        (batch, own), *rest = example
        outputs, pullback = jax.vjp(lambda p: _checked(model_fn(p, batch, *rest)), params)
        shown, factors = _weighed(outputs, own, shares)
        positions = shown.reshape(-1, outputs.shape[-1])
        roots = jax.vmap(lambda z: information_root(information, z / temperature))(positions)
        if factors is not None:
            roots = factors.reshape(-1, 1, 1).astype(roots.dtype) * roots
        size = positions.shape[1]  # √c below: c vectors for each example, whose mean counts each as 1/c
        # The columns of all positions' roots, each a cotangent that is zero at the other positions.
        cotangents = jnp.einsum("pq,pck->pkqc", jnp.eye(len(positions), dtype=roots.dtype), roots)
        cotangents = (jnp.sqrt(size) * cotangents).astype(outputs.dtype).reshape(-1, *outputs.shape)
        # One forward pass for all of them: the backward passes share its activations.
        return jax.vmap(lambda t: pullback(t)[0])(cotangents)

    with at_precision(precision):
        return layouts.laid(_end_to_end(of_each(of_example, ((args[0], shares), *args[1:]))))


@explained("model_fn")
@compiled(static_argnums=(0, 1, 2))
def _sampled_grads(
    precision: str | None,
    layouts: Layouts,
    num_samples: int,
    model_fn: Partial,
    score: Partial,
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."] | None,
    keys: Key,
) -> Block:
    def of_example(example: tuple[Any, ...]) -> Block:
        (batch, key, own), *rest = example
        outputs, pullback = jax.vjp(lambda p: _checked(model_fn(p, batch, *rest)), params)
        shown, factors = _weighed(outputs, own, shares)
        scores = jax.vmap(lambda key: score(key, shown))(jax.random.split(key[0], num_samples))
        # A row sums the positions of an example; their scores are independent, so rows over √positions have
        # the mean over positions for their outer product on average.
        scale = (outputs.size // outputs.shape[-1]) ** -0.5
        if factors is not None:
            scores = factors[None, ..., None].astype(scores.dtype) * scores
        return jax.vmap(lambda t: pullback(scale * t)[0])(scores.astype(outputs.dtype))

    with at_precision(precision):
        return layouts.laid(_end_to_end(of_each(of_example, ((args[0], keys, shares), *args[1:]))))


def _weighed(outputs: Array, own: Array | None, shares: Array | None) -> tuple[Array, Array | None]:
    """An example's outputs, 0 where they do not count, and √(n·positions·share) of each position."""
    if own is None or shares is None:
        return outputs, None
    own = by_position(own, outputs.shape[:-1])
    return present(own, outputs), jnp.sqrt(shares.shape[0] * own.size * own)


def information_root(information: Partial, outputs: Float[Array, " c"]) -> Float[Array, "c c"]:
    """S with SSᵀ the information of one position."""
    # By eigh, not Cholesky: softmax's information is singular (its rows sum to zero), and rounding may make
    # an eigenvalue of zero slightly negative.
    wide = outputs.astype(_tree.accumulator_dtype(outputs))
    matrix = jax.vmap(lambda t: information(wide, t))(jnp.eye(wide.size, dtype=wide.dtype))
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[None]


def _checked(outputs: Any) -> Float[Array, "... c"]:
    if not isinstance(outputs, jax.Array) or outputs.ndim < 2:
        raise TypeError(
            "`model_fn` must return one array, examples first and the outputs of each last: this likelihood "
            "knows no other outputs."
        )
    return outputs


def _end_to_end(rows: Block) -> Block:
    """Several vectors for each example, as one block."""

    def leaf(x: Array) -> Array:
        return _reshaping.merge_axes(x, [x.shape[:2], *((n,) for n in x.shape[2:])])

    return jax.tree.map(leaf, rows)
