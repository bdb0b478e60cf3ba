"""Jaxprs of every version of jax, read into programs: calls opened, loops and branches with their bodies."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import Literal

from hessjax.program._program import Body, Leaves, Operation, Program, Value


def read(fn: Callable[..., Any], params: Any, *args: Any, to_differentiate: bool = False) -> Program:
    """The program of `fn` for inputs of these shapes. It is traced; nothing is compiled or run.

    Calls (`jit`, `checkpoint`, functions with derivatives of their own) are opened where they stand. Mutable
    arrays that are read and written whole become the values that they hold.

    Args:
        fn: `fn(params, *args)`, any pytrees in and out.
        params: arrays or `jax.ShapeDtypeStruct`s.
        *args: the same.
        to_differentiate: functions with derivatives of their own stay closed, all that no leaf enters and
            those not of jax; arrays that `fn` closes over, and rows looked up in a leaf, count as data.

    Returns:
        The program.

    Raises:
        NotImplementedError: if a part of a mutable array is read or written, or a loop of an older form
            holds one.

    Cost:
        One trace.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    if not closed.out_avals:
        raise TypeError("`model_fn` must return arrays, got none.")
    num_params = len(jax.tree.leaves(params))
    leaves = [frozenset((i,)) if i < num_params else None for i in range(len(closed.in_avals))]
    inputs = [Value(aval, made_of) for aval, made_of in zip(closed.in_avals, leaves, strict=True)]
    rules = tuple(dict.fromkeys(_rules(closed)))
    body = _body(_Frame(to_differentiate), closed, inputs)
    return Program(body, num_params, jax.tree.structure(shapes), rules)


@dataclass(frozen=True, slots=True)
class _Frame:
    """A body that is being read.

    Attributes:
        to_differentiate: see `read`.
        operations: those read so far.
        consts: the constants so far.
        held: what every mutable array holds at this point of the program.
    """

    to_differentiate: bool = False
    operations: list[Operation] = field(default_factory=list)
    consts: dict[Value, Any] = field(default_factory=dict)
    held: dict[Value, Value] = field(default_factory=dict)


def _body(outer: _Frame, closed: Any, inputs: Sequence[Value], sources: Sequence[Value | None] = ()) -> Body:
    frame = _Frame(outer.to_differentiate)
    return _close(frame, inputs, _open(frame, closed, inputs), sources)


def _close(
    frame: _Frame, inputs: Sequence[Value], outputs: Sequence[Value], sources: Sequence[Value | None]
) -> Body:
    """The body that was read, without what nothing depends on: XLA computes none of it either."""
    needed, kept = set(outputs), list[Operation]()
    for operation in reversed(frame.operations):
        if operation.eqn.effects or not needed.isdisjoint(operation.outputs):
            needed |= set(operation.inputs)
            kept.append(operation)
    return Body(tuple(inputs), tuple(outputs), tuple(reversed(kept)), frame.consts, tuple(sources))


def _open(frame: _Frame, closed: Any, inputs: Sequence[Value]) -> list[Value]:
    """Read a jaxpr into the frame, where the values that go in are known already."""
    jaxpr = getattr(closed, "jaxpr", closed)  # since jax 0.12 they are one; before, a call may have either
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for variable, const in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
        known[variable] = Value(variable.aval, None if frame.to_differentiate else frozenset())
        frame.consts[known[variable]] = const
    for eqn in jaxpr.eqns:
        read_eqn = _EQUATIONS.get(eqn.primitive.name, _operation)
        outputs = read_eqn(frame, eqn, [_atom(known, v) for v in eqn.invars])
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [_atom(known, v) for v in jaxpr.outvars]


def _atom(known: dict[Any, Value], atom: Any) -> Value:
    return Value(atom.aval, frozenset(), atom.val) if isinstance(atom, Literal) else known[atom]


def _made_of(values: Iterable[Value]) -> Leaves:
    """The leaves of several values together."""
    leaves = [v.leaves for v in values]
    return None if None in leaves else frozenset[int]().union(*(x for x in leaves if x is not None))


def _operation(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    """One that is what it says."""
    leaves = [_made_of(inputs)] * len(eqn.outvars)
    if eqn.primitive.name == "optimization_barrier":  # it has every operand as a result, and mixes none
        leaves = [v.leaves for v in inputs]
    if frame.to_differentiate and eqn.primitive.name == "gather":
        leaves = [None]  # a lookup, even where the rows are always the same, as those of positions
    outputs = [Value(v.aval, made_of) for v, made_of in zip(eqn.outvars, leaves, strict=True)]
    _add(frame, eqn, eqn.primitive.name, inputs, outputs)
    return outputs


def _add(
    frame: _Frame, eqn: Any, name: str, inputs: Sequence[Value], outputs: Sequence[Value], **rest: Any
) -> None:
    if any(_is_mutable(v) for v in inputs):
        raise NotImplementedError(
            f"The program must read and write mutable arrays whole, outside loops and branches, got `{name}` "
            f"on {', '.join(str(v.aval) for v in inputs)}. Carry the values instead."
        )
    frame.operations.append(Operation(eqn, name, tuple(inputs), tuple(outputs), **rest))


def _call(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    """One that merely calls a function; it stays an operation where it takes something else as well."""
    # What only rearranges leaves has to be seen; of jax's own the inside has the same derivatives.
    opened = f" at {_JAX}" in _source(eqn) and any(v.leaves for v in inputs)
    if frame.to_differentiate and eqn.primitive.name.startswith(_RULED) and not opened:
        return _operation(frame, eqn, inputs)
    # jit and remat have a `jaxpr`, custom rules a `call_jaxpr` (a `fun_jaxpr` before), custom_vmap a `call`.
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
    inner = next((eqn.params[name] for name in names if eqn.params.get(name) is not None), None)
    if inner is None or len(getattr(inner, "jaxpr", inner).invars) != len(inputs):
        return _operation(frame, eqn, inputs)
    return _open(frame, inner, inputs)


def _custom_jvp(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    """Opened too, but for jax's own ReLU: of its inside, max(x, 0), the derivative at zero is a half."""
    if _source(eqn).startswith(f"relu at {_JAX}"):
        outputs = [Value(v.aval, _made_of(inputs)) for v in eqn.outvars]
        _add(frame, eqn, "relu", inputs, outputs)
        return outputs
    return _call(frame, eqn, inputs)


_JAX, _RULED = os.path.dirname(jax.__file__), ("custom_jvp", "custom_vjp")


def _source(eqn: Any) -> str:
    """The function that a call is of, and where it stands: `name at file:line`."""
    inner = eqn.params.get("call_jaxpr") or eqn.params.get("fun_jaxpr")
    info = getattr(getattr(inner, "jaxpr", inner), "debug_info", None)
    return str(getattr(info, "func_src_info", None) or "")


def _rules(closed: Any) -> Iterator[str]:
    """The functions with derivative rules of their own that a jaxpr calls, but for those of jax."""
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        if eqn.primitive.name.startswith(_RULED):
            source = _source(eqn)
            if f" at {_JAX}" not in source:
                yield source.split(" at ")[0] or eqn.primitive.name
        elif hasattr(eqn.params.get("_prim"), "drop_fwd_consts"):
            yield str(eqn.params["_prim"])
        values = (x for v in eqn.params.values() for x in (v if isinstance(v, (list, tuple)) else (v,)))
        for value in values:
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from _rules(value)


def _scan(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    """The step of a loop of known length.

    How many inputs are carried or scanned has other names in every version of jax. The shapes say it too:
    what is scanned over, or stacked, has one more axis outside.
    """
    closed = eqn.params["jaxpr"]
    num_carry, end = _alike(eqn.outvars, closed.out_avals), _alike(inputs, closed.in_avals)
    carried = range(end - num_carry, end)
    sources = [None if i in carried else v for i, v in enumerate(inputs)]
    steps = _entries(closed.in_avals, sources)
    body = _body(frame, closed, steps, sources)
    # Whatever the state starts from, data may enter it on the way: it does not count as made of leaves.
    made = [None] * num_carry + [v.leaves for v in body.outputs[num_carry:]]
    outputs = [Value(v.aval, leaves) for v, leaves in zip(eqn.outvars, made, strict=True)]
    rest = {"bodies": (body,), "trips": eqn.params["length"], "carried": carried}
    _add(frame, eqn, "scan", inputs, outputs, **rest)
    return outputs


def _alike(values: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many have as many axes outside as inside."""
    return sum(len(v.aval.shape) == len(aval.shape) for v, aval in zip(values, inner, strict=True))


def _entries(avals: Iterable[Any], sources: Iterable[Value | None]) -> list[Value]:
    """The inputs of a body: made of what they are made of outside; what a loop carries counts as data."""
    return [Value(a, None if v is None else v.leaves) for a, v in zip(avals, sources, strict=True)]


def _while(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    start = eqn.params["cond_nconsts"]
    end = start + eqn.params["body_nconsts"]
    carried = [None] * (len(inputs) - end)
    parts = [("cond_jaxpr", inputs[:start]), ("body_jaxpr", inputs[start:end])]
    bodies = [_inner(frame, eqn.params[name], [*consts, *carried]) for name, consts in parts]
    outputs = [Value(v.aval) for v in eqn.outvars]
    rest = {"bodies": tuple(bodies), "trips": None, "carried": range(end, len(inputs))}
    _add(frame, eqn, "while", inputs, outputs, **rest)
    return outputs


def _cond(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    bodies = [_inner(frame, branch, inputs[1:]) for branch in eqn.params["branches"]]
    # Each result is one of the branches': made of leaves alone if it is so in all of them.
    ends = zip(*(body.outputs for body in bodies), strict=True)
    outputs = [Value(v.aval, _made_of(each)) for v, each in zip(eqn.outvars, ends, strict=True)]
    _add(frame, eqn, "cond", inputs, outputs, bodies=tuple(bodies))
    return outputs


def _inner(frame: _Frame, closed: Any, sources: Sequence[Value | None]) -> Body:
    return _body(frame, closed, _entries(closed.in_avals, sources), sources)


# -- what jax writes since 0.12, behind flags ------------------------------------------------------


def _high(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    """A primitive that is an object of its own: a scan over mutable arrays, or a call."""
    primitive = eqn.params["_prim"]
    if hasattr(primitive, "extensives"):
        return _mutable_scan(frame, eqn, inputs)
    inner = getattr(primitive, "jaxpr", None)
    if inner is None and hasattr(primitive, "traced"):
        inner = primitive.traced.jaxpr
        if hasattr(primitive, "drop_fwd_consts"):  # a custom_vjp: some operands are for the derivative only
            if frame.to_differentiate:
                return _operation(frame, eqn, inputs)
            inputs = jax.tree.leaves(primitive.drop_fwd_consts(*primitive.in_tree.unflatten(inputs)))
    if inner is None or len(inner.in_avals) != len(inputs):
        return _operation(frame, eqn, inputs)
    return _open(frame, inner, inputs)


def _mutable_scan(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    """A scan whose state is in mutable arrays, as one that carries what they hold."""
    primitive = eqn.params["_prim"]
    scanned = list(primitive.extensives)  # one flag for each operand, mutable arrays among them
    refs = [i for i, v in enumerate(inputs) if _is_mutable(v)]
    consts = [i for i in range(len(inputs)) if i not in refs and not scanned[i]]
    order = [*consts, *refs, *(i for i, over in enumerate(scanned) if over)]
    outside = [frame.held.get(inputs[i], inputs[i]) for i in order]
    sources = [None if i in refs else inputs[i] for i in order]
    avals = [getattr(primitive.jaxpr.in_avals[i], "inner_aval", primitive.jaxpr.in_avals[i]) for i in order]
    entries = _entries(avals, sources)
    # Inside, every array is what is carried in; after the last operation it holds what is carried out.
    inner, known = _Frame(frame.to_differentiate), dict(zip(order, entries, strict=True))
    arrays = {i: Value(inputs[i].aval) for i in refs}
    inner.held.update({arrays[i]: known[i] for i in refs})
    stacked = _open(inner, primitive.jaxpr, [arrays.get(i, known[i]) for i in range(len(inputs))])
    body = _close(inner, entries, [*(inner.held[arrays[i]] for i in refs), *stacked], sources)
    state = [Value(v.aval) for v in body.outputs[: len(refs)]]
    results = [Value(v.aval, made.leaves) for v, made in zip(eqn.outvars, stacked, strict=True)]
    frame.held.update(zip([inputs[i] for i in refs], state, strict=True))
    carried = range(len(consts), len(consts) + len(refs))
    rest = {"bodies": (body,), "trips": primitive.length, "carried": carried}
    _add(frame, eqn, "scan", outside, [*state, *results], **rest)
    return results


def _is_mutable(value: Value) -> bool:
    return hasattr(value.aval, "inner_aval")


def _new(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    array = Value(eqn.outvars[0].aval)
    frame.held[array] = inputs[0]
    return [array]


def _get(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    if not _is_whole(frame, inputs, eqn.outvars[0].aval):
        return _operation(frame, eqn, inputs)
    return [frame.held[inputs[0]]]


def _swap(frame: _Frame, eqn: Any, inputs: list[Value]) -> list[Value]:
    array, new = inputs[:2]
    if not _is_whole(frame, [array, *inputs[2:]], new.aval):
        return _operation(frame, eqn, inputs)
    before, frame.held[array] = frame.held[array], new
    return [before]


def _is_whole(frame: _Frame, inputs: list[Value], aval: Any) -> bool:
    """Whether a mutable array of this body is meant as a whole: no index, nothing cut off."""
    return len(inputs) == 1 and inputs[0] in frame.held and inputs[0].aval.inner_aval.shape == aval.shape


_EQUATIONS: dict[str, Callable[[_Frame, Any, list[Value]], list[Value]]] = {
    **dict.fromkeys(["jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2"], _call),
    **dict.fromkeys(["checkpoint", "custom_vjp_call", "custom_vjp_call_jaxpr"], _call),
    "custom_jvp_call": _custom_jvp,
    **dict.fromkeys(["custom_vmap_call", "composite"], _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "call_hi_primitive": _high,
    "new_ref": _new,
    "get": _get,
    "swap": _swap,
    "freeze": _get,
}
