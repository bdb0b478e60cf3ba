"""Inputs and output gradients of every use of every leaf, example by example, kept as they are."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from hessjax._core import _tree
from hessjax._core._compiled import compiled
from hessjax._core._tables import Column, Row, Table, printable, shape_text
from hessjax._core._types import Block, LossFn, Params
from hessjax.curvature._product import as_pytree, at_precision, check_precision, explained
from hessjax.curvature._weights import Weights, by_example, of_examples
from hessjax.layers._coverage import checked_uses
from hessjax.layers._gradients import Gradients, tapped_batch, whole_batch
from hessjax.layers._taps import Tapped
from hessjax.layers._uses import LeafUses, Use
from hessjax.program._origins import Moves


class Layout(NamedTuple):
    """How a leaf lies in one of its uses: equal layouts hash alike, whatever program they were read from.

    Attributes:
        moves: from the leaf to a stack of matrices, (stack, inputs, outputs).
        positions: the shape of the positions that share a matrix.
        is_lookup: whether its inputs are numbers of rows.
        swapped: whether the leaf's first use has inputs where this one has outputs.
        words: what it does.
    """

    moves: Moves
    positions: tuple[int, ...]
    is_lookup: bool
    swapped: bool
    words: str

    @staticmethod
    def of(use: Use) -> "Layout":
        """The layout of a use."""
        return Layout(use.moves, use.positions, use.is_lookup, use.swapped, use.words())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(stack, inputs, outputs)."""
        stack, inputs, outputs = self.moves.end
        return stack, inputs, outputs

    def products(self, inputs: Array, gradients: Float[Array, "p s o"]) -> Float[Array, "s i o"]:
        """Σ a gᵀ over the positions, for one row of one example."""
        if not self.is_lookup:
            return jnp.einsum("psi,pso->sio", inputs, gradients)
        zeros = jnp.zeros(self.shape, gradients.dtype)
        return zeros.at[jnp.arange(self.shape[0])[None], inputs].add(gradients)

    def oriented(self, matrices: Float[Array, "s i o"]) -> Float[Array, "s l r"]:
        """Matrices as the leaf's first use has them."""
        return matrices.swapaxes(1, 2) if self.swapped else matrices

    def strays(self, inputs: Array) -> Bool[Array, ""]:
        """Whether a number of a row is that of none."""
        if not self.is_lookup:
            return jnp.asarray(False)
        return jnp.any((inputs < 0) | (inputs >= self.shape[1]))


def layouts_of(leaves: tuple[LeafUses, ...]) -> tuple[tuple[Layout, ...], ...]:
    """Of every leaf that is covered those of its uses; of others none."""
    return tuple(tuple(Layout.of(use) for use in leaf.uses if leaf.is_covered) for leaf in leaves)


@printable
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["uses"], meta_fields=["layouts", "paths", "structure"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Capture:
    """Inputs and output gradients of every use of every covered leaf, for a batch of examples.

    Attributes:
        uses: for every leaf, in their order, those of each of its uses: `inputs` (examples, positions, stack,
            inputs), of an embedding the numbers of rows without the last axis; and `gradients` (examples, 1,
            positions, stack, outputs). Empty for a leaf that is not covered.
        layouts: where the entries of the leaf lie in each.
        paths: of the leaves.
        structure: of the params.
    """

    uses: tuple[tuple[Tapped, ...], ...]
    layouts: tuple[tuple[Layout, ...], ...]
    paths: tuple[str, ...]
    structure: Any

    def grads(self) -> Block:
        """Every example's gradient, put together again: a block, as `per_example_grads` gives it.

        None in the place of leaves that are not covered, as in the halves of `select`.
        """
        leaves = [_grads(layouts, uses) for layouts, uses in zip(self.layouts, self.uses, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def _table(self) -> Table:
        columns = (
            Column("Leaf", "name"),
            Column("Use", "word"),
            Column("Inputs", "word"),
            Column("Output gradients", "word"),
        )
        rows = [
            Row((path, layout.words, shape_text(use.inputs.shape), shape_text(use.gradients.shape)))
            for path, layouts, uses in zip(self.paths, self.layouts, self.uses, strict=True)
            for layout, use in zip(layouts, uses, strict=True)
        ]
        missing = [path for path, uses in zip(self.paths, self.uses, strict=True) if not uses]
        notes = (f"Not covered: {', '.join(missing)}.",) if missing else ()
        return Table(columns, tuple(rows), notes=notes)


def capture(
    loss_fn: LossFn,
    params: Params,
    *args: Any,
    weights: Weights | None = None,
    precision: str | None = "highest",
) -> Capture:
    """What went into every use of every leaf, a, and what came back, g: ∂ℓₙ/∂W = Σ a gᵀ over its positions.

    Args:
        loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the leading axis of `args[0]`.
        params: pytree of real floating-point arrays.
        *args: first the batch, which alone is cut into examples: see `per_example_grads`.
        weights: as in `per_example_grads`.
        precision: of matrix products and convolutions, as in `hessian`.

    Returns:
        A `Capture`, in at least float32, of the leaves that `coverage` covers.

    Raises:
        TypeError, ValueError: as `per_example_grads`; a number of a row that an embedding does not have.

    Cost:
        One gradient of the whole batch, with respect to activations only. Memory: inputs and output gradients
        of all layers for all examples.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(w, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ w - y) ** 2) / 2
        >>> batch = jnp.array([[1.0, 0.0], [2.0, 3.0]]), jnp.array([[1.0], [0.0]])
        >>> found = hj.layers.capture(loss_fn, jnp.array([[1.0], [1.0]]), batch)
        >>> found.uses[0][0].gradients.ravel().tolist()  # x @ w - y
        [0.0, 5.0]
        >>> found.grads()[:, :, 0].tolist()
        [[0.0, 0.0], [10.0, 15.0]]
    """
    check_precision(precision)
    source = Gradients(argument="loss_fn")
    leaves = checked_uses(source.of(loss_fn) if callable(loss_fn) else loss_fn, params, args, "loss_fn")
    layouts, paths = layouts_of(leaves), tuple(_tree.leaf_paths(params))
    args, shares, count = of_examples(weights, (whole_batch(args[0]), *args[1:]))
    shares = jnp.full(count, 1 / count) if shares is None else shares
    with explained("loss_fn"):
        uses, strays = _captured(precision, layouts, source, as_pytree(loss_fn), params, args, shares)
    check_rows(paths, strays)
    return Capture(uses, layouts, paths, jax.tree.structure(params))


@compiled(static_argnums=(0, 1))
def _captured(
    precision: str | None,
    layouts: tuple[tuple[Layout, ...], ...],
    source: Gradients,
    loss_fn: Partial,
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."],
) -> tuple[tuple[tuple[Tapped, ...], ...], Bool[Array, " leaves"]]:
    with at_precision(precision):
        found = tapped_batch(source, loss_fn, params, args, shares, None)
        # A row is √share · g; in the block it is m · share · g, so that the mean of the rows is the gradient.
        factors = shares.shape[0] * jnp.sqrt(by_example(shares))
        scaled = [
            tuple(
                Tapped(x.inputs, jax.vmap(jnp.multiply)(factors.astype(x.gradients.dtype), x.gradients))
                for x in uses
            )
            for uses in found
        ]
    return tuple(scaled), strays_of(layouts, found)


def strays_of(
    layouts: tuple[tuple[Layout, ...], ...], found: tuple[tuple[Tapped, ...], ...]
) -> Bool[Array, " leaves"]:
    """For every leaf whether it was asked for a row that it does not have."""
    flags = [
        [layout.strays(use.inputs) for layout, use in zip(*each, strict=True)]
        for each in zip(layouts, found, strict=True)
    ]
    return jnp.stack([jnp.any(jnp.stack([*each, jnp.asarray(False)])) for each in flags])


def check_rows(paths: tuple[str, ...], strays: Bool[Array, " leaves"]) -> None:
    """Raise a ValueError that names every leaf which was asked for rows that it does not have."""
    if isinstance(strays, jax.core.Tracer):
        return
    bad = [path for path, stray in zip(paths, jax.device_get(strays), strict=True) if stray]
    if bad:
        raise ValueError(
            f"`args` must hold numbers of rows that the embeddings have, but {', '.join(bad)} are asked for "
            "others: jax takes the nearest, or NaN, for them."
        )


@functools.partial(jax.jit, static_argnums=0)
def _grads(layouts: tuple[Layout, ...], uses: tuple[Tapped, ...]) -> Array | None:
    parts = [
        jax.vmap(functools.partial(_grad, layout))(use) for layout, use in zip(layouts, uses, strict=True)
    ]
    return sum(parts[1:], parts[0]) if parts else None


def _grad(layout: Layout, use: Tapped) -> Array:
    with jax.default_matmul_precision("highest"):
        return layout.moves.undo(layout.products(use.inputs, use.gradients[0]))
