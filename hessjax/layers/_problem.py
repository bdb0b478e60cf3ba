"""Whose moments are taken: the function, its params and batches, and how examples and positions count."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._compiled import Known, compiled
from hessjax._core._messages import checked_any_key, checked_choice, checked_count, checked_function
from hessjax._core._sources import Source, check_source
from hessjax._core._types import Key, Params, settings
from hessjax.curvature._data import check_not_filled, weighed
from hessjax.curvature._ggn import check_likelihood
from hessjax.curvature._product import as_pytree, check_call, check_precision
from hessjax.curvature._weights import Weights, check_weights, of_examples
from hessjax.layers._capture import Layout, layouts_of
from hessjax.layers._coverage import check_covered, checked_uses
from hessjax.layers._gradients import Gradients, whole_batch
from hessjax.layers._sides import Positions

Layouts: TypeAlias = tuple[tuple[Layout, ...], ...]
"""For every leaf those of its uses."""


@settings()
class Rules:
    """How moments are taken.

    Attributes:
        gradients: whose output gradients.
        positions: how positions that share a matrix count.
        max_width: the widest side with a full matrix.
        precision: of matrix products.
    """

    gradients: Gradients
    positions: Positions
    max_width: int
    precision: str | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["fn", "params", "args", "key"],
    meta_fields=["weights", "rules"],
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """Whose moments are taken: a function at its params, and how its examples count.

    Attributes:
        fn: the model, or the loss.
        params: the params.
        args: what all batches share.
        key: for labels drawn.
        weights: how much examples, or their positions, count.
        rules: how the moments are taken.
    """

    fn: Partial
    params: Params
    args: tuple[Any, ...]
    key: Key | None
    weights: Weights | None
    rules: Rules

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the leaves."""
        return tuple(_tree.leaf_paths(self.params))


class Part(NamedTuple):
    """A batch, cut into examples.

    Attributes:
        weight: how much it counts among the batches.
        layouts: of the uses of every leaf.
        args: the batch, and what all batches share.
        shares: the weights of its examples, which sum to 1.
        keys: one for each, if labels are drawn.
    """

    weight: float
    layouts: Layouts
    args: tuple[Any, ...]
    shares: Float[Array, "n ..."]
    keys: Key | None


def parts_of(problem: Problem, batches: Source) -> Iterator[Part]:
    """The batches that count, one after the other, checked."""
    if problem.weights is None:
        check_not_filled(batches)
    for index, (weight, batch) in enumerate(weighed(batches, problem.weights)):
        check_call("fn", problem.fn, (batch, *problem.args))
        args, shares, count = of_examples(problem.weights, (whole_batch(batch), *problem.args))
        layouts = _layouts.eval_shape(problem.rules.gradients, problem.fn, problem.params, args).value
        shares = jnp.full(count, 1 / count) if shares is None else shares
        keys = (
            None if problem.key is None else jax.random.split(jax.random.fold_in(problem.key, index), count)
        )
        yield Part(weight, layouts, args, shares, keys)


@compiled(static_argnums=0)
def _layouts(gradients: Gradients, fn: Partial, params: Params, args: tuple[Any, ...]) -> Known:
    """Read from the program: once for every function and all batches of equal shapes, whatever is in them."""
    leaves = checked_uses(gradients.of(fn), params, args)
    check_covered(params, leaves)
    return Known(layouts_of(leaves))


# -- arguments -------------------------------------------------------------------------------------


def checked_problem(
    fn: Any,
    params: Any,
    batches: Any,
    args: tuple[Any, ...],
    likelihood: Any,
    key: Any,
    num_samples: Any,
    weights: Any,
    positions: Any,
    max_width: Any,
    precision: Any,
) -> Problem:
    """The problem, all arguments of `moments` being what they must be."""
    _tree.check_floating(params)
    checked_function("fn", fn, "(params, *args)")
    check_listed(batches)
    check_weights(weights)
    check_precision(precision)
    checked_choice("positions", positions, ("expand", "reduce"))
    max_width = checked_count("max_width", max_width)
    if likelihood is not None:
        check_likelihood(likelihood)
    elif key is not None:
        raise ValueError("`likelihood` must be given with `key`: labels are drawn from it, got None.")
    if key is None and num_samples is not None:
        raise ValueError(f"`key` must be given with `num_samples`, got None with num_samples={num_samples}.")
    if key is not None:
        key = checked_any_key(key)
        num_samples = 1 if num_samples is None else checked_count("num_samples", num_samples)
    rules = Rules(Gradients(likelihood, num_samples), positions, max_width, precision)
    return Problem(as_pytree(fn), params, args, key, weights, rules)


def check_listed(batches: Any) -> None:
    """Raise a TypeError for what is no iterable of batches, or most likely one batch."""
    check_source(batches)
    if isinstance(batches, tuple) and all(isinstance(x, jax.Array | np.ndarray) for x in batches):
        raise TypeError(
            "`batches` must be an iterable of batches, got what looks like one batch, a "
            f"{type(batches).__name__}: put it into a list, `[batch]`."
        )
