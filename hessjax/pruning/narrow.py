"""A program run at smaller widths: operations that name a shape are told the new one."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.extend.core import Literal

from hessjax.pruning.axes import Axes, Constraints, Kept, Nodes, axes_of, staying, unknown
from hessjax.pruning.program import Program, bind, evaluate
from hessjax.pruning.readings import read

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


def width(kept: Kept, nodes: Nodes) -> int:
    """How many indices of an axis stay."""
    return int(kept[nodes].sum())


def _leaf(constraints: Constraints, leaf: Any) -> Axes:
    return axes_of(tuple(constraints.fresh(n) for n in np.shape(leaf)), _nonzero(leaf), np.zeros((), bool))


def _constant(value: Any) -> Axes:
    """A constant of the program: a rebuilt model may make another, so that nothing of it goes."""
    return axes_of(staying(*np.shape(value)), _nonzero(value), np.zeros((), bool))


def _nonzero(value: Any) -> np.ndarray:
    """Where an array is not exactly zero; everywhere, if it is no array of numbers."""
    if isinstance(value, jax.ShapeDtypeStruct) or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return np.ones((1,) * len(np.shape(value)), bool)
    return np.asarray(np.asarray(value) != 0)


def _run(eqn: Any, values: list[Any], step: Step, kept: Kept) -> list[Any]:
    inputs, outputs = step
    name, shapes = eqn.primitive.name, [tuple(width(kept, n) for n in x.nodes) for x in outputs]
    if name == "broadcast_in_dim":
        return bind(eqn, values, shape=shapes[0])
    if name == "reshape":
        return bind(eqn, values, new_sizes=shapes[0])
    if name in FOLLOWING:
        return bind(eqn, values, **FOLLOWING[name](eqn, inputs, outputs, kept))
    if name == "slice":
        return [_slice(eqn, values[0], inputs[0], kept)]
    return bind(eqn, values)


def _conv(eqn: Any, inputs: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    groups, features = eqn.params["feature_group_count"], inputs[0].nodes[eqn.params["dimension_numbers"].lhs_spec[1]]
    return {"feature_group_count": groups * width(kept, features) // len(features) if groups > 1 else 1}


def _split(eqn: Any, inputs: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"sizes": tuple(width(kept, x.nodes[eqn.params["axis"]]) for x in outputs)}


def _pad(eqn: Any, inputs: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    ends = zip(eqn.params["padding_config"], outputs[0].nodes, strict=True)
    return {
        "padding_config": tuple(
            (width(kept, nodes[:low]), width(kept, nodes[len(nodes) - high :]), inside) if not inside else (low, high, inside)
            for (low, high, inside), nodes in ends
        )
    }


def _slice(eqn: Any, value: Any, axes: Axes, kept: Kept) -> Any:
    """The entries that were cut out, as far as they stay: where each lies among those that stay."""
    steps = eqn.params["strides"] or (1,) * len(axes.nodes)
    cuts = zip(axes.nodes, eqn.params["start_indices"], eqn.params["limit_indices"], steps, strict=True)
    for axis, (nodes, start, limit, step) in enumerate(cuts):
        stays = kept[nodes]
        if stays.all():
            value = jax.lax.slice_in_dim(value, start, limit, step, axis)
        else:
            chosen = np.arange(start, limit, step)
            value = jax.numpy.take(value, (stays.cumsum() - 1)[chosen[stays[chosen]]], axis)
    return value


FOLLOWING: dict[str, Callable[[Any, list[Any], list[Axes], Kept], dict[str, Any]]] = {
    "conv_general_dilated": _conv,
    "pad": _pad,
    "split": _split,
}
