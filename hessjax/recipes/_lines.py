"""YAML with the line of every field, for messages that say where."""

from collections.abc import Sequence
from typing import Any

import yaml


class YamlError(ValueError):
    """What is wrong with a document, and where."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        super().__init__(line, field, reason)
        self.line, self.field, self.reason = line, field, reason


def load(text: str) -> tuple[Any, Any]:
    """What a YAML document holds, and its tree of nodes.

    Raises:
        YamlError: for what is not YAML, and for a key that stands there twice.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(node, ())
        return yaml.safe_load(text), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 1, "", f"not YAML: {error.problem}") from error


def find(node: Any, location: Sequence[Any]) -> tuple[int, str]:
    """The line of a field, and its name. What is not in the file, such as pydantic's tags, is skipped."""
    line, names = node.start_mark.line + 1 if node else 1, []
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                continue
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            continue
        names.append(str(part))
    return line, ".".join(names)


def _check_keys(node: Any, location: tuple[str, ...]) -> None:
    """YAML readers keep the last of two equal keys in silence."""
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _check_keys(value, (*location, str(index)))
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        here = (*location, str(key.value))
        if key.value in seen:
            raise YamlError(key.start_mark.line + 1, ".".join(here), "this key stands here twice")
        seen.add(key.value)
        _check_keys(value, here)
