"""What is the task? Sentences from movie reviews, each liked or disliked by human readers."""

import io
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import downloads
import numpy as np

MEMBER = "additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "movieReviewSnippets_GroundTruth.txt"


class Sentences(NamedTuple):
    """Token ids of sentences, padded with 0, and their classes.

    Attributes:
        tokens: (sentences, length) token ids.
        labels: (sentences,) 1 for praise, 0 for blame.
    """

    tokens: np.ndarray
    labels: np.ndarray

    def __getitem__(self, rows) -> "Sentences":
        """These sentences only, as arrays are indexed."""
        return Sentences(self.tokens[rows], self.labels[rows])


def load(folder: Path = downloads.CACHE) -> tuple[list[str], np.ndarray]:
    """The sentences and the sign of their scores, 10,605 of them (Hutto and Gilbert, ICWSM 2014)."""
    path = downloads.package("vaderSentiment", "3.3.2", source=True, folder=folder)
    rows = [line.split("\t", 2) for line in _table(path).splitlines()]
    return [row[2] for row in rows], np.array([float(row[1]) > 0 for row in rows], np.int32)


def encode(
    sentences: Sequence[str], labels: np.ndarray, vocabulary: Mapping[str, int], length: int
) -> Sentences:
    """Token ids of every sentence between [CLS] and [SEP], cut and padded to one length."""
    tokens = np.zeros((len(sentences), length), np.int32)
    for row, sentence in zip(tokens, sentences, strict=True):
        ids = [vocabulary[piece] for piece in wordpieces(sentence, vocabulary)][: length - 2]
        row[: len(ids) + 2] = [vocabulary["[CLS]"], *ids, vocabulary["[SEP]"]]
    return Sentences(tokens, labels)


def split(sentences: Sentences, share: float = 0.1, seed: int = 0) -> tuple[Sentences, Sentences]:
    """Train and test, always the same for a seed."""
    order = np.random.default_rng(seed).permutation(len(sentences.labels))
    number = round(share * len(order))
    return sentences[order[number:]], sentences[order[:number]]


def batches(number: int, size: int, steps: int, seed: int) -> np.ndarray:
    """(steps, size) rows of the data: every epoch in an order of its own, an incomplete batch dropped."""
    rng, per_epoch = np.random.default_rng(seed), number // size
    epochs = [rng.permutation(number)[: per_epoch * size] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, size)[:steps]


def wordpieces(text: str, vocabulary: Mapping[str, int]) -> Iterator[str]:
    """The pieces of a text: always the longest one that begins the rest of a word (arXiv 1609.08144)."""
    for word in _words(text):
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
            end = next(ends, None)
            if end is None:
                pieces = ["[UNK]"]
                break
            pieces.append(prefix + word[start:end])
            start = end
        yield from pieces


def _words(text: str) -> list[str]:
    """Lower case without accents; every sign of punctuation a word of its own."""
    letters = unicodedata.normalize("NFD", text.lower())
    return "".join(map(_spaced, letters)).split()


def _spaced(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Mn" or (category[0] == "C" and not letter.isspace()):
        return ""
    symbol = 32 < ord(letter) < 127 and not letter.isalnum()
    return f" {letter} " if symbol or category[0] == "P" else letter


def _table(path: Path) -> str:
    """An archive in an archive: read, never unpacked."""
    with tarfile.open(path) as outer:
        inner = outer.extractfile(f"{outer.getnames()[0].split('/')[0]}/{MEMBER}").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        name = next(n for n in archive.getnames() if n.split("/")[-1] == TABLE)
        return archive.extractfile(name).read().decode()
