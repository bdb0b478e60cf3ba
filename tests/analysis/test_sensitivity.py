"""One leaf at a time: against pruning by hand and the quadratic it predicts from, and its file."""

import csv
import dataclasses
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from oracles import CONTAINERS, leaves

import hessjax as hj

LEVELS = (0.0, 0.25, 0.5)


def network(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (3,), "one": (4, 6), "two": (6, 3)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


CENTRE, CURVATURE = network(1), jax.tree.map(jnp.abs, network(2))


def loss_fn(params):
    """A quadratic with its least value 3 at the centre and a diagonal Hessian."""
    parts = jax.tree.map(lambda h, w, c: jnp.sum(h * (w - c) ** 2) / 2, CURVATURE, params, CENTRE)
    return 3.0 + sum(jax.tree.leaves(parts))


def metrics(params):
    return {"loss": loss_fn(params), "zeros": sum(jnp.sum(x == 0) for x in jax.tree.leaves(params))}


class Counting:
    """A metric that knows how often it was called."""

    def __init__(self, metric):
        self.metric, self.calls = metric, 0

    def __call__(self, params):
        self.calls += 1
        return self.metric(params)


# -- numbers ---------------------------------------------------------------------------------------


def test_rows_are_pruning_by_hand():
    result = hj.sensitivity(metrics, CENTRE, LEVELS)
    want = [(name, level) for name in ("one", "two") for level in LEVELS]
    assert [(row.parameter, row.sparsity) for row in result.rows] == want
    for row in result.rows:
        flat = np.asarray(CENTRE[row.parameter]).ravel().copy()
        flat[np.argsort(np.abs(flat))[: round(row.sparsity * flat.size)]] = 0
        by_hand = metrics({**CENTRE, row.parameter: flat.reshape(CENTRE[row.parameter].shape)})
        assert row.metrics == {k: float(v) for k, v in by_hand.items()}
        assert row.predicted is None


def test_a_diagonal_predicts_a_diagonal_quadratic(x64):
    params, curvature = network(1, jnp.float64), jax.tree.map(jnp.abs, network(2, jnp.float64))

    def exact(p):
        return sum(
            jnp.sum(h * (w - c) ** 2) / 2
            for h, w, c in zip(*map(jax.tree.leaves, (curvature, p, params)), strict=True)
        )

    for saliency in (hj.saliencies.magnitude(), hj.saliencies.obd()):
        grads = jax.tree.map(lambda h: jnp.sqrt(h)[None], curvature)
        result = hj.sensitivity(exact, params, LEVELS, saliency, grads_fn=lambda p: grads, diagonal=curvature)  # noqa: B023
        for row in result.rows:
            np.testing.assert_allclose(row.predicted, row.metrics["metric"], rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "rows", "damping"),
    [
        (hj.saliencies.obs(damping=1e-3), np.random.default_rng(5).normal(size=(60, 24)), 1e-3),
        (hj.saliencies.obd(), 3 * np.eye(24), 0.0),
    ],
    ids=["obs", "obd"],
)
def test_a_saliency_predicts_what_it_does_to_its_own_quadratic(x64, rule, rows, damping):
    """The loss is ½ δᵀ(F + λI)δ with the Fisher of the gradients: realised and predicted increase are one."""
    params = {"one": network(1, jnp.float64)["one"]}
    grads = {"one": jnp.asarray(rows.reshape(-1, 4, 6))}
    F = rows.T @ rows / len(rows) + damping * np.eye(24)

    def exact(p):
        move = (p["one"] - params["one"]).ravel()
        return {"loss": move @ F @ move / 2}

    result = hj.sensitivity(exact, params, [0.0, 0.3, 0.7], rule, grads_fn=lambda p: grads)
    for row in result.rows:
        np.testing.assert_allclose(row.predicted, row.metrics["loss"], rtol=1e-8, atol=1e-12)


def test_without_a_metric_it_only_predicts():
    grads = jax.tree.map(lambda x: x[None], CENTRE)
    asked = Counting(lambda p: grads)
    result = hj.sensitivity(None, CENTRE, (0.5, 0.25), hj.saliencies.obd(), grads_fn=asked, where="two")
    assert asked.calls == 1
    assert [row.sparsity for row in result.rows] == [0.5, 0.25]
    assert result.rows[0].metrics == {}
    assert result.rows[0].predicted > result.rows[1].predicted > 0


def test_whole_filters_go_by_pattern():
    lost = lambda p: {name: jnp.sum(jnp.all(p[name] == 0, axis=0)) for name in ("one", "two")}
    result = hj.sensitivity(lost, CENTRE, [0.34, 0.5], pattern=hj.patterns.filters())
    assert [tuple(row.metrics.values()) for row in result.rows] == [(2, 0), (3, 0), (0, 1), (0, 1)]
    mixed = hj.sensitivity(
        lost, CENTRE, [0.5], pattern={"two": hj.patterns.unstructured(), "*": hj.patterns.filters()}
    )
    assert [tuple(row.metrics.values()) for row in mixed.rows] == [(3, 0), (0, 0)]
    with pytest.raises(ValueError, match=r"n_of_m\(2, 4.*\) does not fit two of shape \(6, 3\)"):
        hj.sensitivity(lost, CENTRE, [0.5], pattern=hj.patterns.n_of_m(2, 4))


def test_the_dense_network_is_measured_once():
    metric = Counting(loss_fn)
    result = hj.sensitivity(metric, CENTRE, LEVELS)
    assert metric.calls == 1 + 2 * 2
    assert result.rows[0].metrics == result.rows[3].metrics == {"metric": float(loss_fn(CENTRE))}


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
def test_any_container(wrap):
    params = wrap(leaves())
    result = hj.sensitivity(lambda p: sum(jnp.sum(x == 0) for x in jax.tree.leaves(p)), params, [0.5])
    assert [row.metrics["metric"] for row in result.rows] == [3]


def test_nothing_compiles_for_other_params(compilations):
    hj.sensitivity(loss_fn, network(3), LEVELS, diagonal=CURVATURE)
    del compilations[:]
    hj.sensitivity(loss_fn, network(4), LEVELS, diagonal=CURVATURE)
    assert not compilations


# -- leaves that go together -------------------------------------------------------------------------


def attention(seed, heads=4, kv=4, stack=(), is_fused=False):
    """Query, key, value and output, and the biases of value and output."""
    rng = np.random.default_rng(seed)
    shapes = {name: (8, n, 2) for name, n in {"query": heads, "key": kv, "value": kv}.items()}
    shapes = {**shapes, "out": (heads, 2, 8)}
    if is_fused:
        shapes = {name: (8, s[1] * 2) if name != "out" else (heads * 2, 8) for name, s in shapes.items()}
    found = {n: {"kernel": jnp.asarray(rng.normal(size=stack + s), "float32")} for n, s in shapes.items()}
    for name, shape in (("value", shapes["value"][1:]), ("out", (8,))):
        found[name]["bias"] = jnp.asarray(rng.normal(size=stack + shape), "float32")
    return found


ATTENTIONS = {
    "split": (hj.patterns.heads(), {}),
    "fused": (hj.patterns.heads(4), {"is_fused": True}),
    "grouped": (hj.patterns.heads(4, num_kv_heads=2), {"kv": 2}),
    "grouped and fused": (hj.patterns.heads(4, 2), {"kv": 2, "is_fused": True}),
    "stacked": (hj.patterns.heads(), {"stack": (3,)}),
}


@pytest.mark.parametrize(("pattern", "options"), ATTENTIONS.values(), ids=ATTENTIONS)
def test_heads_go_from_all_leaves_of_an_attention(pattern, options, tmp_path):
    """One question for every attention, pruned as `prune_once` prunes it alone."""
    params = {"blocks": [{"attn": attention(i, **options), "mlp": jnp.ones((2, 3))} for i in (0, 1)]}
    diagonal = jax.tree.map(lambda x: x**2 + 0.1, params)
    seen = []

    def metric(p):
        seen.append(p)
        return {"zeros": sum(jnp.sum(x == 0) for x in jax.tree.leaves(p))}

    call = lambda levels=(0.0, 0.5), where="*/attn/*": hj.sensitivity(
        metric, params, levels, pattern=pattern, where=where, diagonal=diagonal, path=tmp_path / "s.csv"
    )
    result = call()
    assert [row.parameter for row in result.rows] == ["blocks/0/attn"] * 2 + ["blocks/1/attn"] * 2
    assert len(seen) == 3
    by_hand = hj.prune_once(
        params,
        hj.saliencies.magnitude(),
        0.5,
        pattern=pattern,
        where="blocks/0/attn/*",
        allocation=hj.allocations.uniform(),
    ).params
    jax.tree.map(np.testing.assert_array_equal, seen[1], by_hand)
    change = jax.tree.map(lambda h, a, b: jnp.sum(h * (a - b) ** 2) / 2, diagonal, params, by_hand)
    np.testing.assert_allclose(result.rows[1].predicted, sum(jax.tree.leaves(change)), rtol=1e-5)
    # The file goes on, with leaves of one attention only, and with other levels; of other leaves it does not.
    assert call(where="blocks/1/attn/*").rows == result.rows[2:]
    assert len(seen) == 3
    assert len(call((0.25, 0.5)).rows) == 4
    with pytest.raises(ValueError, match="pattern blocks/1/attn: saved heads.* of blocks/1/attn/key/kernel,"):
        call(where="blocks/1/attn/*/kernel")
    axes = hj.plot.sensitivity(result)
    assert sorted(text.get_text() for text in axes.get_legend().get_texts()) == [
        "blocks/0/attn",
        "blocks/1/attn",
    ]


def test_an_attention_at_the_root_and_one_whose_output_is_outside():
    ask = lambda params, **options: hj.sensitivity(
        lambda p: p["x"].sum(), {**params, "x": jnp.ones(1)}, [0.5], pattern=hj.patterns.heads(), **options
    )
    leaves = {name: {"kernel": x["kernel"]} for name, x in attention(0).items()}
    assert ask(leaves).rows[0].parameter == "."
    bert = {"self": {n: leaves[n] for n in ("query", "key", "value")}, "output": {"dense": leaves["out"]}}
    assert [row.parameter for row in ask({"attention": bert}).rows] == ["attention"]
    # What is selected alone goes by its own name; what has no heads is not asked about.
    assert [row.parameter for row in ask(leaves, where="query/*").rows] == ["query/kernel"]
    with pytest.raises(ValueError, match="`pattern` must let something go, but out/bias stay"):
        ask(attention(0), where="out/bias")


@dataclasses.dataclass(frozen=True)
class Rows(hj.patterns.Pattern):
    """Rows that go together in leaves of one name."""

    called: str

    @property
    def tie(self):
        return self.called

    def group(self, leaf):
        return leaf

    def ungroup(self, rows, shape):
        return rows


def test_two_ties_in_one_module_are_told_apart():
    params = {
        name: jnp.arange(1.0, 9.0).reshape(4, 2) + i for i, name in enumerate(("a", "b", "c", "d", "e"))
    }
    ties = {"[ac]": Rows("one"), "[bd]": Rows("two"), "e": hj.patterns.unstructured()}
    zeros = lambda p: {name: jnp.sum(x == 0) for name, x in p.items()}
    result = hj.sensitivity(zeros, params, [0.5], pattern=ties)
    assert [(row.parameter, tuple(row.metrics.values())) for row in result.rows] == [
        ("a + c", (4, 0, 4, 0, 0)),
        ("b + d", (0, 4, 0, 4, 0)),
        ("e", (0, 0, 0, 0, 4)),
    ]


# -- layers that one leaf stacks -----------------------------------------------------------------------


def test_rows_by_layer_are_those_of_layers_alone():
    rng = np.random.default_rng(0)
    kernel, bias = (jnp.asarray(rng.normal(size=s), "float32") for s in ((3, 4, 6), (3, 6)))
    params = {"blocks": {"kernel": kernel, "bias": bias}, "out": {"kernel": kernel[0], "bias": bias[0]}}
    apart = {str(i): {"kernel": kernel[i], "bias": bias[i]} for i in range(3)}
    size = lambda p: {"size": sum(jnp.sum(x**2) for x in jax.tree.leaves(p))}
    ask = lambda params, **options: hj.sensitivity(
        lambda p: size(p), params, [0.0, 0.5], diagonal=jax.tree.map(jnp.abs, params), **options
    )
    for pattern in (hj.patterns.unstructured(), hj.patterns.filters()):
        result, alone = ask(params, by_layer=True, pattern=pattern), ask(apart, pattern=pattern)
        assert [row.parameter for row in result.rows[::2]] == [
            *(f"blocks/kernel[{i}]" for i in range(3)),
            "out/kernel",
        ]
        for mine, other in zip(result.rows[:6], alone.rows, strict=True):
            np.testing.assert_allclose(mine.predicted, other.predicted, rtol=1e-6)
        loss = [row.metrics["size"] for row in result.rows]
        want = [row.metrics["size"] for row in alone.rows]
        np.testing.assert_allclose(np.diff(loss)[:6:2], np.diff(want)[::2], rtol=1e-4)
    with pytest.raises(ValueError, match=r"`by_layer=True` must go with .* got obs\("):
        hj.sensitivity(size, params, [0.5], hj.saliencies.obs(), by_layer=True)


def test_rows_by_layer_of_heads():
    params = {"attn": attention(0, stack=(2,))}
    seen = []
    result = hj.sensitivity(
        lambda p: float(len(seen.append(p) or seen)),
        params,
        [0.5],
        pattern=hj.patterns.heads(),
        where="*/kernel",
        by_layer=True,
    )
    assert [row.parameter for row in result.rows] == ["attn[0]", "attn[1]"]
    both = hj.sensitivity(
        lambda p: float(len(seen.append(p) or seen)),
        params,
        [0.5],
        pattern=hj.patterns.heads(),
        where="*/kernel",
    )
    assert [row.parameter for row in both.rows] == ["attn"]
    for layer in (0, 1):
        for after, whole, dense in zip(*map(jax.tree.leaves, (seen[layer], seen[2], params)), strict=True):
            np.testing.assert_array_equal(after[layer], whole[layer])
            np.testing.assert_array_equal(after[1 - layer], dense[1 - layer])


# -- what one sees of it ---------------------------------------------------------------------------


def test_table():
    result = hj.sensitivity(metrics, CENTRE, LEVELS, diagonal=CURVATURE)
    lines = str(result).splitlines()
    assert lines[0].split() == ["parameter", "sparsity", "loss", "zeros", "predicted", "rise"]
    assert [line.split()[0] for line in lines[1:]] == ["one", "0.25", "0.5", "two", "0.25", "0.5"]
    out = io.StringIO()
    rich.console.Console(file=out, force_terminal=True, width=100).print(result)
    assert "\x1b[1m" in out.getvalue()


def test_names_are_shown_as_they_are():
    params = {"w[a]": jnp.ones((2, 2)), "x[/a]": jnp.ones((2, 2))}
    text = str(hj.sensitivity(lambda p: {"loss[b]": 1.0}, params, [0.5]))
    assert all(name in text for name in ("w[a]", "x[/a]", "loss[b]"))


def test_callbacks_hear_of_every_evaluation():
    seen = []
    hj.sensitivity(loss_fn, CENTRE, LEVELS, callbacks=[seen.append])
    assert [(p.num_matvecs, p.max_matvecs, p.done) for p in seen] == [(i, 6, i == 6) for i in range(1, 7)]


def test_the_progress_bar_counts_evaluations(capsys):
    hj.sensitivity(loss_fn, CENTRE, LEVELS, callbacks=[hj.progress_bar("leaves", unit="evaluations")])
    assert re.search(r"leaves .*6/6 evaluations", capsys.readouterr().out)


# -- the file --------------------------------------------------------------------------------------


def test_the_file_has_distillers_shape_and_full_precision(tmp_path):
    result = hj.sensitivity(metrics, CENTRE, [0.1 + 0.2, 0.5], path=tmp_path / "s.csv")
    result.to_csv(tmp_path / "again.csv")
    text = (tmp_path / "s.csv").read_text()
    assert text == (tmp_path / "again.csv").read_text()
    assert text.splitlines()[0] == "parameter,sparsity,loss,zeros"
    assert text.splitlines()[1] == f"one,0.3,{result.rows[0].metrics['loss']!r},7.0"


def test_it_goes_on_where_it_was_cut_off(tmp_path):
    file = tmp_path / "s.csv"
    whole = hj.sensitivity(metrics, CENTRE, LEVELS, diagonal=CURVATURE, path=file)
    text = file.read_text()
    for cut in (0, 5, 40, len(text) // 2, len(text) - 3, len(text)):
        file.write_text(text[:cut])
        metric = Counting(metrics)
        again = hj.sensitivity(metric, CENTRE, LEVELS, diagonal=CURVATURE, path=file)
        assert again == whole
        assert file.read_text() == text
        assert metric.calls <= 5
    assert metric.calls == 0


def test_more_levels_and_leaves_are_added_to_it(tmp_path):
    file = tmp_path / "s.csv"
    hj.sensitivity(metrics, CENTRE, [0.5, 0.75], where="one", path=file)
    metric = Counting(lambda p: dict(reversed(metrics(p).items())))
    more = hj.sensitivity(metric, CENTRE, LEVELS, path=file)
    assert metric.calls == 1 + 3  # level 0, and one, two at 0.25, two at 0.5
    assert len(more.rows) == 6
    assert len(file.read_text().splitlines()) == 1 + 7
    assert more == hj.sensitivity(metrics, CENTRE, LEVELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,level,loss,zeros\n", r"in line 1 of `.*` the columns must be `parameter,sparsity,<metrics>`"),
        ("a diary", "in line 1 .* got `a diary`"),
        ("a diary\nof two lines", "in line 1 .* got `a diary`"),
        ("parameter,sparsity,loss,zeros,predicted\none,0.5,1,2,3\n", "in line 1 .*predicted"),
        ("param", "in line 1 .* got `param`"),
        ("parameter,sparsity,loss", "in line 1 .* got `parameter,sparsity,loss`"),
        (
            "parameter,sparsity,loss,zeros\n",
            "there is no record of the params that .*: `s.csv.json` is missing",
        ),
        ("parameter,sparsity,loss,zeros\none,0.5,1,2\n", "there is no record of the params"),
        ("parameter,sparsity,loss,zeros\none,0.5,1,2\none,0.5,1,2\n", "in line 3 .* repeats that of line 2"),
        (
            "parameter,sparsity,loss,zeros\none,.5,1,2\none,0.50,1,3\n",
            "in line 3 .* contradicts that of line 2",
        ),
        ("parameter,sparsity,loss,zeros\none,7,1,2\n", r"in line 2 .* must be in \[0, 1\), got 7"),
        ("parameter,sparsity,loss,zeros\none,-0.5,1,2\n", r"in line 2 .* must be in \[0, 1\), got -0.5"),
        ("parameter,sparsity,loss,zeros\none,nan,1,2\n", r"in line 2 .* must be in \[0, 1\), got nan"),
        ("parameter,sparsity,loss,zeros\none,0.5,nan,2\n", "in line 2 .* must be a number, got nan"),
        (
            "parameter,sparsity,loss,loss\none,0.5,1,2\n",
            "in line 1 .* two columns are called the same: loss, l",
        ),
        ("\ufeffparameter,sparsity,loss,zeros\none,0.5,1,2\n", "in line 1 .* the columns must be"),
        ('parameter,sparsity,loss,zeros\n"one"x,0.5,1,2\n', "in line 2 .* there must be CSV"),
        ("parameter,sparsity,loss,zeros\none,0.5,1,2\nthree,0.5,1,2\n", "in line 3 .* got `three`"),
        ("parameter,sparsity,loss,zeros\none,0.5,1\n", "in line 2 .* must be 4 columns.* got 3"),
        ("parameter,sparsity,loss,zeros\none,0.5,1,x\n", "in line 2 .* must be a number: .*'x'"),
    ],
)
def test_another_file_is_left_as_it_is(tmp_path, text, message):
    file = tmp_path / "s.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        hj.sensitivity(metrics, CENTRE, LEVELS, path=file)
    assert file.read_text() == text


def test_other_metrics_are_left_alone(tmp_path):
    file = tmp_path / "s.csv"
    hj.sensitivity(lambda p: {"loss": loss_fn(p)}, CENTRE, [0.5], where="one", path=file)
    text = file.read_text()
    with pytest.raises(ValueError, match="in line 1 .* the metrics are loss, and .* loss, zeros"):
        hj.sensitivity(metrics, CENTRE, LEVELS, path=file)
    assert file.read_text() == text


KEY = jax.random.key(0)
OTHERS = {
    "params one: saved float32": {"params": {**CENTRE, "one": 3 * CENTRE["one"]}},
    "params bias: saved float32": {"params": {**CENTRE, "bias": CENTRE["bias"].at[0].add(1e-6)}},
    r"params two: saved float32\[6, 3\] .*, now bfloat16": {
        "params": {**CENTRE, "two": CENTRE["two"].astype(jnp.bfloat16)}
    },
    r"pattern one: saved unstructured\(\), now filters": {"pattern": hj.patterns.filters()},
    r"saliency: saved Magnitude\(.*now Random": {"saliency": hj.saliencies.random(KEY)},
    "diagonal one: saved": {"diagonal": CENTRE},
}


@pytest.mark.parametrize(("message", "change"), OTHERS.items(), ids=OTHERS)
def test_a_table_of_other_params_or_settings_is_refused(tmp_path, message, change):
    file = tmp_path / "s.csv"
    wide_loss = lambda p: loss_fn(jax.tree.map(lambda x: x.astype(jnp.float32), p))
    arguments = {"params": CENTRE, "diagonal": CURVATURE, "path": file}
    whole = hj.sensitivity(wide_loss, levels=[0.5], **arguments)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"(?s)must be a file of these params and settings, but.*{message}"):
        hj.sensitivity(wide_loss, levels=[0.5, 0.75], **{**arguments, **change})
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert whole == hj.sensitivity(wide_loss, levels=[0.5], **arguments)
    file.unlink()  # deleting the table is enough
    fresh = {
        "saliency": hj.saliencies.magnitude(),
        "pattern": hj.patterns.unstructured(),
        **arguments,
        **change,
    }
    del fresh["path"]
    assert hj.sensitivity(wide_loss, levels=[0.5], path=file, **fresh) == hj.sensitivity(
        wide_loss, levels=[0.5], **fresh
    )


def test_another_key_of_the_saliency_is_refused(tmp_path):
    call = lambda seed: hj.sensitivity(
        loss_fn, CENTRE, [0.5], hj.saliencies.random(jax.random.key(seed)), path=tmp_path / "s.csv"
    )
    assert call(0) == call(0)
    with pytest.raises(ValueError, match="saliency key: saved uint32"):
        call(1)


NAMES = [
    "=1+1",
    "+a",
    "-b",
    "@c",
    "'q",
    "''",
    "a,b",
    'a"b',
    "a\nb",
    "a\r\nb",
    "\tx",
    "ü☃",
    "x y",
    "#",
    "1",
    "-1",
]


def test_any_name_reads_back_and_nothing_is_computed(tmp_path):
    params = {name: jnp.ones((2, 2)) for name in NAMES}
    call = lambda p: {f"={name}": -1.0 - i - jnp.sum(p[name]) for i, name in enumerate(NAMES)}
    file = tmp_path / "s.csv"
    whole = hj.sensitivity(call, params, [0.5], path=file)
    whole.to_csv(tmp_path / "again.csv")
    content = file.read_bytes()
    assert (tmp_path / "again.csv").read_bytes() == content
    counting = Counting(call)
    assert hj.sensitivity(counting, params, [0.5], path=file) == whole
    assert counting.calls == 0
    with file.open(newline="") as opened:
        cells = [cell for line in csv.reader(opened) for cell in line]
    computed = [cell for cell in cells if cell.startswith(tuple("=+-@"))]
    assert {float(cell) for cell in computed} == {x for row in whole.rows for x in row.metrics.values()}
    for cut in range(len(content) - 300, len(content), 17):  # also within a name of two lines
        file.write_bytes(content[:cut])
        assert hj.sensitivity(call, params, [0.5], path=file) == whole
        assert file.read_bytes() == content


def test_one_process_at_a_time_and_paths(tmp_path, monkeypatch):
    file = tmp_path / "s.csv"
    with pytest.raises(BlockingIOError, match="`path` of `sensitivity` must be used by one run at a time"):
        hj.sensitivity(
            lambda p: hj.sensitivity(loss_fn, CENTRE, [0.5], path=file) and 0.0, CENTRE, [0.5], path=file
        )
    for path, message in (("", "an empty string"), ("gs://b/s.csv", "the URL")):
        for call in (lambda p: hj.sensitivity(loss_fn, CENTRE, [0.5], path=p),
                     hj.sensitivity(loss_fn, CENTRE, [0.5]).to_csv):  # fmt: skip
            with pytest.raises(ValueError, match=f"`path` must .*{message}"):
                call(path)
    with pytest.raises(OSError, match="`path` must be a file in a folder to write to, got"):
        hj.sensitivity(loss_fn, CENTRE, [0.5], path=tmp_path / "none" / "s.csv")
    monkeypatch.setenv("HOME", str(tmp_path))
    hj.sensitivity(loss_fn, CENTRE, [0.5], path="~/t.csv").to_csv("~/u.csv")
    assert {p.name for p in tmp_path.iterdir()} == {"s.csv.json", "t.csv", "t.csv.json", "u.csv"}


# -- bad input -------------------------------------------------------------------------------------


def test_a_nan_names_leaf_and_level_and_keeps_the_rows_before_it(tmp_path):
    file = tmp_path / "s.csv"

    def breaks(params):
        return {"loss": jnp.where(jnp.sum(params["two"] == 0) > 8, jnp.nan, loss_fn(params))}

    message = "got NaN for `loss` with `two` pruned to sparsity 0.5.*rows before it are in"
    with pytest.raises(FloatingPointError, match=message):
        hj.sensitivity(breaks, CENTRE, LEVELS, path=file)
    assert len(file.read_text().splitlines()) == 1 + 5
    with pytest.raises(
        FloatingPointError, match="leave that level or leaf out, or evaluate in a wider dtype.$"
    ):
        hj.sensitivity(breaks, CENTRE, LEVELS)


def test_bad_metrics():
    with pytest.raises(
        TypeError, match=r"`metric` must return a scalar .*, got float32\[4, 6\] for `metric`"
    ):
        hj.sensitivity(lambda p: p["one"], CENTRE, LEVELS)
    with pytest.raises(ValueError, match="must not name a value `sparsity`"):
        hj.sensitivity(lambda p: {"sparsity": 0.0}, CENTRE, LEVELS)
    names = iter("ab")
    with pytest.raises(ValueError, match="the same names every time: before, the metrics are a, and .* b"):
        hj.sensitivity(lambda p: {next(names): 0.0}, CENTRE, LEVELS)
    with pytest.raises(ValueError, match="`metric` must be given, or something to predict from"):
        hj.sensitivity(None, CENTRE, LEVELS)


def test_one_number_for_all_rows_is_warned_of():
    with pytest.warns(
        UserWarning, match="returned the same for all 6 rows, metric 3: does it use the params"
    ):
        hj.sensitivity(lambda p: loss_fn(CENTRE), CENTRE, LEVELS)
    with pytest.warns(UserWarning, match="a 1, b 2: does it"):
        hj.sensitivity(lambda p: {"a": 1.0, "b": 2}, CENTRE, (0.25, 0.5))
    hj.sensitivity(lambda p: {"a": 1.0, "b": loss_fn(p)}, CENTRE, LEVELS)
    hj.sensitivity(lambda p: 1.0, CENTRE, [0.5])


def test_what_is_no_metric_and_no_level():
    for value, shown in (
        (None, "None"),
        ("0.5", "'0.5'"),
        (1j, "1j"),
        (True, "True"),
        (jnp.ones(1), "float32"),
    ):
        with pytest.raises(TypeError, match=f"`metric` must return a scalar .*, got {shown}"):
            hj.sensitivity(lambda p: {"a": value}, CENTRE, [0.5])  # noqa: B023
    for value in ({}, {1: 0.5, "1": 0.5}):
        with pytest.raises(ValueError, match="`metric` must return values of different names"):
            hj.sensitivity(lambda p: value, CENTRE, [0.5])  # noqa: B023
    with pytest.raises(
        FloatingPointError, match="the prediction must return numbers, got NaN for `predicted`"
    ):
        hj.sensitivity(None, CENTRE, [0.5], diagonal=jax.tree.map(lambda x: x * jnp.nan, CENTRE))
    for level in (7, -0.5, float("nan"), 1, 0.99999999):
        with pytest.raises(ValueError, match=r"must be (in \[0, 1\)|below 1)"):
            hj.sensitivity(loss_fn, CENTRE, [level])


def test_bad_levels_leaves_and_diagonals():
    with pytest.raises(ValueError, match=r"`levels` must be in \[0, 1\).*got 90.*write 0.9"):
        hj.sensitivity(loss_fn, CENTRE, [0, 90])
    for levels in ([], [0.5, 0.5]):
        with pytest.raises(ValueError, match="`levels` must be one or more different sparsities"):
            hj.sensitivity(loss_fn, CENTRE, levels)
    with pytest.raises(ValueError, match="`where` must match at least one leaf with weights, got .*: a, b."):
        hj.sensitivity(loss_fn, {"a": jnp.zeros((0, 3)), "b": jnp.zeros((3, 0)), "c": jnp.ones(2)}, [0.5])
    with pytest.raises(ValueError, match="`where` must match at least one leaf"):
        hj.sensitivity(loss_fn, CENTRE, LEVELS, where="three")
    with pytest.raises(ValueError, match="`diagonal` must have the structure of `params`"):
        hj.sensitivity(loss_fn, CENTRE, LEVELS, diagonal={"one": CENTRE["one"]})
