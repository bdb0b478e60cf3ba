"""Which indices of which axes nothing depends on, and leaves without them."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax.program._axes import Axes, Constraints, Kept, Nodes, axes_of, constant, nonzero_of, unknown
from hessjax.program._program import Operation, Program, Value, evaluate, execute
from hessjax.program._readings import follow

Indices: TypeAlias = dict[int, np.ndarray]
"""`{axis: indices}`"""


class Narrowing(NamedTuple):
    """A program and what stays of it.

    Attributes:
        program: the program at its full widths.
        axes: those of every value, outside loops and branches: what these touch stays whole.
        kept: which nodes stay.
    """

    program: Program
    axes: dict[Value, Axes]
    kept: Kept

    def shapes(self) -> list[tuple[int, ...]]:
        """Those of all inputs: params that are narrow, and the args."""
        return [self.shape(value) for value in self.program.body.inputs]

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of what stays of a value."""
        return stays(self.kept, self.axes[value]) if value in self.axes else value.shape

    def indices(self) -> list[Indices]:
        """For every leaf what stays of the axes that become shorter."""
        flags = [[self.kept[nodes] for nodes in self.axes[leaf].nodes] for leaf in self.program.leaves]
        return [{a: np.flatnonzero(f) for a, f in enumerate(each) if not f.all()} for each in flags]

    def __call__(self, leaves: list[Any]) -> list[Any]:
        """The outputs, from params that are narrow already, and the args."""
        return evaluate(self.program.body, leaves, self._execute)

    def _execute(self, operation: Operation, values: list[Any]) -> list[Any]:
        if operation.name == "slice":  # the entries that stay need not lie at equal steps any more
            return [_slice(operation, values[0], self.axes[operation.inputs[0]], self.kept)]
        outputs = [self.axes[v] for v in operation.outputs]
        following = _FOLLOWING.get(operation.name)
        if following is None:
            return execute(operation, values)
        return execute(operation, values, **following(operation, values, outputs, self.kept))


def analyse(
    program: Program, leaves: list[Any], may_shrink: list[bool], *, drop_constants: bool
) -> Narrowing:
    """Read the whole program, and find the least of it that computes the same."""
    constraints, body = Constraints(drop_constants), program.body
    params = [_leaf(constraints, leaf) for leaf in leaves]
    known = {v: unknown(v.shape) for v in body.inputs}
    known |= dict(zip(program.leaves, params, strict=True))
    known |= {v: constant(value) for v, value in body.consts.items()}
    follow(constraints, body, known)
    # Who calls the model sees its outputs; args are fixed by whoever makes the data.
    for value in body.outputs:
        if value.literal is None:
            constraints.keep(*known[value].nodes)
    for axes, free, used in zip(params, may_shrink, program.used, strict=True):
        if not (free and used):
            constraints.keep(*axes.nodes)
    kept = constraints.solve(nodes for axes in params for nodes in axes.nodes)
    return Narrowing(program, known, kept)


def stays(kept: Kept, axes: Axes) -> tuple[int, ...]:
    """The shape of what stays of an array."""
    return tuple(int(kept[nodes].sum()) for nodes in axes.nodes)


def _leaf(constraints: Constraints, leaf: Any) -> Axes:
    return axes_of(tuple(constraints.fresh(n) for n in np.shape(leaf)), nonzero_of(leaf), np.zeros((), bool))


# -- parameters of operations that follow the widths ------------------------------------------------


def _broadcast(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"shape": stays(kept, outputs[0])}


def _reshape(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"new_sizes": stays(kept, outputs[0])}


def _conv(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    groups = operation.params["feature_group_count"]
    if groups == 1:
        return {}
    # Depthwise, or nothing went: as many groups as channels, or as before.
    features = operation.params["dimension_numbers"].lhs_spec[1]
    return {"feature_group_count": groups * values[0].shape[features] // operation.inputs[0].shape[features]}


def _split(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"sizes": tuple(_width(kept, x.nodes[operation.params["axis"]]) for x in outputs)}


def _pad(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    config = operation.params["padding_config"]
    # Where padding cuts off or goes between entries, no index was followed, and all of them stay.
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return {}
    ends = zip(config, outputs[0].nodes, strict=True)
    stay = ((_width(kept, n[:low]), _width(kept, n[len(n) - high :]), 0) for (low, high, _), n in ends)
    return {"padding_config": tuple(stay)}


def _width(kept: Kept, nodes: Nodes) -> int:
    return int(kept[nodes].sum())


def _slice(operation: Operation, value: Array, axes: Axes, kept: Kept) -> Array:
    """The entries that were cut out, as far as they stay: where each lies among those that stay."""
    steps = operation.params["strides"] or (1,) * len(axes.nodes)
    cuts = zip(
        axes.nodes, operation.params["start_indices"], operation.params["limit_indices"], steps, strict=True
    )
    for axis, (nodes, start, limit, step) in enumerate(cuts):
        flags = kept[nodes]
        if flags.all():
            value = jax.lax.slice_in_dim(value, start, limit, step, axis)
        else:
            chosen = np.arange(start, limit, step)
            value = jax.numpy.take(value, (flags.cumsum() - 1)[chosen[flags[chosen]]], axis)
    return value


_FOLLOWING: dict[str, Callable[[Operation, list[Any], list[Axes], Kept], dict[str, Any]]] = {
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _conv,
    "pad": _pad,
    "reshape": _reshape,
    "split": _split,
}


# -- leaves -----------------------------------------------------------------------------------------


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
    # Of `kernel` and `Dense_0/kernel` both at the end of a path, the longer one is meant.
    owner = max(owners, key=len)
    shape, like, cuts = np.shape(leaf), shapes[owner], kept.get(owner, {})
    # optax puts arrays of size 1 where a leaf has no such moment.
    if not cuts or np.size(leaf) <= 1 < np.prod(like):
        return leaf, shape == like or not cuts
    if shape[len(shape) - len(like) :] == like:
        ahead = len(shape) - len(like)
        return take(leaf, {axis + ahead: indices for axis, indices in cuts.items()}), True
    # Adafactor keeps row and column sums of the second moments: the leaf's shape without one axis.
    missing = [axis for axis in range(len(like)) if shape == like[:axis] + like[axis + 1 :]]
    if len(missing) != 1:
        raise ValueError(
            f"`tree` must have the params' shapes, but {path} has {shape} where {owner} had {like}, which "
            "does not show what belongs to a removed channel. Make it anew from the smaller params."
        )
    gone = missing[0]
    rest = {axis - (axis > gone): indices for axis, indices in cuts.items() if axis != gone}
    return take(leaf, rest), True
