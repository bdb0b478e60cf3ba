"""The tour on real data, in its quick form, run once."""

import json

import matplotlib as mpl

mpl.use("Agg")

import jax
import numpy as np
import pytest
from PIL import Image

import hessjax as hj
from hessjax.cli import _digits, _tour
from hessjax.cli._tour import tour


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour") / "new" / "folder"
    returned = tour(folder, quick=True, seed=0)
    assert returned == json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    return folder


@pytest.fixture(scope="module")
def record(out):
    return json.loads((out / "report.json").read_text())


def test_network_learns_the_digits(record):
    assert record["outcome"]["dense"]["accuracy"] >= 0.97
    assert record["outcome"]["dense"]["sparsity"] == 0.0


def test_eigenvalues_are_at_both_ends_and_converged(record):
    found = record["eigenvalues"]
    assert all(found["converged"])
    assert found["values"] == sorted(found["values"], reverse=True)
    assert found["values"][0] > 0 > found["values"][-1]
    assert max(found["residuals"]) <= 1e-4 * max(map(abs, found["values"]))


def test_layers_share_the_trace(record):
    rows = record["layers"]
    assert sum(row["trace"] for row in rows) == pytest.approx(record["trace"]["mean"], rel=1e-4)
    assert sum(row["share"] for row in rows) == pytest.approx(1, rel=1e-4)
    assert sum(row["parameters"] for row in rows) == 21546
    assert all(row["stderr"] > 0 and row["data_stderr"] > 0 for row in rows)
    assert record["trace"]["num_samples"] == 20


def test_density_agrees_with_trace_and_eigenvalues(record):
    nodes, weights = np.array(record["density"]["nodes"]), np.array(record["density"]["weights"])
    assert weights.sum() == pytest.approx(1, rel=1e-4)
    assert nodes.max() == pytest.approx(record["eigenvalues"]["values"][0], rel=1e-3)
    gap = abs(21546 * (nodes * weights).sum() - record["trace"]["mean"])
    # One probe's error is that of one Hutchinson sample.
    assert gap < 4 * record["trace"]["stderr"] * np.sqrt(record["trace"]["num_samples"] + 1)


def test_pruned_network_is_exactly_sparse_and_good(record):
    kernels = [row for row in record["summary"]["rows"] if len(row["shape"]) > 1]
    number = sum(row["number"] for row in kernels)
    zeros = number - sum(row["nonzeros"] for row in kernels)
    assert zeros == round(0.9 * number)
    tuned, at_once = (record["outcome"][name] for name in ("pruned while fine-tuning", "pruned at once"))
    assert tuned["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert at_once["sparsity"] == tuned["sparsity"]
    assert tuned["accuracy"] >= 0.95
    assert tuned["accuracy"] > at_once["accuracy"] + 0.1


def test_report_says_where_it_was_made(record):
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert (record["seed"], record["quick"], record["complete"]) == (0, True, True)
    assert {"training", "spectrum", "trace", "landscape", "pruning", "all"} == set(record["seconds"])


def test_figures_are_pictures(out, record):
    assert sorted(path.name for path in out.iterdir()) == sorted([*record["figures"], "report.json"])
    for name in record["figures"]:
        with Image.open(out / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("L").getcolors()) > 20


def test_force_removes_an_earlier_result_and_nothing_else(tmp_path):
    for name in ("report.json", "kept.png", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(_tour.EarlierResultError, match=r"with report.json, kept.png: `force` removes these"):
        _tour.make_room(tmp_path, False)
    assert len(list(tmp_path.iterdir())) == 3
    _tour.make_room(tmp_path, True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    _tour.make_room(tmp_path, False)  # what is not a result is in nobody's way


def test_parts_that_were_done_stay_when_the_next_one_is_interrupted(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    history = _tour.History([0], [_digits.Quality(1.0, 0.5, 0.0)], 0.25)
    monkeypatch.setattr(_tour, "train", lambda *_: ({}, history))
    monkeypatch.setattr(_tour, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tour(tmp_path, quick=True)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert (kept["complete"], kept["figures"], kept["seconds"]) == (False, [], {"training": 0.25})
    assert kept["training"]["quality"] == [{"loss": 1.0, "accuracy": 0.5, "sparsity": 0.0}]


def test_digits_are_split_once_and_for_all():
    first, second = _digits.load(), _digits.load()
    assert [len(part[1]) for part in first] == [1437, 360]
    jax.tree.map(np.testing.assert_array_equal, tuple(first), tuple(second))


def test_loss_of_the_tour_has_a_symmetric_hessian():
    params = _digits.NETWORK.init(jax.random.key(0), _digits.load().train[0][:1])["params"]
    batch = tuple(part[:8] for part in _digits.load().train)
    A = hj.hessian(_digits.loss_fn, params, batch)
    u, v = (
        jax.tree.map(lambda w, s=seed: jax.random.normal(jax.random.key(s), w.shape), params)
        for seed in (1, 2)
    )

    def inner(a, b):
        return sum(float((x * y).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    assert inner(u, A(v)) == pytest.approx(inner(v, A(u)), rel=1e-3)
