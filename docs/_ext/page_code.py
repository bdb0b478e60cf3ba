"""The Python of the pages: find it, run it, keep what it prints and draws. For the build and the tests.

On a page, every fence ```` ```python ```` is a block; all blocks of a page run in order in one namespace, in
an empty folder. A fence `{code-block} LANGUAGE` with a `:caption:` is a file: it is written to that folder
under the caption's name. A page whose front matter says `requires: [package]` needs that package.
"""

import contextlib
import importlib.util
import io
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent.parent
_FENCE = re.compile(
    r"^```(python|\{code-block\} \w+\n:caption: ([\w./-]+)\n)(.*?)^```$", re.DOTALL | re.MULTILINE
)


class PageError(Exception):
    """A block that raised: the message names page, block, line and reason."""


class Block(NamedTuple):
    """A fence of a page.

    Attributes:
        file: the name of the file that it is; None for Python to run.
        source: its text.
        line: of the page, where the text begins.
        end: the position in the page's text after the fence.
    """

    file: str | None
    source: str
    line: int
    end: int


def pages() -> list[Path]:
    """The pages of the repository, none made at build, those with code or without."""
    found = DOCS.rglob("*.md")
    return sorted(p for p in found if not p.relative_to(DOCS).parts[0].startswith("_"))


def blocks(text: str) -> list[Block]:
    """All fences of a page that run or are files, in order."""
    return [
        Block(match[2], match[3].lstrip("\n"), text.count("\n", 0, match.start()) + 2, match.end())
        for match in _FENCE.finditer(text)
    ]


def missing(text: str) -> list[str]:
    """The packages that a page requires and that are not installed."""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    line = re.search(r"^requires: \[(.*)\]$", front[1], re.MULTILINE) if front else None
    names = [name.strip() for name in line[1].split(",")] if line else []
    return [name for name in names if importlib.util.find_spec(name) is None]


def run(name: str, text: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run the blocks one after the other; after each, the block and what it printed.

    Figures stay open in pyplot: it is for the caller to save and close them.

    Raises:
        PageError: at the first block that raises.
    """
    namespace: dict[str, Any] = {"__name__": "page"}
    number = 0
    for block in blocks(text):
        printed = io.StringIO()
        if block.file is not None:
            (folder / block.file).write_text(block.source)
            continue
        number += 1
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            _execute(f"{name}, block {number}", block, namespace)
        yield block, printed.getvalue()


def _execute(place: str, block: Block, namespace: dict[str, Any]) -> None:
    """Line numbers in a traceback are those of the page."""
    code = compile("\n" * (block.line - 1) + block.source, place, "exec")
    try:
        exec(code, namespace)
    except Exception as error:
        here = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == place]
        line = here[-1] if here else block.line
        raise PageError(f"{place}, line {line} of the page: {type(error).__name__}: {error}") from error


def figures() -> list[Any]:
    """The figures that pyplot holds open, if anything was drawn."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    pyplot = sys.modules["matplotlib.pyplot"]
    return [pyplot.figure(number) for number in pyplot.get_fignums()]


def close_figures() -> None:
    """Forget them."""
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
