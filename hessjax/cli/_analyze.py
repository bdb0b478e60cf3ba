"""`hessjax analyze`: the report of a problem."""

import json as json_text
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hessjax._core._tables import written
from hessjax._report._engine import Order, analyze
from hessjax._report._folder import PAGE, check_room
from hessjax._report._plan import Asked
from hessjax._report._record import to_json
from hessjax._report._words import SIGNS
from hessjax.cli._live import Live, console_for
from hessjax.cli._load import alone, load_problem

STYLES = {"good": "green", "care": "yellow", "unknown": "dim"}


def run_analysis(target: str, out: Path, asked: Asked, order: Order, *, json: bool, quiet: bool) -> None:
    """Load, measure, show."""
    console = console_for(json, quiet or json)
    check_room(out, order.resume, order.force)  # before the problem is made, which may take its time
    with alone(json), Live(console).shown() as live:
        problem = load_problem(target)
        record = analyze(problem, out, asked, order, live, target)
    if json:
        print(json_text.dumps(to_json(record), ensure_ascii=False))
    else:
        show_answers(console, record["reading"])
        print_line(console, f"Written to {out / PAGE}")


def show_answers(console: Console, lines: list[dict[str, Any]]) -> None:
    """The reading."""
    console.print()
    for line in lines:
        head = Text(f"{SIGNS[line['verdict']]} {line['question']} ", style=f"bold {STYLES[line['verdict']]}")
        console.print(head.append(written(line["answer"], console.encoding), style="not bold default"))
    console.print()


def print_line(console: Console, text: str) -> None:
    """A line as it is."""
    console.print(written(text, console.encoding), highlight=False, markup=False, soft_wrap=True)
