"""Reconstruction: for any mask the kept weights that bring a layer's outputs nearest to the dense ones."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hessjax._core import _tree
from hessjax._core._messages import checked_choice
from hessjax._core._results import by_shapes, is_known
from hessjax._core._sources import Source
from hessjax._core._tables import Column, Row, Table, number, percent, printable
from hessjax._core._types import Amount, Params, Relative, Scalar, Tolerance
from hessjax.layers._masks import Empty, checked_masks
from hessjax.layers._moments import LayerMoments
from hessjax.layers._outputs import Inputs, by_path, inputs_of, shifted
from hessjax.layers._problem import Problem, check_listed
from hessjax.layers._rows import best_columns
from hessjax.layers._sequence import Cross, Walk


class Rebuilt(NamedTuple):
    """What became of one leaf.

    Attributes:
        sparsity: the fraction of zeros.
        masked: the squared error of its outputs, as a fraction of their squares, if the mask alone is applied
            to the dense weights.
        error: the same after the kept weights have moved. The inputs are those of the dense network in both;
            kept weights that were fitted to inputs of the pruned one may err more on these.
    """

    sparsity: float
    masked: Scalar
    error: Scalar


@printable
class Reconstruction(NamedTuple):
    """A pruned network whose kept weights have moved.

    Attributes:
        params: the params, exactly zero where the mask is False.
        leaves: what became of every leaf that was pruned, by path.
    """

    params: Params
    leaves: dict[str, Rebuilt]

    def _table(self) -> Table | str:
        if not is_known(self):
            return by_shapes(self)
        columns = Column("Leaf", "name"), Column("Zeros %"), Column("Error, mask alone"), Column("Error")
        rows = [
            Row((path, percent(leaf.sparsity), number(leaf.masked), number(leaf.error)))
            for path, leaf in self.leaves.items()
        ]
        note = "Squared errors of the leaves' outputs, over their squares, at the dense network's inputs."
        return Table(columns, tuple(rows), notes=(note,))


def reconstruct(
    params: Params,
    mask: Params,
    moments: LayerMoments,
    batches: Source | None = None,
    *,
    damping: Tolerance | Scalar = Relative(0.01),  # noqa: B008 (a value, never changed)
    empty: Empty = "refuse",
) -> Reconstruction:
    """For a mask of any pattern the best kept weights, layer by layer, without any training.

    Of every matrix W, used as y = aᵀW, Ŵ minimises E‖aᵀW − âᵀŴ‖² + λ‖W − Ŵ‖² among those that are zero where
    the mask is False. Without `batches` the inputs â of the pruned network are taken for those of the dense
    one, a. With them the leaves are taken in the order of the program, those that know nothing of one another
    together, and â is what comes out of the layers before, as they are by then: a layer then makes up for the
    errors of those before it too. Steps of a `scan` that have matrices of their own are taken one after the
    other, the leaves within a step together.

    Args:
        params: the dense params.
        mask: a tree of booleans like them, True = kept; a scalar True for a leaf that is not pruned and does
            not move, as `prune_once` and `mask_of` give it.
        moments: `hessjax.layers.moments(fn, params, batches)` of these params, or of a part of them that has
            every leaf which the mask prunes, with positions `"expand"`. Only the inputs' matter.
        batches: the batches that the moments are of, once more, gone through once; one batch is put into a
            list. None: all leaves at one go.
        damping: λ, or `relative(r)`: r times the mean diagonal of E[ââᵀ], matrix by matrix. Where there are
            fewer examples (times positions) than inputs it is λ alone that decides in which of many
            equally good ways the kept weights make up for the others: the nearest to the dense ones.
        empty: `"refuse"` a mask that leaves an output without any input; or `"allow"` it, such outputs being
            zero, as of neurons that died.

    Returns:
        A `Reconstruction`: the params, and for every leaf the error of its outputs; it prints as a table.

    Raises:
        TypeError: `params` are not floating point, the mask is not boolean, `moments` are none.
        ValueError: a mask of another structure or shape; leaves that there are no moments of, moments of
            other params (all are named); a tied leaf whose inputs in one use are its outputs in another; a
            mask that leaves outputs without inputs; λ = 0 where E[ââᵀ] is singular (names the leaf).

    Cost:
        For each mask that columns of a matrix have (one, where all columns share it) a Cholesky factor of
        k × k numbers, k being the most kept entries of a column or the most zeros, whichever is less: at
        most inputs³/3 operations for each output. Systems of 2²⁴ numbers are in memory at a time. With
        `batches` two forward passes over them in all (steps of a `scan` with matrices of their own: two of
        the loop for each; leaves that are used twice: two more up to there), and the products of inputs.
        The batches stay in memory, and of all of them the activations between two depths.

    References:
        Frantar et al., Optimal brain compression (2022), arXiv 2208.11580. Frantar and Alistarh, SparseGPT
        (2023), arXiv 2301.00774.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0], [2.0, 2.0]])  # the inputs are the same
        >>> moments = hj.layers.moments(model_fn, w, [x], likelihood=hj.likelihoods.gaussian)
        >>> mask = jnp.array([[False], [True]])
        >>> hj.layers.reconstruct(w, mask, moments, damping=1e-6).params.round(3).ravel().tolist()
        [0.0, 3.0]
    """
    checked_choice("empty", empty, ("refuse", "allow"))
    damped = Amount.of(damping, "damping")
    masks = checked_masks(params, mask, moments, empty)
    found = {path: inputs_of(moments, path) for path in masks}
    if batches is None:
        moved = {path: nearest(found[path], x, damped) for path, x in masks.items()}
    else:
        check_listed(batches)
        moved = _in_sequence(found, masks, moments, batches, damped)
    check_solved(moved)
    leaves = {path: _rebuilt(found[path], masks[path], moved[path]) for path in masks}
    flat = [moved[path].astype(x.dtype) if path in moved else x for path, x in by_path(params).items()]
    return Reconstruction(jax.tree.unflatten(jax.tree.structure(params), flat), leaves)


def nearest(inputs: Inputs, mask: Bool[Array, "..."], damping: Amount) -> Array:
    """The leaf with the best kept weights, in at least float32, at the inputs of the dense network."""
    kept = inputs.moves.apply(mask)
    if inputs.is_diagonal:
        return inputs.moves.undo(jnp.where(kept, inputs.dense, 0))
    quadratic = inputs.damped(damping)
    slope = jnp.matmul(quadratic, inputs.dense, precision="highest")
    best = best_columns(quadratic, slope, kept)
    # What loses nothing stays as it is, to the last bit.
    return inputs.moves.undo(jnp.where(jnp.all(kept, axis=1, keepdims=True), inputs.dense, best))


# -- one depth after the other ---------------------------------------------------------------------


def _in_sequence(
    found: Mapping[str, Inputs],
    masks: Mapping[str, Array],
    moments: LayerMoments,
    batches: Source,
    damping: Amount,
) -> dict[str, Array]:
    """All leaves that are pruned, each fitted to what comes out of those before."""
    problem = moments.problem
    paths, dense = problem.paths, jax.tree.leaves(problem.params)
    current = [jnp.asarray(x) for x in dense]
    wanted = tuple(paths.index(path) for path in masks)
    walk = Walk.of(problem, batches, wanted)
    for place, depth in enumerate(depths := walk.depths):
        for parts in depth.parts:
            crosses = walk.crosses(place, depth.leaves, _tree_of(problem, current))
            for leaf, cross, part in zip(depth.leaves, crosses, parts, strict=True):
                inputs, kept = found[paths[leaf]], masks[paths[leaf]]
                own = inputs, cross, inputs.moves.apply(kept), slice(*part), damping
                current[leaf] = _moved(*own, current[leaf])
        if place + 1 < len(depths):
            walk.go_on(place, depths, _tree_of(problem, current))
    return {path: current[paths.index(path)] for path in masks}


def _tree_of(problem: Problem, leaves: list[Array]) -> Params:
    return jax.tree.unflatten(jax.tree.structure(problem.params), leaves)


def _moved(
    inputs: Inputs, cross: Cross, kept: Bool[Array, "s i o"], part: slice, damping: Amount, leaf: Array
) -> Array:
    """The leaf with a part of its stack fitted."""
    now = inputs.moves.apply(_tree.wide(leaf))
    best = _fitted(inputs, cross, kept, part, damping)
    return inputs.moves.undo(now.at[part].set(best)).astype(leaf.dtype)


def _fitted(
    inputs: Inputs, cross: Cross, kept: Bool[Array, "s i o"], part: slice, damping: Amount
) -> Float[Array, "p i o"]:
    """The matrices of a part of the stack."""
    dense, kept = inputs.dense[part], kept[part]
    if inputs.is_diagonal:
        return jnp.where(kept, dense, 0)
    hessian, both = cross.hessian[part], cross.both[part]
    mean = jnp.mean(jnp.diagonal(hessian, axis1=1, axis2=2), axis=1)
    shift = jnp.broadcast_to(jnp.asarray(damping.limit(mean), mean.dtype), mean.shape)
    quadratic = shifted(hessian, shift)
    # E‖aᵀW − âᵀŴ‖² + λ‖W − Ŵ‖² has the slope (E[â aᵀ] + λI) W, and both shifts are the same number.
    slope = jnp.matmul(both + (quadratic - hessian), dense, precision="highest")
    return best_columns(quadratic, slope, kept)


# -- what became of it -----------------------------------------------------------------------------


def check_solved(moved: Mapping[str, Array]) -> None:
    """Raise a ValueError that names every leaf with a singular system."""
    if any(isinstance(x, jax.core.Tracer) for x in moved.values()):
        return
    bad = [path for path, x in moved.items() if not bool(jnp.all(jnp.isfinite(x)))]
    if bad:
        raise ValueError(
            f"`damping` must make E[a aᵀ] + λI regular, but for {', '.join(bad)} it is not: the inputs are "
            "fewer than the weights, dependent, or not finite. `relative(0.01)` does for most."
        )


def _rebuilt(inputs: Inputs, mask: Array, leaf: Array) -> Rebuilt:
    kept = inputs.moves.apply(mask)
    masked, error = _errors(inputs.hessian, inputs.dense, kept, inputs.moves.apply(_tree.wide(leaf)))
    return Rebuilt(1 - float(np.mean(np.asarray(mask))), masked, error)


@jax.jit
def _errors(hessian: Array, dense: Array, kept: Array, moved: Array) -> tuple[Scalar, Scalar]:
    error = functools.partial(_square, hessian)
    whole = error(dense)
    whole = jnp.where(whole > 0, whole, 1)
    return error(jnp.where(kept, 0, dense)) / whole, error(dense - moved) / whole


def _square(hessian: Array, change: Array) -> Scalar:
    times = (
        hessian[..., None] * change if hessian.ndim == 2 else jnp.matmul(hessian, change, precision="highest")
    )
    return jnp.sum(change * times)
