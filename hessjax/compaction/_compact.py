"""Pruned channels removed for good: smaller arrays, the same function."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax._core import _numbers, _tree
from hessjax._core._messages import check_flags
from hessjax._core._tables import Column, Row, Table, printable, shape_text
from hessjax._core._types import ModelFn, Params, Scalar, Where
from hessjax.compaction._narrow import Narrowing, analyse, shrink_leaf, take
from hessjax.curvature._product import check_call
from hessjax.program._products import multiply_adds
from hessjax.program._program import Body
from hessjax.program._tracing import read


class Size(NamedTuple):
    """What a model costs.

    Attributes:
        weights: numbers in the params.
        bytes: of memory that they take.
        multiply_adds: in the matrix products and convolutions of one call on the example, those inside a
            `scan` as often as it runs.
    """

    weights: int
    bytes: int
    multiply_adds: int


@printable
class Compacted(NamedTuple):
    """A model without its dead channels.

    Attributes:
        params: the smaller params, in the structure of the full ones.
        kept: `{path: {axis: indices}}`: what stays of every axis that became shorter.
        shapes: `{path: (before, after)}` of every leaf.
        before: the full model's size.
        after: this one's.
        difference: between the outputs of the two on the example: max |y − y'| / max |y|, at rounding level
            unless constants were dropped.
        model_fn: `model_fn(params, *args)` at the smaller widths, for args of the example's shapes. It is
            the program that was traced, without the calls it was made of: run it, time it, compare with it;
            to train on, build the model anew.
        notes: what the multiply-adds leave open: a `while` loop counts as one step, a `cond` as its most
            expensive branch, and what some operations do inside is not counted.
    """

    params: Params
    kept: dict[str, dict[int, np.ndarray]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    before: Size
    after: Size
    difference: float
    model_fn: ModelFn
    notes: tuple[str, ...] = ()

    def shrink(self, tree: Any, under: str = "") -> Any:
        """Remove the same channels from anything made for the full params: gradients, an optimizer's state.

        A leaf whose path ends in the path of one of the params (`0/mu/Dense_0/kernel`) is cut as they were:
        in the same shape, with further leading axes (a stack of gradients), or without one of the axes
        (second moments factored into rows and columns). Counters, and optax's placeholders, stay as they
        are.

        Args:
            tree: a tree of the params' structure, or one that holds such trees: an optax state, with a
                `PruneState` in it or not. (A schedule of `prune` counts from then on in the weights that
                are left.)
            under: where the tree was made for a part of the params: that part's path, `"params"` for an
                optimizer of `variables["params"]`.

        Returns:
            The same tree with smaller arrays.

        Raises:
            ValueError: if no leaf lies at the path of one of the params, or one that does has another shape.
        """
        prefix = f"{under}/" if under else ""
        shapes = {
            path.removeprefix(prefix): before
            for path, (before, _) in self.shapes.items()
            if path.startswith(prefix)
        }
        kept = {path.removeprefix(prefix): axes for path, axes in self.kept.items()}
        found = jax.tree_util.tree_leaves_with_path(tree)
        cut = [shrink_leaf(_tree.path_name(path), leaf, shapes, kept) for path, leaf in found]
        if not any(hit for _, hit in cut):
            raise ValueError(
                f"`tree` must hold leaves at the paths of the params ({', '.join(shapes) or 'none'}), got "
                f"{', '.join(_tree.leaf_paths(tree)) or 'no leaves'}. A tree made for a part of them needs "
                '`under`, such as under="params".'
            )
        return jax.tree.unflatten(jax.tree.structure(tree), [leaf for leaf, _ in cut])

    def check(self, model_fn: ModelFn, *args: Any) -> float:
        """How far a model built anew at the smaller widths is from this one: max |y − y'| / max |y|.

        Worth a look wherever a module's widths set more than shapes: a temperature, an initial scale.

        Args:
            model_fn: `model_fn(params, *args)`, which takes the smaller params.
            *args: arguments of the example's shapes.

        Returns:
            The difference; at rounding level for the same function.

        Raises:
            ValueError: if its outputs differ in structure or shape.
        """
        return float(_difference(self.model_fn, model_fn, self.params, self.params, args)[0])

    def to_text(self, width: int | None = None) -> str:
        """The table, at most `width` columns wide; by default as wide as the terminal, 80 without one."""
        return self._table().to_text(width)

    def _table(self) -> Table:
        heads = (Column("Name", "name"), Column("Shape", "word", 1), Column("Compact", "word"))
        rows = [Row((path, *map(shape_text, self.shapes[path]))) for path in self.kept]
        sizes = zip(Size._fields, self.before, self.after, strict=True)
        rows += [Row((name.replace("_", "-"), f"{a:,}", f"{b:,}"), "bold") for name, a, b in sizes]
        return Table(heads, tuple(rows), notes=self.notes)


def compact(
    model_fn: ModelFn, params: Params, *args: Any, where: Where = "*", drop_constants: bool = False
) -> Compacted:
    """Remove the channels, filters and heads that do nothing, and with them the work that they cost.

    The model is traced once, and every index of every axis in it followed from operation to operation,
    whatever framework it was written in. Index i of an axis goes if the outputs do not need it: all that
    would read it has weights of exactly 0.0 there, or it is exactly 0.0 itself whatever the input. Axes
    that hang together (a filter, its BatchNorm, the kernels that read it, a residual stream with all that
    write to it, the query, key, value and output of a head) become shorter together, or not at all.

    Never removed: what an input, an output, or an operation that is not understood depends on (a `scan`, a
    gather), and axes that a mean, a maximum or a normalisation runs over, since it counts them: LayerNorm
    over a transformer's stream. Nor the width of a head, as its square root scales the products. An axis
    keeps at least one index, a leaf that `model_fn` does not use all. Nothing to remove is no error.

    Args:
        model_fn: `model_fn(params, *args) -> outputs`; keyword arguments and flags bound beforehand. Batch
            statistics must be part of `params`: a leaf of `args` has a fixed shape, and ties what it meets.
        params: any pytree of arrays; counters and keys may be among them.
        *args: an example of the inputs.
        where: the leaves that may become smaller: a glob over their paths, several, or
            `(path, leaf) -> bool`.
        drop_constants: whether a channel that is the same for every input, such as a filter of zeros
            followed by a bias or BatchNorm's offset, goes as well. The function then changes by these
            constants (`difference` says by how much on the example). `hessjax.flax.linen_recalibrate` lets a
            BatchNorm behind take them up, all but at padded borders.

    Returns:
        A `Compacted`: the smaller params, what was kept, sizes, and the difference on the example. It prints
        as a table.

    Raises:
        ValueError: if `where` matches no leaf, or two leaves have the same path.
        RuntimeError: if the outputs differ by more than rounding on the example (√ε of the coarsest dtype in
            the model), and no constants were to be dropped.

    Cost:
        A trace, a few passes over the weights on the host (one byte each), and one compilation with one run
        of both models on the example. Activations are taken to be finite: 0 · inf counts as 0.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> def model(params, x):
        ...     return jnp.maximum(x @ params["in"] + params["bias"], 0) @ params["out"]
        >>> params = {"in": jnp.ones((4, 3)), "bias": jnp.ones(3), "out": jnp.array([[1.0], [0.0], [2.0]])}
        >>> small = hj.compact(model, params, jnp.ones((2, 4)))
        >>> print(small)
        Name           Shape  Compact
        bias           3      2
        in             4×3    4×2
        out            3×1    2×1
        weights        18     12
        bytes          72     48
        multiply-adds  30     20
        >>> small.kept["in"], small.difference
        ({1: array([0, 2])}, 0.0)
        >>> small.check(model, jnp.full((2, 4), 3.0))
        0.0
    """
    check_flags(drop_constants=drop_constants)
    _tree.check_leaves(params)
    check_call("model_fn", model_fn, args)
    paths, leaves = _tree.unique_paths(params, "params"), jax.tree.leaves(params)
    program = read(model_fn, params, *args)
    may_shrink = jax.tree.leaves(_tree.match(params, where))
    narrowing = analyse(program, leaves, may_shrink, drop_constants=drop_constants)
    chosen = narrowing.indices()
    small_leaves = [take(leaf, axes) for leaf, axes in zip(leaves, chosen, strict=True)]
    small = jax.tree.unflatten(jax.tree.structure(params), small_leaves)
    narrow_fn = functools.partial(_narrow_fn, narrowing, jax.tree.structure((small, args)))
    difference, of_numbers = map(float, _difference(model_fn, narrow_fn, params, small, args))
    kept = {path: axes for path, axes in zip(paths, chosen, strict=True) if axes}
    work = multiply_adds(program)
    if not drop_constants:
        _check_same(of_numbers, program.body, kept)
    return Compacted(
        params=small,
        kept=kept,
        shapes={p: (jnp.shape(x), jnp.shape(y)) for p, x, y in zip(paths, leaves, small_leaves, strict=True)},
        before=_size(params, work.total),
        after=_size(small, multiply_adds(program, narrowing.shape).total),
        difference=difference,
        model_fn=narrow_fn,
        notes=work.notes,
    )


def _narrow_fn(narrowing: Narrowing, structure: Any, params: Params, *args: Any) -> Any:
    """The program at its smaller widths, as a function like the one that it was traced from."""
    leaves, got = jax.tree.flatten((params, args))
    want, shapes = narrowing.shapes(), [jnp.shape(leaf) for leaf in leaves]
    if got != structure or shapes != want:
        raise ValueError(
            "`params` and `args` must be like the compact params and the example, "
            f"{structure} with shapes {want}, got {got} with {shapes}. Compact again with an example like it."
        )
    return jax.tree.unflatten(narrowing.program.out_tree, narrowing(leaves))


def _size(params: Params, products: int) -> Size:
    leaves = [x for x in jax.tree.leaves(params) if hasattr(x, "nbytes")]
    return Size(_tree.size(params), sum(x.nbytes for x in leaves), products)


def _check_same(difference: float, body: Body, kept: Iterable[str]) -> None:
    """Refuse a compact model that computes something else."""
    # Rounding grows with depth, so that ε itself is too strict; a misread channel shows at the order of 1.
    allowed = _rounding(body) ** 0.5
    if not difference <= allowed:
        raise RuntimeError(
            f"The compact model's outputs must be those of the full one to rounding, {allowed:.1e}, but on "
            f"the example they differ by {difference:.1e}. An operation must have been misread: `where` can "
            f"leave out what was cut ({', '.join(kept)})."
        )


def _rounding(body: Body) -> float:
    """The ε of the coarsest floating dtype that the operations give: a bfloat16 inside sets the error."""
    dtypes = (getattr(v.aval, "dtype", np.int32) for operation in body.operations for v in operation.outputs)
    own = [float(jnp.finfo(x).eps) for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
    inner = [_rounding(each) for operation in body.operations for each in operation.bodies]
    return max([*own, *inner], default=0.0)


def _difference(full: ModelFn, small: ModelFn, params: Params, fewer: Params, args: Any) -> tuple[Any, Any]:
    """Max |y − y'| / max |y| over all outputs, and over those that are floating-point numbers."""
    # In the fast modes of accelerators (TF32) sums in another order differ by far more than float32 rounds.
    with jax.default_matmul_precision("highest"):
        return jax.jit(functools.partial(_both, full, small))(params, fewer, args)


def _both(full: ModelFn, small: ModelFn, params: Params, fewer: Params, args: Any) -> tuple[Scalar, Scalar]:
    want, got = full(params, *args), small(fewer, *args)
    _tree.check_like(got, want, "model_fn(params, *args)", "the compact model's outputs")
    pairs = [
        (jnp.asarray(a), jnp.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)
    ]
    # An argmax may jump where two numbers tie to rounding: it is reported, and not held against the model.
    return _gap(pairs), _gap([(a, b) for a, b in pairs if jnp.issubdtype(b.dtype, jnp.inexact)])


def _gap(pairs: list[tuple[Array, Array]]) -> Scalar:
    """Max |a − b| / max |b|; the same infinity (a masked logit) or NaN on both sides is no difference."""
    gap = size = jnp.zeros((), _numbers.common_dtype(jnp.float32, *(b.dtype for _, b in pairs)))
    for a, b in pairs:
        # Booleans cannot be subtracted, and unsigned integers wrap around.
        a, b = (x.astype(gap.dtype) for x in (a, b))
        same = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
        gap = jnp.maximum(gap, jnp.max(jnp.where(same, 0, jnp.abs(a - b)), initial=0))
        size = jnp.maximum(size, jnp.max(jnp.where(jnp.isfinite(b), jnp.abs(b), 0), initial=0))
    # Outputs may all be zero: 0 / 0.
    return jnp.where(gap == 0, 0.0, gap / size)
