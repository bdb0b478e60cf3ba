"""`hessjax prune`: a problem's network with fewer weights."""

import json as json_text
from pathlib import Path
from typing import Any

from rich.console import Console

from hessjax._core import _files
from hessjax._report._engine import Order
from hessjax._report._folder import PAGE, check_room
from hessjax._report._html import brief
from hessjax._report._prune_engine import Wish, checked_wish, prune
from hessjax._report._record import to_json
from hessjax.cli._analyze import print_line
from hessjax.cli._live import Live, console_for
from hessjax.cli._load import alone, load_problem


def run_pruning(target: str, out: Path, wish: Wish, order: Order, *, json: bool, quiet: bool) -> None:
    """Load, prune, write, show."""
    console, out = console_for(json, quiet or json), _files.local_path("out", out)
    wish = checked_wish(wish)
    check_room(out, order.resume, order.force)
    with alone(json), Live(console).shown() as live:
        problem = load_problem(target)
        record = prune(problem, out, wish, live, target, resume=order.resume, force=order.force)
    if json:
        print(json_text.dumps(to_json(record), ensure_ascii=False))
    else:
        show_pruned(console, record)
        print_line(console, f"Written to {out / PAGE}")


def show_pruned(console: Console, record: dict[str, Any]) -> None:
    """Before and after."""
    before, after = (record["stages"][name]["result"] for name in ("before", "network"))
    console.print()
    print_line(console, f"{after['how'][0].upper()}{after['how'][1:]}:")
    print_line(console, f"loss {brief(before['loss'], 4)} to {brief(after['loss'], 4)}")
    for name, value in before["metrics"].items():
        print_line(console, f"{name} {brief(value, 4)} to {brief(after['metrics'].get(name), 4)}")
    console.print()
    print_line(console, f"Beside the page: {', '.join(after['files'])}")
