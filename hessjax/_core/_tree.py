"""The pytree algebra that `optax.tree` lacks: paths, checks, inner products, blocks of vectors."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core import _sharding
from hessjax._core._messages import shown
from hessjax._core._numbers import common_dtype, promoted
from hessjax._core._types import Block, Params, Scalar, Vector

# -- paths ---------------------------------------------------------------------------------------


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf as people write it: `Conv_0/kernel`; `.` for a tree that is one leaf."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # the inside of an nnx Variable
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "."


def leaf_paths(tree: Any) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def unique_paths(tree: Any, argument: str) -> list[str]:
    """`leaf_paths`, each different from all others, or a ValueError."""
    paths = leaf_paths(tree)
    if len(set(paths)) < len(paths):
        raise ValueError(f"`{argument}` must have a path of its own for every leaf, got {', '.join(paths)}.")
    return paths


# -- checks --------------------------------------------------------------------------------------


def check_floating(params: Params, argument: str = "params") -> None:
    """Raise a TypeError naming every leaf that is not a real floating-point array."""
    _check_bare(params, argument)
    found = jax.tree_util.tree_leaves_with_path(params)
    bad = {path_name(path): leaf for path, leaf in found if not is_floating(leaf)}
    if bad:
        raise TypeError(
            f"`{argument}` must have real floating-point leaves only, got\n{_listed(bad)}\n{_way_out(bad)}"
        )
    if places := _sharding.different_places(jax.tree.leaves(params)):
        lines = [
            f"  {path}: {place}" for path, place in zip(leaf_paths(params), places, strict=True) if place
        ]
        raise ValueError(
            f"`{argument}` must lie on one mesh, or on the same devices, got\n" + "\n".join(lines) + "\n"
            "Move them to one, `jax.device_put(params, shardings)`."
        )
    if not any(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"`{argument}` must hold at least one number, got a tree without any.")


def check_leaves(tree: Any, argument: str = "params") -> None:
    """Raise a ValueError for a tree without leaves, a TypeError for one with leaves that are no arrays."""
    if not jax.tree.leaves(tree):
        raise ValueError(f"`{argument}` must hold at least one array, got a tree without any.")
    _check_bare(tree, argument)
    check_arrays(tree, argument)


def _check_bare(tree: Any, argument: str) -> None:
    """Raise a TypeError for a function or a state, which are trees of arrays too, in the place of params."""
    got = "a function with arrays bound to it" if isinstance(tree, jax.tree_util.Partial) else ""
    if hasattr(tree, "opt_state") and hasattr(tree, "params"):
        got = f"a {type(tree).__name__}, with its counters and moments: take its `.params`"
    for node in filter(_is_state, jax.tree.leaves(tree, is_leaf=_is_state)):
        got = f"the state of an optimizer, {type(node).__name__}"
    if got:
        raise TypeError(f"`{argument}` must be a tree of arrays, got {got}.")


def _is_state(node: Any) -> bool:
    # `optax.MaskedNode` stands in trees of params too, and holds nothing.
    return type(node).__module__.partition(".")[0] == "optax" and bool(jax.tree.leaves(node))


def _listed(leaves: dict[str, Any]) -> str:
    return "\n".join(f"  {path}: {describe(leaf)}" for path, leaf in leaves.items())


def _way_out(bad: dict[str, Any]) -> str:
    """What to do about leaves that are not floating-point arrays."""
    if not all(map(is_array, bad.values())):
        # As Equinox has them: a module's functions and settings are leaves of it.
        return (
            "Keep functions, settings and arrays of other libraries out of it: of an Equinox module take the "
            "first part of `eqx.partition(model, eqx.is_inexact_array)`."
        )
    return "Keep counters and other state out of it: `hessjax.select` splits a tree by path."


def check_arrays(tree: Any, argument: str) -> None:
    """Raise a TypeError naming every leaf that is no array."""
    if all(map(is_array, jax.tree.leaves(tree))):  # first, as it runs at every product
        return
    found = jax.tree_util.tree_leaves_with_path(tree)
    bad = {path_name(path): leaf for path, leaf in found if not is_array(leaf)}
    raise TypeError(f"`{argument}` must hold arrays only, got\n{_listed(bad)}\n{_way_out(bad)}")


def is_array(leaf: Any) -> bool:
    """Whether jax takes this for an array: its own, NumPy's, numbers, shapes."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return True
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def check_like(tree: Any, like: Any, argument: str, reference: str) -> None:
    """Raise a ValueError listing every leaf whose path or shape differs from `like`'s.

    A TypeError if any leaf is no array, or complex: a cast would take the imaginary part away in silence.
    """
    check_arrays(tree, argument)
    if any(_is_complex(leaf) for leaf in jax.tree.leaves(tree)):
        kinds = ", ".join(sorted({describe(leaf) for leaf in jax.tree.leaves(tree) if _is_complex(leaf)}))
        raise TypeError(f"`{argument}` must be real, got {kinds}.")
    # This first: it runs at every product, and paths as text are wanted for an error only.
    same_structure: bool = jax.tree.structure(tree) == jax.tree.structure(like)  # type: ignore[operator]
    if same_structure:
        shapes = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
        if all(jnp.shape(x) == jnp.shape(y) for x, y in shapes):
            return
    got = {path_name(p): jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    want = {path_name(p): jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(like)}
    lines = [f"  {path}: missing" for path in want if path not in got]
    lines += [f"  {path}: not in `{reference}`" for path in got if path not in want]
    lines += [
        f"  {path}: shape {got[path]}, must be {want[path]}"
        for path in want
        if path in got and got[path] != want[path]
    ]
    if lines:
        raise ValueError(f"`{argument}` must have the structure of `{reference}`, but\n" + "\n".join(lines))
    raise ValueError(
        f"`{argument}` must have the structure of `{reference}`: the leaves agree, the containers do not.\n"
        f"  got  {jax.tree.structure(tree)}\n  need {jax.tree.structure(like)}"
    )


def check_vector(vector: Any, like: Any, argument: str = "vector", reference: str = "params") -> None:
    """`check_like`, and a TypeError for integers: a result in their dtype would be cut to whole numbers."""
    check_like(vector, like, argument, reference)
    kinds = {describe(x) for x in jax.tree.leaves(vector) if not is_floating(x)}
    if kinds:
        raise TypeError(f"`{argument}` must be floating point, got {', '.join(sorted(kinds))}.")


def is_floating(leaf: Any) -> bool:
    is_number = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, float))
    # Arrays of NumPy may hold strings, dates or objects, which have no dtype in jax.
    return is_number and is_array(leaf) and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _is_complex(leaf: Any) -> bool:
    return isinstance(leaf, complex) or getattr(getattr(leaf, "dtype", None), "kind", None) == "c"


def describe(leaf: Any) -> str:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return shown(leaf) if callable(leaf) else f"a {type(leaf).__name__}"


# -- vectors -------------------------------------------------------------------------------------


def size(tree: Any) -> int:
    """The number of scalars in `tree`."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def accumulator_dtype(tree: Any) -> jnp.dtype:
    """The dtype sums over `tree` are taken in: float64 if any leaf is, float32 otherwise."""
    return common_dtype(jnp.float32, *(jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)))


def wide(tree: Any) -> Any:
    """Every leaf in at least float32, so that long sums and orthogonality survive bfloat16 params."""
    return jax.tree.map(_wide, tree)


def _wide(x: Any) -> Any:
    dtype = common_dtype(jnp.result_type(x), jnp.float32)
    if isinstance(x, jax.ShapeDtypeStruct):  # of a run that is only asked about
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return jnp.asarray(x, dtype)


def cast_like(tree: Any, like: Any) -> Any:
    """Every leaf in the dtype of the leaf of `like` in its place."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def zeros_like(tree: Any) -> Any:
    """Zeros in the place of every leaf, laid out as it is on an explicit mesh."""
    return jax.tree.map(lambda x: _sharding.laid_out_like(jnp.zeros_like(x), x), tree)


def inner(a: Vector, b: Vector) -> Scalar:
    """⟨a, b⟩ over all leaves, accumulated in at least float32."""
    return sum(inner_by_leaf(a, b), jnp.zeros((), accumulator_dtype(a)))


def inner_by_leaf(a: Vector, b: Vector) -> list[Scalar]:
    """⟨a_l, b_l⟩ for every leaf l, each accumulated in at least float32."""
    dtype = accumulator_dtype(a)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [_inner(x.astype(dtype), y.astype(dtype)) for x, y in pairs]


def _inner(x: Array, y: Array) -> Scalar:
    if _sharding.explicit(x) or _sharding.explicit(y) or x.size >= 2**31:
        # Of more entries than an int32 counts XLA's compiler for CPUs aborts the process in a dot product.
        return jnp.sum(x * y)
    # Not `vdot`: it lays arrays flat, which gathers those that are divided along any axis but the first.
    axes = tuple(range(x.ndim))
    # By default accelerators multiply float32 as TF32 or bfloat16, and orthogonality ends at about 1e-3.
    return jax.lax.dot_general(x, y, ((axes, axes), ((), ())), precision="highest")


def norm(a: Vector) -> Scalar:
    """‖a‖₂ over all leaves, for entries of any magnitude: squares alone leave float32 at 1e-19 and 1e19."""
    dtype = accumulator_dtype(a)
    largest = [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in jax.tree.leaves(a)]
    top = functools.reduce(jnp.maximum, largest)
    # An infinite entry must come out as ∞, not as ∞/∞; and zeros as 0.
    unit = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    scaled = jax.tree.map(lambda x: x / unit.astype(x.dtype), a)
    return unit * jnp.sqrt(inner(scaled, scaled))


def scale(factor: Any, a: Vector) -> Vector:
    """`factor · a`, every leaf in its own dtype."""
    return jax.tree.map(lambda x: times(factor, x).astype(x.dtype), a)


def add_scaled(a: Vector, factor: Any, b: Vector) -> Vector:
    """`a + factor · b`, every leaf in the dtype of `a`'s."""
    return jax.tree.map(lambda x, y: jnp.add(*promoted(x, times(factor, y))).astype(x.dtype), a, b)


def times(factor: Any, x: Array) -> Array:
    """`factor · x`, in their common dtype."""
    return jnp.multiply(*promoted(factor, x))


# -- blocks of vectors ---------------------------------------------------------------------------


def block_inner(block: Block, vector: Vector) -> Float[Array, " k"]:
    """The k inner products of the block's rows with one vector."""
    return _contracted(block, vector, 0)


def gram(a: Block, b: Block) -> Float[Array, "j k"]:
    """All inner products of the rows of `a` (j) with the rows of `b` (k)."""
    return _contracted(a, b, 1)


def _contracted(a: Block, b: Any, num_leading: int) -> Array:
    """Sums of products over all axes of the leaves but the first of `a`, and the leading ones of `b`."""
    dtype = accumulator_dtype(b)

    def leaf(x: Array, y: Array) -> Array:
        axes = [*range(1, x.ndim)], [*range(num_leading, y.ndim)]
        return jnp.tensordot(
            x.astype(dtype),
            y.astype(dtype),
            axes=axes,
            precision="highest",
            out_sharding=_sharding.everywhere(y),
        )

    parts: list[Array] = jax.tree.leaves(jax.tree.map(leaf, a, b))
    return sum(parts[1:], parts[0])


def combine(coefficients: Float[Array, "... k"], block: Block) -> Any:
    """Σᵢ cᵢ · rowᵢ, in the block's dtypes; with an (n, k) matrix of coefficients, n of them."""
    return jax.tree.map(
        lambda rows: jnp.tensordot(coefficients.astype(rows.dtype), rows, axes=1, precision="highest"), block
    )


def row(block: Block, index: Any) -> Vector:
    """One vector of a block."""
    return jax.tree.map(lambda rows: rows[index], block)


def rows(block: Block) -> list[Vector]:
    """The vectors of a block, one by one."""
    return [row(block, index) for index in range(jax.tree.leaves(block)[0].shape[0])]


def block_of(*vectors: Vector) -> Block:
    """The block of these vectors."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *vectors)
