"""Saliencies that move the kept weights of every layer: optimal brain compression, SparseGPT's sweep."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core._messages import checked_count
from hessjax._core._types import Amount, Params, Relative, Scalar, Tolerance, assign, settings
from hessjax.layers._exchange import exchanged
from hessjax.layers._moments import LayerMoments
from hessjax.layers._outputs import Inputs, by_path
from hessjax.layers._reconstruct import check_solved, nearest
from hessjax.layers._rows import inverted
from hessjax.layers._selection import costs_in_turn, costs_of_sets, swept
from hessjax.pruning.patterns._fitting import patterns_of
from hessjax.pruning.patterns._pattern import Kept, Pattern, Unstructured
from hessjax.pruning.saliencies._saliency import Context, MaskChange, Saliency
from hessjax.pruning.saliencies._wanda import (
    check_counted,
    check_moments,
    diagonal_costs,
    inputs_now,
    there_of,
    tree_of,
)


@settings(arrays=("moments", "damping"))
class LayerWise(Saliency):
    """Optimal brain compression: what a weight costs its layer's outputs, and the best kept weights.

    With H = E[a aᵀ] + λI of a leaf's inputs, a weight of a column w costs ½ w_q² / [H⁻¹]_qq times E[g²] of
    the output, in units of the loss, if the others of the column make up for it; scores are what each weight
    costs when its turn comes, the cheapest of a column first and the others moved (OBC's greedy order). Under
    patterns that remove groups as a whole they are what the set costs, ½ w_Qᵀ [H⁻¹_QQ]⁻¹ w_Q, in equal parts.
    The move is exact for any mask: the best kept weights, as `hessjax.layers.reconstruct` has them at one go.

    As `by` of `compensated` it is the layer-wise move for any score.

    Args:
        moments: `hessjax.layers.moments(fn, params, batches)`, with positions `"expand"`.
        damping: λ, or `relative(r)`: r times the mean diagonal of E[a aᵀ], matrix by matrix.

    Returns:
        A `Saliency`; its predicted increase is ½ tr(Δᵀ E[a aᵀ] Δ E[g gᵀ]), K-FAC's.

    Raises:
        TypeError: if `moments` are none.
        ValueError: gradients that are all zero; when scored or moved, for leaves that there are no moments
            of, or of another shape (all are named); λ = 0 where E[a aᵀ] is singular (names the leaves).

    Cost:
        Scores: 2·i² operations for each weight, i being the inputs of its leaf, in steps one after the other:
        for layers of up to some hundred inputs; beyond, `sparsegpt`. The move as `reconstruct`.

    References:
        Frantar et al., Optimal brain compression (2022), arXiv 2208.11580.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0], [2.0, 2.0]])  # the inputs are the same
        >>> moments = hj.layers.moments(model_fn, w, [x], likelihood=hj.likelihoods.gaussian)
        >>> rule = hj.saliencies.obc(moments, damping=1e-4)
        >>> hj.prune_once(w, rule, 0.5, where="*").params.round(2).ravel().tolist()
        [0.0, 3.0]
    """

    moments: LayerMoments
    damping: Tolerance | Scalar = Relative(0.01)
    compensates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_moments(self.moments)
        check_counted(self.moments)
        assign(self, damping=Amount.of(self.damping, "damping"))

    def __repr__(self) -> str:
        return f"obc({self.moments.problem.paths}, {self.damping})"

    @property
    def amount(self) -> Amount:
        """The damping, one that is no fraction too."""
        return Amount.of(self.damping, "damping")

    def scores(self, state: Any, seen: Context) -> Params:
        """What each weight costs when its turn comes, or its group."""
        found = inputs_now(self.moments, there_of(seen))
        patterns = patterns_of(seen.pattern, seen.weights)
        triples = zip(found, patterns, jax.tree.leaves(seen.mask), strict=True)
        return tree_of(seen, [_cost(inputs, p, mask, self.amount) for inputs, p, mask in triples])

    def compensate(self, state: Any, seen: Context, mask: Params) -> tuple[Params, Float[Array, ""]]:
        """The best kept weights."""
        found = inputs_now(self.moments, there_of(seen))
        masks = [m & a for m, a in zip(*map(jax.tree.leaves, (mask, seen.mask)), strict=True)]
        best = [nearest(inputs, m, self.amount) for inputs, m in zip(found, masks, strict=True)]
        check_solved(dict(zip(by_path(seen.weights), best, strict=True)))
        increases = [
            inputs.increase(inputs.dense - inputs.moves.apply(x))
            for inputs, x in zip(found, best, strict=True)
        ]
        moved = jax.tree.map(
            # A pruned weight keeps its dense copy; traced code cannot raise: what is singular does not move.
            lambda w, m, x: jnp.where(m & jnp.all(jnp.isfinite(x)), x.astype(w.dtype), w),
            seen.weights,
            tree_of(seen, masks),
            tree_of(seen, best),
        )
        return moved, jnp.sum(jnp.stack(increases))


def _cost(inputs: Inputs, pattern: Pattern, mask: Array, damping: Amount) -> Array:
    there = inputs.moves.apply(mask)
    if inputs.is_diagonal:
        return inputs.moves.undo(diagonal_costs(inputs))
    weights = inputs.dense * jnp.sqrt(inputs.importance)[:, None]
    quadratic = inputs.damped(damping)
    if isinstance(pattern, Unstructured | Kept) or pattern.at_most is not None:
        return inputs.moves.undo(costs_in_turn(quadratic, weights, there))
    places = pattern.group(jnp.asarray(_places(inputs)))
    found = costs_of_sets(inverted(quadratic), weights, there, places)
    return pattern.ungroup(found, mask.shape)


def _places(inputs: Inputs) -> np.ndarray:
    """For every entry of a leaf its number in the stack of matrices."""
    numbers = np.arange(int(np.prod(inputs.moves.end)))
    return inputs.moves.undo(numbers.reshape(inputs.moves.end))


# -- SparseGPT's sweep -----------------------------------------------------------------------------


@settings(arrays=("moments", "damping"))
class Sweep(MaskChange):
    """Another mask of as many zeros in every matrix, or in every group, chosen in one sweep."""

    moments: LayerMoments
    damping: Amount
    block_size: int
    exchanges: int

    def settle(self, mask: Params, order: Params, seen: Context) -> Params:
        """The mask of the sweep."""
        found = inputs_now(self.moments, there_of(seen))
        paths, patterns = by_path(seen.weights), patterns_of(seen.pattern, seen.weights)
        rows = zip(paths, found, patterns, jax.tree.leaves(mask), jax.tree.leaves(seen.mask), strict=True)
        return tree_of(seen, [self._leaf(*row) for row in rows])

    def _leaf(self, path: str, inputs: Inputs, pattern: Pattern, mask: Array, active: Array) -> Array:
        is_single = isinstance(pattern, Unstructured)
        if inputs.is_diagonal or not (is_single or pattern.at_most):
            return mask  # groups that go as a whole, or nothing to move: as they were ranked
        order, size = (np.arange(inputs.moves.end[1]), 1) if is_single else _runs(path, inputs, pattern)
        block = size * max(1, self.block_size // size)
        kept, there = map(inputs.moves.apply, (mask & active, active))
        quadratic = inputs.damped(self.damping)
        # A column's scale is nothing to the column itself: it is what the columns are compared by.
        weights = inputs.dense * jnp.sqrt(inputs.importance)[:, None]
        where = jnp.asarray(order), size, not is_single
        found = swept(quadratic, weights, kept, ~there, *where, block)
        if self.exchanges:
            found = exchanged(quadratic, weights, found, ~there, *where, self.exchanges)
        return inputs.moves.undo(found)


def _runs(path: str, inputs: Inputs, pattern: Pattern) -> tuple[np.ndarray, int]:
    """The inputs in an order in which those of a group follow one another, and how many those are."""
    with jax.ensure_compile_time_eval():
        shape = inputs.moves.shape
        rows = pattern.group(jnp.zeros(shape))
        number = jnp.tile(jnp.arange(len(rows))[:, None], (1, rows.shape[1]))
        groups = np.asarray(inputs.moves.apply(np.asarray(pattern.ungroup(number, shape))))
    size = rows.shape[1]
    first = groups[0, :, 0]
    order = np.argsort(first, kind="stable")
    runs = groups[:, order].reshape(groups.shape[0], -1, size, groups.shape[2])
    if groups.shape[1] % size or not np.all(runs == runs[:, :, :1]):
        raise ValueError(
            f"`pattern` must group weights along the inputs for `sparsegpt`, but {pattern.name} does not in "
            f"{path}: rank by `obc`, or by `wanda`."
        )
    return order, size


@settings(arrays=("moments", "damping"))
class SparseGPT(LayerWise):
    """SparseGPT: the mask is chosen in one sweep over the inputs of each layer, as the weights move.

    How many weights a leaf's matrices lose is the allocation's affair, which ranks w² / [H⁻¹]_qq times E[g²]
    (so under `uniform` each leaf the same share, as published). Which ones go is decided block by block of
    inputs: the cheapest of the block, times E[g²] of their outputs, as the weights are after those before it
    have gone; under n:m group by group. What the sweep settled early it does not look at again: so kept
    weights then change places with zeros, as long as the outputs gain, which comes within some percent of
    `obc`'s greedy choice. The kept weights are last moved to their best values, as in `obc`. Groups that go
    as a whole go as they are ranked.

    Args:
        moments: as in `obc`.
        damping: as in `obc`.
        block_size: so many inputs are taken at a time, 128 as published; fewer choose better, and are slower.
        exchanges: at most so many rounds of exchanges; 0: the mask of the sweep, as published.

    Raises:
        TypeError, ValueError: as `obc`; a `block_size` below 1, `exchanges` below 0; a pattern whose groups
            do not run along the inputs.

    Cost:
        For each matrix of i inputs and o outputs i³ + 2·i²·o operations, in i steps, and a sort of each
        block; memory i² + 3·i·o numbers. A round of exchanges takes k³/3 + k²·i operations for each output,
        of whose inputs k are kept; so does the move, as `reconstruct`, without the second term.

    References:
        Frantar and Alistarh, SparseGPT: massive language models can be accurately pruned in one-shot (2023),
        arXiv 2301.00774.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0], [2.0, 2.0]])  # the inputs are the same
        >>> moments = hj.layers.moments(model_fn, w, [x], likelihood=hj.likelihoods.gaussian)
        >>> rule = hj.saliencies.sparsegpt(moments, damping=0.01)
        >>> hj.prune_once(w, rule, 0.5, where="*").params.round(2).ravel().tolist()
        [0.0, 3.0]
    """

    block_size: int = 16
    exchanges: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, block_size=checked_count("block_size", self.block_size))
        assign(self, exchanges=checked_count("exchanges", self.exchanges, 0))

    def __repr__(self) -> str:
        settings = f"{self.damping}, {self.block_size}, {self.exchanges}"
        return f"sparsegpt({self.moments.problem.paths}, {settings})"

    @property
    def change(self) -> MaskChange:  # type: ignore[override]
        """The sweep."""
        return Sweep(self.moments, self.amount, self.block_size, self.exchanges)

    def scores(self, state: Any, seen: Context) -> Params:
        """What each weight costs if it goes alone."""
        found = inputs_now(self.moments, there_of(seen))
        return tree_of(seen, [inputs.moves.undo(_single_cost(inputs, self.amount)) for inputs in found])


def _single_cost(inputs: Inputs, damping: Amount) -> Float[Array, "s i o"]:
    if inputs.is_diagonal:
        return diagonal_costs(inputs)
    pivots = jnp.diagonal(inverted(inputs.damped(damping)), axis1=1, axis2=2)
    return inputs.dense**2 / pivots[..., None] * inputs.importance[:, None] / 2


obc, sparsegpt = LayerWise, SparseGPT
