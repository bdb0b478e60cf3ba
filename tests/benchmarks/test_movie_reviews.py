"""The task of the transfer study: word pieces, splits and batches, an archive that is there already."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import downloads
import movie_reviews

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "film",
    "##s",
    "cafe",
    "'",
    "!",
    "un",
    "##film",
    "##able",
    "no",
]
VOCABULARY = {word: i for i, word in enumerate(WORDS)}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A Films!", ["a", "film", "##s", "!"]),
        ("unfilmable", ["un", "##film", "##able"]),
        ("Café", ["cafe"]),
        ("a\u00a0film\u200b", ["a", "film"]),
        ("films' xyz", ["film", "##s", "'", "[UNK]"]),
        ("unfilmx", ["[UNK]"]),
        ("", []),
    ],
)
def test_wordpieces(text, pieces):
    assert list(movie_reviews.wordpieces(text, VOCABULARY)) == pieces


def test_sentences_are_cut_and_padded():
    found = movie_reviews.encode(["a film", "a a a a a a"], np.array([1, 0]), VOCABULARY, 5)
    assert found.tokens.tolist() == [[2, 4, 5, 3, 0], [2, 4, 4, 4, 3]]


def test_split_keeps_every_sentence_once():
    number = np.arange(50)
    train, test = movie_reviews.split(movie_reviews.Sentences(number[:, None], number))
    assert len(test.labels) == 5
    assert sorted([*train.labels, *test.labels]) == number.tolist()
    assert not np.array_equal(train.labels, np.sort(train.labels))


def test_batches_see_every_row_once_an_epoch():
    found = movie_reviews.batches(10, 3, 8, seed=0)
    assert found.shape == (8, 3)
    assert len(set(found[:3].ravel())) == len(set(found[3:6].ravel())) == 9
    assert not np.array_equal(found[:3], found[3:6])


def test_sentences_are_read_from_an_archive_in_an_archive(tmp_path):
    inner = archive({"hutto/" + movie_reviews.TABLE: b'1\t2.5\tGood, a "film"\r\n2\t-0.1\tBad\r\n'})
    member = "vaderSentiment-3.3.2/" + movie_reviews.MEMBER
    (tmp_path / "vadersentiment-3.3.2.tar.gz").write_bytes(archive({member: inner}))
    sentences, labels = movie_reviews.load(tmp_path)
    assert sentences == ['Good, a "film"', "Bad"]
    assert labels.tolist() == [1, 0]


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*put a file no_such-1\*\.whl into"):
        downloads.package("no-such", "1", folder=tmp_path)


def archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
