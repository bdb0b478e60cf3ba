"""One self-contained page: elements with their text escaped, tables, charts, and the document around them."""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from hessjax._core._tables import number


class Html(str):
    """Text that is HTML already; any other is escaped."""

    __slots__ = ()


def tag(name: str, *inside: Any, **attributes: Any) -> Html:
    """An element; of attributes a trailing underscore falls away, others become hyphens."""
    named = {
        key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None
    }
    words = "".join(f' {key}="{html.escape(str(value), quote=True)}"' for key, value in named.items())
    return Html(f"<{name}{words}>{join(inside)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Parts one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


class Cell(NamedTuple):
    """How a column of a table is set: its head, and whether it holds names, words or numbers."""

    title: str
    kind: str = ""


def table(
    columns: Sequence[Cell | str], rows: Iterable[Sequence[Any]], label: str, bad: Iterable[int] = ()
) -> Html:
    """A table that scrolls inside itself; the rows numbered in `bad` stand out."""
    cells = [column if isinstance(column, Cell) else Cell(column) for column in columns]
    heads = join(tag("th", cell.title, class_=cell.kind or None, scope="col") for cell in cells)
    marked = set(bad)
    body = join(
        tag("tr", *(tag("td", x, class_=cell.kind or None) for cell, x in zip(cells, row, strict=True)),
            class_="bad" if index in marked else None)
        for index, row in enumerate(rows)
    )  # fmt: skip
    whole = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body))
    # The keyboard can scroll what can have the focus.
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def chart(name: str, alt: str, picture: bytes | None, caption: str) -> Html:
    """The place of a chart: what is drawn in it by the script, or else a picture."""
    inner = Html("") if picture is None else _image(alt, picture)
    place = tag("div", inner, id=name, class_="chart", role="img", aria_label=alt)
    return tag("figure", place, tag("figcaption", caption))


def figure(alt: str, picture: bytes, caption: str) -> Html:
    """A picture."""
    return tag("figure", _image(alt, picture), tag("figcaption", caption))


def _image(alt: str, picture: bytes) -> Html:
    data = base64.b64encode(picture).decode()
    return Html(f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">')


def document(title: str, body: Iterable[Any], charts: Mapping[str, Any]) -> str:
    """The whole page. Nothing in it asks the network for anything, and its policy forbids it to."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_asset('page.css')}</style>",
    ]
    scripts = [f"<script>{_asset(name)}</script>" for name in ("d3.min.js", "plot.umd.min.js", "page.js")]
    # `</` would end the script it stands in.
    data = json.dumps(plain(charts), allow_nan=False, ensure_ascii=False).replace("</", "<\\/")
    data = f'<script type="application/json" id="charts">{data}</script>'
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", tag("main", *body)]
    return "\n".join([*lines, data, *(scripts if charts else []), "</body>", "</html>", ""])


def _asset(name: str) -> str:
    return resources.files("hessjax._report").joinpath("assets", name).read_text(encoding="utf-8")


def plain(value: Any) -> Any:
    """For charts: numbers that are finite, and None for others."""
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def real(value: Any) -> float:
    """A number of a record, in which those that JSON lacks are words."""
    return math.nan if value is None else float(value)


def finite(value: Any) -> float | None:
    """The same, None if it is not finite."""
    found = real(value)
    return found if math.isfinite(found) else None


def brief(value: Any, digits: int = 3) -> str:
    """A number in a table; a dash for none."""
    found = real(value)
    return "–" if math.isnan(found) else number(found, digits).replace("-", "−")


def with_error(value: Any, error: Any) -> str:
    """A number with its standard error."""
    return brief(value) if finite(error) is None else f"{brief(value)} ± {brief(error, 2)}"


def read_picture(folder: Path, name: str) -> bytes | None:
    """A figure of the report; None if it went."""
    try:
        return (folder / name).read_bytes()
    except OSError:
        return None
