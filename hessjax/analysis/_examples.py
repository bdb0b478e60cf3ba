"""Rows of `check`: whether the loss is the mean over its examples that all of curvature/ takes it for."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._types import LossFn, Params, Vector
from hessjax.analysis._comparisons import CheckRow, loss_and_gradient, named, norms
from hessjax.curvature._data import Batches
from hessjax.curvature._product import at_precision, scalar
from hessjax.curvature._weights import (
    Weights,
    batch_weight,
    by_example,
    check_count,
    leading_axis,
    of_each,
    shares_of,
    weighed,
    without_absent,
)

MATTERS = 0.1
"""A gradient that changes by more than this fraction when the examples change places is of no such mean."""

ORDERED = "its order matters: `args[0]` is no batch of examples, or the loss is random (dropout)"
SPREAD = "the batch is spread over several arguments: what cuts it wants it as the first, `(x, y)`"

ROUNDING = 10
"""Times what a gradient changes by then, where it is the same but for rounding: so much may be rounding."""


_HALF = {":bf16[": jnp.bfloat16, ":f16[": jnp.float16}
"""As programs write them."""


class _Subject(NamedTuple):
    """What is tested: the gradient of a loss on a batch, and what of it is rounding.

    Attributes:
        loss_fn: the loss.
        params: the params.
        args: first the batch.
        number: of examples in it.
        weights: how much they count.
        grads: the gradient.
        eps: of the coarsest dtype, those inside the loss included.
        halves: the weight of each half and its gradient, of those that count.
        change: by how much the norm of every leaf's gradient changes when the examples change places.
        sizes: of every leaf's gradient, at its largest.
    """

    loss_fn: LossFn
    params: Params
    args: tuple[Any, ...]
    number: int
    weights: Weights | None
    grads: Vector
    eps: float
    halves: list[tuple[float, Vector]]
    change: np.ndarray
    sizes: np.ndarray


def example_rows(
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    weights: Weights | None,
    grads: Vector,
    eps: float,
) -> Iterator[CheckRow]:
    """*examples* and *halves*; notes where there is no batch to speak of."""
    try:
        subject = _subject(loss_fn, params, args, weights, grads, eps)
    except _Skip as reason:
        yield from (_skipped(name, str(reason)) for name in ("examples", "halves"))
        return
    examples = _examples(subject)
    yield examples
    total = sum(weight for weight, _ in subject.halves)
    mean = _tree.scale(0.0, _tree.wide(grads))
    for weight, half in subject.halves:
        mean = _tree.add_scaled(mean, weight / total, half)
    halves = _row("halves", subject, mean, "the mean of its halves' gradients is the batch's")
    yield (
        halves if examples.passed else halves._replace(detail=halves.detail.split(": ")[0] + ", as examples")
    )


def padding_rows(loss_fn: LossFn, params: Params, batches: Any, args: tuple[Any, ...]) -> Iterator[CheckRow]:
    """*padding*, where batches are filled up: whether the loss leaves out what counts for nothing."""
    if (pair := batches.part() if isinstance(batches, Batches) else None) is None:
        return
    whole, filled = (loss_and_gradient(Partial(loss_fn), params, (batch, *args))[0] for batch in pair)
    eps = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in [*jax.tree.leaves(params), whole])
    change = abs(float(filled) - float(whole)) / (abs(float(whole)) or 1.0)
    detail = (
        "half a batch has the loss that it has when it is filled up"
        if (passed := change <= eps**0.5)
        else "half a batch changes its loss when it is filled up: take the mean by the weights that "
        "`with_weights` puts into it, Σ w ℓ / Σ w"
    )
    yield CheckRow("padding", passed, change, eps**0.5, detail)


class _Skip(Exception):  # noqa: N818 (never seen by anyone)
    """What is there is no batch; says why."""


def _skipped(name: str, reason: str) -> CheckRow:
    return CheckRow(name, True, 0.0, np.inf, f"skipped: {reason}")


def _subject(
    loss_fn: LossFn,
    params: Params,
    args: tuple[Any, ...],
    weights: Weights | None,
    grads: Vector,
    eps: float,
) -> _Subject:
    """Raises `_Skip` for arguments that are no batch, whose mean the loss might be."""
    count = _count(args, weights)
    with _Attempt("the loss cannot take it in another order"):
        backwards = _gradient(loss_fn, params, _cut(args, slice(None, None, -1)))
    halves, no_halves = list[tuple[float, Vector]](), None
    try:
        with _Attempt("the loss cannot take a part of it"):
            for part in (_cut(args, place) for place in (slice(0, count // 2), slice(count // 2, count))):
                if weight := batch_weight(weights, part[0], 0):  # one of padding has no gradient
                    halves.append((weight, _gradient(loss_fn, params, part)))
    except _Skip as reason:
        no_halves = reason
    # Half precision inside rounds alike whatever the order, and otherwise in parts of the batch.
    eps = max(eps, _eps_inside(loss_fn, params, args))
    change = _of_leaves(_tree.add_scaled(_tree.wide(backwards), -1.0, grads))
    sizes = np.max([_of_leaves(tree) for tree in (grads, *(half for _, half in halves))], axis=0)
    if _matters(change, sizes):
        together = _gradient(loss_fn, params, tuple(map(_backwards(count), args)))
        is_spread = not _matters(_of_leaves(_tree.add_scaled(_tree.wide(together), -1.0, grads)), sizes)
        raise _Skip(SPREAD if is_spread else ORDERED)
    if no_halves is not None:
        raise no_halves
    return _Subject(loss_fn, params, args, count, weights, grads, eps, halves, change, sizes)


def _gradient(loss_fn: LossFn, params: Params, args: tuple[Any, ...]) -> Vector:
    return loss_and_gradient(loss_fn, params, args)[1]


def _eps_inside(loss_fn: LossFn, params: Params, args: tuple[Any, ...]) -> float:
    """The spacing of the coarsest half-precision dtype that the loss computes in, or 0."""
    program = str(jax.make_jaxpr(scalar(loss_fn, args))(params))
    return max((float(jnp.finfo(dtype).eps) for name, dtype in _HALF.items() if name in program), default=0.0)


def _matters(change: np.ndarray, sizes: np.ndarray) -> bool:
    # Of a batch of examples the order does not matter; of a matrix, of targets, of a model's state it does.
    return bool(np.linalg.norm(change) > MATTERS * np.linalg.norm(sizes))


def _backwards(count: int) -> Callable[[Any], Any]:
    """Turns round what is as long as the batch."""
    return functools.partial(
        jax.tree.map, lambda x: x[::-1] if jnp.ndim(x) and jnp.shape(x)[0] == count else x
    )


class _Attempt:
    """Whatever a user's function raises on what may be no batch for it is a reason to skip."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception):
            raise _Skip(f"not a batch, {self.reason} ({type(error).__name__})") from error


def _count(args: tuple[Any, ...], weights: Weights | None) -> int:
    if not args:
        raise _Skip("not a batch, the loss has no arguments")
    with _Attempt("its arrays share no leading axis"):
        count = leading_axis(args[0])
    if count < 2:
        raise _Skip("there is one example only" if count else "not a batch, it is empty")
    if weights is not None and jnp.ndim(weights(args[0])):
        check_count(shares_of(weights, args), count)
    return count


def _cut(args: tuple[Any, ...], place: slice) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: x[place] if jnp.ndim(x) else x, args[0]), *args[1:]


def _of_leaves(vector: Vector) -> np.ndarray:
    return np.asarray(norms(vector), float)


# -- examples --------------------------------------------------------------------------------------


def _examples(subject: _Subject) -> CheckRow:
    args, shares = subject.args, None
    if subject.weights is not None:
        if not jnp.ndim(subject.weights(args[0])):
            return _skipped("examples", "`weights` gives one number for the whole batch")
        shares = by_example(shares_of(subject.weights, args))
        args = without_absent(args, shares > 0)
    try:
        with _Attempt("the loss cannot take one example"):
            mean = _mean_gradient(subject.loss_fn, subject.params, args, shares)
    except _Skip as reason:
        return _skipped("examples", str(reason))
    return _row("examples", subject, mean, "the mean of the examples' gradients is the batch's")


@compiled()
def _mean_gradient(
    loss_fn: LossFn, params: Params, args: tuple[Any, ...], shares: Float[Array, " n"] | None
) -> Vector:
    """The mean of the examples' gradients, as one gradient: no block of them is kept."""

    def mean(params: Params) -> Float[Array, ""]:
        losses = of_each(lambda example: scalar(loss_fn, example)(params), args)
        return jnp.mean(_tree.wide(losses)) if shares is None else jnp.sum(weighed(shares, losses))

    with at_precision("highest"):
        return jax.grad(mean)(params)


# -- what is seen ----------------------------------------------------------------------------------


def _row(name: str, subject: _Subject, mean: Vector, good: str) -> CheckRow:
    """The gradient against a mean of others that should be it."""
    found = _of_leaves(mean)
    error = _of_leaves(_tree.add_scaled(_tree.wide(mean), -1.0, subject.grads))
    # The largest of all: at a minimum the gradient itself is nothing but what others leave of each other.
    size = np.maximum(subject.sizes, found)
    size = size + 0.01 * np.linalg.norm(size)
    size = np.where(size > 0, size, 1)
    limits = subject.eps**0.5 + ROUNDING * subject.change / size
    wrong = ~(error / size <= limits)  # written so that NaN is wrong
    worst = int(np.argmax(np.where(np.isfinite(error), error / size / limits, np.inf)))
    detail = f"differs in {named(subject.params, wrong)}: {_cause(subject, mean)}" if wrong.any() else good
    return CheckRow(name, not wrong.any(), float((error / size)[worst]), float(limits[worst]), detail)


def _cause(subject: _Subject, mean: Vector) -> str:
    whole, found = _tree.wide(subject.grads), _tree.wide(mean)
    if _norm(_tree.add_scaled(whole, -float(subject.number), found)) <= 0.01 * _norm(whole):
        return "the loss is a sum over its examples: take the mean"
    train = "BatchNorm in train mode (take eval mode), or data outside `args[0]`"
    if subject.weights is None:
        return f"{train}, or a mean over what is not padding, which wants `weights=`"
    return f"{train}, or `weights` are not those of the loss's own mean"


_norm: Callable[[Vector], Any] = jax.jit(_tree.norm)
