"""What `influence` returns: scores, and which examples help and harm most."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hessjax._core._messages import checked_count
from hessjax._core._results import by_shapes, counted, is_known
from hessjax._core._tables import Column, Row, Table, number, printable

SHOWN = 8
"""How many rows a printed result has."""


@printable
class Influence(NamedTuple):
    """How the losses of queries change as training examples count more.

    Attributes:
        scores: (queries, examples) the slope of a query's loss in the weight of an example, that of all
            together being 1: below 0, the example helps; above 0, it hurts. Of a self-influence
            (examples,). 0 for examples of weight 0; what is not finite stays as it came.
        losses: (queries,) the queries' own losses.
        weights: (examples,) how much each example counts.
        leaves: by path, the part of the scores that each leaf makes up, if asked for.
        residuals: (queries,) where the inverse is a solver, how far it came: ‖g − (H + λI)x‖ / ‖g‖, an error
            of about this part of a score. None where it is not known.
    """

    scores: Float[Array, "*queries examples"]
    losses: Float[Array, " queries"]
    weights: Float[Array, " examples"]
    leaves: dict[str, Float[Array, "queries examples"]] = {}  # noqa: RUF012 - never written to
    residuals: Float[Array, " queries"] | None = None

    def removed(self) -> Float[Array, "*queries examples"]:
        """By how much the losses would change, to first order, were an example left out of training.

        Of the mean over all others, −score · w/(Σw − w): above 0, the query needs the example.
        """
        share = self.weights / (jnp.sum(self.weights) - self.weights)
        return -self.scores * jnp.broadcast_to(share, self.scores.shape)

    def helpful(self, k: int = 5) -> Int[Array, "*queries k"]:
        """The k examples without which a query's loss would rise most, the first first."""
        return self._order(self.removed(), k)

    def harmful(self, k: int = 5) -> Int[Array, "*queries k"]:
        """The k examples without which a query's loss would fall most, the first first."""
        return self._order(-self.removed(), k)

    def _order(self, values: Array, k: int) -> Array:
        k = checked_count("k", k)
        if k > (most := values.shape[-1]):
            raise ValueError(f"`k` must be at most {most}, the number of training examples, got {k}.")
        # NaN goes last, and with it what is not there: an example of weight 0 changes nothing.
        there = jnp.broadcast_to(self.weights > 0, values.shape) & jnp.isfinite(values)
        return jnp.argsort(jnp.where(there, -values, jnp.inf), axis=-1)[..., :k]

    def _table(self) -> Table | str:
        if not is_known(self) or np.ndim(self.scores) not in (1, 2) or not np.size(self.scores):
            return by_shapes(self)
        return self._of_queries() if np.ndim(self.scores) == 2 else self._of_examples()

    def _of_queries(self) -> Table:
        columns: tuple[Column, ...]
        columns = Column("Query"), Column("Loss"), Column("Most helpful", "word"), Column("Harmful", "word")
        if self.residuals is not None:
            columns = (*columns, Column("Residual", rank=1))
        removed = np.asarray(self.removed())
        best, worst = (np.asarray(x)[:, 0] for x in (self.helpful(1), self.harmful(1)))
        rows = []
        for i in range(min(SHOWN, len(removed))):
            cells = [f"#{j} ({removed[i, j]:+.2g})" for j in (best[i], worst[i])]
            own = [] if self.residuals is None else [number(self.residuals[i], 2)]
            rows.append(Row((str(i), number(self.losses[i]), *cells, *own)))
        return Table(columns, tuple(rows), notes=self._notes(len(removed)))

    def _of_examples(self) -> Table:
        columns = Column("Example"), Column("Loss"), Column("Loss if left out")
        removed, losses = np.asarray(self.removed()), np.asarray(self.losses)
        first = np.asarray(self.helpful(min(SHOWN, removed.size)))
        rows = (Row((f"#{i}", number(losses[i]), number(losses[i] + removed[i]))) for i in first)
        return Table(columns, tuple(rows), notes=self._notes(0))

    def _notes(self, queries: int) -> tuple[str, ...]:
        whole = f"{counted(queries, 'query').replace('querys', 'queries')}, " if queries else ""
        change = "In brackets: by how much the loss would change without the example; " if queries else ""
        text = f"{change}{whole}{counted(np.size(self.weights), 'training example')}."
        bad = int(np.sum(~np.isfinite(self.scores).reshape(-1, np.size(self.weights)).all(axis=0)))
        more = (f"The scores of {counted(bad, 'example')} are not finite.",) if bad else ()
        return (text[0].upper() + text[1:], *more)
