"""What may watch a run: a progress bar."""

import math
import types

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hessjax._run._drivers import Progress as RunProgress


class _ProgressBar:
    """A callback and a context manager: the bar lives as long as the run."""

    def __init__(self, description: str, transient: bool, unit: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit + "{task.fields[status]}", markup=False),
            TimeRemainingColumn(compact=True),
            transient=transient,
        )
        self._description = description
        self._task: TaskID | None = None

    def __enter__(self) -> "_ProgressBar":
        for task in self._bar.task_ids:  # of earlier runs
            self._bar.remove_task(task)
        self._task = self._bar.add_task(self._description, total=None, status="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: RunProgress) -> None:
        assert self._task is not None
        total = progress.num_matvecs if progress.done else progress.max_matvecs
        self._bar.update(self._task, completed=progress.num_matvecs, total=total, status=_status(progress))


def _status(progress: RunProgress) -> str:
    if not math.isfinite(progress.error):
        return ""
    goal = f" (goal {progress.target:.2g})" if math.isfinite(progress.target) else ""
    return f", error {progress.error:.2g}{goal}"


def progress_bar(
    description: str = "curvature", *, transient: bool = False, unit: str = "products"
) -> _ProgressBar:
    """A callback for `run` and the one-liners: products done, error against its goal, time left.

    Args:
        description: stands before the bar.
        transient: wipe the bar when the run is over.
        unit: what is counted: `"evaluations"` for `sensitivity`.

    Returns:
        A callback; it can serve several runs, one after the other.

    Cost:
        None beyond the error that `run` reads anyway; a run without `tol` reads it for its callbacks.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))
        >>> bar = hj.progress_bar("trace")
        >>> estimate = hj.trace(A, jax.random.key(0), jnp.zeros(10), num_probes=20, callbacks=[bar])
        trace ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 20/20 products, error 0 00:00
    """
    return _ProgressBar(description, transient, unit)
