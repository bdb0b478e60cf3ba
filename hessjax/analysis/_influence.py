"""Influence: what an example of the training data, counted more, does to the loss of a query."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._messages import check_flags, checked_count, checked_flag
from hessjax._core._sources import Source, check_source, length_of
from hessjax._core._types import Block, LossFn, Params
from hessjax._run._bar import bar_of
from hessjax.analysis._attribution import (
    AT_ONCE,
    Part,
    Rules,
    applied,
    checked_inverse,
    finite_rows,
    losses_and_grads,
    parts_of,
    products,
)
from hessjax.analysis._scores import Influence
from hessjax.curvature._product import as_pytree, check_call, check_precision
from hessjax.curvature._weights import Weights, check_weights, present


def influence(
    loss_fn: LossFn,
    params: Params,
    train: Source,
    query: Source,
    *args: Any,
    inverse: Any,
    query_fn: LossFn | None = None,
    weights: Weights | None = None,
    by_leaf: bool = False,
    microbatch: int | None = None,
    progress: bool = False,
    precision: str | None = "highest",
) -> Influence:
    """Which training examples matter to a query: −∇ℓ(q)ᵀ (H + λI)⁻¹ ∇ℓ(z) for every query q and example z.

    At a minimum of the mean loss this is the slope of ℓ(q) in the weight of z. A negative score means that
    more of z lowers the query's loss: it helps; a positive one that it raises it: it hurts. Left out, z
    changes the loss by about −score/(n − 1) (`.removed()`). The inverse is applied to the queries, once each;
    then the training data are passed over once.

    Args:
        loss_fn: `loss_fn(params, batch, *args) -> scalar`, the mean over the examples of the batch that was
            trained on, with its weight decay: an example has its share of that.
        params: pytree of real floating-point arrays, where training ended.
        train: the training data, a source of batches as for `over_batches`, passed over once; one batch is
            put into a list.
        query: the examples asked about, likewise.
        *args: what the loss takes after the batch.
        inverse: what multiplies by (H + λI)⁻¹: `functools.partial(hj.solve, A, damping=λ)`, an
            `inverse_fisher`, `hj.layers.kfac(moments).inverse(λ)`, or any function from a vector like the
            params to another. None: none, plain products of gradients.
        query_fn: what of a query is asked about, called as the loss is, such as the logit of its class, or
            the loss without its weight decay. None: the loss.
        weights: `weights(batch) -> array`, how much each example, or output position, counts, as in
            `per_example_grads`. None: all alike. Examples of weight 0 have the score 0; those that
            `hj.batches` fills up with are not there.
        by_leaf: also the part of each leaf, the sum over its entries.
        microbatch: the most examples to differentiate at once. None: as many as make up 2²⁶ numbers.
        progress: show two bars, of the queries multiplied by the inverse, which the host then waits for, and
            of the batches of training data.
        precision: of matrix products and convolutions, as in `hessian`.

    Returns:
        An `Influence`: `.scores`, `.helpful(k)`, `.harmful(k)`, `.removed()`; in units of the loss.

    Raises:
        TypeError: `params` are not floating point, or traced; a source is none; `inverse` is no function, or
            the matrix itself.
        ValueError: a query whose loss or gradient is not finite; `inverse` is that of other params, or gives
            NaN; weights that do not fit, are negative, not finite or all zero.

    Cost:
        One product with the inverse for each query; one gradient, and 2·queries·d operations, for each
        example. Memory: 3·queries·d numbers while the inverse is applied, then (queries + microbatch)·d.
        On the host queries · examples numbers, `by_leaf` for each leaf.

    References:
        Koh & Liang (2017), Understanding black-box predictions via influence functions, arXiv 1703.04730;
        Grosse et al. (2023), Studying large language model generalization with influence functions, arXiv
        2308.03296.

    Example:
        >>> import functools, jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, x):
        ...     return jnp.mean((x - w) ** 2) / 2
        >>> train, w = jnp.array([0.0, 1.0, 5.0]), jnp.array(2.0)  # trained: w is their mean
        >>> H = hj.hessian(loss_fn, w, train)
        >>> found = hj.influence(loss_fn, w, [train], [jnp.array([1.0])],
        ...                                              inverse=functools.partial(hj.solve, H))
        >>> found.scores.tolist()  # more of 0 would bring w nearer to 1, more of 5 take it away
        [[-2.0, -1.0, 3.0]]
        >>> found.harmful(1).tolist(), found.removed().tolist()
        ([[2]], [[1.0, 0.5, -1.5]])
    """
    rules = _checked(loss_fn, params, args, train, weights, by_leaf, precision)
    check_flags(progress=progress)
    check_source(query, "query")
    if query_fn is not None:
        check_call("query_fn", query_fn, (0, *args))
    inverse, at_once = checked_inverse(inverse, params), _at_once(microbatch, params)
    queries = parts_of(query, "query", args, weights, at_once)
    losses, grads = _queries(rules, loss_fn if query_fn is None else query_fn, params, queries)
    with bar_of(progress, "inverse", len(losses), "queries") as advance:
        vectors, residuals = applied(inverse, grads, params, advance)
    del grads
    found, counts = list[Any](), []
    with bar_of(progress, "influence", length_of(train), "batches") as advance:
        for part in _told(parts_of(train, "train", args, weights, at_once), advance):
            found.append(products(rules, as_pytree(loss_fn), params, part, vectors))
            counts.append(part.weights)
            # Fetched when the next part is under way, and read meanwhile.
            found[-2:-1] = map(jax.device_get, found[-2:-1])
    scores = _assembled(jax.device_get(found), counts)
    leaves = dict(zip(_tree.leaf_paths(params), scores, strict=True)) if by_leaf else {}
    weight = jnp.asarray(np.concatenate(counts), scores.dtype)
    return Influence(jnp.sum(scores, axis=0), losses, weight, leaves, _known(residuals, scores))


def self_influence(
    loss_fn: LossFn,
    params: Params,
    train: Source,
    *args: Any,
    inverse: Any,
    weights: Weights | None = None,
    microbatch: int | None = None,
    progress: bool = False,
    precision: str | None = "highest",
) -> Influence:
    """How much every training example depends on itself: −∇ℓ(z)ᵀ (H + λI)⁻¹ ∇ℓ(z).

    The diagonal of `influence` with the training data as queries. Examples that the network knows only
    because it saw them, rare ones and those with wrong labels, come first in `.helpful(k)`; `.removed()` is
    by how much the loss of each would rise were it left out of training. A score above 0 says that H + λI is
    not positive definite.

    Args:
        loss_fn: as in `influence`.
        params: as in `influence`.
        train: as in `influence`.
        *args: what the loss takes after the batch.
        inverse: as in `influence`.
        weights: as in `influence`.
        microbatch: as in `influence`.
        progress: show a bar of the batches.
        precision: as in `hessian`.

    Returns:
        An `Influence` with scores (examples,).

    Raises:
        TypeError, ValueError: as `influence`. Losses of examples that are not finite give scores that are
            not.

    Cost:
        One gradient and one product with the inverse for each example; 3·microbatch·d numbers of memory.

    References:
        Feldman & Zhang (2020), What neural networks memorize and why, arXiv 2008.03703.

    Example:
        >>> import functools, jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, x):
        ...     return jnp.mean((x - w) ** 2) / 2
        >>> train, w = jnp.array([0.0, 1.0, 5.0]), jnp.array(2.0)
        >>> inverse = functools.partial(hj.solve, hj.hessian(loss_fn, w, train))
        >>> hj.self_influence(loss_fn, w, [train], inverse=inverse).scores.tolist()
        [-4.0, -1.0, -9.0]
    """
    rules = _checked(loss_fn, params, args, train, weights, False, precision)
    check_flags(progress=progress)
    inverse, at_once = checked_inverse(inverse, params), _at_once(microbatch, params)
    found = []
    with bar_of(progress, "self-influence", length_of(train), "batches") as advance:
        for part in _told(parts_of(train, "train", args, weights, at_once), advance):
            losses, grads = losses_and_grads(rules, as_pytree(loss_fn), params, part)
            losses, grads = _present(jnp.asarray(part.weights, losses.dtype), losses, grads)
            vectors, residuals = applied(inverse, grads, params)
            found.append((jax.device_get(_inner(vectors, grads)), losses, part.weights, residuals))
    inner, each, counts, told = zip(*found, strict=True)
    of_all = None if told[0] is None else np.concatenate(told)
    weight, own = jnp.asarray(np.concatenate(counts), inner[0].dtype), _assembled(inner, counts)
    return Influence(own, jnp.concatenate(each), weight, {}, _known(of_all, own))


# -- what is asked for, and put together -------------------------------------------------------------


def _checked(
    loss_fn: Any,
    params: Any,
    args: tuple[Any, ...],
    train: Any,
    weights: Any,
    by_leaf: Any,
    precision: Any,
) -> Rules:
    _tree.check_floating(params)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
        raise TypeError("`params` must not be traced: influence reads its data on the host, outside `jit`.")
    check_call("loss_fn", loss_fn, (0, *args))
    check_source(train, "train")
    check_weights(weights)
    check_precision(precision)
    if checked_flag("by_leaf", by_leaf):
        _tree.unique_paths(params, "params")
    return Rules(precision, by_leaf)


def _at_once(microbatch: Any, params: Params) -> int:
    return (
        max(1, AT_ONCE // _tree.size(params))
        if microbatch is None
        else checked_count("microbatch", microbatch)
    )


def _told(parts: Iterator[Part], advance: Callable[[None], None]) -> Iterator[Part]:
    """The same; a bar of batches moves on when the last part of one is done with."""
    for part in parts:
        yield part
        if part.last:
            advance(None)


def _queries(
    rules: Rules, fn: LossFn, params: Params, parts: Iterator[Part]
) -> tuple[Float[Array, " queries"], Block]:
    """The queries' losses and gradients, all of them finite."""
    found = []
    for part in parts:
        losses, grads = losses_and_grads(rules, as_pytree(fn), params, part)
        found.append(_present(jnp.asarray(part.weights, losses.dtype), losses, grads))
        _check_finite(sum(len(x) for x, _ in found[:-1]), *found[-1])
    values, blocks = zip(*found, strict=True)
    return jnp.concatenate(values), jax.tree.map(lambda *rows: jnp.concatenate(rows), *blocks)


@jax.jit
def _present(weights: Array, losses: Array, grads: Block) -> tuple[Array, Block]:
    """Without what a batch is filled up with, and 0 for the examples that do not count."""
    return jax.tree.map(lambda x: present(weights, x[: len(weights)]), (losses, grads))


def _check_finite(first: int, losses: Array, grads: Block) -> None:
    """Raise a ValueError for queries that have no finite loss, or no finite gradient."""
    flags = zip((losses, grads), ("loss", "gradient"), strict=True)
    for tree, what in flags:
        bad = np.flatnonzero(~np.asarray(finite_rows(tree)))
        if bad.size:
            raise ValueError(
                f"`query` must have a finite {what} for every example, got NaN or infinity for "
                f"{bad.size} of {len(losses)}, the first number {first + int(bad[0])}: leave them out, or "
                "give them weight 0 by `weights`."
            )


def _assembled(parts: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> Float[Array, "... examples"]:
    """Scores from inner products, part after part; 0 for examples that do not count."""
    pairs = zip(parts, counts, strict=True)
    kept = [np.where(w > 0, -np.asarray(x)[..., : len(w)], np.zeros((), x.dtype)) for x, w in pairs]
    return jnp.asarray(np.concatenate(kept, axis=-1))


def _known(residuals: np.ndarray | None, like: Array) -> Float[Array, " queries"] | None:
    return None if residuals is None else jnp.asarray(residuals, like.dtype)


@jax.jit
def _inner(vectors: Block, grads: Block) -> Float[Array, " n"]:
    return jax.vmap(_tree.inner)(_tree.wide(vectors), _tree.wide(grads))
