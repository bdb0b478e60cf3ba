"""The matvecs of the first batches, made once and kept for all products, in so much memory."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.tree_util import Partial

from hessjax._core import _digests
from hessjax._core._messages import shown
from hessjax._core._types import Matvec, Vector


@dataclasses.dataclass
class Kept:
    """What a mean over batches keeps from one product to the next.

    Attributes:
        limit: the most bytes that the arrays of the matvecs may have, on all devices together.
        matvecs: of the first batches, with what each batch counts.
        marks: digests of these batches.
        sizes: the bytes of every array held, by identity: what matvecs share, as the params, counts once.
        full: whether a matvec did not fit: those of the batches from there on are made at every product.
        complete: whether those of all batches are kept, so that no data need be read.
    """

    limit: int
    matvecs: list[tuple[float, Matvec]] = dataclasses.field(default_factory=list)
    marks: list[list[str]] = dataclasses.field(default_factory=list)
    sizes: dict[int, int] = dataclasses.field(default_factory=dict)
    full: bool = False
    complete: bool = False

    def products(
        self, batches: Iterator[tuple[float, Any]], made: Callable[[Any], Matvec], vector: Vector
    ) -> Iterator[tuple[float, Vector]]:
        """One pass: what every batch counts, and its product; `made(batch)` is a batch's matvec."""
        if self.complete:
            yield from ((weight, matvec(vector)) for weight, matvec in self.matvecs)
            return
        index = -1
        for index, (weight, batch) in enumerate(batches):
            # No name for the matvec, which would live on while the next one is made.
            yield weight, self._of(index, weight, batch, made)(vector)
        self.complete = index + 1 == len(self.matvecs)

    def _of(self, index: int, weight: float, batch: Any, made: Callable[[Any], Matvec]) -> Matvec:
        if index < len(self.matvecs):
            self._check_same(index, batch)
            return self.matvecs[index][1]
        matvec = made(batch)
        if not self.full:
            self._keep(weight, matvec, batch)
        return matvec

    def _keep(self, weight: float, matvec: Matvec, batch: Any) -> None:
        if not isinstance(matvec, Partial):
            raise TypeError(
                "`make_matvec` must return matvecs that are pytrees with `keep_bytes`, such as "
                f"`hessjax.hessian(loss_fn, params, batch, linearize=True)`, got {shown(matvec)}, of which "
                "nothing says what memory it holds."
            )
        sizes = self.sizes | {id(x): x.nbytes for x in jax.tree.leaves(matvec) if hasattr(x, "nbytes")}
        self.full = sum(sizes.values()) > self.limit
        if not self.full:
            self.sizes = sizes
            self.matvecs.append((weight, matvec))
            self.marks.append(_mark(batch))

    def _check_same(self, index: int, batch: Any) -> None:
        if self.marks[index] != _mark(batch):
            raise ValueError(
                f"`batches` must come in the same order at every pass with `keep_bytes`, but batch {index} "
                "is another than at the first, as from a loader that shuffles: raise `keep_bytes` until all "
                "fit, and the data is read once."
            )


def _mark(batch: Any) -> list[str]:
    return _digests.of_data([x for x in jax.tree.leaves(batch) if hasattr(x, "dtype")])
