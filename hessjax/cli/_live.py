"""What a terminal sees while a report is made: a line for what is done, a bar and the time that is left."""

import contextlib
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from hessjax._core._tables import written
from hessjax._report._engine import Watcher
from hessjax._report._words import TITLES, stage_line

_INDENT = 24


class Live(Watcher):
    """Lines for stages that are done; on a terminal a bar over products, or updates, with the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, left"),
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
            self._task = self._bar.add_task("The problem", total=None, unit="products")
            yield self

    def planned(self, products: Mapping[str, int]) -> None:
        """What is to come."""
        self._budget, self._made = dict(products), {}
        if self._task is not None:  # the time that is left goes by what follows
            unit = "updates" if "training" in products else "products"
            self._bar.reset(self._task, total=sum(products.values()) or None, unit=unit)

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
        text = stage_line(stage, entry).partition(": ")[2]
        failed = stage == "check" and "FAILED" in text
        self.say(TITLES[stage], text, entry.get("seconds"), "bold red" if failed else "")

    def say(self, title: str, text: str, seconds: float | None = None, style: str = "") -> None:
        """A line for what is done; what does not fit goes below its beginning."""
        took = "" if seconds is None else f"  {seconds:.1f} s"
        space = max(self._console.width - _INDENT - len(took), 20)
        first, *more = textwrap.wrap(written(text, self._console.encoding), space) or [""]
        line = Text(f"{title:<{_INDENT}}", style="bold").append(first, style=style)
        for rest in more:
            line.append(f"\n{'':{_INDENT}}{rest}", style=style)
        self._console.print(line.append(took, style="not bold dim"))

    def _update(self) -> None:
        if self._task is not None:
            total = sum(self._budget.values())
            self._bar.update(self._task, completed=sum(self._made.values()), total=total or None)


def console_for(json: bool, quiet: bool) -> Console:
    """Where it is shown: beside JSON the error output, and nowhere when it is to be quiet."""
    return Console(stderr=json, quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty())
