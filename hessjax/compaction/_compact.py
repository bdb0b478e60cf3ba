"""Pruned channels removed for good: smaller arrays, the same function."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _processes, _tree
from hessjax._core._messages import check_flags
from hessjax._core._tables import Column, Row, Table, printable, shape_text
from hessjax._core._types import ModelFn, Params, Where
from hessjax._core._where import match
from hessjax.compaction._difference import PRECISION, check_same, gaps
from hessjax.compaction._leaves import shrink_leaf, take
from hessjax.compaction._model import CompactModel, shapes_of, signature
from hessjax.compaction._narrow import Asked, analyse
from hessjax.compaction._obstacles import Obstacle, obstacles
from hessjax.curvature._product import check_call
from hessjax.program._axes import nonzero_of
from hessjax.program._products import multiply_adds
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
        difference: between the outputs of the two on the example: max |y − y'| / max |y|, the largest of any
            output, at rounding level unless constants were dropped.
        model_fn: `model_fn(params, *args)` at the smaller widths, for args of any shapes that the full model
            takes: a batch of another size is traced once more. It is the program that was traced, without
            the calls it was made of: run it, time it, compare with it, differentiate it. (A model with
            derivative rules of its own says so when it is differentiated: build it anew to train on.)
        notes: what the multiply-adds leave open: a `while` loop counts as one step, a `cond` as its most
            expensive branch, and what some operations do inside is not counted.
        obstacles: zeros that could not be removed: where, why, and what would help.
    """

    params: Params
    kept: dict[str, dict[int, np.ndarray]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    before: Size
    after: Size
    difference: float
    model_fn: ModelFn
    notes: tuple[str, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()

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
            ValueError: if no leaf lies at the path of one of the params, one that does has another shape,
                or a leaf spans processes.
        """
        _processes.check_here(tree, "tree")
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
            *args: arguments, of any shapes that both take.

        Returns:
            The difference; at rounding level for the same function.

        Raises:
            ValueError: if its outputs differ in structure or shape.
        """
        return gaps(self.model_fn, model_fn, self.params, self.params, args).difference

    def to_text(self, width: int | None = None) -> str:
        """The table, at most `width` columns wide; by default as wide as the terminal, 80 without one."""
        return self._table().to_text(width)

    def _table(self) -> Table:
        heads = (Column("Name", "name"), Column("Shape", "word", 1), Column("Compact", "word"))
        rows = [Row((path, *map(shape_text, self.shapes[path]))) for path in self.kept]
        sizes = zip(Size._fields, self.before, self.after, strict=True)
        rows += [Row((name.replace("_", "-"), f"{a:,}", f"{b:,}"), "bold") for name, a, b in sizes]
        return Table(heads, tuple(rows), notes=(*self.notes, *map(str, self.obstacles)))


def compact(
    model_fn: ModelFn, params: Params, *args: Any, where: Where = "*", drop_constants: bool = False
) -> Compacted:
    """Remove the channels, filters and heads that do nothing, and with them the work that they cost.

    The model is traced once, and every index of every axis in it followed from operation to operation,
    whatever framework it was written in. Index i of an axis goes if the outputs do not need it: all that
    would read it has weights of exactly 0.0 there, or it is exactly 0.0 itself whatever the input. Axes
    that hang together (a filter, its BatchNorm, the kernels that read it, a residual stream with all that
    write to it, the query, key, value and output of a head) become shorter together, or not at all.

    Layers in a `scan` shrink by what is dead in all of them, experts (weighted, gathered, `ragged_dot`) and
    groups of channels too.

    Never removed: what an input, an output, or an operation that is not understood depends on, what is
    taken by number (an index, a sort), and axes that a mean, a maximum or a normalisation runs over, since it
    counts them: LayerNorm over a transformer's stream. Nor the width of a head, as its square root scales the
    products. An axis keeps at least one index, a leaf that `model_fn` does not use all. Nothing to remove is
    no error; `obstacles` says why zeros stay, and what would help.

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
        ValueError: if `where` matches no leaf, two leaves have the same path, or one spans processes.
        RuntimeError: if an output differs by more than rounding on the example (√ε of the coarsest dtype in
            the model, or what the network makes of a few ε in its weights), and no constants were to be
            dropped. It is named.

    Cost:
        A trace, a few passes over the weights on the host (one byte each, which `model_fn` keeps), and one
        compilation with one run of both models on the example; where whole indices of zeros stay, as many
        passes again for each rule that might hold them. Activations are taken to be finite: 0 · inf counts
        as 0.

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
    _processes.check_here(params, "params")
    _processes.check_here(args, "args")
    paths, leaves = _tree.unique_paths(params, "params"), jax.tree.leaves(params)
    with jax.default_matmul_precision(PRECISION):
        program, known_as = read(model_fn, params, *args), signature(args)
    asked = Asked(jax.tree.leaves(match(params, where)), drop_constants)
    nonzero = [nonzero_of(leaf) for leaf in leaves]
    narrowing = analyse(program, nonzero, asked)
    chosen = narrowing.indices()
    small_leaves = [take(leaf, axes) for leaf, axes in zip(leaves, chosen, strict=True)]
    small = jax.tree.unflatten(jax.tree.structure(params), small_leaves)
    small_fn = CompactModel(model_fn, shapes_of(params), nonzero, asked, chosen, {known_as: narrowing})
    found = gaps(model_fn, small_fn, params, small, args)
    kept = {path: axes for path, axes in zip(paths, chosen, strict=True) if axes}
    work = multiply_adds(program)
    if not drop_constants:
        check_same(found, program.body, kept, model_fn, params, args)
    return Compacted(
        params=small,
        kept=kept,
        shapes={p: (jnp.shape(x), jnp.shape(y)) for p, x, y in zip(paths, leaves, small_leaves, strict=True)},
        before=_size(params, work.total),
        after=_size(small, multiply_adds(program, narrowing.shape).total),
        difference=found.difference,
        model_fn=small_fn,
        notes=work.notes,
        obstacles=obstacles(narrowing, nonzero, asked, paths, args),
    )


def _size(params: Params, products: int) -> Size:
    leaves = [x for x in jax.tree.leaves(params) if hasattr(x, "nbytes")]
    return Size(_tree.size(params), sum(x.nbytes for x in leaves), products)
