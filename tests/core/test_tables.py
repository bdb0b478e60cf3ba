"""Tables: as wide as asked for, numbers whole, names told apart, what is left out named."""

import fcntl
import io
import itertools
import os
import pty
import struct
import sys
import termios

import jax.numpy as jnp
import pytest
import rich.console
from rich.cells import cell_len

import hessjax as hj
from hessjax._core import _tables
from hessjax._core._tables import Column, Row, Table, number, percent
from hessjax.analysis._comparisons import Check, CheckRow
from hessjax.analysis._sensitivity_csv import SensitivityRow
from hessjax.analysis._summary import Summary, SummaryRow

NUMBERS = (0.0, -0.0, 1e-300, -1.25e300, float("nan"), float("inf"), 0.125)
LONG = "encoder/" + "/".join(f"block_{i}" for i in range(12)) + "/attention/out/kernel"
NAMES = (
    LONG,
    LONG.replace("out", "key"),
    "x" * 150,
    "[bold]w[/bold]",
    "层/重み",
    "a\nb\x1b[2J",
    "",
    "w:smile:\\",
)


def summary_of(names, count=10**12):
    def row(name, value=0.5):
        return SummaryRow(
            name, (3, 3, 512, 512), count, count // 3, count, count / 3, *(5 * [0.5]), 0.5, *(3 * [value])
        )

    return Summary(tuple(map(row, names, itertools.cycle(NUMBERS))), row("total"))


def sensitivity_of(names, metrics=8):
    def row(name, level):
        return SensitivityRow(name, level, {f"metric {i}": NUMBERS[i % 7] for i in range(metrics)}, 0.25)

    return hj.Sensitivity(tuple(row(name, level) for name in names for level in (0.0, 0.5)))


def check_of(names):
    detail = f"disagrees with finite differences in: {', '.join(names)}"
    return Check((CheckRow("same loss retraced", False, 1e-300, 1.91e-6, detail),))


RESULTS = [summary_of(NAMES), sensitivity_of(NAMES), check_of(NAMES)]


def squeezed(text):
    return "".join(text.split())


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
@pytest.mark.parametrize("width", [40, 60, 80, 132, 200, 2000])
def test_no_line_is_wider_and_nothing_is_cut(result, width):
    lines = result.to_text(width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert not any(line.endswith(" ") for line in lines)
    table = result._table()
    shown = [c for c in table.columns if not any(c.title in note for note in notes_of(lines))]
    assert {c.title for c in table.columns if c.rank == 0} <= {c.title for c in shown}
    everything = " ".join(lines)
    for row in table.rows:
        for cell, column in zip(row.cells, table.columns, strict=True):
            if column in shown and column.kind in ("number", "word"):
                assert f" {cell} " in f" {everything} " or not cell
    together = squeezed(" ".join(of_names(lines, table, width)))
    for name in NAMES:
        assert squeezed(name.replace("\n", "\\n").replace("\x1b", "\\x1b")) in together


def of_names(lines, table, width):
    """The part of every line that belongs to the column of names, or to the text."""
    if "Detail" in lines[0]:
        return [line[lines[0].index("Detail") :] for line in lines]
    if table.columns[-1].kind == "text":
        return lines
    return [line[: _tables._fitted(table, width)[1][0]] for line in lines]


def notes_of(lines):
    text = " ".join(lines)
    return [text[text.index("Not shown in") :]] if "Not shown in" in text else []


def test_the_least_important_columns_go_first_and_are_named_with_the_width_that_they_need():
    result = summary_of(["conv/kernel"], 1000)
    (note,) = notes_of(result.to_text(80).splitlines())
    assert note == (
        "Not shown in 80 columns: Shape, 2D %, 3D %, Std, Mean, Abs-mean. `.to_text(129)` has them."
    )
    whole = result.to_text(129)
    assert "Not shown" not in whole
    assert "Abs-mean" in whole
    assert "Not shown" in result.to_text(128)
    assert "`.to_csv`" in sensitivity_of(["w"]).to_text(40)


def test_a_long_name_is_broken_at_slashes_and_told_from_another_that_differs_in_one_part():
    lines = summary_of([LONG, LONG.replace("out", "key")]).to_text(80).splitlines()
    assert lines[1].startswith("encoder/block_0/block_1/")
    assert lines[2].startswith("  block_")
    assert (
        sum("attention/out" in line for line in lines) == sum("attention/key" in line for line in lines) == 1
    )


def test_a_text_without_room_beside_its_row_goes_below():
    beside, below = (check_of(["w"]).to_text(width).splitlines() for width in (90, 60))
    assert len(beside) == 2
    assert below[2] == "    disagrees with finite differences in: w"


@pytest.mark.parametrize("width", [1, 10, 25])
def test_where_even_the_important_columns_do_not_fit_numbers_stay_whole(width):
    text = summary_of([LONG], 10**12).to_text(width)
    assert "50.00" in text.split()


def test_empty_and_long_tables():
    assert str(hj.Sensitivity(())).split() == ["parameter", "sparsity"]
    assert len(str(Check(())).splitlines()) == 1
    assert len(summary_of([f"layer_{i}" for i in range(1000)]).to_text(60).splitlines()) >= 1002
    assert str(Table((Column("a", "name"),), ())) == "a"


def test_numbers_at_every_scale():
    assert [number(x) for x in NUMBERS] == ["0.00", "-0.00", "1.00e-300", "-1.25e+300", "nan", "inf", "0.125"]
    assert [number(x) for x in (None, 123.4, jnp.bfloat16(2.0), 1e5)] == ["", "123", "2.00", "1.00e+05"]
    assert [percent(x) for x in (0.0, 1.0, 1e-9, 1 - 1e-9, 0.5)] == [
        "0.00",
        "100.00",
        "<0.01",
        ">99.99",
        "50.00",
    ]


def test_missing_numbers_and_metrics_are_blank():
    rows = (SensitivityRow("w", 0.5, {"loss": 1.0}, None), SensitivityRow("v", 0.5, {"top": 2.0}, 3.0))
    lines = str(hj.Sensitivity(rows)).splitlines()
    assert lines[0].split() == ["parameter", "sparsity", "loss", "top", "predicted", "rise"]
    assert lines[1].split() == ["w", "0.5", "1"]
    assert lines[2].split() == ["v", "0.5", "2", "3"]


def test_rich_shows_the_same_lines_as_wide_as_its_console():
    for result, width in itertools.product(RESULTS, (40, 100)):
        out = io.StringIO()
        rich.console.Console(file=out, width=width, color_system=None).print(result)
        assert [line.rstrip() for line in out.getvalue().splitlines()] == result.to_text(width).splitlines()
    out = io.StringIO()
    rich.console.Console(file=out, force_terminal=True, width=80).print(RESULTS[2])
    assert "\x1b[1;31msame loss retraced" in out.getvalue()
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=80, no_color=True)
    console.print(RESULTS[2])
    assert "31m" not in out.getvalue()


def test_a_notebook_gets_every_column_with_names_as_they_are():
    text = summary_of(["<b>w</b>"])._repr_html_()
    assert "&lt;b&gt;w&lt;/b&gt;" in text
    assert text.count("<tr>") == 3
    assert text.count("<th>") == len(RESULTS[0]._table().columns)


def test_the_width_is_that_of_the_terminal_or_of_columns_or_80(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert _tables.terminal_width() == 80
    for given, width in (("57", 57), ("0", 80), ("wide", 80), ("", 80)):
        monkeypatch.setenv("COLUMNS", given)
        assert _tables.terminal_width() == width
    monkeypatch.delenv("COLUMNS")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 46, 0, 0))
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert _tables.terminal_width() == 46
        wide = max(map(cell_len, str(RESULTS[0]).splitlines()))
    os.close(leader)
    monkeypatch.setattr(sys, "stdout", None)
    assert _tables.terminal_width() == 80
    assert wide <= 46


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_stream_without_the_characters_gets_them_in_ascii(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    for result in RESULTS:
        print(result.to_text(400))
    rich.console.Console(width=400).print(*RESULTS)
    sys.stdout.flush()
    text = raw.getvalue().decode(encoding)
    assert text.count("3×3×512×512" if encoding == "latin-1" else "3x3x512x512") == 2 * (len(NAMES) + 1)
    assert "\\u5c42" in text


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        str(Table((Column("a"),), (Row(("1", "2")),)))
