"""What pruning at one go returns: the pruned network, and its zeros leaf by leaf when printed."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._results import by_shapes, is_known, is_single
from hessjax._core._tables import Column, Row, Table, percent, printable
from hessjax._core._types import Params


class PruneStep(NamedTuple):
    """One step of `prune_once`.

    Attributes:
        sparsity: after it.
        predicted_increase: how much the saliency expects it to raise the loss; NaN for one that does not say.
        realised_increase: how much `loss_fn` rose; NaN without it.
    """

    sparsity: Any
    predicted_increase: Float[Array, ""]
    realised_increase: Float[Array, ""]


@printable
class Pruned(NamedTuple):
    """A pruned network.

    Attributes:
        params: the params, exactly zero where `mask` is False.
        mask: as `mask_of` gives it: booleans, True = kept, and a scalar True for leaves that are not pruned.
        predicted_increase: how much the saliency expects the loss to rise, summed over the steps; NaN for a
            saliency that does not say.
        realised_increase: how much `loss_fn` rose; None without it.
        steps: the steps it took, more than `recomputes` where `max_ratio` cut some in two.
    """

    params: Params
    mask: Params
    predicted_increase: Float[Array, ""]
    realised_increase: Float[Array, ""] | None = None
    steps: tuple[PruneStep, ...] = ()

    def _table(self) -> Table | str:
        if not (is_known(self) and is_single(self.predicted_increase)):
            return by_shapes(self)
        heads = Column("Leaf", "name"), Column("Weights"), Column("Zeros"), Column("Zeros %")
        masks = list(zip(_tree.leaf_paths(self.mask), jax.tree.leaves(self.mask), strict=True))
        # A scalar stands for a leaf that is not pruned, and for a leaf of one weight that stays.
        found = {path: (m.size, m.size - int(np.count_nonzero(m))) for path, m in masks if np.ndim(m)}
        whole = tuple(map(sum, zip(*found.values(), strict=True))) or (0, 0)
        rows = [Row(_cells(name, *counts)) for name, counts in found.items()]
        notes = self._increases()
        if len(found) < len(masks):
            notes.append(f"Not pruned: {len(masks) - len(found)} of {len(masks)} leaves.")
        return Table(heads, (*rows, Row(_cells("total", *whole), "bold")), notes=tuple(notes))

    def _increases(self) -> list[str]:
        increases = {"expected": self.predicted_increase, "realised": self.realised_increase}
        said = {name: float(x) for name, x in increases.items() if x is not None and not np.isnan(x)}
        return [f"Rise of the loss, {name}: {x:.4g}." for name, x in said.items()]


def _cells(name: str, size: int, zeros: int) -> tuple[str, ...]:
    return name, f"{size:,}", f"{zeros:,}", percent(zeros / max(size, 1))
