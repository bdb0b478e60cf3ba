"""The progress bar: what is done, the error against its goal, and the time that is left."""

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich import get_console
from rich.cells import cell_len, set_cell_size
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from hessjax._core._messages import checked_flag, shown
from hessjax._core._tables import written
from hessjax._run._estimator import Progress


@contextlib.contextmanager
def bar_of(shown: bool, description: str, total: int | None, unit: str) -> Iterator[Callable[[Any], Any]]:
    """A bar of work that is no run, and the function that moves it on by one when a result is there.

    Without a total it says how many, and that it moves. Of several processes, process 0 alone shows it.
    """
    with Bar(*columns(), disable=not shown or jax.process_index() != 0) as bar:
        task = bar.add_task(description, total=total, text=unit)

        def advance(result: Any) -> Any:
            if shown:  # a bar of calls that were only dispatched would run ahead of the work
                jax.block_until_ready(result)
                bar.advance(task)
            return result

        yield advance


def progress_bar(
    description: str = "curvature", *, transient: bool = False, unit: str = "products"
) -> "_ProgressBar":
    """A callback for `run` and the one-liners: products done, error against its goal, time left.

    Of several processes (`jax.distributed`), process 0 alone shows it.

    Args:
        description: stands before the bar; in a narrow terminal its end is left out, the numbers never.
        transient: wipe the bar when the run is over.
        unit: what is counted: `"evaluations"` for `sensitivity`.

    Returns:
        A callback; it can serve several runs, one after the other or one within the other.

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
    for name, text in {"description": description, "unit": unit}.items():
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must be a string, got {shown(text)}.")
    return _ProgressBar(description, checked_flag("transient", transient), unit)


class _ProgressBar:
    """A callback and a context manager: the bar lives as long as the outermost run."""

    def __init__(self, description: str, transient: bool, unit: str) -> None:
        self._description, self._transient, self._unit = description, transient, unit
        self._running: list[TaskID] = []  # a run may be part of another, with the same bar
        self._bar: Bar | None = None

    def __repr__(self) -> str:
        return f"progress_bar({self._description!r})"

    def __enter__(self) -> "_ProgressBar":
        if not self._running:  # anew for every run: the terminal may have another width by now
            # One bar, not one for each process: all of them see the same numbers.
            elsewhere = jax.process_index() != 0
            self._bar = Bar(*columns(), transient=self._transient, disable=elsewhere)
            self._bar.start()
        assert self._bar is not None
        description = written(self._description, get_console().encoding)
        self._running.append(self._bar.add_task(description, total=None, text=""))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        assert self._bar is not None
        task = self._running.pop()
        if self._running:  # of a hundred inner runs a hundred lines would stay
            self._bar.remove_task(task)
        else:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        assert self._running
        assert self._bar is not None
        total = progress.num_matvecs if progress.done else progress.max_matvecs
        numbers = f"{progress.num_matvecs}/{total}"
        space = get_console().width - cell_len(numbers) - TIME - GAPS
        description, text = _fitted(self._description, self._unit, progress, space)
        task = self._running[-1]
        self._bar.update(
            task, completed=progress.num_matvecs, total=total, description=description, text=text
        )


TIME, GAPS = 5, 4
"""Cells of the time that is left, and between the columns."""


def columns() -> tuple[Any, ...]:
    """Description, bar, numbers, text, time; where there is little space the bar is shortened, or goes."""
    whole = Column(no_wrap=True)
    bar = [BarColumn(bar_width=30)] if get_console().width >= 40 else []
    return (
        TextColumn("{task.description}", markup=False),
        *bar,
        MofNCompleteColumn(table_column=whole),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    )


def _fitted(description: str, unit: str, progress: Progress, space: int) -> tuple[str, str]:
    """Description and text in so many cells: first the goal goes, then the error, the description's end."""
    encoding = get_console().encoding
    description, unit = written(description, encoding), written(unit, encoding)
    texts = [unit + _error(progress) + _goal(progress), unit + _error(progress), unit, ""]
    fits = (text for text in texts if cell_len(text) + min(cell_len(description), 12) <= space)
    text = next(fits, "")
    space = max(space - cell_len(text), 1)
    if cell_len(description) > space:
        description = set_cell_size(description, space).rstrip()
    return description, text


def _error(progress: Progress) -> str:
    return f", error {progress.error:.2g}" if math.isfinite(progress.error) else ""


def _goal(progress: Progress) -> str:
    known = math.isfinite(progress.error) and math.isfinite(progress.target)
    return f" (goal {progress.target:.2g})" if known else ""
