"""Moments of what goes into layers of a pruned network and of the dense one, depth by depth."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core._compiled import compiled
from hessjax._core._sources import Source
from hessjax._core._types import Key, Params
from hessjax.curvature._batches import add, zero
from hessjax.curvature._product import at_precision, explained
from hessjax.layers._capture import Layout
from hessjax.layers._depths import depths_of
from hessjax.layers._gradients import tapped_batch
from hessjax.layers._moments import mean
from hessjax.layers._problem import Layouts, Problem, Rules, parts_of
from hessjax.layers._sides import by_position
from hessjax.layers._taps import Tapped


class Cross(NamedTuple):
    """Second moments of the inputs of a leaf, summed over uses and positions; None for rows of embeddings.

    Attributes:
        hessian: E[â âᵀ] of the network as it is, (stack, inputs, inputs).
        both: E[â aᵀ] with those of the dense one.
    """

    hessian: Any
    both: Any


class Stage(NamedTuple):
    """Leaves that are fitted together.

    Attributes:
        leaves: their numbers.
        parts: of the stack of matrices of each, which.
    """

    leaves: tuple[int, ...]
    parts: tuple[slice, ...]


def stages_of(problem: Problem, batches: Source, wanted: tuple[int, ...]) -> Iterator[Stage]:
    """The leaves in the order in which the program uses them."""
    first = next(iter(parts_of(problem, batches)))
    data = problem.fn, problem.params, first.args
    for depth in depths_of.eval_shape(problem.rules.gradients, wanted, *data).value:
        for parts in depth.parts:
            yield Stage(depth.leaves, tuple(slice(*part) for part in parts))


def crossed(problem: Problem, batches: Source, current: Params, leaves: tuple[int, ...]) -> tuple[Cross, ...]:
    """The moments of these leaves, over all batches."""
    total, count = None, 0.0
    for part in parts_of(problem, batches):
        data = problem.fn, problem.params, current, part.args, part.shares, part.keys
        with explained("fn"):
            found = _part_crosses(problem.rules, part.layouts, leaves, *data)
        total = add(zero(found) if total is None else total, part.weight, found)
        count += part.weight
    return mean(total, count)


@compiled(static_argnums=(1, 2))
def _part_crosses(
    rules: Rules,
    layouts: Layouts,
    leaves: tuple[int, ...],
    fn: Partial,
    dense: Params,
    current: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."],
    keys: Key | None,
) -> tuple[Cross, ...]:
    # Of both only inputs are read: the compiler drops the backward passes, and all that comes behind.
    with at_precision(rules.precision):
        networks = [
            tapped_batch(rules.gradients, fn, params, args, shares, keys) for params in (dense, current)
        ]
        return tuple(_cross(layouts[i], networks[0][i], networks[1][i], shares) for i in leaves)


def _cross(
    layouts: tuple[Layout, ...], dense: tuple[Tapped, ...], current: tuple[Tapped, ...], shares: Array
) -> Cross:
    if layouts[0].is_lookup:
        return Cross(None, None)
    found = [_of_use(*use, shares) for use in zip(layouts, dense, current, strict=True)]
    return Cross(sum(x.hessian for x in found), sum(x.both for x in found))


def _of_use(layout: Layout, dense: Tapped, current: Tapped, shares: Array) -> Cross:
    weights = by_position(layout.positions, shares).astype(current.inputs.dtype)
    weighed = current.inputs * (weights * weights.shape[1])[..., None, None]
    hessian = jnp.einsum("npsi,npsj->sij", weighed, current.inputs)
    return Cross(hessian, jnp.einsum("npsi,npsj->sij", weighed, dense.inputs))
