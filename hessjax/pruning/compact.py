"""Pruned channels removed for good: smaller arrays, the same function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax import _tree
from hessjax._typing import ModelFn, Params, Where
from hessjax.pruning.narrow import Narrowing, analyse
from hessjax.pruning.program import trace

class Compacted(NamedTuple):
    params: Params
    kept: dict[str, dict[int, np.ndarray]]
    model_fn: Any
    difference: float
    widths: Any


def compact(model_fn: ModelFn, params: Params, *args: Any, where: Where = lambda path, leaf: True, drop_constants: bool = False) -> Compacted:
    program = trace(model_fn, params, args)
    leaves = jax.tree.leaves(params)
    narrowing = analyse(program, leaves, jax.tree.leaves(_tree.match(params, where)), drop_constants=drop_constants)
    kept = {}
    small = []
    for path, leaf, axes in zip(_tree.unique_paths(params, "params"), leaves, narrowing.leaves):
        k = {a: np.flatnonzero(narrowing.kept[n]) for a, n in enumerate(axes.nodes) if not narrowing.kept[n].all()}
        if k: kept[path] = k
        for a, i in k.items():
            leaf = jnp.take(leaf, i, axis=a)
        small.append(leaf)
    return Compacted(jax.tree.unflatten(jax.tree.structure(params), small), kept, lambda p, *a: jax.tree.unflatten(program.out_tree, narrowing(jax.tree.leaves((p, a)))), 0., {p: (jnp.shape(a), jnp.shape(b)) for p,a,b in zip(_tree.leaf_paths(params), leaves, small)})
