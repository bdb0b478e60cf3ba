"""What the stages of a report share: the problem, its matvec, where states are saved, who is told."""

import contextlib
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from hessjax._core import _tree
from hessjax._core._types import Key, Matvec, Vector
from hessjax._report._plan import Asked, Plan
from hessjax._report._problem import Problem, first_batch
from hessjax._run._callbacks import checkpoint
from hessjax._run._estimator import Beginning, Progress
from hessjax.curvature._batches import over_batches
from hessjax.curvature._hessian import hessian

Listener = Callable[[str, int, int], None]
"""Told of a stage's name, the products that it has made and those that it may make."""

SAVE_EVERY = 5.0
"""Seconds between two checkpoints of a run; and at least twenty times what the last one took."""


class Work:
    """A problem being worked on.

    Attributes:
        problem: whose.
        asked: what is wanted.
        plan: how many products each stage may make; set once the cost of one is known.
        folder: where states are saved, those of each stage in a folder of its own.
        results: of the stages that are done, as data.
        steepest: two eigenvectors, once there are some.
    """

    def __init__(self, problem: Problem, asked: Asked, folder: Path, listener: Listener) -> None:
        self.problem, self.asked, self.folder, self._listener = problem, asked, folder, listener
        self.plan = Plan({})
        self.results: dict[str, Any] = {}
        self.steepest: Vector | None = None

    @property
    def matvec(self) -> Matvec:
        """The Hessian of the mean loss over all batches."""
        return make_matvec(self.problem)

    @property
    def first_batch(self) -> Any:
        """Of the data."""
        return first_batch(self.problem)

    def key(self, stage: int) -> Key:
        """A random key for a stage."""
        return jax.random.fold_in(jax.random.key(self.asked.seed), stage)

    def callbacks(self, stage: str, part: str = "", before: int = 0, total: int | None = None) -> list[Any]:
        """Who saves a run, and who is told of it: `before` products of the stage were made already."""
        folder = self.folder / stage / part if part else self.folder / stage
        return [_Timed(checkpoint(folder, every=1)), _Told(self._listener, stage, before, total)]

    def tell(self, stage: str, done: int, total: int) -> None:
        """Products that no run makes."""
        self._listener(stage, done, total)


def make_matvec(problem: Problem) -> Matvec:
    """The Hessian of the mean loss over all batches."""
    return over_batches(_OfBatch(problem), problem.batches, weights=problem.weights)


class _OfBatch:
    """The Hessian of one batch."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, batch: Any) -> Matvec:
        return hessian(self._problem.loss_fn, self._problem.params, batch)


class _Told:
    """A callback that tells the listener of the stage."""

    def __init__(self, listener: Listener, stage: str, before: int, total: int | None) -> None:
        self._listener, self._stage, self._before, self._total = listener, stage, before, total

    def __call__(self, progress: Progress) -> None:
        total = progress.max_matvecs if self._total is None else self._total
        self._listener(self._stage, self._before + progress.num_matvecs, total)


class Pace:
    """When to save: every few seconds, however long a step takes, and seldom where saving takes long."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._last >= max(SAVE_EVERY, 20 * self._cost)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around the saving."""
        start = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - start


class _Timed:
    """A checkpoint that is written at that pace."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._pace = inner, Pace()

    def __enter__(self) -> "_Timed":
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)

    def restore(self, beginning: Beginning) -> tuple[Any, int] | None:
        """As the checkpoint does."""
        return self._inner.restore(beginning)

    def __call__(self, progress: Progress) -> None:
        if self._pace.is_due():
            with self._pace.saving():
                self._inner(progress)


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since the block began."""
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start


def seconds_per_product(work: Work) -> float:
    """One product, after one that compiles."""
    matvec, vector = work.matvec, _tree.zeros_like(work.problem.params)
    jax.block_until_ready(matvec(vector))
    with timed() as seconds:
        jax.block_until_ready(matvec(vector))
        return seconds()
