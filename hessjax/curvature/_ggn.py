"""Gauss–Newton products Jᵀ C J v: the generalised Gauss–Newton matrix and the Fisher information."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from hessjax._core import _digests, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import check_flags, checked_any_key, checked_count, checked_instance, shown
from hessjax._core._types import Key, LossFn, Matvec, ModelFn, Params
from hessjax.curvature._parts import check_alone, in_parts
from hessjax.curvature._product import (
    SandwichProduct,
    as_pytree,
    at_precision,
    check_call,
    check_precision,
    described,
    explained,
    pull_back,
    sandwich,
    scalar,
)
from hessjax.curvature._weights import (
    Weights,
    by_example,
    by_position,
    present,
    shares_of,
    weighed,
    without_absent,
)
from hessjax.curvature.likelihoods import Likelihood


def ggn(
    model_fn: ModelFn,
    output_loss: LossFn,
    params: Params,
    *args: Any,
    linearize: bool = False,
    microbatch: int | None = None,
    weights: Weights | None = None,
    precision: str | None = "highest",
) -> Matvec:
    """The generalised Gauss–Newton matrix of output_loss(model_fn(params, *args), *args), as a matvec.

    v ↦ Jᵀ H J v, with J the Jacobian of the outputs in the params and H the Hessian of the loss in the
    outputs. Positive semidefinite if the loss is convex in the outputs. The Hessian is this and a second
    part, from the curvature of the model, which vanishes where the model is linear or fits its data
    exactly: `weighted_sum([hessian(...), ggn(...)], [1, -1])`.

    Args:
        model_fn: `model_fn(params, *args) -> outputs`, a pytree of real floating-point arrays.
        output_loss: `output_loss(outputs, *args) -> scalar`, the mean over the examples. It is given all
            the arguments that the model is given. What counts is its own affair: a mask in it is enough, and
            no `weights` are needed but with `microbatch`.
        params: pytree of real floating-point arrays.
        *args: what else the two take: a batch, BatchNorm statistics, random keys.
        linearize: do the work that does not depend on v once, now, and keep it: later products are
            cheaper, and the activations stay in memory.
        microbatch: the most examples to work on at once, as in `hessian`.
        weights: with `microbatch`, as in `hessian`.
        precision: of matrix products and convolutions, as in `hessian`.

    Returns:
        The matvec, a pytree as `hessian`'s is. It takes a vector like `params` (cast to their dtypes) and
        returns one, in loss per parameter.

    Raises:
        TypeError: `params` has leaves that are not floating point; at the first product (at once with
            `linearize`), the outputs are not real floats or the loss is not one real number.
        ValueError: at a product, `vector` is not like `params` (every leaf is listed); `microbatch` and
            `weights` as in `hessian`.

    Cost:
        By operation count a product is 5/3 gradients, 4/3 when linearized. Memory: that of a gradient and
        of the tangents of the activations, with `microbatch` of so many examples.

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
        Martens (2020), New insights and perspectives on the natural gradient method, arXiv 1412.1193, §8.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def model_fn(w, x):
        ...     return x * w**2  # J = 2 x w
        >>> def output_loss(outputs, x):
        ...     return jnp.mean(outputs**2)  # H = 2 / 2 examples
        >>> A = hj.ggn(model_fn, output_loss, jnp.array(3.0), jnp.array([1.0, 2.0]))
        >>> float(A(jnp.array(1.0)))
        180.0
    """
    _tree.check_floating(params)
    check_call("model_fn", model_fn, args)
    check_call("output_loss", output_loss, args, "outputs")
    _digests.check_alike(params, args)
    check_flags(linearize=linearize)
    check_precision(precision)
    curvature = Partial(_loss_curvature, as_pytree(output_loss))
    check_alone(weights, microbatch)
    if microbatch is not None:
        functions, product = (as_pytree(model_fn), curvature), SandwichProduct(precision, "model_fn")
        return in_parts(product, functions, params, args, microbatch, weights, linearize)
    return sandwich(model_fn, curvature, params, args, linearize, precision)


def fisher(
    model_fn: ModelFn,
    params: Params,
    *args: Any,
    likelihood: Likelihood,
    weights: Weights | None = None,
    num_samples: int | None = None,
    key: Key | None = None,
    linearize: bool = False,
    microbatch: int | None = None,
    precision: str | None = "highest",
) -> Matvec:
    """The Fisher information of a model's predictive distribution, as a matvec.

    v ↦ 1/n Σᵢ E[∇log p(y|xᵢ) ∇log p(y|xᵢ)ᵀ] v, with y drawn from the model itself: no labels enter. The
    expectation is exact, 1/n Σᵢ Jᵢᵀ F(outputᵢ) Jᵢ v, and then equal to `ggn` with the negative
    log-likelihood, or, given a `key`, a mean over labels drawn, which is unbiased. With `weights` the mean
    over i is Σ wᵢ (...) / Σ wᵢ, as in the loss: with a padding mask it is `ggn` with the masked loss.

    Args:
        model_fn: `model_fn(params, *args) -> outputs`, one array (..., examples, numbers of one example).
        params: pytree of real floating-point arrays.
        *args: what else the model takes; with `weights` first the batch.
        likelihood: what the outputs mean: `likelihoods.categorical` (logits),
            `likelihoods.gaussian` (means, variance 1), or a `Likelihood` of your own. The mean is over all
            axes but the last.
        weights: `weights(batch) -> array`: how much each example counts, (examples,), or each output
            position, (examples, positions...), a padding mask; leading axes of the outputs. None: all alike.
            Where a weight is zero the outputs do not count, whatever they are, and nothing is drawn that
            does. If examples of weight zero have derivatives that are not finite, and the batch's arrays
            share the axis of examples, copies of an example that counts take their place.
        num_samples: with `key`: labels to draw for every example, 1 by default. None without: exact.
        key: random key of the labels. One matvec draws the same labels in every product, hence is one
            symmetric matrix. Matvecs of equal key and shapes share their noise: `over_batches` wants a key
            for each batch, as a part of the batch.
        linearize: as in `ggn`; labels are then drawn once.
        microbatch: the most examples to work on at once, as in `hessian`. Not with `weights` or a `key`.
        precision: as in `hessian`.

    Returns:
        The matvec, positive semidefinite, in log-likelihood (nats) per parameter.

    Raises:
        TypeError: as `ggn`; the outputs are not one array.
        ValueError: `num_samples` without `key`, or below 1; `microbatch` below 1, or with what it does not
            go with; at a product, `vector` is not like `params`, or the outputs have fewer than two axes.
            Weights of another shape, negative, not finite, or all zero. (Inside `jit` such values give NaN.)

    Cost:
        As `ggn`; with a key, `num_samples` arrays like the outputs. One gradient more, when it is made, if
        there are examples of weight zero.

    References:
        Martens (2020), New insights and perspectives on the natural gradient method, arXiv 1412.1193, §5, §9.
        Kunstner et al. (2019), Limitations of the empirical Fisher approximation, arXiv 1905.12558.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> def model_fn(w, x):
        ...     return x[:, None] * jnp.array([w, 0.0])  # two classes, logits x w and 0
        >>> w, x = jnp.array(0.0), jnp.array([1.0, 3.0])
        >>> A = hj.fisher(model_fn, w, x, likelihood=hj.likelihoods.categorical)
        >>> float(A(jnp.array(1.0)))  # p (1 - p) x², on average
        1.25
    """
    _tree.check_floating(params)
    check_call("model_fn", model_fn, args)
    _digests.check_alike(params, args)
    check_likelihood(likelihood)
    check_flags(linearize=linearize)
    check_precision(precision)
    if microbatch is not None and not (weights is None and key is None):
        raise ValueError(
            f"`microbatch` must be None with {'`weights`' if key is None else 'a `key`'}, got "
            f"{shown(microbatch)}: `over_batches` takes the mean over parts of a batch."
        )
    shares = None if weights is None else shares_of(weights, args)
    if shares is not None:
        args = _finite(precision, as_pytree(model_fn), params, args, by_example(shares) > 0)
    if key is None:
        if num_samples is not None:
            raise ValueError(
                f"`key` must be given with `num_samples`, got None with num_samples={num_samples}."
            )
        curvature = Partial(_exact_fisher, as_pytree(likelihood.information), shares)
        if microbatch is not None and weights is None:
            functions, product = (as_pytree(model_fn), curvature), SandwichProduct(precision, "model_fn")
            return in_parts(product, functions, params, args, microbatch, None, linearize)
    else:
        num_samples = 1 if num_samples is None else checked_count("num_samples", num_samples)
        key = checked_any_key(key)
        curvature = Partial(_SampledFisher(num_samples), as_pytree(likelihood.score), key, shares)
    return sandwich(model_fn, curvature, params, args, linearize, precision)


def check_likelihood(likelihood: Any) -> None:
    """Raise a TypeError for what is no `Likelihood`, such as its name."""
    checked_instance("likelihood", likelihood, Likelihood, "hessjax.likelihoods.categorical")


# -- the curvature in the outputs ----------------------------------------------------------------


def _loss_curvature(output_loss: LossFn, outputs: Any, args: tuple[Any, ...]) -> Partial:
    # Reverse over reverse: outputs are few, so it costs little, and a `custom_vjp` in the loss can stay.
    return Partial(pull_back, jax.vjp(jax.grad(scalar(output_loss, args, "output_loss")), outputs)[1])


def _exact_fisher(information: Callable[..., Any], shares: Array | None, outputs: Any, _args: Any) -> Partial:
    _check_examples(outputs)
    outputs, shares = _present(_tree.wide(outputs), shares)
    return Partial(_mean_information, information, outputs, shares)


def _mean_information(
    information: Callable[..., Any],
    outputs: Float[Array, "*n c"],
    shares: Float[Array, "*n"] | None,
    tangents: Float[Array, "*n c"],
) -> Float[Array, "*n c"]:
    # p − p² cancels where a class is nearly certain: in bfloat16 nothing would be left of it.
    return _averaged(information(outputs, _tree.wide(tangents)), shares)


@dataclasses.dataclass(frozen=True)
class _SampledFisher:
    num_samples: int

    def __call__(
        self, score: Callable[..., Any], key: Key, shares: Array | None, outputs: Any, _args: Any
    ) -> Partial:
        _check_examples(outputs)
        outputs, shares = _present(_tree.wide(outputs), shares)
        # Folded in, not split: sample i is the same whatever `num_samples`.
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(self.num_samples))
        return Partial(_mean_outer, jax.vmap(score, in_axes=(0, None))(keys, outputs), shares)


def _mean_outer(
    scores: Float[Array, "samples *n c"], shares: Float[Array, "*n"] | None, tangents: Float[Array, "*n c"]
) -> Float[Array, "*n c"]:
    """The mean of s sᵀ t over the samples, in every example."""
    # Scores of different examples are independent with mean zero: their cross terms, zero on average, are
    # left out, which takes nothing from the expectation and most of the variance.
    slopes = jnp.sum(scores * _tree.wide(tangents)[None], axis=-1, keepdims=True)
    return _averaged(jnp.mean(scores * slopes, axis=0), shares)


def _averaged(values: Float[Array, "*n c"], shares: Float[Array, "*n"] | None) -> Float[Array, "*n c"]:
    """Of every example, its part of the mean."""
    return values / _num_examples(values) if shares is None else weighed(shares, values)


def _present(outputs: Array, shares: Array | None) -> tuple[Array, Array | None]:
    """The outputs, 0 where they do not count, and the share of each position."""
    if shares is None:
        return outputs, None
    shares = by_position(shares, outputs.shape[:-1])
    return present(shares, outputs), shares


def _finite(
    precision: str | None, model_fn: Partial, params: Params, args: tuple[Any, ...], there: Bool[Array, " n"]
) -> tuple[Any, ...]:
    """The arguments, without examples that do not count but would make every product NaN."""
    is_traced = isinstance(there, jax.core.Tracer)
    shapes = {jnp.shape(x)[:1] for x in jax.tree.leaves(args[0]) if jnp.ndim(x)}
    if shapes != {there.shape} or (not is_traced and bool(jnp.all(there))):
        return args
    # Only then: a model that couples its examples shall see them as they are, as the GGN's does.
    clean = _is_clean(precision, model_fn, params, args)
    return args if not is_traced and bool(clean) else without_absent(args, there | clean)


@explained("model_fn")
@compiled(static_argnums=0)
def _is_clean(
    precision: str | None, model_fn: Partial, params: Params, args: tuple[Any, ...]
) -> Bool[Array, ""]:
    """Whether cotangents of zero give gradients of zero: 0 · NaN is NaN."""
    with at_precision(precision):
        outputs, pullback = jax.vjp(lambda p: model_fn(p, *args), params)
        grads = pullback(jax.tree.map(jnp.zeros_like, outputs))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))


def _check_examples(outputs: Any) -> None:
    if not isinstance(outputs, jax.Array):
        raise TypeError(
            f"`model_fn` must return one array for a Fisher, got {described(outputs)}; for other outputs "
            "take `ggn` with their negative log-likelihood."
        )
    if outputs.ndim < 2:
        raise ValueError(
            "`model_fn` must return outputs with an axis of examples before the last, which is one "
            f"example's, got {described(outputs)}; add an axis of length 1."
        )


def _num_examples(outputs: Float[Array, "... c"]) -> int:
    # All axes but the last: tokens and pixels count as examples, as in a loss that is a mean over them.
    return max(1, math.prod(outputs.shape[:-1]))
