"""Tables as text, for `print` and for a notebook's last line."""

import io
from typing import Any

from rich.console import Console


def plain(table: Any) -> str:
    """What rich shows, without colour, as wide as it needs, no blanks at the ends of lines."""
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
