"""Operations that work entry by entry: which axes they share, and where their result can be nonzero."""

import functools

import numpy as np

from hessjax.program._axes import Axes, Constraints, Flags, Nodes, axes_of, staying
from hessjax.program._program import Operation

# fmt: off
ZERO_AT_ZERO = frozenset((
    "neg", "abs", "sign", "sqrt", "cbrt", "sin", "tan", "tanh", "asin", "atan", "sinh", "asinh",
    "atanh", "expm1", "log1p", "floor", "ceil", "round", "erf", "erf_inv", "real", "imag", "conj",
    "convert_element_type", "copy", "copy_p", "stop_gradient", "square", "reduce_precision",
    "device_put", "sharding_constraint", "name", "optimization_barrier", "relu",
))
"""f(0) = 0."""
ZERO_AT_ZEROS = frozenset(("add", "sub", "add_any", "max", "min", "select_n", "clamp"))
"""f(0, 0, ...) = 0."""
ELEMENTWISE = ZERO_AT_ZERO | ZERO_AT_ZEROS | frozenset((
    "mul", "div", "pow", "integer_pow", "exp", "exp2", "log", "logistic", "rsqrt", "cos", "acos",
    "cosh", "acosh", "lgamma", "digamma", "erfc", "rem", "atan2", "nextafter", "eq", "ne", "lt", "le",
    "gt", "ge", "and", "or", "xor", "not", "is_finite",
))
# fmt: on


def elementwise(constraints: Constraints, operation: Operation, inputs: list[Axes]) -> list[Axes]:
    """Entry by entry."""
    if len(operation.outputs) > 1:  # an optimization barrier
        return inputs
    nodes = tuple(
        common_nodes(constraints, axis, n, inputs) for axis, n in enumerate(operation.outputs[0].shape)
    )
    nonzero = _can_be_nonzero(operation, inputs)
    varies = either([x.varies for x in inputs])
    if operation.name == "mul":  # what is exactly zero makes the other factor harmless
        a, b = inputs
        varies = either([a.varies & b.nonzero, a.nonzero & b.varies])
    data = [x for x in inputs if x.varies.any()]
    return [axes_of(nodes, nonzero, varies, chosen=bool(data) and all(x.chosen for x in data))]


def common_nodes(constraints: Constraints, axis: int, length: int, inputs: list[Axes]) -> Nodes:
    """The nodes of an axis that several arrays share; scalars and axes of length 1 fit any."""
    shared = [x.nodes[axis] for x in inputs if len(x.nodes) > axis and len(x.nodes[axis]) == length]
    # The first that has nodes of its own stands for all (a mask's have none), so that a leaf is recognised.
    chosen = next((nodes for nodes in shared if nodes.any()), staying(length)[0])
    for nodes in shared:
        chosen = constraints.share(chosen, nodes)
    return chosen


def _can_be_nonzero(operation: Operation, inputs: list[Axes]) -> Flags:
    """Where an elementwise operation can give anything but zero."""
    name, first = operation.name, inputs[0].nonzero
    numbers = [None if v.literal is None else np.asarray(v.literal) for v in operation.inputs]
    if name == "mul":
        return np.asarray(first & inputs[1].nonzero)
    if name == "div" or (name == "integer_pow" and operation.params["y"] > 0) or name in ZERO_AT_ZERO:
        return first
    if name == "pow" and numbers[1] is not None and numbers[1] > 0:
        return first
    if name in ("max", "min"):
        # max(x, c) with c ≤ 0 is zero at zero whatever c is: a leaky clip. The other way round for min.
        harmless = (lambda c: c <= 0) if name == "max" else (lambda c: c >= 0)
        inputs = [x for x, c in zip(inputs, numbers, strict=True) if c is None or not harmless(c)] or inputs
    if name == "clamp" and None not in (numbers[0], numbers[2]) and numbers[0] <= 0 <= numbers[2]:  # type: ignore[operator]
        return inputs[1].nonzero
    if name in ZERO_AT_ZEROS:
        cases = inputs[1:] if name == "select_n" else inputs  # what selects is no part of the result
        return either([x.nonzero for x in cases])
    return either([np.ones_like(x.nonzero) for x in inputs])


def either(flags: list[Flags | np.bool_]) -> Flags:
    return np.asarray(functools.reduce(np.logical_or, flags))
