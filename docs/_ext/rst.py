"""Docstrings in Google style as reStructuredText."""

import re
import textwrap
from collections.abc import Iterable, Iterator

_SECTIONS = {
    "Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Raises": "Raises", "Cost": "Cost",
    "References": "References", "Example": "Example", "Examples": "Example",
    "Yields": "Yields", "Note": "Note",
}  # fmt: skip
# Public in one family, but more often the name of an argument.
_WORDS = (
    "channels",
    "density",
    "explicit",
    "heads",
    "layers",
    "random",
    "static",
    "threshold",
)  # arguments as well
_ITEMISED = ("Arguments", "Attributes", "Raises")
_HEAD = re.compile(rf"^({'|'.join(_SECTIONS)}):\s*$")
_ITEM = re.compile(r"^([*\w][\w*, ]*):\s+(.*)$")


class Links:
    """Turns names in single backticks into links to their entries, where they have one.

    Args:
        paths: of all entries, `hessjax.saliencies.obs` and the like.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = frozenset(paths)
        bare = [path.rpartition(".")[2] for path in self.paths]
        self.only = {name: path for name, path in zip(bare, self.paths, strict=True) if bare.count(name) == 1}

    def document(self, docstring: str, module: str) -> str:
        """A whole docstring, whose bare names are looked for in `module` first."""
        text = []
        for title, lines in _split(docstring):
            text += list(self._section(title, lines, module))
        return "\n".join(text) + "\n"

    def inline(self, text: str, module: str) -> str:
        """Prose: links, literals, and nothing else that reStructuredText would take for markup."""
        done = ""
        for piece in re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL):
            if piece.startswith("`"):
                done += self._name(piece.strip("`"), module)
            else:  # a letter right after a literal, as in a plural, has to be told apart from it
                done += ("\\ " if done and piece[:1].isalnum() else "") + _escaped(piece)
        return done

    def _name(self, code: str, module: str) -> str:
        bare = re.sub(r"\(.*\)$", "", code, flags=re.DOTALL)
        bare = re.sub(r"^(hj|hessjax)\.", "", bare)
        for path in (f"{module}.{bare}", f"hessjax.{bare}"):
            if path in self.paths:
                return f":py:obj:`{code} <{path}>`"
        if bare in self.only and bare not in _WORDS:
            return f":py:obj:`{code} <{self.only[bare]}>`"
        code = " ".join(code.split())
        return f"``{code}``"

    def _section(self, title: str, lines: list[str], module: str) -> Iterator[str]:
        if not title:
            yield self._prose(lines, module)
        elif title == "Example":
            yield "\n.. rubric:: Example\n\n" + "\n".join(lines) + "\n"
        else:
            body = self._items(lines, module) if title in _ITEMISED else self._prose(lines, module)
            yield f"\n:{title}:\n" + textwrap.indent(body, "   ")

    def _items(self, lines: list[str], module: str) -> str:
        """`name: text` as a definition list."""
        text = []
        for name, body in _itemised(lines):
            text.append(f"``{name}``\n" + textwrap.indent(self._prose(body, module), "   ") if name
                        else self._prose(body, module))  # fmt: skip
        return "\n".join(text)

    def _prose(self, lines: list[str], module: str) -> str:
        """Paragraphs; what is indented below one is a formula, and kept as it stands."""
        text = []
        for paragraph in re.split(r"\n{2,}", "\n".join(lines).strip("\n")):
            if paragraph.startswith("    "):
                text.append(
                    ".. code-block:: text\n   :class: formula\n\n"
                    + textwrap.indent(textwrap.dedent(paragraph), "   ")
                )
            else:
                text.append(self.inline(paragraph, module))
        return "\n\n".join(text) + "\n"


def _split(docstring: str) -> Iterator[tuple[str, list[str]]]:
    """Title and dedented lines of every section, the first one without a title."""
    title, lines = "", []
    for line in docstring.strip().splitlines():
        if match := _HEAD.match(line):
            yield title, _dedented(lines, title)
            title, lines = _SECTIONS[match[1]], []
        else:
            lines.append(line)
    yield title, _dedented(lines, title)


def _dedented(lines: list[str], title: str) -> list[str]:
    return textwrap.dedent("\n".join(lines)).strip("\n").splitlines() if title else lines


def _itemised(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    name, body = "", []
    for line in lines:
        match = _ITEM.match(line)
        if match:
            if body:
                yield name, _unindented(body)
            name, body = match[1], [match[2]]
        else:
            body.append(line)
    if body:
        yield name, _unindented(body)


def _unindented(body: list[str]) -> list[str]:
    """The first line as it is, those below without their indent."""
    return [body[0], *textwrap.dedent("\n".join(body[1:])).splitlines()]


def _escaped(text: str) -> str:
    """Characters that would be markup; `*emphasis*` within a line stays."""
    text = text.replace("|", "\\|")
    text = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", text)
    kept = re.split(r"(\*\w[^*\n]*\w\*)", text)
    return "".join(piece if i % 2 else piece.replace("*", "\\*") for i, piece in enumerate(kept))
