"""Second moments of what goes into every layer and of what comes back, streamed over batches."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_any_key, checked_choice, checked_count, checked_function
from hessjax._core._results import is_known
from hessjax._core._sources import Source, check_source
from hessjax._core._tables import Column, Row, Table, number, printable
from hessjax._core._types import Key, ModelFn, Params, settings
from hessjax.curvature._batches import add, zero
from hessjax.curvature._data import check_not_filled, weighed
from hessjax.curvature._ggn import check_likelihood
from hessjax.curvature._product import as_pytree, at_precision, check_precision, explained
from hessjax.curvature._weights import Weights, check_weights, of_examples
from hessjax.curvature.likelihoods import Likelihood
from hessjax.layers._capture import Layout, check_rows, layouts_of, strays_of
from hessjax.layers._coverage import check_covered, checked_uses
from hessjax.layers._gradients import Gradients, tapped_batch
from hessjax.layers._sides import Moments, Positions, diagonal_sides, use_moments
from hessjax.layers._taps import Tapped

Layouts: TypeAlias = tuple[tuple[Layout, ...], ...]
"""For every leaf those of its uses."""


@settings()
class Rules:
    """How moments are taken.

    Attributes:
        gradients: whose output gradients.
        positions: how positions that share a matrix count.
        max_width: the widest side with a full matrix.
        precision: of matrix products.
    """

    gradients: Gradients
    positions: Positions
    max_width: int
    precision: str | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["fn", "params", "args", "key"],
    meta_fields=["weights", "rules"],
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """Whose moments are taken: a function at its params, and how its examples count.

    Attributes:
        fn: the model, or the loss.
        params: the params.
        args: what all batches share.
        key: for labels drawn.
        weights: how much examples, or their positions, count.
        rules: how the moments are taken.
    """

    fn: Partial
    params: Params
    args: tuple[Any, ...]
    key: Key | None
    weights: Weights | None
    rules: Rules

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the leaves."""
        return tuple(_tree.leaf_paths(self.params))


class Part(NamedTuple):
    """A batch, cut into examples.

    Attributes:
        weight: how much it counts among the batches.
        layouts: of the uses of every leaf.
        args: the batch, and what all batches share.
        shares: the weights of its examples, which sum to 1.
        keys: one for each, if labels are drawn.
    """

    weight: float
    layouts: Layouts
    args: tuple[Any, ...]
    shares: Float[Array, "n ..."]
    keys: Key | None


def parts_of(problem: Problem, batches: Source) -> Iterator[Part]:
    """The batches that count, one after the other, checked."""
    if problem.weights is None:
        check_not_filled(batches)
    known = dict[Any, Layouts]()
    for index, (weight, batch) in enumerate(weighed(batches, problem.weights)):
        args, shares, count = of_examples(problem.weights, (batch, *problem.args))
        # Shapes decide what a program is: batches of equal ones are read once.
        shapes = jax.tree.structure(batch), tuple(np.shape(x)[1:] for x in jax.tree.leaves(batch))
        if shapes not in known:
            known[shapes] = _layouts(problem, args)
        shares = jnp.full(count, 1 / count) if shares is None else shares
        keys = (
            None if problem.key is None else jax.random.split(jax.random.fold_in(problem.key, index), count)
        )
        yield Part(weight, known[shapes], args, shares, keys)


def _layouts(problem: Problem, args: tuple[Any, ...]) -> Layouts:
    leaves = checked_uses(problem.rules.gradients.of(problem.fn), problem.params, args)
    check_covered(problem.params, leaves)
    return layouts_of(leaves)


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
            number of a row that an embedding does not have.

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
    problem = _checked(
        fn, params, batches, args, likelihood, key, num_samples, weights, positions, max_width, precision
    )
    return accumulated(problem, parts_of(problem, batches))


def accumulated(problem: Problem, parts: Iterator[Part]) -> LayerMoments:
    """The mean over the parts, by their weights."""
    total, count = None, 0.0
    for part in parts:
        data = problem.fn, problem.params, part.args, part.shares, part.keys
        with explained("fn"):
            found, strays = _part_moments(problem.rules, part.layouts, *data)
        check_rows(problem.paths, strays)
        total = add(zero(found) if total is None else total, part.weight, found)
        count, layouts = count + part.weight, part.layouts
    return LayerMoments(mean(total, count), problem, layouts)


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
) -> tuple[tuple[tuple[Moments, ...], ...], Bool[Array, " leaves"]]:
    with at_precision(rules.precision):
        found = tapped_batch(rules.gradients, fn, params, args, shares, keys)
        leaves = [_of_leaf(rules, *each, shares) for each in zip(layouts, found, strict=True)]
    return tuple(leaves), strays_of(layouts, found)


def _of_leaf(
    rules: Rules, layouts: tuple[Layout, ...], uses: tuple[Tapped, ...], shares: Array
) -> tuple[Moments, ...]:
    diagonal = diagonal_sides(layouts, rules.max_width)
    pairs = zip(layouts, uses, strict=True)
    return tuple(use_moments(layout, diagonal, rules.positions, use, shares) for layout, use in pairs)


# -- arguments -------------------------------------------------------------------------------------


def _checked(
    fn: Any,
    params: Any,
    batches: Any,
    args: tuple[Any, ...],
    likelihood: Any,
    key: Any,
    num_samples: Any,
    weights: Any,
    positions: Any,
    max_width: Any,
    precision: Any,
) -> Problem:
    _tree.check_floating(params)
    checked_function("fn", fn, "(params, *args)")
    check_listed(batches)
    check_weights(weights)
    check_precision(precision)
    checked_choice("positions", positions, ("expand", "reduce"))
    max_width = checked_count("max_width", max_width)
    if likelihood is not None:
        check_likelihood(likelihood)
    elif key is not None:
        raise ValueError("`likelihood` must be given with `key`: labels are drawn from it, got None.")
    if key is None and num_samples is not None:
        raise ValueError(f"`key` must be given with `num_samples`, got None with num_samples={num_samples}.")
    if key is not None:
        key = checked_any_key(key)
        num_samples = 1 if num_samples is None else checked_count("num_samples", num_samples)
    rules = Rules(Gradients(likelihood, num_samples), positions, max_width, precision)
    return Problem(as_pytree(fn), params, args, key, weights, rules)


def check_listed(batches: Any) -> None:
    """Raise a TypeError for what is no iterable of batches, or most likely one batch."""
    check_source(batches)
    if isinstance(batches, tuple) and all(isinstance(x, jax.Array | np.ndarray) for x in batches):
        raise TypeError(
            "`batches` must be an iterable of batches, got what looks like one batch, a "
            f"{type(batches).__name__}: put it into a list, `[batch]`."
        )
