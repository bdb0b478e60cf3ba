"""What pruning is held against: the outputs of every layer, as quadratics in the columns of its matrices."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._types import Amount, Scalar
from hessjax.layers._capture import Layout
from hessjax.layers._moments import LayerMoments
from hessjax.program._origins import Moves


class Inputs(NamedTuple):
    """What a leaf's matrices are multiplied with, and how much their outputs count.

    Attributes:
        moves: from the leaf to (stack, inputs, outputs).
        hessian: E[a aᵀ] summed over uses and positions, (stack, inputs, inputs), or its diagonals.
        outputs: E[g gᵀ], the mean over positions, (stack, outputs, outputs), or its diagonals.
        dense: the leaf in the network whose moments they are, as matrices.
    """

    moves: Moves
    hessian: Array
    outputs: Array
    dense: Float[Array, "s i o"]

    @property
    def is_diagonal(self) -> bool:
        """Whether inputs count by themselves, so that nothing can make up for anything."""
        return self.hessian.ndim == 2

    @property
    def squares(self) -> Float[Array, "s i"]:
        """E[a²] of every input."""
        return self.hessian if self.is_diagonal else jnp.diagonal(self.hessian, axis1=1, axis2=2)

    @property
    def importance(self) -> Float[Array, "s o"]:
        """E[g²] of every output."""
        if self.outputs.ndim == 2:
            return self.outputs
        return jnp.diagonal(self.outputs, axis1=1, axis2=2)

    def damping(self, damping: Amount) -> Float[Array, " s"]:
        """λ of every matrix, a fraction being one of its mean diagonal."""
        mean = jnp.mean(self.squares, axis=1)
        return jnp.broadcast_to(jnp.asarray(damping.limit(mean), mean.dtype), mean.shape)

    def damped(self, damping: Amount) -> Float[Array, "s i i"]:
        """H + λI of every matrix."""
        return shifted(self.hessian, self.damping(damping))

    def increase(self, change: Float[Array, "s i o"]) -> Scalar:
        """By how much the loss rises, ½ tr(Δᵀ A Δ B): K-FAC's quadratic."""
        weighed = (
            change * self.outputs[:, None]
            if self.outputs.ndim == 2
            else jnp.matmul(change, self.outputs, precision="highest")
        )
        return jnp.sum(self.times(change) * weighed) / 2

    def times(self, change: Float[Array, "s i o"]) -> Float[Array, "s i o"]:
        """HΔ."""
        if self.is_diagonal:
            return self.hessian[..., None] * change
        return jnp.matmul(self.hessian, change, precision="highest")


def shifted(hessian: Float[Array, "s i i"], shift: Float[Array, " s"]) -> Float[Array, "s i i"]:
    """H + λI. Of inputs that are all zero H is: any weights will do, and 1 in λ's place keeps those given."""
    shift = jnp.where(jnp.all(hessian == 0, axis=(1, 2)), 1, shift).astype(hessian.dtype)
    return hessian + shift[:, None, None] * jnp.eye(hessian.shape[-1], dtype=hessian.dtype)[None]


def inputs_of(moments: LayerMoments, path: str) -> Inputs:
    """What a leaf's matrices are multiplied with.

    Raises:
        ValueError: its uses have inputs on different sides, or the moments are those of mean inputs.
    """
    place = moments.problem.paths.index(path)
    layouts, uses = moments.layouts[place], moments.leaves[place]
    if any(layout.swapped for layout in layouts):
        raise ValueError(
            f"`moments` must have the inputs of a leaf on one side, but the outputs of one use of {path} "
            "are the inputs of another, as of tied embeddings: leave it out by `where`, or by the mask."
        )
    if moments.problem.rules.positions != "expand":
        raise ValueError(
            '`moments` must be taken with positions="expand", which sees every position, got '
            f"{moments.problem.rules.positions!r}."
        )
    dense = jax.tree.leaves(moments.problem.params)[place]
    matrices = layouts[0].moves.apply(_tree.wide(dense))
    # Moments are means over positions; what a use adds to the outputs' error is a sum.
    hessian = sum(positions_of(layout) * use.left for layout, use in zip(layouts, uses, strict=True))
    outputs = sum(use.right for use in uses) / sum(map(positions_of, layouts))
    return Inputs(layouts[0].moves, jnp.asarray(hessian), jnp.asarray(outputs), matrices)


def positions_of(layout: Layout) -> int:
    """How many positions share a matrix."""
    return max(1, int(np.prod(layout.positions)))


# -- which moments belong to which weights ---------------------------------------------------------


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves."""
    return dict(zip(_tree.leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def check_belong(weights: Mapping[str, Any], moments: LayerMoments, argument: str = "params") -> None:
    """Raise a ValueError for weights that moments are missing for, or that are those of other shapes."""
    known = by_path(moments.problem.params)
    bad = [f"  {path}: {_of(x)}, no moments" for path, x in weights.items() if path not in known]
    bad += [
        f"  {path}: {_of(x)}, moments of {_of(known[path])}"
        for path, x in weights.items()
        if path in known and np.shape(x) != np.shape(known[path])
    ]
    if bad:
        raise ValueError(
            f"`moments` must be those of `{argument}`, but\n"
            + "\n".join(bad)
            + f"\nThey are of {', '.join(known)}."
        )


def _of(x: Any) -> str:
    return f"shape {np.shape(x)}"
