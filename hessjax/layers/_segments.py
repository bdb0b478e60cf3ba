"""A program cut at the depths of its leaves: what runs up to the inputs of each, and what is kept for later.

No operation that examples enter runs twice: its results are handed on as long as a later depth asks for them.
What is made of leaves alone is made anew in every segment, from the leaves as they are by then.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from hessjax._core import _tree
from hessjax._core._types import Params
from hessjax.curvature._product import as_pytree
from hessjax.curvature._weights import of_each
from hessjax.layers._depths import levels_of
from hessjax.layers._gradients import Gradients
from hessjax.layers._taps import Run, read_uses
from hessjax.layers._uses import LeafUses, Use
from hessjax.program._program import Body, Operation, Program, Value, reached

Held = tuple[Array, ...]
"""The values that are handed on, with a leading axis of examples."""


def inputs_at(
    gradients: Gradients,
    wanted: tuple[int, ...],
    number: int,
    fn: Callable[..., Any],
    params: Params,
    args: tuple[Any, ...],
    held: Held,
) -> tuple[tuple[tuple[Array, ...], ...], Held]:
    """What goes into the leaves of a depth, and what the next one asks for.

    Args:
        gradients: whose.
        wanted: numbers of leaves that are covered: see `depths_of`.
        number: of the depth.
        fn: `fn(params, *args)`.
        params: the params.
        args: first the batch.
        held: what the depth before handed on; nothing at the first one.

    Returns:
        For every leaf of the depth and each of its uses the inputs, (examples, positions, stack, inputs).
    """
    called = gradients.of(fn)

    def of_example(example: tuple[Any, ...]) -> tuple[tuple[tuple[Array, ...], ...], Held]:
        (batch, own), *rest = example
        program, leaves = read_uses(called, params, (batch, *rest))
        plan = _Plan.of(program, leaves, wanted, len(jax.tree.leaves(batch)))
        flat = jax.tree.leaves((params, batch, as_pytree(called), *rest))
        # As a batch of one even results of operations have an axis of examples, which the program did not.
        return plan.run(number, [*flat, *(x[0] for x in own)])

    return of_each(of_example, ((args[0], held), *args[1:]))


class _Plan(NamedTuple):
    """What runs when.

    Attributes:
        body: the whole program.
        leaves: of every depth the uses of its leaves.
        asked: of every depth the values that its leaves meet, and all that goes into loops around them.
        cuts: of every depth the operations that these come from.
        entered: the operations that examples enter.
    """

    body: Body
    leaves: list[list[LeafUses]]
    asked: list[list[Value]]
    cuts: list[set[Operation]]
    entered: set[Operation]

    @staticmethod
    def of(program: Program, leaves: Sequence[LeafUses], wanted: tuple[int, ...], size: int) -> "_Plan":
        """Of a program whose batch has so many arrays."""
        body = program.body
        examples = reached(body, body.inputs[program.num_params : program.num_params + size])
        levels = [[leaves[leaf] for leaf in level] for level in levels_of(body, leaves, wanted)]
        asked = [[v for leaf in level for use in leaf.uses for v in _asked(use)] for level in levels]
        cuts = [_needed(body, values) for values in asked]
        entered = {o for o in body.operations if not examples.isdisjoint(o.outputs)}
        return _Plan(body, levels, asked, cuts, entered)

    def run(self, number: int, inputs: list[Any]) -> tuple[tuple[tuple[Array, ...], ...], Held]:
        """The inputs of the leaves of a depth, and what is handed on behind it."""
        uses = [use for leaf in self.leaves[number] for use in leaf.uses]
        met = [v for use in uses if not use.loops for v in _asked(use)]
        loops = {use.loops[0] for use in uses if use.loops}
        chosen = (self.cuts[number] - self._done(number)) | loops
        body = dataclasses.replace(
            self.body,
            inputs=(*self.body.inputs, *self._handed_on(number)),
            operations=tuple(o for o in self.body.operations if o in chosen),
            outputs=(*met, *self._handed_on(number + 1)),
        )
        run = Run.of([use for use in uses if use.loops])
        outputs, recorded = run.body(body, inputs, {})
        values = dict(zip(met, outputs, strict=False))

        def data(use: Use) -> Array | None:
            if use.loops:
                return recorded.get(run.places[use.operation])
            return values[_asked(use)[0]] if _asked(use) else None

        found = tuple(tuple(_inputs(use, data(use)) for use in leaf.uses) for leaf in self.leaves[number])
        return found, tuple(outputs[len(met) :])

    def _done(self, number: int) -> set[Operation]:
        """What has run before a depth."""
        return self.entered & set[Operation]().union(*self.cuts[:number])

    def _handed_on(self, number: int) -> list[Value]:
        """The results of it that this depth or a later one asks for, in the order of the program."""
        done = self._done(number)
        later = {v for cut in self.cuts[number:] for o in cut - done for v in o.inputs}
        later |= {v for values in self.asked[number:] for v in values}
        return [v for o in self.body.operations if o in done for v in o.outputs if v in later]


def _inputs(use: Use, data: Array | None) -> Array:
    inputs = use.inputs(data)
    return inputs if use.is_lookup else _tree.wide(inputs)


def _asked(use: Use) -> tuple[Value, ...]:
    """What a leaf meets; of a loop around it all that goes in."""
    if use.loops:
        return use.loops[0].inputs
    return () if use.data is None else (use.operation.inputs[use.data],)


def _needed(body: Body, values: Iterable[Value]) -> set[Operation]:
    """The operations that these values come from."""
    needed, found = set(values), set[Operation]()
    for operation in reversed(body.operations):
        if not needed.isdisjoint(operation.outputs):
            found.add(operation)
            needed |= set(operation.inputs)
    return found
