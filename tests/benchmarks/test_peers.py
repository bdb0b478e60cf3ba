"""The peers: problems that go through a file, rows, tables, and peers that are missing, wrong or slow."""

import json
import sys

import numpy as np
import pytest
from peers import asking, in_jax, problems, questions, report, rows, summary, with_hessjax, worker
from peers.problems import Problem


@pytest.fixture(scope="module")
def network():
    """A trained perceptron of 310 weights with all that is known of it."""
    problem = in_jax.trained_mlp((4,), steps=5)
    spectrum = in_jax.all_eigenvalues(problem)
    truth = {"truth/spectrum": spectrum, "truth/top": spectrum[::-1][:20], "truth/trace": spectrum.sum()}
    arrays = {**problem.arrays, **{name: np.asarray(value) for name, value in truth.items()}}
    return problem._replace(arrays=arrays, cuts=[900])


def test_a_problem_goes_through_a_file(network, tmp_path):
    problems.write(tmp_path / "problem.npz", network)
    back = problems.read(tmp_path / "problem.npz")
    assert (back.kind, back.options["widths"], back.cuts) == ("MLP", [4], [900])
    assert all(np.array_equal(back.arrays[name], array) for name, array in network.arrays.items())
    assert [len(labels) for _, labels in back.batches()] == [900, 897]
    assert in_jax.loss(in_jax.load(back)) == in_jax.loss(in_jax.load(network))


def test_the_trace_of_a_network_of_relus_is_its_gauss_newton_matrix_s(network):
    assert in_jax.exact_trace(network) == pytest.approx(network.arrays["truth/trace"], rel=1e-4)
    assert in_jax.largest_eigenvalues(network, 3) == pytest.approx(network.arrays["truth/top"][:3], rel=1e-9)


@pytest.mark.parametrize("cuts", [[], [1000]], ids=["one batch", "ragged"])
def test_what_we_answer_is_right(network, cuts):
    problem = network._replace(cuts=cuts)
    ours = with_hessjax.load(problem)
    assert questions.judge_top(with_hessjax.top(ours, 0, k=3), problem)["right"]
    assert questions.judge_trace(with_hessjax.trace(ours, 0), problem)["right"]
    assert questions.judge_density(with_hessjax.density(ours, 2, probes=3), problem)["error"] < 0.02


def test_the_twins_in_torch_have_the_same_loss(network):
    in_torch = pytest.importorskip("peers.in_torch", reason="PyTorch is not installed", exc_type=ImportError)
    assert in_torch.loss(in_torch.load(network)) == pytest.approx(in_jax.loss(in_jax.load(network)), abs=1e-5)


def test_a_peer_that_is_not_installed_says_so(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree", None)
    monkeypatch.delitem(sys.modules, "peers.with_matfree", raising=False)
    hello, *_ = worker.loaded("matfree", network)
    assert hello == {"missing": "matfree"}


class Module:
    """A peer that can do a little."""

    @staticmethod
    def top(network, way, k):
        return {"values": [network] * k}

    @staticmethod
    def trace(network, way):
        raise ValueError("no\nmore")


def test_a_worker_tells_what_it_cannot_do():
    assert worker.attempt(Module, 2.0, "density", {}) == {"absent": "density"}
    assert worker.attempt(Module, 2.0, "trace", {"way": 0}) == {"failed": "ValueError: no"}
    answer = worker.attempt(Module, 2.0, "top", {"way": 0, "k": 2})
    assert answer["values"] == [2.0, 2.0]
    assert answer["seconds"] >= 0


def test_a_loss_that_differs_or_a_missing_peer_is_trouble():
    class Said:
        def __init__(self, **hello):
            self.hello = hello

    ours = Said(loss=1.0)
    assert asking._trouble(Said(loss=1.000001), ours) is None
    assert "1.1" in asking._trouble(Said(loss=1.1), ours)
    assert asking._trouble(Said(missing="torch"), ours) == "torch is not installed"


class Peer:
    """Answers by the way it is asked; the time is told, not taken."""

    def __init__(self, *values):
        self.values, self.asked = values, []

    def ask(self, task, way, **given):
        self.asked.append(way)
        value = self.values[way]
        return {"failed": "no"} if value is None else {"values": [value], "seconds": 1.0 + way, "products": 7}


class Group:
    def __init__(self, **workers):
        self.workers, self.usable = workers, list(workers)

    def ways(self, name, task):
        return [f"way {i}" for i in range(len(self.workers[name].values))]


def test_peers_are_asked_until_they_are_right():
    group = Group(hessjax=Peer(1.0), slow=Peer(2.0, 3.0, 1.0, 1.0), broken=Peer(None, 1.0))

    def judge(said):
        return {"right": said["values"] == [1.0]}

    found = list(questions.answer(group, "net: top-5", "top", {}, judge, 2))
    assert [(line["peer"], line["way"]) for line in found] == [
        ("hessjax", "way 0"),
        ("slow", "way 0"),
        ("slow", "way 2"),
        ("broken", "way 0"),
    ]
    assert [line.get("right") for line in found] == [True, False, True, None]
    assert [line.get("ratio") for line in found] == [1.0, 1.0, 3.0, None]
    assert group.workers["slow"].asked == [0, 1, 2, 0, 2, 0, 2]


def test_a_wide_spread_marks_the_row_as_busy():
    line = rows.row("q", "matfree", "way", {"seconds": 5.0})
    assert not rows.timed(line, [1.0, 1.1, 1.2], [1.0, 1.0, 1.0])["busy"]
    busy = rows.timed(line, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert busy["busy"]
    assert busy["ratio"] == 2.0


def test_distance_and_coverage():
    spectrum = np.array([0.0, 1.0, 4.0])
    assert rows.wasserstein(spectrum, [2.0, 2.0, 2.0], spectrum) == pytest.approx(0)
    assert rows.wasserstein([1.0, 2.0, 5.0], [1.0, 1.0, 1.0], spectrum) == pytest.approx(0.25)
    assert rows.coverage([0.0, 1.0, 2.0, 3.0], [0.4, 0.4, 0.4, 0.6], 1.0) == 0.25


def result():
    """One of every kind of row, as it comes back from the JSON."""
    failed = {"failed": "torch is not installed"}
    answered = rows.row("digits_in_mlp: top-5", "hessjax", "default", {"seconds": 1.0, "products": 25})
    wrong = {
        **rows.row("digits_in_mlp: top-5", "matfree", "way", {"seconds": 2.0}),
        "right": False,
        "error": 0.1,
    }
    product = rows.row("mlp: Hessian", "hessjax", "Hessian", {"seconds": 1.0})
    fails = rows.row("mlp: Hessian", "curvlinops", "Hessian", {"failed": "no|way"})
    estimate = rows.row("flat, 120 products", "hessjax", "XTrace", {}, error=0.1, coverage=0.95)
    sections = {
        "answers": [
            rows.row("digits_in_mlp: top-5", "pyhessian", "", failed),
            rows.timed(answered, [0.1, 0.1], [0.1, 0.1]),
            rows.timed(wrong, [0.2, 0.2], [0.1, 0.1]),
        ],
        "products": [
            rows.row("mlp: product", "torch", "", failed),
            rows.timed(product, [0.1], [0.1]),
            fails,
        ],
        "estimates": [estimate, rows.row("spectra: estimate", "curvlinops", "", failed)],
        "inverse_fisher": [rows.row("inverse Fisher", "torch", "", failed)],
        "start": [rows.timed(rows.row("start: first", "hessjax", "fresh", {"seconds": 3.0}), [3.0], [3.0])],
    }
    machine = {"device": "CPU", "processor": "p", "python": "3", "date": "today", "versions": {"jax": "0"}}
    return json.loads(json.dumps({"sections": sections, "quick": False, **machine}))


def test_every_row_is_in_a_table_of_even_width():
    text = report.markdown(result())
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    for words in ("torch is not installed", "**not right**", "100 ms", "0.1 (95 %)", "no\\|way", "fails"):
        assert words in text.replace("no|way", "no\\|way")


def test_a_figure_is_drawn_also_of_nothing(tmp_path):
    report.draw(result(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
    report.draw({"sections": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_kinds_of_problems_are_known_to_both_sides():
    assert set(in_jax.OPTIONS) == set(in_jax.MODULES)
    assert Problem("MLP", {}, {"params/a/b": np.ones(1)}, []).tree("params") == {"a": {"b": np.ones(1)}}


class Multiplier:
    """Gives the same product as ours, another one, or none."""

    def __init__(self, norm):
        self.norm = norm

    def ask(self, task, name):
        return {"absent": name} if self.norm is None else {"norm": self.norm, "along": 1.0, "seconds": 1.0}


def test_a_product_that_is_not_ours_is_marked():
    group = Group(
        hessjax=Multiplier(2.0), same=Multiplier(2.0001), other=Multiplier(2.1), none=Multiplier(None)
    )
    found = {line["peer"]: line for line in questions.product(group, "mlp: Hessian", "Hessian", 3)}
    assert {peer: line["right"] for peer, line in found.items()} == {
        "hessjax": True,
        "same": True,
        "other": False,
    }
    assert found["other"]["ratio"] == 1.0


def test_estimates_count_what_their_errors_hold():
    said = {"means": [1.0, 1.1], "errors": [0.01, 0.01]}
    assert questions.estimated("q", "matfree", "XTrace", said, 1.0)["coverage"] == 0.5
    assert questions.estimated("q", "curvlinops", "XTrace", {**said, "errors": None}, 1.0)["coverage"] is None
    assert questions.estimated("q", "matfree", "XTrace", {"failed": "no"}, 1.0)["failed"] == "no"


def test_the_readme_has_the_fastest_right_answers():
    asked = "digits_in_mlp: top-10"
    lines = [
        {"question": asked, "peer": "hessjax", "way": "", "later": 2.0, "right": True},
        {"question": asked, "peer": "matfree", "way": "", "later": 1.0, "right": False},
        {"question": asked, "peer": "matfree", "way": "", "later": 5.0, "right": True},
        {"question": asked, "peer": "pyhessian", "way": "", "later": 1.0, "right": False, "error": 0.1},
        {"question": asked, "peer": "curvlinops", "way": "", "first": 1.0},
    ]
    *_, line = summary.markdown({"sections": {"answers": lines}}).split("\n")
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["off by 10 %", "**0.5**", "", "2.5", "", ""]
