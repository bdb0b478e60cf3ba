"""Second moments of what goes into every layer and of what comes back, streamed over batches."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._digests import digests
from hessjax._core._results import is_known
from hessjax._core._sources import Source
from hessjax._core._tables import Column, Row, Table, number, printable
from hessjax._core._types import Key, ModelFn, Params
from hessjax.curvature._batches import add, zero
from hessjax.curvature._product import at_precision, explained
from hessjax.curvature._weights import Weights
from hessjax.curvature.likelihoods import Likelihood
from hessjax.layers._capture import Layout, check_rows, strays_of
from hessjax.layers._gradients import tapped_batch
from hessjax.layers._problem import Layouts, Part, Problem, Rules, checked_problem, parts_of
from hessjax.layers._sides import Moments, Positions, diagonal_sides, use_moments
from hessjax.layers._taps import Tapped


@printable
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "problem"],
    meta_fields=["layouts"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class LayerMoments:
    """Second moments of every use of every leaf; a pytree, made by `moments`.

    Attributes:
        leaves: for every leaf those of each of its uses, in the leaf's own orientation: its matrices are
            (stack, left, right), the moments `left` and `right` in at least float32.
        problem: whose moments they are.
        layouts: how the leaf's entries lie in (stack, left, right), for each of its uses.
    """

    leaves: tuple[tuple[Moments, ...], ...]
    problem: Problem
    layouts: Layouts

    def of(self, path: str) -> tuple[Moments, ...]:
        """The moments of the uses of one leaf, by its path.

        Raises:
            ValueError: there is no such leaf (the paths are listed).
        """
        paths = self.problem.paths
        if path not in paths:
            raise ValueError(f"`path` must be that of a leaf, one of {', '.join(paths)}, got {path!r}.")
        return self.leaves[paths.index(path)]

    def check(self, params: Params) -> None:
        """Raise unless the moments are of these params: the same leaves, with the same numbers in them.

        Moments keep the params that they were taken at (no copy), and these are compared with. Traced params
        have no numbers to compare: their paths and shapes are.

        Raises:
            ValueError: leaves of other paths, shapes or values, which are named.

        Cost:
            One pass over the params.
        """
        own, given = map(_by_path, (self.problem.params, params))
        bad = [f"  {path}: no such leaf" for path in own.keys() ^ given.keys()]
        both = sorted(own.keys() & given.keys())
        bad += [
            f"  {path}: shape {np.shape(given[path])}, not {np.shape(own[path])}"
            for path in both
            if np.shape(given[path]) != np.shape(own[path])
        ]
        if not bad and is_known((self.problem.params, params)):
            # By digests, which do not mind on which devices either lies.
            pairs = zip(*(digests([tree[path] for path in both]) for tree in (own, given)), strict=True)
            bad = [f"  {path}: other values" for path, (x, y) in zip(both, pairs, strict=True) if x != y]
        if bad:
            raise ValueError(
                "`params` must be those that the moments were taken at, but\n"
                + "\n".join(bad)
                + "\nTake the moments anew: `hessjax.layers.moments(model_fn, params, batches)`."
            )

    def _table(self) -> Table | str:
        if not is_known(self.leaves):
            return f"LayerMoments(of {len(self.leaves)} leaves)"
        columns = (
            Column("Leaf", "name"),
            Column("Use", "word"),
            Column("Left"),
            Column("Trace"),
            Column("Right"),
            Column("Trace"),
        )
        rows = [
            Row((path, layout.words, *_cells(found.left), *_cells(found.right)))
            for path, layouts, uses in zip(self.problem.paths, self.layouts, self.leaves, strict=True)
            for layout, found in zip(layouts, uses, strict=True)
        ]
        return Table(columns, tuple(rows), notes=("Widths of moments kept as diagonals are marked d.",))


def _by_path(params: Params) -> dict[str, Any]:
    return dict(zip(_tree.leaf_paths(params), jax.tree.leaves(params), strict=True))


def _cells(side: Array) -> tuple[str, str]:
    is_diagonal = side.ndim == 2
    trace = side.sum() if is_diagonal else jnp.trace(side, axis1=1, axis2=2).sum()
    return f"{side.shape[1]}{' d' if is_diagonal else ''}", number(trace)


def moments(
    fn: ModelFn,
    params: Params,
    batches: Source,
    *args: Any,
    likelihood: Likelihood | None = None,
    key: Key | None = None,
    num_samples: int | None = None,
    weights: Weights | None = None,
    positions: Positions = "expand",
    max_width: int = 4096,
    precision: str | None = "highest",
) -> LayerMoments:
    """Second moments A = E[a aᵀ] of what goes into every layer, and B = E[g gᵀ] of what comes back.

    Of a matrix used once in each example, Σ wₙ aₙaₙᵀ and Σ wₙ gₙgₙᵀ over the examples, with weights that sum
    to 1. Where positions share it (tokens, pixels, steps of a loop), "expand" takes the mean of a aᵀ and
    the sum of g gᵀ over them, "reduce" the moments of the mean of a and the sum of g. Whose gradients g are
    is decided as in `fisher`: with a likelihood those of its exact information, column by column of its
    root, or of labels drawn from it; without one those of the loss at its own labels.

    Args:
        fn: `model_fn(params, batch, *args) -> outputs` with a likelihood, `loss_fn(params, batch, *args) ->
            scalar` without.
        params: pytree of real floating-point arrays, all of them leaves that `coverage` covers.
        batches: a source of data, as for `hj.over_batches`, passed over once; one batch is put into a list.
        *args: what `fn` takes besides, the same for all batches.
        likelihood: what the outputs mean, as in `fisher`; None: `fn` is the loss (the empirical Fisher).
        key: random key of the labels; None: none are drawn. Batch i draws by the key with i folded in.
        num_samples: with `key`: labels for each example, 1 by default.
        weights: `weights(batch) -> array`, as in `fisher`: for each example, or each output position. In
            layers whose positions are those of the weights inputs count by them too.
        positions: `"expand"` or `"reduce"`.
        max_width: a side that is wider has only the diagonal of its moments, as have the rows of embeddings.
        precision: of matrix products and convolutions, as in `hessian`.

    Returns:
        A `LayerMoments`, in at least float32: what `kfac` and `ekfac` take.

    Raises:
        TypeError: `params` or the outputs are not floating point; `batches` cannot be iterated; the
            outputs are not one array, or the loss is no scalar.
        ValueError: a leaf that is not covered (all are named, with the reasons); `num_samples` without
            `key`; `key` without a likelihood; weights of another shape, negative, not finite, or all zero; a
            number of a row that an embedding does not have; moments that are NaN or infinite.

    Cost:
        For each batch a forward pass and, for activations only, a backward pass for each row: one for the
        loss and for each label drawn, as many as outputs times output positions for the exact information.
        The products a aᵀ and g gᵀ cost (I² + O²)/(I·O) times a third of a gradient. Memory: the activations
        of a batch, their gradients for all rows, and I² + O² numbers for each matrix.

    References:
        Martens & Grosse (2015), arXiv 1503.05671; Grosse & Martens (2016), arXiv 1602.01407 (convolutions);
        Eschenhagen et al. (2023), arXiv 2311.00636 (positions).

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> found = hj.layers.moments(model_fn, w, [x], likelihood=hj.likelihoods.gaussian)
        >>> found.leaves[0][0].left[0].tolist(), found.leaves[0][0].right[0].tolist()
        ([[1.0, 1.0], [1.0, 2.0]], [[1.0]])
    """
    problem = checked_problem(
        fn, params, batches, args, likelihood, key, num_samples, weights, positions, max_width, precision
    )
    return accumulated(problem, parts_of(problem, batches))


def accumulated(problem: Problem, parts: Iterator[Part]) -> LayerMoments:
    """The mean over the parts, by their weights."""
    total, count = None, 0.0
    for index, part in enumerate(parts):
        data = problem.fn, problem.params, part.args, part.shares, part.keys
        with explained("fn"):
            found, strays, wrong = _part_moments(problem.rules, part.layouts, *data)
        check_rows(problem.paths, strays)
        _check_finite(problem.paths, index, wrong)
        total = add(zero(found) if total is None else total, part.weight, found)
        count, layouts = count + part.weight, part.layouts
    return LayerMoments(mean(total, count), problem, layouts)


def _check_finite(paths: tuple[str, ...], index: int, wrong: Bool[Array, " leaves"]) -> None:
    """Raise a ValueError that names every leaf whose moments are not finite: one example spoils them all."""
    if isinstance(wrong, jax.core.Tracer):
        return
    bad = [path for path, x in zip(paths, jax.device_get(wrong), strict=True) if x]
    if bad:
        raise ValueError(
            f"`batches` must give finite moments, but those of {', '.join(bad)} are NaN or infinite in "
            f"number {index} of the batches that count: leave such examples out, or give them weight 0 by "
            "`weights`."
        )


@functools.partial(jax.jit, donate_argnums=0)
def mean(total: Any, count: Any) -> Any:
    """`total / count`, in the memory of the total."""
    return _tree.scale(1 / count, total)


@compiled(static_argnums=1)
def _part_moments(
    rules: Rules,
    layouts: Layouts,
    fn: Partial,
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."],
    keys: Key | None,
) -> tuple[tuple[tuple[Moments, ...], ...], Bool[Array, " leaves"], Bool[Array, " leaves"]]:
    with at_precision(rules.precision):
        found = tapped_batch(rules.gradients, fn, params, args, shares, keys)
        leaves = [_of_leaf(rules, *each, shares) for each in zip(layouts, found, strict=True)]
    wrong = [[jnp.any(~jnp.isfinite(x)) for x in jax.tree.leaves(uses)] for uses in leaves]
    return tuple(leaves), strays_of(layouts, found), jnp.stack([jnp.any(jnp.stack(x)) for x in wrong])


def _of_leaf(
    rules: Rules, layouts: tuple[Layout, ...], uses: tuple[Tapped, ...], shares: Array
) -> tuple[Moments, ...]:
    diagonal = diagonal_sides(layouts, rules.max_width)
    pairs = zip(layouts, uses, strict=True)
    return tuple(use_moments(layout, diagonal, rules.positions, use, shares) for layout, use in pairs)
