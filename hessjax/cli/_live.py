"""What a terminal sees while a report is made: a line for what is done, a bar and the time that is left."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from hessjax._core._tables import written
from hessjax._report._engine import Watcher
from hessjax._report._page import TITLES
from hessjax._report._words import stage_line


class Live(Watcher):
    """Lines for stages that are done; on a terminal a bar over all products with the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("products, left"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._budget: dict[str, int] = {}
        self._made: dict[str, int] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator["Live"]:
        """The bar, for the time of a block."""
        with self._bar:
            self._task = self._bar.add_task("Self-test", total=None)
            yield self

    def planned(self, products: Mapping[str, int]) -> None:
        """What is to come."""
        self._budget = dict(products)
        self._update()

    def begun(self, stage: str) -> None:
        """A stage."""
        if self._task is not None:
            self._bar.update(self._task, description=TITLES[stage])

    def made(self, stage: str, products: int, total: int) -> None:
        """Products."""
        if stage in self._budget:
            self._made[stage] = min(products, self._budget[stage])
            self._update()

    def ended(self, stage: str, entry: Mapping[str, Any]) -> None:
        """A stage's line."""
        if stage in self._budget:
            self._made[stage] = self._budget[stage]
            self._update()
        seconds = f"  {entry['seconds']:.1f} s" if "seconds" in entry else ""
        text = written(stage_line(stage, entry).partition(": ")[2], self._console.encoding)
        line = Text(f"{TITLES[stage]:<24}", style="bold")
        failed = stage == "check" and "FAILED" in text
        line.append(text, style="bold red" if failed else "")
        line.append(seconds, style="dim")
        self._console.print(line)

    def _update(self) -> None:
        if self._task is not None:
            total = sum(self._budget.values())
            self._bar.update(self._task, completed=sum(self._made.values()), total=total or None)


def console_for(json: bool, quiet: bool) -> Console:
    """Where it is shown: beside JSON the error output, and nowhere when it is to be quiet."""
    return Console(stderr=json, quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty())
