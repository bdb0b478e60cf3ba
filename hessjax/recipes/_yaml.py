"""YAML with the line of every field, and of everything in it that a recipe cannot hold."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

MOST_BYTES = 1_000_000
MOST_NODES = 20_000
MOST_DEPTH = 40

_Location = tuple[str, ...]

_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_PLAIN = re.compile(r"[-+]?(0|[1-9]\d*|(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)")
_LOOSE = re.compile(r"(?=.*\d)[-+]?[\d.][\d_.:]*|[-+]?0[xob][\da-fA-F_]+")
"""What some reader of YAML takes for a number and another does not, or for another one: 010, 1_000, 1:30."""


class YamlError(ValueError):
    """What is wrong with a document, and where."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        super().__init__(line, field, reason)
        self.line, self.field, self.reason = line, field, reason


class _Loader(yaml.SafeLoader):
    """Numbers such as `1e-3` and `+.5`, which PyYAML takes for text, are numbers."""


_FLOAT = re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$")
_Loader.add_implicit_resolver(_NUMBERS[1], _FLOAT, list("-+.0123456789"))


def load_yaml(content: bytes) -> tuple[Any, Any]:
    """What a YAML document holds, and its tree of nodes.

    Raises:
        YamlError: for what is not YAML, and for what readers of YAML understand differently or in silence:
            a key that stands there twice or is no text, numbers with `_`, `:` or leading zeros, dates, tags;
            for aliases that hold themselves or grow beyond measure.
    """
    text = _decoded(content)
    try:
        _check_size(text)
        # Composed for the lines, loaded for the values: plain values do not know where they stood.
        node = yaml.compose(text, Loader=_Loader)
        _check_node(node, ())
        return yaml.load(text, Loader=_Loader), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 1, "", f"not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            line, "", f"not YAML: the character U+{error.character:04X} must not stand in it"
        ) from error


def find_in_yaml(node: Any, location: Sequence[Any]) -> tuple[int, str]:
    """The line of a field, and its name. What is not in the file, such as pydantic's tags, is skipped."""
    line, names = node.start_mark.line + 1 if node else 1, []
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                continue
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            continue
        names.append(str(part))
    return line, ".".join(names)


# -- before anything is built ----------------------------------------------------------------------


def _decoded(content: bytes) -> str:
    if len(content) > MOST_BYTES:
        raise YamlError(1, "", f"it must have at most {MOST_BYTES:,} bytes, got {len(content):,}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise YamlError(line, "", f"it must be in UTF-8, got the byte {content[error.start]:#04x}") from None


def _check_size(text: str) -> None:
    """Count the values as if every alias were written out, without doing so; depth before recursion."""
    sizes: dict[str, int | None] = {}  # of anchors; None: not yet closed
    open_: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if sizes.get(event.anchor, 0) is None:
                raise YamlError(line, "", f"`*{event.anchor}` stands within `&{event.anchor}` itself")
            total += sizes.get(event.anchor) or 0
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            _check_tag(event, line)
            if isinstance(event, yaml.ScalarEvent):
                sizes |= {event.anchor: 1} if event.anchor else {}
            else:
                sizes |= {event.anchor: None} if event.anchor else {}
                open_.append((event.anchor, total - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            sizes |= {anchor: total - before} if anchor else {}
        if total > MOST_NODES:
            raise YamlError(line, "", f"there must be at most {MOST_NODES:,} values, aliases written out")
        if len(open_) > MOST_DEPTH:
            raise YamlError(line, "", f"it must be at most {MOST_DEPTH} levels deep")


def _check_tag(event: Any, line: int) -> None:
    if event.tag not in (None, "!"):
        raise YamlError(line, "", f"there must be no tags, got `{event.tag}`")


# -- what is in it ---------------------------------------------------------------------------------


def _check_node(node: Any, location: _Location) -> None:
    if isinstance(node, yaml.ScalarNode):
        _check_number(node, location)
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _check_node(value, (*location, str(index)))
    if isinstance(node, yaml.MappingNode):
        _check_mapping(node, location)


def _check_mapping(node: Any, location: _Location) -> None:
    """YAML readers keep the last of two equal keys in silence."""
    seen: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError(line, ".".join(location), "a key must be text, got a list or a mapping")
        here = (*location, key.value[:80])
        if key.tag not in (_TEXT, _MERGE):
            kind = key.tag.rpartition(":")[2]
            raise YamlError(line, ".".join(here), f"a key must be text, got a {kind}: put it in quotes")
        if key.value in seen:
            raise YamlError(line, ".".join(here), "this key stands here twice")
        seen.add(key.value)
        _check_node(value, here)


def _check_number(node: Any, location: _Location) -> None:
    line, text = node.start_mark.line + 1, node.value
    if node.style is not None:  # in quotes, or a block of text
        return
    if node.tag.endswith(":timestamp"):
        raise YamlError(
            line, ".".join(location), f"there must be no dates, got {text[:40]}: put it in quotes"
        )
    if node.tag not in _NUMBERS and not _LOOSE.fullmatch(text):
        return
    if not _PLAIN.fullmatch(text):
        reason = f"a number must be finite and plain, as 10, 0.5 or 1e-3 (text in quotes), got {text[:40]}"
        raise YamlError(line, ".".join(location), reason)
    if (
        len(text) > 40
        or abs(float(text)) > 1e300
        or (text.lstrip("+-").isdigit() and abs(int(text)) >= 2**53)
    ):
        raise YamlError(line, ".".join(location), f"a number must not be that large or long, got {text[:40]}")
