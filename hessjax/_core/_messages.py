"""Arguments that count something, checked; tables as text."""

import io
import operator
from typing import Any

from rich.console import Console


def checked_count(argument: str, number: Any, least: int = 1, meaning: str = "") -> int:
    """The number as an int.

    Raises:
        TypeError: it is not an integer (2.0 is not one either).
        ValueError: it is below `least`.
    """
    try:
        found = operator.index(number)
    except TypeError:
        raise TypeError(f"`{argument}` must be an integer, got {number}.") from None
    if found < least:
        raise ValueError(f"`{argument}` must be at least {least}{meaning}, got {found}.")
    return found


def plain(table: Any) -> str:
    """What rich shows, without colour, as wide as it needs, no blanks at the ends of lines."""
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
