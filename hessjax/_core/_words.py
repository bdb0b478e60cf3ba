"""What users say of axes: words for every axis of the leaves that a glob matches."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from hessjax._core._messages import shown
from hessjax._core._names import Leaf

AxisWords: TypeAlias = Mapping[str, str]
"""What axes mean, by glob over paths: `{"blocks/*": "layer ...", "up/kernel": "h w out in"}`."""

WINDOW = ("h", "w", "d", "t", "window")
WORDS = ("layer", "in", "out", "head", "entry", "heads", "vocab", *WINDOW)


def words_by_path(axes: AxisWords | None, leaves: Sequence[Leaf]) -> dict[str, tuple[str, ...]]:
    """The words for every leaf that the user says something of; the first glob that matches counts.

    Raises:
        TypeError: if `axes` is no mapping of text to text.
        ValueError: for a word there is none of, a glob that matches no leaf, or another number of words than
            the leaf has axes.
    """
    if axes is None:
        return {}
    if not isinstance(axes, Mapping):
        raise TypeError(
            f'`axes` must be a mapping from globs to words, such as {{"*/weight": "out in"}}, got '
            f"{shown(axes)}."
        )
    if not axes:
        raise ValueError(
            "`axes` must say something of at least one leaf, or be left out, got an empty mapping."
        )
    found: dict[str, tuple[str, ...]] = {}
    for glob, text in axes.items():
        words = _checked(glob, text)
        hits = [leaf for leaf in leaves if leaf.path == glob or fnmatch.fnmatchcase(leaf.path, glob)]
        if not hits:
            raise ValueError(
                f"`axes` must match leaves, but `{glob}` matches none of: "
                f"{', '.join(leaf.path for leaf in leaves) or '(no leaves)'}."
            )
        for leaf in hits:
            if leaf.path not in found:
                _check_number(glob, text, words, leaf)
                found[leaf.path] = words
    return found


def _checked(glob: object, text: object) -> tuple[str, ...]:
    if not isinstance(glob, str) or not isinstance(text, str):
        raise TypeError(f"`axes` must map globs to words, both as text, got {glob!r}: {text!r}.")
    words = tuple(text.split())
    unknown = [word for word in words if word not in (*WORDS, "...")]
    if unknown or not words:
        raise ValueError(
            f"`axes` must be made of the words {', '.join(WORDS)}, and `...` for the others, got "
            f'"{text}" for `{glob}`.'
        )
    if "..." in words and (words.count("...") > 1 or set(words) - {"layer", "..."}):
        raise ValueError(
            f'`axes` must name every axis, or only `layer` beside one `...`, got "{text}" for `{glob}`.'
        )
    once = [word for word in ("head", "heads", "entry", "vocab") if words.count(word) > 1]
    if once or ("heads" in words and {"head", "entry"} & set(words)):
        raise ValueError(
            f'`axes` must name heads once, as `head entry` or, in one axis, `heads`, got "{text}" for '
            f"`{glob}`."
        )
    return words


def _check_number(glob: str, text: str, words: tuple[str, ...], leaf: Leaf) -> None:
    number = len(words)
    if (len(leaf.shape) < number - 1) if "..." in words else (len(leaf.shape) != number):
        raise ValueError(
            f'`axes` must have a word for every axis, but "{text}" for `{glob}` has {number} and '
            f"{leaf.path} of shape {leaf.shape} has {len(leaf.shape)} axes."
        )


def layer_places(words: tuple[str, ...], number: int) -> tuple[int, ...]:
    """The axes, of so many, that count layers."""
    if "..." not in words:
        return tuple(i for i, word in enumerate(words) if word == "layer")
    before = words.index("...")
    after = len(words) - before - 1
    return (*range(before), *range(number - after, number))
