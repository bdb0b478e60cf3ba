"""The table of a sensitivity as CSV: rows to text and back, every cell checked."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hessjax._core import _files

PREDICTED = "predicted"
FIRST = ("parameter", "sparsity")
COLUMNS = frozenset((*FIRST, PREDICTED))

_FORMULA = tuple("=+-@\t\r'")
"""What makes a spreadsheet compute a cell; and the quote that keeps it from that, so that it reads back."""


class SensitivityRow(NamedTuple):
    """One leaf pruned to one sparsity, or what goes together, everything else as it was.

    Attributes:
        parameter: the path of the leaf; `blocks/Dense_0/kernel[0]` for one layer of it; of leaves that are
            pruned together, what their paths have in common: `blocks/0/attn`, or `.` for the root.
        sparsity: the fraction of its weights at zero, as asked for.
        metrics: what was measured, by name; empty where nothing was.
        predicted: by how much the quadratic model expects the loss to rise; None without a model.
    """

    parameter: str
    sparsity: float
    metrics: dict[str, float]
    predicted: float | None = None


def level_name(sparsity: float) -> str:
    """A level as the file has it, and as levels are told apart: `0.15`, whatever the last bits."""
    # Six digits survive float32, in which levels may have been computed.
    return f"{sparsity:.6g}"


# -- writing -------------------------------------------------------------------------------------


def lines_of(rows: Sequence[SensitivityRow]) -> list[str]:
    """The header and a line for every row; numbers to the last digit."""
    if not rows:
        return []
    names, has_model = list(rows[0].metrics), rows[0].predicted is not None
    header = [*FIRST, *map(_escaped, names), *([PREDICTED] if has_model else [])]
    return [_line(header), *(_line(_cells(row)) for row in rows)]


def write(path: Path, rows: Sequence[SensitivityRow]) -> None:
    """A new file of all rows, whole or not at all."""
    text = "".join(lines_of(rows)).encode()
    _files.write_whole(path, lambda file: file.write(text))


def _cells(row: SensitivityRow) -> list[str]:
    numbers = [*row.metrics.values(), *([] if row.predicted is None else [row.predicted])]
    # `repr` is the shortest text that reads back to the same bits.
    return [_escaped(row.parameter), level_name(row.sparsity), *map(repr, numbers)]


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _escaped(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name


def _unescaped(cell: str) -> str:
    return cell.removeprefix("'")


# -- reading -------------------------------------------------------------------------------------


def whole_lines(content: bytes) -> int:
    """How many bytes are whole lines: a line break between quotes, in a name, ends none."""
    end, is_quoted = 0, False
    for place, byte in enumerate(content):
        if byte == ord('"'):
            is_quoted = not is_quoted
        elif byte == ord("\n") and not is_quoted:
            end = place + 1
    return end


def read(path: Path, content: bytes, known: set[str], has_model: bool) -> list[SensitivityRow]:
    """The rows of a table.

    Raises:
        ValueError: naming the line, if it is not a table of such an analysis of these parameters.
    """
    lines = _lines(path, content)
    number, header = next(lines, (1, [*FIRST, *[PREDICTED] * has_model]))
    names = _metric_names(path, number, header, has_model)
    seen: dict[tuple[str, str], int] = {}
    rows = []
    for number, line in lines:
        row = _row(path, number, line, names, known, has_model)
        question = row.parameter, level_name(row.sparsity)
        if question in seen:
            what = "repeats" if row in rows else "contradicts"
            raise refusal(path, number, f"the row {what} that of line {seen[question]}, of the same sparsity")
        seen[question] = number
        rows.append(row)
    return rows


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not empty, each with its number."""
    number = 1
    try:
        reader = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
        for line in reader:
            if line:
                yield number, line
            number = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise refusal(path, number, f"there must be CSV in UTF-8: {error}") from error


def _metric_names(path: Path, number: int, header: list[str], has_model: bool) -> list[str]:
    end = len(header) - (PREDICTED in header)  # the metrics stand between two fixed columns and this one
    if header[:2] != list(FIRST) or header[end:] != [PREDICTED] * has_model:
        wanted = ",".join([*FIRST, "<metrics>", *[PREDICTED] * has_model])
        raise refusal(path, number, f"the columns must be `{wanted}`, got `{','.join(header)[:200]}`")
    names = [_unescaped(cell) for cell in header[2:end]]
    if len(set(names)) < len(names):
        raise refusal(path, number, f"two columns are called the same: {', '.join(names)}")
    return names


def _row(
    path: Path, number: int, line: list[str], names: list[str], known: set[str], has_model: bool
) -> SensitivityRow:
    width = 2 + len(names) + has_model
    if len(line) != width:
        raise refusal(path, number, f"there must be {width} columns, as in the header, got {len(line)}")
    parameter, cells = _unescaped(line[0]), line[1:]
    if parameter not in known:
        raise refusal(path, number, f"`parameter` must be a leaf of `params`, got `{parameter}`")
    try:
        sparsity, *values = map(float, cells)
    except ValueError as error:
        raise refusal(path, number, f"every column but the first must be a number: {error}") from error
    if not 0 <= sparsity < 1:
        raise refusal(path, number, f"`sparsity` must be in [0, 1), got {cells[0]}")
    if any(map(math.isnan, values)):
        raise refusal(path, number, "every column but the first must be a number, got nan")
    metrics = dict(zip(names, values, strict=False))
    return SensitivityRow(parameter, sparsity, metrics, values[-1] if has_model else None)


def refusal(path: Path, number: int, reason: Any) -> ValueError:
    """The error for a file that cannot be gone on with."""
    return ValueError(
        f"`path` must be a file of this analysis, but in line {number} of `{path}` {reason}. "
        "It was left as it is: give another path, or delete it."
    )
