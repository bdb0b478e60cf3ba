"""A function as data: its operations in order, with the bodies of loops and branches; and how to run it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax

Leaves: TypeAlias = frozenset[int] | None
"""The leaves of the params that a value is made of, constants beside them; None where data enter it."""


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """One array of a program: equal to itself only, so that it can stand for what is known of it.

    Attributes:
        aval: its shape and dtype, as jax has them.
        leaves: what it is made of: the indices of leaves of the params (transposed, cast, cut, masked, ...),
            none of them for a constant; None where data, or the state of a loop, enter it.
        literal: the number that the program names in its place; None for every other value.
    """

    aval: Any
    leaves: Leaves = None
    literal: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; () for what is no array, such as a token."""
        return getattr(self.aval, "shape", ())


@dataclass(frozen=True, eq=False, slots=True)
class Body:
    """Operations that compute outputs from inputs: a whole program, the step of a loop, a branch.

    Attributes:
        inputs: what goes in.
        outputs: what comes out.
        operations: those that the outputs depend on, or that have effects, in order.
        consts: the constants that the function closed over, with their values.
        sources: for every input of a loop's step or a branch, what it is outside: a value as it is, one that
            is scanned over its first axis (and has one more), or None for the state that a loop carries.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operations: tuple["Operation", ...]
    consts: dict[Value, Any]
    sources: tuple[Value | None, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """One operation of a program.

    Attributes:
        eqn: the equation as jax has it; its `primitive` and `source_info`.
        name: the primitive's name; "scan", "while" and "cond" in whatever form jax has them.
        inputs: its operands.
        outputs: its results.
        bodies: the step of a `scan`; condition and step of a `while`; the branches of a `cond`. The inputs
            of a `scan` are what every step sees, what it carries, what it scans over, in this order.
        trips: how often the bodies run in one execution (one of the branches once); None for a `while`.
        carried: which inputs are the state that a loop starts from; a `scan` has its end as first outputs.
    """

    eqn: Any
    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    bodies: tuple[Body, ...] = ()
    trips: int | None = 1
    carried: range = range(0)

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's parameters: axes, sizes, `reverse`, ...; those of the object, where it is one."""
        return getattr(self.eqn.params.get("_prim"), "params", self.eqn.params)


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """What `fn(params, *args)` computes.

    Attributes:
        body: its inputs are the leaves of the params, then those of the args.
        num_params: how many of the inputs are leaves of the params.
        out_tree: the structure of what `fn` returns.
        rules: the functions in it with derivatives of their own, which the operations do not know of.
    """

    body: Body
    num_params: int
    out_tree: Any
    rules: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[Value, ...]:
        """The leaves of the params."""
        return self.body.inputs[: self.num_params]

    @property
    def used(self) -> list[bool]:
        """For every leaf of the params, whether the outputs depend on it."""
        needed = {v for operation in self.body.operations for v in operation.inputs}
        return [leaf in needed or leaf in self.body.outputs for leaf in self.leaves]


class Use(NamedTuple):
    """Where a leaf of the params, or something made of leaves alone, meets data.

    Attributes:
        operation: the one that it enters: a product, a sum with a bias, a gather, a loop that carries it.
        operand: which of the operation's inputs it is.
        axes: for every axis of this input, the axes of the leaf that run along it: several where they were
            merged, the same one twice where it was split, none where it was broadcast. None instead of all
            where an operation on the way (a gather, a sort) is not understood: which run where is not known.
        loops: the loops and branches around the operation, outermost first.
    """

    operation: Operation
    operand: int
    axes: tuple[tuple[int, ...], ...] | None
    loops: tuple[Operation, ...]

    @property
    def trips(self) -> int | None:
        """How often one call executes it, branches taken; None inside a `while` loop."""
        trips = [loop.trips for loop in self.loops]
        return None if None in trips else math.prod(n for n in trips if n is not None)


def reached(body: Body, seeds: Iterable[Value]) -> set[Value]:
    """All values that depend on these, in the bodies of loops and branches too."""
    found = set(seeds)
    for operation in body.operations:
        if found.isdisjoint(operation.inputs):
            continue
        found |= set(operation.outputs)
        for inner in operation.bodies:
            # What a loop carries may take in anything of the others.
            pairs = zip(inner.inputs, inner.sources, strict=True)
            found |= reached(inner, [v for v, source in pairs if source is None or source in found])
    return found


def evaluate(
    body: Body, inputs: Iterable[Any], apply: Callable[[Operation, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Run a body on arrays: `apply(operation, inputs) -> outputs` says what an operation does."""
    values = {**body.consts, **dict(zip(body.inputs, inputs, strict=True))}
    for operation in body.operations:
        outputs = apply(operation, [_look(values, v) for v in operation.inputs])
        values.update(zip(operation.outputs, outputs, strict=True))
    return [_look(values, v) for v in body.outputs]


def execute(operation: Operation, inputs: list[Any], **changed: Any) -> list[Any]:
    """The operation on arrays, some of its parameters changed."""
    if operation.name == "scan" and operation.eqn.primitive.name != "scan":
        return _execute_scan(operation, inputs)
    primitive = operation.eqn.primitive
    bound = primitive.get_bind_params({**operation.eqn.params, **changed})
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # jax before and since 0.10
    outputs = primitive.bind(*functions, *inputs, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def _execute_scan(operation: Operation, inputs: list[Any]) -> list[Any]:
    """A scan over mutable arrays: its equation wants them, here they are values."""
    (body,), carried, num_carry = operation.bodies, operation.carried, len(operation.carried)

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = evaluate(body, [*inputs[: carried.start], *carry, *xs], execute)
        return outputs[:num_carry], outputs[num_carry:]

    rest = {name: operation.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(step, inputs[carried.start : carried.stop], inputs[carried.stop :], **rest)
    return [*carry, *ys]


def _look(values: dict[Value, Any], value: Value) -> Any:
    return values[value] if value.literal is None else value.literal
