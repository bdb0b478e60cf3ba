"""The table of a sensitivity on disk, and its rows from the values of a metric."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

PREDICTED = "predicted"
_FIRST = ("parameter", "sparsity")
COLUMNS = frozenset((*_FIRST, PREDICTED))


class SensitivityRow(NamedTuple):
    """One leaf pruned to one sparsity, everything else as it was.

    Attributes:
        parameter: the path of the leaf.
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


def lines_of(rows: Sequence[SensitivityRow]) -> list[str]:
    """The header and a line for every row; numbers to the last digit."""
    if not rows:
        return []
    names, has_model = list(rows[0].metrics), rows[0].predicted is not None
    header = [*_FIRST, *names, *([PREDICTED] if has_model else [])]
    return [_line(header), *(_line(_cells(row)) for row in rows)]


def write(path: Path, rows: Sequence[SensitivityRow]) -> None:
    """A new file of all rows."""
    path.write_text("".join(lines_of(rows)), encoding="utf-8")


def append(path: Path, row: SensitivityRow) -> None:
    """One more line; the header before it, if it is the first."""
    is_new = not path.exists() or not path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines_of([row])[0 if is_new else 1 :]))


def read(path: Path, parameters: Iterable[str], has_model: bool) -> list[SensitivityRow]:
    """The rows of an earlier run. A last line that was cut off in the middle is cut from the file.

    Raises:
        ValueError: naming the line, if the file is not of such an analysis of these parameters.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a run killed while it wrote leaves half a line at the end
    start = ",".join(_FIRST)
    if not whole and not (start.startswith(text) or text.startswith(start)):
        raise refusal(path, 1, f"the columns must be `{start},<metrics>`, got `{text[:60]}`")
    lines = [(n, line) for n, line in enumerate(csv.reader(io.StringIO(whole)), start=1) if line]
    names = _metric_names(path, lines[0][1], has_model) if lines else []
    known = set(parameters)
    rows = [_row(path, number, line, names, known, has_model) for number, line in lines[1:]]
    if text and (len(whole) < len(text) or not rows):  # known by now to be of an analysis
        path.write_text(whole if rows else "", encoding="utf-8")
    return rows


def _metric_names(path: Path, header: list[str], has_model: bool) -> list[str]:
    end = len(header) - (PREDICTED in header)  # the metrics stand between two fixed columns and this one
    if header[:2] != list(_FIRST) or header[end:] != [PREDICTED] * has_model:
        wanted = ",".join([*_FIRST, "<metrics>", *[PREDICTED] * has_model])
        raise refusal(path, 1, f"the columns must be `{wanted}`, got `{','.join(header)}`")
    return header[2:end]


def _row(
    path: Path, number: int, line: list[str], names: list[str], known: set[str], has_model: bool
) -> SensitivityRow:
    width = 2 + len(names) + has_model
    if len(line) != width:
        raise refusal(path, number, f"there must be {width} columns, as in the header, got {len(line)}")
    parameter, *cells = line
    if parameter not in known:
        raise refusal(path, number, f"`parameter` must be a leaf of `params`, got `{parameter}`")
    try:
        sparsity, *values = map(float, cells)
    except ValueError as error:
        raise refusal(path, number, f"every column but the first must be a number: {error}") from error
    metrics = dict(zip(names, values, strict=False))
    return SensitivityRow(parameter, sparsity, metrics, values[-1] if has_model else None)


def refusal(path: Path, number: int, reason: str) -> ValueError:
    """The error for a file that cannot be gone on with."""
    return ValueError(
        f"`path` must be a file of this analysis, but in line {number} of `{path}` {reason}. "
        "It was left as it is: give another path, or delete it."
    )


def _cells(row: SensitivityRow) -> list[str]:
    numbers = [*row.metrics.values(), *([] if row.predicted is None else [row.predicted])]
    # `repr` is the shortest text that reads back to the same bits.
    return [row.parameter, level_name(row.sparsity), *map(repr, numbers)]


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def named(value: Any) -> dict[str, float]:
    """The metric's values by name."""
    values = dict(value) if isinstance(value, Mapping) else {"metric": value}
    for name, x in values.items():
        if jnp.ndim(x) or not jnp.issubdtype(jnp.result_type(x), jnp.number):
            raise TypeError(
                f"`metric` must return a scalar or a dict of scalars, got {jnp.result_type(x)}"
                f"{list(jnp.shape(x))} for `{name}`."
            )
    return {str(name): float(x) for name, x in values.items()}


def in_order(
    metrics: dict[str, float], earlier: Sequence[SensitivityRow], file: Path | None
) -> dict[str, float]:
    """The metrics in the order of the rows before, which must have the same names."""
    if reserved := metrics.keys() & COLUMNS:
        raise ValueError(f"`metric` must not name a value `{min(reserved)}`: that is a column already.")
    before = list(earlier[0].metrics) if earlier else list(metrics)
    if metrics.keys() == set(before):
        return {name: metrics[name] for name in before}
    reason = f"the metrics are {', '.join(before) or 'none'}, and `metric` returned {', '.join(metrics)}"
    if file is not None:
        raise refusal(file, 1, reason)
    raise ValueError(f"`metric` must return the same names every time: before, {reason}.")


def check_numbers(metrics: dict[str, float], question: tuple[str, str], file: Path | None) -> None:
    """Refuses NaN; `question` is the leaf that was pruned, and to what level."""
    name = next((name for name, x in metrics.items() if math.isnan(x)), None)
    if name is None:
        return
    kept = "" if file is None else f" The rows before it are in `{file}`, to go on from."
    raise FloatingPointError(
        f"`metric` must return numbers, got NaN for `{name}` with `{question[0]}` pruned to sparsity "
        f"{question[1]}: leave that level or leaf out, or evaluate in a wider dtype.{kept}"
    )
