"""Which indices of which axes nothing depends on, and leaves without them."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from hessjax.program._axes import Axes, Constraints, Kept, Nodes, axes_of, staying, unknown
from hessjax.program._multiply_adds import equation_multiply_adds
from hessjax.program._program import Program, bind, evaluate
from hessjax.program._readings import read

Step: TypeAlias = tuple[list[Any], list[Axes]]
"""What is known of the inputs and of the results of one operation."""


class Narrowing(NamedTuple):
    """A program and what stays of it.

    Attributes:
        program: the program at its full widths.
        steps: the axes of every operation's inputs and results.
        kept: which nodes stay.
        leaves: the axes of the params' leaves.
    """

    program: Program
    steps: tuple[Step, ...]
    kept: Kept
    leaves: tuple[Axes, ...]

    def shapes(self) -> list[tuple[int, ...]]:
        """Those of all inputs: params that are narrow, and the args."""
        args: list[Any] = [v.aval for v in self.program.jaxpr.invars[len(self.leaves) :]]
        return [stays(self.kept, axes) for axes in self.leaves] + [x.shape for x in args]

    def __call__(self, leaves: list[Any]) -> list[Any]:
        """The outputs, from params that are narrow already, and the args."""
        steps = iter(self.steps)

        def apply(eqn: Any, inputs: list[Any]) -> list[Any]:
            values = [x.val if isinstance(x, Literal) else x for x in inputs]
            return _run(eqn, values, next(steps), self.kept)

        return evaluate(self.program, leaves, apply, self.program.consts)


def analyse(
    program: Program, leaves: list[Any], may_shrink: list[bool], *, drop_constants: bool
) -> Narrowing:
    """Read the whole program, and find the least of it that computes the same."""
    constraints, steps = Constraints(drop_constants), list[Step]()
    params = [_leaf(constraints, leaf) for leaf in leaves]

    def apply(eqn: Any, inputs: list[Any]) -> list[Axes]:
        outputs = read(constraints, eqn, inputs)
        steps.append((inputs, outputs))
        return outputs

    args = [unknown(getattr(v.aval, "shape", ())) for v in program.jaxpr.invars[len(leaves) :]]
    consts = [_constant(value) for value in program.consts]
    outputs = evaluate(program, [*params, *args], apply, consts)
    for axes in outputs:
        if not isinstance(axes, Literal):
            constraints.keep(*axes.nodes)
    for axes, free, used in zip(params, may_shrink, program.used, strict=True):
        if not (free and used):
            constraints.keep(*axes.nodes)
    kept = constraints.solve(nodes for axes in params for nodes in axes.nodes)
    return Narrowing(program, tuple(steps), kept, tuple(params))


def stays(kept: Kept, axes: Axes) -> tuple[int, ...]:
    """The shape of what stays of an array."""
    return tuple(int(kept[nodes].sum()) for nodes in axes.nodes)


def multiply_adds(narrowing: Narrowing, kept: Kept) -> int:
    """In the matrix products and convolutions of the program, at the widths of `kept`."""
    total = 0
    for eqn, (inputs, outputs) in zip(narrowing.program.eqns, narrowing.steps, strict=True):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            shapes = (stays(kept, axes) for axes in (*inputs[:2], outputs[0]))
            total += equation_multiply_adds(eqn, *shapes)
    return total


def _leaf(constraints: Constraints, leaf: Any) -> Axes:
    return axes_of(tuple(constraints.fresh(n) for n in np.shape(leaf)), _nonzero(leaf), np.zeros((), bool))


def _constant(value: Any) -> Axes:
    """A constant of the program: a rebuilt model may make another, so that nothing of it goes."""
    return axes_of(staying(*np.shape(value)), _nonzero(value), np.zeros((), bool))


def _nonzero(value: Any) -> np.ndarray:
    """Where an array is not exactly zero; everywhere, if it is no array of numbers."""
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
        return np.ones((1,) * np.ndim(value), bool)
    return np.asarray(np.asarray(value) != 0)


def _run(eqn: Any, values: list[Any], step: Step, kept: Kept) -> list[Any]:
    inputs, outputs = step
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return bind(eqn, values, shape=stays(kept, outputs[0]))
    if name == "reshape":
        return bind(eqn, values, new_sizes=stays(kept, outputs[0]))
    if name in FOLLOWING:
        return bind(eqn, values, **FOLLOWING[name](eqn, inputs, outputs, kept))
    if name == "slice":
        return [_slice(eqn, values[0], inputs[0], kept)]
    return bind(eqn, values)


def _conv(eqn: Any, inputs: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    features = inputs[0].nodes[eqn.params["dimension_numbers"].lhs_spec[1]]
    groups = eqn.params["feature_group_count"]  # above 1 and depthwise, or nothing goes
    return {"feature_group_count": groups * _width(kept, features) // len(features) if groups > 1 else 1}


def _split(eqn: Any, inputs: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"sizes": tuple(_width(kept, x.nodes[eqn.params["axis"]]) for x in outputs)}


def _pad(eqn: Any, inputs: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    config = eqn.params["padding_config"]
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return {}
    ends = zip(config, outputs[0].nodes, strict=True)
    stay = ((_width(kept, n[:low]), _width(kept, n[len(n) - high :]), 0) for (low, high, _), n in ends)
    return {"padding_config": tuple(stay)}


def _width(kept: Kept, nodes: Nodes) -> int:
    return int(kept[nodes].sum())


def _slice(eqn: Any, value: Any, axes: Axes, kept: Kept) -> Any:
    """The entries that were cut out, as far as they stay: where each lies among those that stay."""
    steps = eqn.params["strides"] or (1,) * len(axes.nodes)
    cuts = zip(axes.nodes, eqn.params["start_indices"], eqn.params["limit_indices"], steps, strict=True)
    for axis, (nodes, start, limit, step) in enumerate(cuts):
        flags = kept[nodes]
        if flags.all():
            value = jax.lax.slice_in_dim(value, start, limit, step, axis)
        else:
            chosen = np.arange(start, limit, step)
            value = jax.numpy.take(value, (flags.cumsum() - 1)[chosen[flags[chosen]]], axis)
    return value


FOLLOWING: dict[str, Callable[[Any, list[Any], list[Axes], Kept], dict[str, Any]]] = {
    "conv_general_dilated": _conv,
    "pad": _pad,
    "split": _split,
}


Indices: TypeAlias = dict[int, np.ndarray]
"""`{axis: indices}`"""


def take(leaf: Any, kept: Indices) -> Any:
    """The chosen entries, on the host: nothing to compile for every shape."""
    if not kept:
        return leaf
    value = np.asarray(leaf)
    for axis, indices in kept.items():
        value = np.take(value, indices, axis)
    return value if isinstance(leaf, np.ndarray) else jnp.asarray(value)


def shrink_leaf(
    path: str, leaf: Any, shapes: dict[str, tuple[int, ...]], kept: dict[str, Indices]
) -> tuple[Any, bool]:
    """A leaf cut like the param that its path ends in, and whether there is one.

    Raises:
        ValueError: if its shape does not show how to cut it.
    """
    owners = [name for name in shapes if name == "." or f"/{path}".endswith(f"/{name}")]
    if not owners:
        return leaf, False
    owner = max(owners, key=len)
    shape, like, cuts = np.shape(leaf), shapes[owner], kept.get(owner, {})
    if not cuts or np.size(leaf) <= 1 < np.prod(like):
        return leaf, shape == like or not cuts
    if shape[len(shape) - len(like) :] == like:
        ahead = len(shape) - len(like)
        return take(leaf, {axis + ahead: indices for axis, indices in cuts.items()}), True
    missing = [axis for axis in range(len(like)) if shape == like[:axis] + like[axis + 1 :]]
    if len(missing) != 1:
        raise ValueError(
            f"`tree` must have the params' shapes, but {path} has {shape} where {owner} had {like}, which "
            "does not show what belongs to a removed channel. Make it anew from the smaller params."
        )
    gone = missing[0]
    rest = {axis - (axis > gone): indices for axis, indices in cuts.items() if axis != gone}
    return take(leaf, rest), True
