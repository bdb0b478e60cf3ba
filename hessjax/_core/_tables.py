"""Tables as text: as wide as the terminal at most, every number whole, what does not fit named."""

import html
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions
from rich.text import Text

GAP = "  "
PROSE = 30
"""A text narrower than this is set below its row instead of beside it."""


class Column(NamedTuple):
    """How a column is set.

    Attributes:
        title: its head.
        kind: a `"number"` is never broken and stands on the right, a `"word"` (a shape, a verdict) is never
            broken either; a `"name"` is broken at slashes, a `"text"` at blanks.
        rank: 0 always stays; where the table is too wide, the columns of the highest rank go first.
    """

    title: str
    kind: Literal["number", "word", "name", "text"] = "number"
    rank: int = 0


class Row(NamedTuple):
    """Cells as text, one for each column, and a style of rich's."""

    cells: tuple[str, ...]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """What a result shows of itself.

    Attributes:
        columns: from left to right; at most one is of kind `"text"`, the last.
        rows: from top to bottom.
        title: a line above.
        notes: lines below.
        hint: where the columns are that did not fit; `{width}` stands for the width that all of them need.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    hint: str = "`.to_text({width})` has them."

    def to_text(self, width: int | None = None) -> str:
        """The lines, without style; the default width is that of the terminal, or 80."""
        lines = _lines(_recoded(self, _encoding()), terminal_width() if width is None else width)
        return "\n".join(line for line, _ in lines)

    def to_html(self) -> str:
        """All columns, for a notebook."""
        heads = "".join(f"<th>{html.escape(column.title)}</th>" for column in self.columns)
        body = "".join(f"<tr>{_html_cells(row.cells, self.columns)}</tr>" for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def __str__(self) -> str:
        return self.to_text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line, style in _lines(_recoded(self, options.encoding), options.max_width):
            yield Text(line, style=style, no_wrap=True, overflow="ignore")


Class = TypeVar("Class")


def printable(cls: type[Class]) -> type[Class]:
    """Let a result with a method `_table` be shown as what it gives: by `print`, by rich, by a notebook.

    It gives a table, or a line of text.
    """
    shown: dict[str, Callable[[Any], Any]] = {
        "__str__": lambda self: _as_text(self._table()),
        "__repr__": lambda self: _as_text(self._table()),  # a notebook's last line shows the table
        "__rich__": lambda self: _as_rich(self._table()),
        "_repr_html_": lambda self: _as_html(self._table()),
    }
    for name, method in shown.items():
        setattr(cls, name, method)
    return cls


def _as_text(shown: Table | str) -> str:
    return written(shown, _encoding()) if isinstance(shown, str) else shown.to_text()


def _as_rich(shown: Table | str) -> Table | Text:
    return Text(shown) if isinstance(shown, str) else shown


def _as_html(shown: Table | str) -> str:
    return f"<p>{html.escape(shown)}</p>" if isinstance(shown, str) else shown.to_html()


# -- cells ---------------------------------------------------------------------------------------


def number(value: Any, digits: int = 3) -> str:
    """So many digits whatever the size: 0.500, 1.25e-05, inf; nothing for None."""
    return "" if value is None else f"{float(value):#.{digits}g}".rstrip(".")


def percent(fraction: float) -> str:
    """Two decimals; neither none nor all for what is only nearly so."""
    text = f"{100 * fraction:.2f}"
    if text == "100.00" and fraction < 1:
        return ">99.99"
    return "<0.01" if text == "0.00" and fraction > 0 else text


def shape_text(axes: tuple[int, ...]) -> str:
    """3×3×16."""
    return "×".join(map(str, axes))


# -- layout --------------------------------------------------------------------------------------


def terminal_width() -> int:
    """What `COLUMNS` says, else the width of the terminal that `print` writes to, else 80."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    try:
        # Of `sys.stdout`, not of the process: in a notebook the latter is where the server was started.
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):
        return 80


def _lines(table: Table, width: int) -> Iterator[tuple[str, str]]:
    """Every line with its style."""
    if table.title:
        yield from ((line, "bold") for line in _folded(table.title, width, " "))
    shown, widths = _fitted(table, width)
    heads = Row(tuple(column.title for column in table.columns), "bold")
    for row in (heads, *table.rows):
        for line in _row(row.cells, table.columns, shown, widths, width):
            yield line.rstrip(), row.style
    for note in (*table.notes, *_left_out(table, shown, width)):
        yield from ((line, "dim") for line in _folded(note, width, " "))


def _natural(table: Table) -> list[int]:
    rows = [row.cells for row in table.rows]
    return [max(map(cell_len, cells)) for cells in zip([c.title for c in table.columns], *rows, strict=True)]


def _fitted(table: Table, width: int) -> tuple[list[int], dict[int, int]]:
    """Which columns are shown, and how wide; a text that is left out of the widths goes below its row."""
    columns, natural = table.columns, _natural(table)
    # Two fifths of the line are enough for a name that is broken; more, if there is space in the end.
    most = max(20, 2 * width // 5)
    least = [min(n, most) if column.kind == "name" else n for column, n in zip(columns, natural, strict=True)]
    shown = [i for i, column in enumerate(columns) if column.kind != "text"]
    while _total(least[i] for i in shown) > width and any(columns[i].rank for i in shown):
        shown.remove(max(shown, key=lambda i: columns[i].rank))
    widths = {i: least[i] for i in shown}
    for i in shown:
        widths[i] += max(0, min(natural[i] - widths[i], width - _total(widths.values())))
    for i, column in enumerate(columns):
        space = width - _total([*widths.values(), 0])
        if column.kind == "text" and space >= min(natural[i], PROSE):
            widths[i] = min(space, natural[i])
    return shown, widths


def _total(widths: Any) -> int:
    listed = list(widths)
    return sum(listed) + len(GAP) * (len(listed) - 1)


def _row(
    cells: tuple[str, ...], columns: tuple[Column, ...], shown: list[int], widths: dict[int, int], width: int
) -> Iterator[str]:
    """A row's lines: several where a name or a text is broken."""
    blocks = {i: _block(cells[i], columns[i], widths[i]) for i in widths}
    for k in range(max(map(len, blocks.values()))):
        parts = [(block[k] if k < len(block) else "", i) for i, block in blocks.items()]
        yield GAP.join(_padded(part, columns[i], widths[i]) for part, i in parts)
    below = [i for i, column in enumerate(columns) if column.kind == "text" and i not in widths]
    for i in below:
        if cells[i] != columns[i].title:
            yield from (2 * GAP + line for line in _folded(cells[i], width - 4, " "))


def _block(cell: str, column: Column, width: int) -> list[str]:
    if column.kind in ("number", "word") or cell_len(cell) <= width:
        return [cell]
    if column.kind == "text":
        return _folded(cell, width, " ")
    first, *rest = _folded(cell, width - len(GAP), "/")
    return [first, *(GAP + line for line in rest)]


def _padded(cell: str, column: Column, width: int) -> str:
    blanks = " " * (width - cell_len(cell))
    return blanks + cell if column.kind == "number" else cell + blanks


def _folded(text: str, width: int, after: str) -> list[str]:
    """`text` in lines, broken after this character where that will do, else anywhere; nothing is lost."""
    lines = [""]
    for piece in re.findall(f"[^{after}]*{after}|[^{after}]+$", text):
        if lines[-1] and cell_len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        *full, last = (
            chop_cells(lines[-1] + piece, max(width, 2)) if cell_len(piece) > width else [lines[-1] + piece]
        )
        lines[-1:] = [*full, last]
    return [line.rstrip() for line in lines]


def _left_out(table: Table, shown: list[int], width: int) -> list[str]:
    names = [c.title for i, c in enumerate(table.columns) if c.kind != "text" and i not in shown]
    if not names:
        return []
    whole = max(_total(n for n, c in zip(_natural(table), table.columns, strict=True) if c.kind != "text"), 1)
    return [f"Not shown in {width} columns: {', '.join(names)}. {table.hint.format(width=whole)}"]


def _html_cells(cells: tuple[str, ...], columns: tuple[Column, ...]) -> str:
    sides = ["right" if column.kind == "number" else "left" for column in columns]
    styled = zip(cells, sides, strict=True)
    return "".join(f'<td style="text-align: {side}">{html.escape(cell)}</td>' for cell, side in styled)


# -- what a stream can show ------------------------------------------------------------------------


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


_ASCII = str.maketrans({"×": "x", "±": "+-", "λ": "lambda", "−": "-", "…": "...", "–": "-"})


def _recoded(table: Table, encoding: str) -> Table:
    """The table with what the encoding does not have written in ASCII."""

    def recoded(text: str) -> str:
        return written(text, encoding)

    columns = tuple(column._replace(title=recoded(column.title)) for column in table.columns)
    rows = tuple(row._replace(cells=tuple(map(recoded, row.cells))) for row in table.rows)
    notes, title = tuple(map(recoded, table.notes)), recoded(table.title)
    return replace(table, columns=columns, rows=rows, notes=notes, title=title)


def written(text: str, encoding: str) -> str:
    """On one line, without control characters, in what the encoding has."""
    if not text.isprintable():  # a name may hold a newline, or what moves the cursor
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text
