"""Where values that are one leaf of the params, moved about, come from, and how every entry got there."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from hessjax.program._program import Body, Operation, Program, Value

Step: TypeAlias = tuple[Literal["reshape", "transpose", "flip"], tuple[int, ...]]
"""One move: the new shape, the order of the axes, or the axes that are turned round."""


class Moves(NamedTuple):
    """Moves that lose and copy nothing: each entry of the one array is one of the other.

    Attributes:
        shape: of the array that is moved.
        steps: one after the other.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    def then(self, kind: Literal["reshape", "transpose", "flip"], numbers: Sequence[int]) -> "Moves":
        """These, and one more, unless that moves nothing."""
        numbers = tuple(map(int, numbers))
        nothing = {"reshape": self.end, "transpose": tuple(range(len(self.end))), "flip": ()}[kind]
        return self if numbers == nothing else self._replace(steps=(*self.steps, (kind, numbers)))

    @property
    def end(self) -> tuple[int, ...]:
        """The shape of the array that they lead to."""
        return functools.reduce(_moved_shape, self.steps, self.shape)

    def apply(self, x: Any) -> Any:
        """The array moved; one of numpy's stays one."""
        return functools.reduce(_moved, self.steps, x)

    def undo(self, x: Any) -> Any:
        """The array moved back."""
        shapes = [self.shape]
        for step in self.steps:
            shapes.append(_moved_shape(shapes[-1], step))
        for step, before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            x = _moved(x, _inverse(step, before))
        return x


def _moved_shape(shape: tuple[int, ...], step: Step) -> tuple[int, ...]:
    kind, numbers = step
    if kind == "reshape":
        return numbers
    return tuple(shape[axis] for axis in numbers) if kind == "transpose" else shape


def _moved(x: Any, step: Step) -> Any:
    kind, numbers = step
    if kind == "flip":
        return (np if isinstance(x, np.ndarray) else jnp).flip(x, numbers)
    return x.reshape(numbers) if kind == "reshape" else x.transpose(numbers)


def _inverse(step: Step, before: tuple[int, ...]) -> Step:
    kind, numbers = step
    if kind == "reshape":
        return "reshape", before
    return ("transpose", tuple(map(int, np.argsort(numbers)))) if kind == "transpose" else step


class Origin(NamedTuple):
    """What a value is: one leaf of the params, moved, times a number, and perhaps copied along axes.

    Attributes:
        leaf: which.
        moves: from the leaf to the value, with length 1 along the axes that it is copied along, and the axes
            that loops around it scan over in front.
        scans: these loops, outermost first.
        factor: a number that the leaf was multiplied with on the way.
    """

    leaf: int
    moves: Moves
    scans: tuple[Operation, ...] = ()
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one step of the loops: the shape of the value, where it is not copied."""
        return self.moves.end[len(self.scans) :]

    def then(self, kind: Literal["reshape", "transpose", "flip"], numbers: Sequence[int]) -> "Origin":
        """With a move within a step."""
        front = self.moves.end[: len(self.scans)]
        if kind == "reshape":
            return self._replace(moves=self.moves.then(kind, (*front, *numbers)))
        inside = [axis + len(front) for axis in numbers]
        inside = inside if kind == "flip" else [*range(len(front)), *inside]
        return self._replace(moves=self.moves.then(kind, inside))


def origins(program: Program) -> dict[Value, Origin | str]:
    """For every value that is made of leaves, where it comes from.

    Args:
        program: what `read` made of a function.

    Returns:
        For values that are one leaf, moved, the way there; for others the name of the operation that made
        more of it: "mul", where a mask or another leaf is multiplied in.
    """
    leaves = {leaf: Origin(i, Moves(leaf.shape)) for i, leaf in enumerate(program.leaves)}
    found: dict[Value, Origin | str] = dict(leaves)
    _follow(program.body, found)
    return found


def _follow(body: Body, found: dict[Value, Origin | str]) -> None:
    for operation in body.operations:
        for inner in operation.bodies:
            found.update(_entered(operation, inner, found))
            _follow(inner, found)
        made = [i for i, v in enumerate(operation.inputs) if v in found]
        if made:
            found.update(_left(operation, made, found))


def _entered(
    operation: Operation, inner: Body, found: dict[Value, Origin | str]
) -> Iterator[tuple[Value, Origin | str]]:
    """What the inputs of a loop's step, or of a branch, are."""
    for value, source in zip(inner.inputs, inner.sources, strict=True):
        if source is not None and source in found:
            origin = found[source]
            scanned = len(value.shape) < len(source.shape)
            if scanned and isinstance(origin, Origin):
                origin = _scanned(operation, origin)
            yield value, origin


def _scanned(operation: Operation, origin: Origin) -> Origin | str:
    if origin.shape[0] != operation.trips:
        return "broadcast_in_dim"  # copied along the axis that is scanned over
    return origin._replace(scans=(*origin.scans, operation))


def _left(
    operation: Operation, made: list[int], found: dict[Value, Origin | str]
) -> Iterator[tuple[Value, Origin | str]]:
    """What the results of an operation are, of which these operands are made of leaves."""
    if operation.name == "optimization_barrier":
        yield from ((operation.outputs[i], found[operation.inputs[i]]) for i in made)
        return
    origin = found[operation.inputs[made[0]]]
    move = _MOVES.get(operation.name)
    for value in operation.outputs:
        if value.leaves is None:  # it meets data: no longer a leaf
            continue
        if isinstance(origin, str) and len(made) == 1:
            yield value, origin
        elif move is None or len(made) > 1 or not isinstance(origin, Origin) or not _is_real(value):
            yield value, operation.name
        else:
            yield value, move(operation, origin) or operation.name


def _is_real(value: Value) -> bool:
    return bool(jnp.issubdtype(value.aval.dtype, jnp.floating))


# -- moves -----------------------------------------------------------------------------------------


def _same(operation: Operation, origin: Origin) -> Origin:
    return origin


def _reshape(operation: Operation, origin: Origin) -> Origin | None:
    if math.prod(origin.shape) != math.prod(operation.outputs[0].shape):
        return None  # after a copy
    # A `vmap` of a convolution gives its axes another order on the way.
    order = operation.params.get("dimensions") if operation.name == "reshape" else None
    origin = origin if order is None else origin.then("transpose", order)
    return origin.then("reshape", operation.outputs[0].shape)


def _times(operation: Operation, origin: Origin) -> Origin | None:
    """By a number that the program names: `w * 0.5`, `w / 2`."""
    first, second = operation.inputs
    number = first.literal if second.literal is None else second.literal
    if np.ndim(number) or number is None or (operation.name == "div" and first.literal is not None):
        return None
    factor = float(number)
    return origin._replace(factor=origin.factor * (1 / factor if operation.name == "div" else factor))


def _negative(operation: Operation, origin: Origin) -> Origin:
    return origin._replace(factor=-origin.factor)


def _squeeze(operation: Operation, origin: Origin) -> Origin:
    gone = {axis % len(origin.shape) for axis in operation.params["dimensions"]}
    return origin.then("reshape", [n for axis, n in enumerate(origin.shape) if axis not in gone])


def _transpose(operation: Operation, origin: Origin) -> Origin:
    return origin.then("transpose", operation.params["permutation"])


def _flip(operation: Operation, origin: Origin) -> Origin | None:
    axes = operation.params["dimensions"]
    whole = all(origin.shape[axis] == operation.inputs[0].shape[axis] for axis in axes)
    return origin.then("flip", axes) if whole else None


def _broadcast(operation: Operation, origin: Origin) -> Origin:
    """New axes have length 1, whatever they are copied to: which copy it is, the value does not tell."""
    shape = [1] * len(operation.outputs[0].shape)
    for axis, place in enumerate(operation.params["broadcast_dimensions"]):
        shape[place] = origin.shape[axis]
    return origin.then("reshape", shape)


_MOVES: dict[str, Callable[[Operation, Origin], Origin | None]] = {
    **dict.fromkeys(["convert_element_type", "reduce_precision", "copy", "copy_p", "name"], _same),
    **dict.fromkeys(["sharding_constraint", "reshard", "device_put"], _same),
    **dict.fromkeys(["mul", "div"], _times),
    "broadcast_in_dim": _broadcast,
    "expand_dims": _reshape,
    "neg": _negative,
    "reshape": _reshape,
    "rev": _flip,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
"""What only moves the entries of an array, or copies them, or multiplies all with one number."""
