"""A program run with taps: what goes into the operations that leaves take part in, and what comes back."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core import _tree
from hessjax.curvature._product import as_pytree
from hessjax.layers._uses import LeafUses, Use, uses_of
from hessjax.program._program import Body, Operation, Program, evaluate, execute
from hessjax.program._tracing import read


class Tapped(NamedTuple):
    """What one use of a leaf has to do with one example.

    Attributes:
        inputs: a, (positions, stack, inputs); of an embedding the numbers of rows, (positions, stack).
        gradients: g, (rows, positions, stack, outputs): one for every vector that was pulled back.
    """

    inputs: Array
    gradients: Array


def read_uses(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...]
) -> tuple[Program, tuple[LeafUses, ...]]:
    """The program of `fn(params, *args)`, and what its leaves take part in, leaf by leaf.

    The arrays that a `Partial` carries are arguments of the program, as the others are.
    """
    bound, structure = jax.tree.flatten(as_pytree(fn))
    # A function made anew: what jax remembers of it goes with it, and with what it closes over.
    called = functools.partial(_called, structure)
    program = read(called, params, args[0], bound, *args[1:], to_differentiate=True)
    stop = program.num_params + len(jax.tree.leaves(args[0]))
    return program, uses_of(program, program.body.inputs[program.num_params : stop])


def _called(structure: Any, params: Any, batch: Any, bound: list[Any], *args: Any) -> Any:
    return jax.tree.unflatten(structure, bound)(params, batch, *args)


def tapped(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    cotangents: Callable[[Array], Array],
) -> tuple[tuple[Tapped, ...], ...]:
    """Inputs and output gradients of every use of every covered leaf, for one example.

    A zero is added to the result of each operation that a covered leaf takes part in, and the outputs are
    differentiated in these zeros: one forward pass, and one backward pass for every cotangent.

    Args:
        fn: `fn(params, *args)`, one array.
        params: the params.
        args: one example, as a batch of one, and the rest.
        cotangents: `(outputs) -> (rows, *outputs.shape)`: what is pulled back.
    """
    program, leaves = read_uses(fn, params, args)
    used = [use for leaf in leaves if leaf.is_covered for use in leaf.uses]
    run = Run.of(used)
    taps = {run.places[use.operation]: jnp.zeros(*_result(use)) for use in used}
    flat = jax.tree.leaves((params, args[0], as_pytree(fn), *args[1:]))
    (outputs,), pull_back, recorded = jax.vjp(lambda t: run.body(program.body, flat, t), taps, has_aux=True)
    gradients = jax.vmap(lambda t: pull_back([t])[0])(cotangents(outputs).astype(outputs.dtype))
    found = {o: (recorded.get(i), gradients[i]) for o, i in run.places.items()}
    return tuple(
        tuple(_of_use(use, *found[use.operation]) for use in leaf.uses if leaf.is_covered) for leaf in leaves
    )


def _result(use: Use) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the results of an operation, in all steps of the loops around it."""
    value = use.operation.outputs[0]
    return (*(loop.trips or 0 for loop in use.loops), *value.shape), value.aval.dtype


def _of_use(use: Use, data: Array | None, output: Array) -> Tapped:
    inputs = use.inputs(data)
    inputs = inputs if use.is_lookup else _tree.wide(inputs)
    return Tapped(inputs, jax.vmap(lambda g: use.gradients(_tree.wide(g), data))(output))


# -- running it ------------------------------------------------------------------------------------


def _nested(used: Iterable[Use]) -> dict[Operation, list[Operation]]:
    """For every loop, the tapped operations somewhere in it, each once."""
    inside: dict[Operation, dict[Operation, None]] = {}
    for use in used:
        for loop in use.loops:
            inside.setdefault(loop, {})[use.operation] = None
    return {loop: list(operations) for loop, operations in inside.items()}


@dataclasses.dataclass(frozen=True)
class Run:
    """How to run a program with taps.

    Attributes:
        places: the number of every tapped operation, which taps and records go by.
        data: of every tapped operation the operand to be recorded, if any.
        inside: the tapped operations in every loop that has some.
    """

    places: dict[Operation, int]
    data: dict[Operation, int | None]
    inside: dict[Operation, list[Operation]]

    @staticmethod
    def of(used: Sequence[Use]) -> "Run":
        """With these uses tapped."""
        places = {operation: i for i, operation in enumerate(dict.fromkeys(use.operation for use in used))}
        return Run(places, {use.operation: use.data for use in used}, _nested(used))

    def body(
        self, body: Body, inputs: Sequence[Any], taps: dict[int, Array]
    ) -> tuple[list[Any], dict[int, Array]]:
        """The outputs, and what was recorded; without taps it is recorded only."""
        recorded: dict[int, Array] = {}

        def apply(operation: Operation, values: list[Any]) -> Sequence[Any]:
            if operation in self.inside:
                outputs, found = self._scan(operation, values, taps)
                recorded.update(found)
                return outputs
            outputs = execute(operation, values)
            if operation not in self.data:
                return outputs
            if (operand := self.data[operation]) is not None:
                recorded[self.places[operation]] = values[operand]
            return [outputs[0] + taps[self.places[operation]]] if taps else outputs

        return evaluate(body, inputs, apply), recorded

    def _scan(
        self, operation: Operation, inputs: list[Any], taps: dict[int, Array]
    ) -> tuple[list[Any], dict[int, Array]]:
        """A loop with taps inside: its steps scan over them, and stack what is recorded."""
        (body,), carried = operation.bodies, operation.carried
        count = len(carried)

        def step(carry: list[Any], xs: tuple[list[Any], dict[int, Array]]) -> Any:
            outputs, recorded = self.body(body, [*inputs[: carried.start], *carry, *xs[0]], xs[1])
            return outputs[:count], (outputs[count:], recorded)

        places = [self.places[tapped] for tapped in self.inside[operation]]
        own = {i: taps[i] for i in places} if taps else {}
        rest = {name: operation.params[name] for name in ("length", "reverse", "unroll")}
        start, scanned = inputs[carried.start : carried.stop], inputs[carried.stop :]
        carry, (stacked, recorded) = jax.lax.scan(step, start, (scanned, own), **rest)
        return [*carry, *stacked], recorded
