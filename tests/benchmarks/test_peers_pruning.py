"""Peers asked about pruning and about layers: what they are held against, and the tables of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers import (
    in_jax,
    problems,
    pruning,
    pruning_in_jax,
    questions,
    report,
    rows,
    sampling,
    summary,
    with_hessjax,
    with_jax,
)
from peers.problems import Problem


def to_prune():
    """A network of 66 weights with images of two kinds, as `digits_to_prune` has them."""
    rng = np.random.default_rng(0)
    y = np.arange(24) % 2
    x = (rng.normal(size=(24, 6)) + 3 * y[:, None] * np.eye(6)[0]).astype(np.float32)
    kernels = {f"net/0/{i}": rng.normal(size=s).astype(np.float32) for i, s in enumerate([(6, 9), (9, 2)])}
    data = {f"{name}/{what}": array for name in ("train", "test") for what, array in (("x", x), ("y", y))}
    options = {"sparsities": [0.5, 0.75], "grads": 8, "damping": 1e-2, "recomputes": 2}
    return Problem("digits to prune", options, {**kernels, **data}, [])


@pytest.mark.parametrize("rule", pruning.RULES)
def test_we_prune_to_what_is_asked_for_at_one_go(rule):
    problem = to_prune()
    line = pruning.pruned(problem, "hessjax", rule, [with_hessjax.one_shot(problem, rule, 0)])
    assert line["right"]
    assert [len(found) for found in line["accuracies"]] == [1, 1]


def test_woodfisher_by_the_recursion_is_ours():
    pruning_in_torch = pytest.importorskip(
        "peers.pruning_in_torch", reason="PyTorch is not installed", exc_type=ImportError
    )
    problem = to_prune()
    for rule in ("magnitude", "WoodFisher"):
        theirs, ours = (m.one_shot(problem, rule, 0)["kernels"] for m in (pruning_in_torch, with_hessjax))
        for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert pruning_in_torch.one_shot(problem, "OBS, joint", 0) == {"absent": "OBS, joint"}


def test_a_pruned_network_is_run_by_numpy():
    problem = to_prune()
    kernels = pruning.network(problem, 0, [x.ravel().tolist() for x in problem.part("net/0").values()])
    params = tuple(map(jnp.asarray, kernels))
    x, y = problem.arrays["test/x"], problem.arrays["test/y"]
    logits = jax.nn.relu(x @ params[0]) @ params[1]
    assert pruning.accuracy(problem, kernels) == pytest.approx(100 * np.mean(np.argmax(logits, 1) == y))
    failed = [{"failed": "no"}]
    assert pruning.pruned(problem, "torch", "magnitude", failed)["failed"] == "no"
    few = [{"kernels": [[[1.0] * 54, [0.0] * 18]] * 2}]
    assert not pruning.pruned(problem, "torch", "magnitude", few)["right"]


def test_masks_by_sorting_keep_the_largest():
    params = {"kernel": jnp.array([[3.0, -1.0], [0.5, -4.0]]), "bias": jnp.array([0.1, 0.2])}
    tx = with_jax.sorting(optax.sgd(0.0), 0.5, every=2)
    state = tx.init(params)
    assert with_jax.masked(params, state)["kernel"].tolist() == params["kernel"].tolist()
    _, state = tx.update(params, state, params)
    assert with_jax.masked(params, state)["kernel"].tolist() == [[3.0, 0.0], [0.0, -4.0]]
    _, state = tx.update(params, state, {**params, "kernel": jnp.zeros((2, 2))})  # at rest
    assert state.masks["kernel"].tolist() == [[1, 0], [0, 1]]
    assert state.masks["bias"].tolist() == [1, 1]


@pytest.fixture(scope="module")
def deep():
    """A trained perceptron of three layers, and the traces of their blocks of the Hessian."""
    problem = in_jax.trained_mlp((4, 4), steps=5)
    traces = in_jax.exact_traces(problem)
    kernels = [value for path, value in traces.items() if path.endswith("kernel")]
    return problem._replace(arrays={**problem.arrays, "truth/layers": np.array(kernels)}), traces


def test_traces_of_layers_are_held_against_the_exact_ones(deep):
    problem, traces = deep
    assert list(traces) == in_jax.paths(in_jax.load(problem).params)
    answer = with_hessjax.layer_traces(with_hessjax.load(problem), 0)
    judged = questions.judge_layers(answer, problem)
    assert judged["right"], (answer, judged)
    wrong = {"layers": [[2 * mean, error] for mean, error in answer["layers"]]}
    assert not questions.judge_layers(wrong, problem)["right"]
    loose = {"layers": [[mean, mean] for mean, _ in answer["layers"]]}
    assert not questions.judge_layers(loose, problem)["right"]


def test_a_step_with_masks_leaves_zeros(deep):
    network = in_jax.load(deep[0])
    for name in pruning.STEPS:
        with_hessjax.training_step(network, name)
        with_jax.training_step(network, name)
    for name in problems.EVERY:
        ours, sorted_ = (module.zeros(network, name)["zeros"] for module in (with_hessjax, with_jax))
        assert ours == pytest.approx(sorted_, abs=0.01)
        assert ours == pytest.approx(problems.SPARSITY, abs=0.01)
    for module in (pruning_in_jax, with_jax):
        module._KEPT.clear()


def test_samples_are_taken_until_they_agree():
    draws = iter(np.random.default_rng(0).normal(10, 5, size=1000).tolist())
    found = sampling.sampled(lambda: [next(draws)], 0.05)
    assert found["stderr"] <= 0.05 * found["mean"]
    assert 60 <= found["products"] <= 150
    assert sampling.sampled(lambda: [1.0, 3.0], np.inf, least=1) == {
        "mean": 2.0,
        "stderr": 1.0,
        "products": 2,
    }
    both = sampling.layer_by_layer([1.0, 2.0], lambda x: lambda: [x] * 20)
    assert both == {"layers": [[1.0, 0.0], [2.0, 0.0]], "products": 40}


class Asked:
    """Says how long things took, without doing them."""

    def __init__(self, **seconds):
        self.seconds = seconds

    def ask(self, task, name):
        if task == "zeros":
            return {"zeros": 0.9}
        more = {"weights": [100, 60], "norm": 1.0} if name == "size" else {}
        return {"seconds": self.seconds.get(name, 1.0), **more}


class Peers:
    def __init__(self, **workers):
        self.workers, self.usable, self.problems = workers, list(workers), {"jax": "jax is not installed"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_what_masks_add_is_told_in_each_ones_own_steps():
    group = Peers(
        hessjax=Asked(bare=1.0, between=1.1), torch=Asked(bare=2.0, between=3.0, **{"mask step": 4.0})
    )
    found = {(line["way"], line["peer"]): line for line in pruning.steps(group, "mlp", 3)}
    assert found["between", "torch"]["added"] == pytest.approx(0.5)
    assert found["between", "torch"]["ratio"] == pytest.approx(3 / 1.1)
    assert found["mask step", "hessjax"]["added"] == pytest.approx(0)
    assert "added" not in found["bare", "torch"]
    assert found["bare", "torch"]["ratio"] == 2


def test_a_cut_is_told_beside_the_whole(monkeypatch):
    group = Peers(hessjax=Asked(before=2.0, after=1.0), torch=Asked(before=3.0, after=3.0))
    monkeypatch.setattr(pruning, "Group", lambda *asked: group)
    missing, ours, theirs = pruning.compact(True, str)
    assert missing["failed"] == "jax is not installed"
    assert (ours["share"], theirs["share"], theirs["ratio"]) == (0.5, 1.0, 3.0)
    assert theirs["right"]
    assert ours["weights"] == [100, 60]


def found_rows():
    """One of each new kind, as they come back from the JSON."""
    missing = {"failed": "torch is not installed"}
    took, one = {"seconds": 1.0}, [1.0, 1.0]
    shot = rows.row(
        "one-shot: magnitude", "hessjax", "magnitude", took, accuracies=[[70.0, 72.0]], right=True
    )
    step = rows.row("mlp: mask step", "jax", "mask step", {**took, "note": "by hand"}, added=0.5)
    cut = rows.row("compact: after", "torch_pruning", "half", took, cut=0.1, share=0.5, weights=[1000, 600])
    traces = rows.row(
        "digits_in_deep_mlp: layer traces", "matfree", "one by one", took, error=0.01, right=True
    )
    sections = {
        "layer_traces": [rows.timed(traces, one, one)],
        "one_shot": [rows.timed(shot, one, one), rows.row("one-shot: magnitude", "torch", "", missing)],
        "training_step": [rows.row("mlp: bare step", "torch", "", missing), rows.timed(step, one, one)],
        "compact": [rows.timed(cut, one, one)],
    }
    return json.loads(json.dumps(sections))


def test_tables_of_pruning():
    machine = {"device": "CPU", "processor": "p", "python": "3", "date": "today", "versions": {"jax": "0"}}
    text = report.markdown({"sections": found_rows(), "quick": False, **machine})
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for words in ("71.0 ± 1.4", "+50 %", "by hand", "1,000 → 600", "torch-pruning", "torch is not installed"):
        assert words in text


def test_the_readme_names_those_by_hand_in_one_column():
    asked = "mlp: mask step"
    lines = [
        {"question": asked, "peer": "hessjax", "way": "", "later": 2.0},
        {"question": asked, "peer": "jax", "way": "", "later": 4.0},
        {"question": asked, "peer": "torch", "way": "", "later": 1.0},
    ]
    *_, line = summary.markdown({"sections": {"training_step": lines}}).split("\n")
    assert line.split("|")[-2].strip() == "PyTorch by hand **0.5**, JAX by hand 2"
    assert len(summary.QUESTIONS) <= 14
