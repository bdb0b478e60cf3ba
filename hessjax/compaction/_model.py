"""The compact model as a function, for arguments of any shape."""

import functools
import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hessjax._core._types import ModelFn, Params
from hessjax.compaction._leaves import Indices
from hessjax.compaction._narrow import Asked, Narrowing, analyse
from hessjax.program._axes import Flags
from hessjax.program._tracing import read


@dataclass(frozen=True, eq=False)
class CompactModel:
    """The program that was traced, at its smaller widths: a function like the one that it was traced from.

    For arguments of other shapes, a batch of another size say, the full model is traced again, on shapes
    only, and narrowed to the same params.

    Attributes:
        full_fn: the full model.
        full_params: the shapes of its params.
        nonzero: for every leaf, where it was not zero.
        asked: what could go.
        kept: for every leaf, what stays.
        known: the programs so far, by the shapes of the arguments.
    """

    full_fn: ModelFn
    full_params: Params
    nonzero: list[Flags]
    asked: Asked
    kept: list[Indices]
    known: dict[Hashable, Narrowing]

    def __call__(self, params: Params, *args: Any) -> Any:
        """Outputs, from params at their smaller widths."""
        narrowing = self._narrowing(args)
        leaves, structure = jax.tree.flatten(params)
        want = narrowing.shapes()[: narrowing.program.num_params]
        if structure != self._structure or [jnp.shape(x) for x in leaves] != want:
            raise ValueError(
                "`params` must be like the compact params, "
                f"{self._structure} with shapes {want}, got {structure} with "
                f"{[jnp.shape(x) for x in leaves]}. Cut what was made for the full ones by `shrink`."
            )
        outputs = narrowing([*leaves, *jax.tree.leaves(args)])
        if narrowing.program.rules:
            outputs = _without_derivative(narrowing.program.rules, outputs)
        return jax.tree.unflatten(narrowing.program.out_tree, outputs)

    @property
    def _structure(self) -> Any:
        return jax.tree.structure(self.full_params)

    def _narrowing(self, args: Any) -> Narrowing:
        key = signature(args)
        if key in self.known:
            return self.known[key]
        program = read(self.full_fn, self.full_params, *args)
        narrowing = analyse(program, self.nonzero, self.asked, self.kept)
        if _as_lists(narrowing.indices()) != _as_lists(self.kept):
            raise ValueError(
                f"`args` must leave the params as they were cut, but at the shapes "
                f"{[jnp.shape(x) for x in jax.tree.leaves(args)]} the model needs indices that went. Compact "
                "again with an example of these shapes."
            )
        if not any(isinstance(x, jax.core.Tracer) for x in program.body.consts.values()):
            self.known[key] = narrowing
        return narrowing


def signature(args: Any) -> Hashable:
    """What a program depends on: its arguments, and how exactly products are asked for where it is traced."""
    leaves, structure = jax.tree.flatten(args)
    # By name: types of older jax do not know it.
    precision = operator.attrgetter("jax_default_matmul_precision")(jax.config)
    return structure, precision, tuple((jnp.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)


def shapes_of(params: Params) -> Params:
    """The same tree without the numbers: all that a trace needs."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, params
    )


def _as_lists(kept: list[Indices]) -> list[dict[int, list[int]]]:
    return [{axis: indices.tolist() for axis, indices in each.items()} for each in kept]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_derivative(rules: tuple[str, ...], outputs: list[Any]) -> list[Any]:
    """The same; derivatives are refused, as the functions' own rules are no part of the traced program."""
    return outputs


@_without_derivative.defjvp
def _refuse(rules: tuple[str, ...], primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"The compact program computes {', '.join(rules)} without the derivative that is defined for it: its "
        "own gradient would be another. To train on, build the model anew at the smaller widths: "
        "`hessjax.flax.linen_resized`, `hessjax.flax.nnx_resized`."
    )
