"""A function as one flat list of operations: calls inlined, dead code gone, ready to be read or re-run."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    }
)


class Program(NamedTuple):
    """What `fn(params, *args)` computes.

    Attributes:
        jaxpr: inputs are the leaves of the params, then those of the args.
        consts: the values of its constants.
        eqns: the operations that the outputs depend on, in order.
        num_params: how many of the inputs are leaves of the params.
        out_tree: the structure of what `fn` returns.
    """

    jaxpr: Jaxpr
    consts: list[Any]
    eqns: tuple[Any, ...]
    num_params: int
    out_tree: Any

    @property
    def used(self) -> list[bool]:
        """For every leaf of the params, whether the outputs depend on it."""
        needed = {id(v) for eqn in self.eqns for v in variables(eqn.invars)}
        needed |= {id(v) for v in variables(self.jaxpr.outvars)}
        return [id(v) in needed for v in self.jaxpr.invars[: self.num_params]]


def trace(fn: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Program:
    """The program of `fn` for inputs of these shapes."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    flat = jax.make_jaxpr(lambda *leaves: _inline(closed.jaxpr, closed.consts, leaves))(
        *(v.aval for v in closed.jaxpr.invars)
    )
    num_params = len(jax.tree.leaves(params))
    return Program(flat.jaxpr, list(flat.consts), _alive(flat.jaxpr), num_params, jax.tree.structure(shapes))


def evaluate(
    program: Program, leaves: list[Any], apply: Callable[[Any, list[Any]], list[Any]], consts: list[Any]
) -> list[Any]:
    """Run the program on any kind of value: `apply(eqn, inputs) -> outputs` gives an operation its meaning.

    A literal reaches `apply` as it is, a `jax.extend.core.Literal`.
    """
    jaxpr = program.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *leaves], strict=True))

    def read(v: Any) -> Any:
        return v if isinstance(v, Literal) else values[v]

    for eqn in program.eqns:
        outputs = apply(eqn, [read(v) for v in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def variables(vs: Any) -> Iterator[Any]:
    """Those that are no literals."""
    return (v for v in vs if not isinstance(v, Literal))


def literal_value(literal: Any) -> np.ndarray:
    """The number that a literal stands for."""
    return np.asarray(literal.val)


def _inline(jaxpr: Jaxpr, consts: Any, leaves: Any) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *leaves], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for eqn in jaxpr.eqns:
        inputs, inner = [read(v) for v in eqn.invars], _callee(eqn)
        outputs = bind(eqn, inputs) if inner is None else _inline(inner.jaxpr, inner.consts, inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def bind(eqn: Any, inputs: list[Any], **changed: Any) -> list[Any]:
    """The operation on other inputs, some of its parameters changed."""
    bound = eqn.primitive.get_bind_params({**eqn.params, **changed})
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # jax before and since 0.10
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _callee(eqn: Any) -> ClosedJaxpr | None:
    """The function that an operation merely calls; None for one that does something itself."""
    if eqn.primitive.name not in CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None:
            return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
    return None


def _alive(jaxpr: Jaxpr) -> tuple[Any, ...]:
    """The operations that the outputs depend on."""
    needed, kept = set(variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            needed |= set(variables(eqn.invars))
            kept.append(eqn)
    return tuple(reversed(kept))
