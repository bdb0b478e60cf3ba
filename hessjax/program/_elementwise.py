"""Operations that act on every entry by itself: axes are shared, and zero often stays zero."""

import functools
from typing import Any

import numpy as np
from jax.extend.core import Literal

from hessjax.program._axes import Axes, Constraints, Nodes, axes_of, staying
from hessjax.program._program import literal_value

# fmt: off
ZERO_AT_ZERO = frozenset((
    "neg", "abs", "sign", "sqrt", "cbrt", "sin", "tan", "tanh", "asin", "atan", "sinh", "asinh",
    "atanh", "expm1", "log1p", "floor", "ceil", "round", "erf", "erf_inv", "real", "imag", "conj",
    "convert_element_type", "copy", "copy_p", "stop_gradient", "square", "reduce_precision",
    "device_put", "sharding_constraint", "name", "optimization_barrier",
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


def elementwise(constraints: Constraints, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Entry by entry."""
    if eqn.primitive.multiple_results:  # an optimization barrier
        return inputs
    nodes = tuple(
        common_nodes(constraints, axis, n, inputs) for axis, n in enumerate(eqn.outvars[0].aval.shape)
    )
    nonzero = _nonzero(eqn, inputs)
    varies = _either([x.varies for x in inputs])
    if eqn.primitive.name == "mul":
        a, b = inputs
        varies = _either([a.varies & b.nonzero, a.nonzero & b.varies])
    return [axes_of(nodes, nonzero, varies)]


def common_nodes(constraints: Constraints, axis: int, length: int, inputs: list[Axes]) -> Nodes:
    """The nodes of an axis that several arrays share; scalars and axes of length 1 fit any."""
    shared = [x.nodes[axis] for x in inputs if len(x.nodes) > axis and len(x.nodes[axis]) == length]
    if length == 1 or not shared:
        return staying(length)[0]
    for nodes in shared[1:]:
        constraints.tie(shared[0], nodes)
    return shared[0]


def _nonzero(eqn: Any, inputs: list[Axes]) -> np.ndarray:
    """Where an elementwise operation can give anything but zero."""
    name, first = eqn.primitive.name, inputs[0].nonzero
    numbers = [literal_value(v) if isinstance(v, Literal) else None for v in eqn.invars]
    if name == "mul":
        return np.asarray(first & inputs[1].nonzero)
    if name == "div" or (name == "integer_pow" and eqn.params["y"] > 0) or name in ZERO_AT_ZERO:
        return first
    if name == "pow" and numbers[1] is not None and numbers[1] > 0:
        return first
    if name in ("max", "min"):
        harmless = (lambda c: c <= 0) if name == "max" else (lambda c: c >= 0)
        inputs = [x for x, c in zip(inputs, numbers, strict=True) if c is None or not harmless(c)] or inputs
    if name == "clamp" and None not in (numbers[0], numbers[2]) and numbers[0] <= 0 <= numbers[2]:  # type: ignore[operator]
        return inputs[1].nonzero
    if name in ZERO_AT_ZEROS:
        cases = inputs[1:] if name == "select_n" else inputs
        return _either([x.nonzero for x in cases])
    return _either([np.ones_like(x.nonzero) for x in inputs])


def _either(flags: list[Any]) -> np.ndarray:
    return np.asarray(functools.reduce(np.logical_or, flags))
