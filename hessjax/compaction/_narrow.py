"""Which indices of which axes nothing depends on, and leaves without them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from hessjax.compaction._leaves import Indices
from hessjax.program._axes import Axes, Cause, Constraints, Flags, Kept, Nodes, axes_of, unknown
from hessjax.program._program import Body, Operation, Program, Value, evaluate, execute
from hessjax.program._readings import follow


class Narrowing(NamedTuple):
    """A program and what stays of it.

    Attributes:
        program: the program at its full widths.
        axes: those of every value.
        kept: which nodes stay.
        causes: why what no weight needs stays, each with the operations that brought it in.
    """

    program: Program
    axes: dict[Value, Axes]
    kept: Kept
    causes: dict[Cause, dict[str, None]]

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
        if operation.bodies:
            if not any(self._is_narrow(body) for body in operation.bodies):
                return execute(operation, values)
            return _LOOPS[operation.name](self, operation, values)
        if operation.name == "relu":  # with jax's derivative at zero, where `max` would give a half
            return [jax.nn.relu(values[0])]
        if operation.name == "slice":  # the entries that stay need not lie at equal steps any more
            return [_slice(operation, values[0], self.axes[operation.inputs[0]], self.kept)]
        outputs = [self.axes[v] for v in operation.outputs]
        following = _FOLLOWING.get(operation.name)
        if following is None:
            return execute(operation, values)
        return execute(operation, values, **following(operation, values, outputs, self.kept))

    def _is_narrow(self, body: Body) -> bool:
        values = (*body.inputs, *(v for each in body.operations for v in each.outputs))
        if any(self.shape(v) != v.shape for v in values):
            return True
        return any(self._is_narrow(inner) for each in body.operations for inner in each.bodies)

    def run(self, body: Body, inputs: list[Any]) -> list[Any]:
        """A body at its smaller widths."""
        return evaluate(body, inputs, self._execute)


class Asked(NamedTuple):
    """What is asked of the analysis.

    Attributes:
        may_shrink: for every leaf of the params, whether it may.
        drop_constants: whether what is the same for every input may go.
        relaxed: causes that are left out of account, to find out what they hold.
    """

    may_shrink: list[bool]
    drop_constants: bool
    relaxed: frozenset[Cause] = frozenset()


def analyse(
    program: Program, nonzero: list[Flags], asked: Asked, at_least: list[Indices] | None = None
) -> Narrowing:
    """Read the whole program, and find the least of it that computes the same.

    Args:
        program: what `read` made of the model.
        nonzero: for every leaf of the params, where it is not zero.
        asked: what may go.
        at_least: for every leaf what has to stay, whether it is needed or not.

    Returns:
        The program with what stays of it.
    """
    drop_constants = asked.drop_constants or "constant" in asked.relaxed
    constraints, body = Constraints(drop_constants, asked.relaxed), program.body
    known = {v: _argument(constraints, v) for v in body.inputs}
    params = [_leaf(constraints, v, flags) for v, flags in zip(program.leaves, nonzero, strict=True)]
    known |= dict(zip(program.leaves, params, strict=True))
    follow(constraints, body, known)
    # Who calls the model sees its outputs; args are fixed by whoever makes the data.
    for value in body.outputs:
        if value.literal is None:
            constraints.keep(*known[value].nodes)
    for axes, free, used in zip(params, asked.may_shrink, program.used, strict=True):
        if not used:
            constraints.keep(*axes.nodes)
        elif not free:
            constraints.keep(*axes.nodes, why="where")
    for axes, indices in zip(params, at_least or [], strict=False):
        constraints.keep(*(nodes[indices.get(a, slice(None))] for a, nodes in enumerate(axes.nodes)))
    kept = constraints.solve(nodes for axes in params for nodes in axes.nodes)
    return Narrowing(program, known, kept, constraints.causes)


def stays(kept: Kept, axes: Axes) -> tuple[int, ...]:
    """The shape of what stays of an array."""
    return tuple(int(kept[nodes].sum()) for nodes in axes.nodes)


def _argument(constraints: Constraints, value: Value) -> Axes:
    axes = unknown(value.shape)._replace(nodes=constraints.given(value.shape, "argument"))
    # Vectors, such as batch statistics, are what models keep; the rest is data.
    kept = "argument" in constraints.relaxed and len(value.shape) == 1
    return axes._replace(varies=np.zeros_like(axes.varies)) if kept else axes


def _leaf(constraints: Constraints, value: Value, nonzero: Flags) -> Axes:
    return axes_of(tuple(constraints.fresh(n) for n in value.shape), nonzero, np.zeros((), bool))


# -- parameters of operations that follow the widths ------------------------------------------------


def _broadcast(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"shape": stays(kept, outputs[0])}


def _reshape(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"new_sizes": stays(kept, outputs[0])}


def _conv(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    layout = operation.params["dimension_numbers"]
    # Each group has as many input channels as the kernel.
    groups = values[0].shape[layout.lhs_spec[1]] // values[1].shape[layout.rhs_spec[1]]
    return {} if operation.params["batch_group_count"] > 1 else {"feature_group_count": groups}


def _split(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    return {"sizes": tuple(_width(kept, x.nodes[operation.params["axis"]]) for x in outputs)}


def _pad(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    config = operation.params["padding_config"]
    return {
        "padding_config": tuple(_padding(kept, *each) for each in zip(config, outputs[0].nodes, strict=True))
    }


def _padding(kept: Kept, config: Sequence[Any], nodes: Nodes) -> tuple[int, int, int]:
    low, high, inside = map(int, config)
    # Where padding cuts off or goes between entries, no index was followed, and all of them stay.
    if low < 0 or high < 0 or inside:
        return low, high, inside
    return _width(kept, nodes[:low]), _width(kept, nodes[len(nodes) - high :]), 0


def _windows(operation: Operation, values: list[Any], outputs: list[Axes], kept: Kept) -> dict[str, Any]:
    """Windows that have an axis whole have all that stays of it; axes that they cut stay whole."""
    sizes = zip(operation.params["slice_sizes"], operation.inputs[0].shape, values[0].shape, strict=True)
    return {"slice_sizes": tuple(new if size == old else size for size, old, new in sizes)}


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
    "dynamic_slice": _windows,
    "gather": _windows,
    "pad": _pad,
    "reshape": _reshape,
    "split": _split,
}


# -- loops and branches ----------------------------------------------------------------------------


def _scan(narrowing: Narrowing, operation: Operation, values: list[Any]) -> list[Any]:
    (body,), carried, num_carry = operation.bodies, operation.carried, len(operation.carried)

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = narrowing.run(body, [*values[: carried.start], *carry, *xs])
        return outputs[:num_carry], outputs[num_carry:]

    rest = {name: operation.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(step, values[carried.start : carried.stop], values[carried.stop :], **rest)
    return [*carry, *ys]


def _while(narrowing: Narrowing, operation: Operation, values: list[Any]) -> list[Any]:
    (test, body), carried = operation.bodies, operation.carried
    seen = len(test.inputs) - len(carried)

    def again(state: Any) -> Any:
        return narrowing.run(test, [*values[:seen], *state])[0]

    def step(state: Any) -> Any:
        return narrowing.run(body, [*values[seen : carried.start], *state])

    return list(jax.lax.while_loop(again, step, values[carried.start :]))


def _cond(narrowing: Narrowing, operation: Operation, values: list[Any]) -> list[Any]:
    branches = [functools.partial(_branch, narrowing, body) for body in operation.bodies]
    return list(jax.lax.switch(values[0], branches, *values[1:]))


def _branch(narrowing: Narrowing, body: Body, *inputs: Any) -> list[Any]:
    return narrowing.run(body, list(inputs))


_LOOPS: dict[str, Callable[[Narrowing, Operation, list[Any]], list[Any]]] = {
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
