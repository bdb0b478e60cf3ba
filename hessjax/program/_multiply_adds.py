"""How many multiply-adds a model spends on each leaf of its params, counted from its jaxpr."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from hessjax._core import _tree
from hessjax._core._types import ModelFn, Params

_CONSTANT, _DATA = -1, -2
_Origin: TypeAlias = int
"""What a value is made of: the leaf of this index (and constants), nothing but constants, or data."""

_Walked: TypeAlias = tuple[list[_Origin], Counter[int]]
"""The origins of the outputs, and the multiply-adds of every leaf."""


def multiply_adds(model_fn: ModelFn, params: Params, *args: Any) -> dict[str, int]:
    """The multiply-adds of one call of a model, by the leaf of the params that they multiply with.

    Counted are matrix products and convolutions of which one side is a leaf, or made of leaves alone
    (transposed, cast, cut, masked, normalised: it then counts for the largest leaf in it). Products of data
    with data, such as the scores of attention, and elementwise operations are not counted.

    A convolution counts its padding too. A body under `scan` counts as often as it runs, a `while_loop` once,
    of the branches of a `cond` the dearest.

    Args:
        model_fn: `model_fn(params, *args) -> outputs`.
        params: pytree of real floating-point arrays.
        *args: a batch, as arrays or `jax.ShapeDtypeStruct`s. The count is that of the whole batch.

    Returns:
        The path of every leaf, and its multiply-adds.

    Cost:
        One trace; nothing is computed.

    Example:
        >>> import jax.numpy as jnp
        >>> from hessjax.program._multiply_adds import multiply_adds
        >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
        >>> multiply_adds(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 3)))
        {'bias': 0, 'kernel': 30}
    """
    closed = jax.make_jaxpr(lambda p, a: model_fn(p, *a))(params, args)
    sizes = [math.prod(x.shape) for x in closed.in_avals[: len(jax.tree.leaves(params))]]
    origins = [*range(len(sizes)), *[_DATA] * (len(closed.in_avals) - len(sizes))]
    _, counts = _walk(closed.jaxpr, origins, sizes)
    return {path: counts[index] for index, path in enumerate(_tree.leaf_paths(params))}


def _walk(jaxpr: Any, origins: list[_Origin], sizes: list[int]) -> _Walked:
    known: dict[Any, _Origin] = dict(zip(jaxpr.invars, origins, strict=True))
    counts: Counter[int] = Counter()

    def of(atom: Any) -> _Origin:
        return _CONSTANT if isinstance(atom, Literal) else known.get(atom, _CONSTANT)

    for equation in jaxpr.eqns:
        outs, inside = _equation(equation, [of(atom) for atom in equation.invars], sizes)
        known.update(zip(equation.outvars, outs, strict=True))
        counts.update(inside)
    return [of(atom) for atom in jaxpr.outvars], counts


def _equation(equation: JaxprEqn, ins: list[_Origin], sizes: list[int]) -> _Walked:
    inside = _INSIDE.get(equation.primitive.name, _call)(equation.params, ins, sizes)
    if inside is not None:
        return inside
    leaf = _largest(ins, sizes)
    counts = Counter({leaf: _products(equation)}) if leaf >= 0 else Counter[int]()
    return [_DATA if _DATA in ins else leaf] * len(equation.outvars), counts


def _largest(origins: Iterable[_Origin], sizes: list[int]) -> _Origin:
    return max((i for i in origins if i >= 0), key=lambda i: sizes[i], default=_CONSTANT)


def _products(equation: JaxprEqn) -> int:
    left, right = (*(x.aval.shape for x in equation.invars), (), ())[:2]  # type: ignore[attr-defined]
    return equation_multiply_adds(equation, left, right, equation.outvars[0].aval.shape)  # type: ignore[attr-defined]


def equation_multiply_adds(
    equation: JaxprEqn, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> int:
    """Those of one product or convolution at these widths: outputs times the terms of a sum."""
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return math.prod(out) * math.prod(left[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        _, *summed = params["dimension_numbers"].rhs_spec
        counted = math.prod(out) * math.prod(right[axis] for axis in summed)
        return counted // math.prod(params["lhs_dilation"])  # zeros between the inputs are no work
    return 0


# -- equations with a body -------------------------------------------------------------------------


def _call(params: dict[str, Any], ins: list[_Origin], sizes: list[int]) -> _Walked | None:
    """`jit`, `custom_jvp_call`, `checkpoint`, ...: a body that takes what the equation takes."""
    bodies = [params[name] for name in ("jaxpr", "call_jaxpr") if name in params]
    body = next((b.jaxpr if isinstance(b, ClosedJaxpr) else b for b in bodies), None)
    return _walk(body, ins, sizes) if body is not None and len(body.invars) == len(ins) else None


def _scan(params: dict[str, Any], ins: list[_Origin], sizes: list[int]) -> _Walked:
    start = params["num_consts"]
    end = start + params["num_carry"]  # whatever the carry starts from, data enters it
    outs, counts = _walk(params["jaxpr"].jaxpr, [*ins[:start], *[_DATA] * (end - start), *ins[end:]], sizes)
    return outs, Counter({leaf: params["length"] * count for leaf, count in counts.items()})


def _while(params: dict[str, Any], ins: list[_Origin], sizes: list[int]) -> _Walked:
    start = params["cond_nconsts"]
    end = start + params["body_nconsts"]
    return _walk(params["body_jaxpr"].jaxpr, [*ins[start:end], *[_DATA] * (len(ins) - end)], sizes)


def _cond(params: dict[str, Any], ins: list[_Origin], sizes: list[int]) -> _Walked:
    walked = [_walk(branch.jaxpr, ins[1:], sizes) for branch in params["branches"]]
    ends = zip(*(outs for outs, _ in walked), strict=True)
    outs = [_DATA if _DATA in origins else _largest(origins, sizes) for origins in ends]
    counts = Counter[int]()
    for _, branch in walked:
        counts |= branch  # the larger of the two, leaf by leaf
    return outs, counts


_INSIDE = {"scan": _scan, "while": _while, "cond": _cond}
