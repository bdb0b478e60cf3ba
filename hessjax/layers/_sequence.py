"""Moments of what goes into layers of a pruned network and of the dense one, depth by depth."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core._compiled import compiled
from hessjax._core._sources import Source
from hessjax._core._types import Params
from hessjax.curvature._batches import add, zero
from hessjax.curvature._product import at_precision, explained
from hessjax.layers._capture import Layout
from hessjax.layers._depths import Depth, depths_of
from hessjax.layers._moments import mean
from hessjax.layers._problem import Layouts, Part, Problem, Rules, parts_of
from hessjax.layers._segments import Held, inputs_at
from hessjax.layers._sides import by_position


class Cross(NamedTuple):
    """Second moments of the inputs of a leaf, summed over uses and positions; None for rows of embeddings.

    Attributes:
        hessian: E[â âᵀ] of the network as it is, (stack, inputs, inputs).
        both: E[â aᵀ] with those of the dense one.
    """

    hessian: Any
    both: Any


@dataclasses.dataclass
class Walk:
    """Depth by depth through a network, the dense one and the one as it is by then side by side.

    Attributes:
        problem: whose dense network.
        wanted: the leaves that are fitted.
        parts: the batches.
        held: what the segments before hand on, of every batch: of the dense network, and of the other.
        after: what the one that was looked at last does.
    """

    problem: Problem
    wanted: tuple[int, ...]
    parts: list[Part]
    held: list[tuple[Held, Held]]
    after: list[tuple[Held, Held]] = dataclasses.field(default_factory=list)

    @staticmethod
    def of(problem: Problem, batches: Source, wanted: tuple[int, ...]) -> "Walk":
        """At the beginning. The batches are gone through once, and kept."""
        parts = list(parts_of(problem, batches))
        return Walk(problem, wanted, parts, [((), ())] * len(parts))

    @property
    def depths(self) -> tuple[Depth, ...]:
        """The leaves in the order in which the program uses them."""
        data = self.problem.fn, self.problem.params, self.parts[0].args
        return depths_of.eval_shape(self.problem.rules.gradients, self.wanted, *data).value

    def crosses(self, number: int, leaves: tuple[int, ...], current: Params) -> tuple[Cross, ...]:
        """The moments of what goes into the leaves of a depth, over all batches."""
        total, count, self.after = None, 0.0, []
        for part, held in zip(self.parts, self.held, strict=True):
            found, after = self._look(number, leaves, current, part, held)
            self.after.append(after)
            total = add(zero(found) if total is None else total, part.weight, found)
            count += part.weight
        return mean(total, count)

    def go_on(self, number: int, depths: tuple[Depth, ...], current: Params) -> None:
        """To the next depth, the leaves of this one being what they will be."""
        self.held = self.after  # nothing in it depends on them
        if depths[number].returns:
            self.held = [self._again(depths[: number + 1], current, part) for part in self.parts]

    def _again(self, depths: tuple[Depth, ...], current: Params, part: Part) -> tuple[Held, Held]:
        """From the beginning: leaves that were used before as well are others now."""
        held: tuple[Held, Held] = (), ()
        for number, depth in enumerate(depths):
            _, held = self._look(number, depth.leaves, current, part, held)
        return held

    def _look(
        self, number: int, leaves: tuple[int, ...], current: Params, part: Part, held: tuple[Held, Held]
    ) -> tuple[tuple[Cross, ...], tuple[Held, Held]]:
        settings = self.problem.rules, tuple(part.layouts[leaf] for leaf in leaves), self.wanted, number
        data = self.problem.fn, self.problem.params, current, part.args, part.shares
        with explained("fn"):
            return _part_crosses(*settings, *data, held)


@compiled(static_argnums=(0, 1, 2, 3))
def _part_crosses(
    rules: Rules,
    layouts: Layouts,
    wanted: tuple[int, ...],
    number: int,
    fn: Partial,
    dense: Params,
    current: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."],
    held: tuple[Held, Held],
) -> tuple[tuple[Cross, ...], tuple[Held, Held]]:
    with at_precision(rules.precision):
        before, now = (
            inputs_at(rules.gradients, wanted, number, fn, params, args, own)
            for params, own in zip((dense, current), held, strict=True)
        )
        found = zip(layouts, before[0], now[0], strict=True)
        return tuple(_cross(*each, shares) for each in found), (before[1], now[1])


def _cross(
    layouts: tuple[Layout, ...], dense: tuple[Array, ...], current: tuple[Array, ...], shares: Array
) -> Cross:
    if layouts[0].is_lookup:
        return Cross(None, None)
    found = [_of_use(*use, shares) for use in zip(layouts, dense, current, strict=True)]
    return Cross(sum(x.hessian for x in found), sum(x.both for x in found))


def _of_use(layout: Layout, dense: Array, current: Array, shares: Array) -> Cross:
    weights = by_position(layout.positions, shares).astype(current.dtype)
    weighed = current * (weights * weights.shape[1])[..., None, None]
    hessian = jnp.einsum("npsi,npsj->sij", weighed, current)
    return Cross(hessian, jnp.einsum("npsi,npsj->sij", weighed, dense))
