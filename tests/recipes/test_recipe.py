"""A recipe and the same in Python are one run; what is wrong with one is said with line and field."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj
from hessjax.recipes import _kinds

SAMPLE = pathlib.Path(__file__).parent / "recipe.yaml"


def network():
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [jax.random.normal(k, s) for k, s in zip(keys, [(5, 6), (6, 8), (8, 4)], strict=True)]
    return {
        name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}
        for name, kernel in zip(("first", "hidden_1", "hidden_2"), kernels, strict=True)
    }


def loss_fn(params, x):
    out = x
    for name in ("first", "hidden_1", "hidden_2"):
        out = jnp.tanh(out @ params[name]["kernel"] + params[name]["bias"][None])
    return jnp.mean((out - x[:, :4]) ** 2)


def trajectory(tx, steps=22):
    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    params, state, seen = network(), tx.init(network()), []
    for t in range(steps):
        params, state = step(params, state, jax.random.normal(jax.random.key(t), (16, 5)))
        seen.append(params)
    return seen, state


def zeros(params, name):
    return int(jnp.sum(params[name]["kernel"] == 0))


@pytest.fixture
def load(tmp_path):
    """A recipe from its text."""

    def of(text, **kwargs):
        (tmp_path / "recipe.yaml").write_text(text)
        return hj.load_recipe(tmp_path / "recipe.yaml", **kwargs)

    return of


def test_a_recipe_and_the_same_in_python_are_one_run():
    tx = hj.load_recipe(SAMPLE, steps_per_epoch=4).prune(optax.adam(0.02))
    by_hand = hj.prune(
        hj.prune(
            optax.adam(0.02),
            hj.saliencies.movement(optax.sgd(optax.linear_schedule(1.0, 0.0, 20)), start=jnp.zeros_like),
            optax.polynomial_schedule(0.1, 0.75, 3, transition_steps=16, transition_begin=4),
            where="hidden*/kernel",
            allocation=hj.allocations.uniform(),
            every=4,
            start=4,
            stop=20,
        ),
        hj.saliencies.magnitude(),
        optax.polynomial_schedule(0.0, 0.5, 3, transition_steps=14, transition_begin=3),
        where="first/kernel",
        pattern=hj.patterns.filters(),
        allocation=hj.allocations.global_threshold(floor=0.2),
        every=4,
        start=3,
        stop=17,
    )
    got, want = trajectory(tx), trajectory(by_hand)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    last = got[0][-1]
    assert [zeros(last, name) for name in last] == [15, 36, 24]
    assert [zeros(got[0][2], name) for name in last] == [0, 0, 0]  # after 3 updates: the start of one at 0
    assert zeros(got[0][3], "hidden_1") == round(0.1 * 48)
    mask = hj.mask_of(got[1])
    np.testing.assert_array_equal(mask["hidden_2"]["kernel"], last["hidden_2"]["kernel"] != 0)


HEAD = "version: 1\npruners:\n  all:\n"
WHEN = "policies:\n  - {pruner: {instance_name: all}, starting_step: 1, ending_step: 9, frequency: 2}\n"


def recipe(args, name="magnitude"):
    return f"{HEAD}    class: {name}\n    args: {args}\n{WHEN}"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("magnitude", "{final_sparsity: 0.5, where: '*_1/k*', pattern: {class: n_of_m, args: "
         "{n: 2, m: 4, axis: -1}}}"),
        ("magnitude", "{final_sparsity: 0.5, pattern: {'f*': filters, '*': unstructured}, regrow: false}"),
        ("gradient", "{final_sparsity: 0.5, decay: 0.5, straight_through: true}"),
        ("random", "{final_sparsity: 0.5, seed: 3, allocation: erdos_renyi}"),
        ("soft_movement", "{final_threshold: 0.1, penalty: 1e-2, optimizer: {class: adam, args: "
         "{learning_rate: 0.1}}}"),
        ("soft_movement", "{final_sparsity: 0.4, penalty: {class: linear_schedule, args: "
         "{init_value: 0, end_value: 400, transition_steps: 9}}}"),
        ("movement", "{final_sparsity: 0.4, start: from_magnitudes, optimizer: {class: lars, args: "
         "{learning_rate: 0.01, trust_coefficient: 1, momentum: 0}}}"),
        ("hard_concrete", "{final_threshold: 0, penalty: 2, seed: 1}"),
        ("sparse_evolution", "{final_sparsity: 0.5, fraction: 0.3, seed: 1, allocation: uniform}"),
        ("rigl", "{final_sparsity: 0.5, fraction: {class: cosine_decay_schedule, args: "
         "{init_value: 0.3, decay_steps: 9}}}"),
        ("obd", "{final_sparsity: 0.4, num_grads: 3}"),
        ("obs", "{final_sparsity: 0.4, num_grads: 3, damping: {relative: 0.1}, block_size: null, "
         "update: summed}"),
        ("wood_taylor", "{final_sparsity: 0.4, num_grads: 3, damping: 0.5, block_size: 8}"),
        ("compensated", "{final_sparsity: 0.4, choose: movement, by: {class: obs, args: {num_grads: 2}}}"),
        ("magnitude", "{final_sparsity: 0.3, where: 'hidden*/kernel', allocation: {class: explicit, args: "
         "{sparsities: {'*1/kernel': 0.5}}}}"),
        ("magnitude", "{final_sparsity: 0.3, where: hidden_1/kernel, allocation: {class: by_curvature, args: "
         "{curvature: {hidden_1/kernel: 2}}}}"),
    ],
)  # fmt: skip
def test_every_class_loads_and_begins(load, name, args):
    state = jax.eval_shape(load(recipe(args, name)).prune(optax.sgd(0.1)).init, network())
    assert any(x.dtype == bool for x in jax.tree.leaves(state.mask))


def test_arguments_arrive(load):
    rule = load(recipe("{final_sparsity: 0.4, num_grads: 3, damping: {relative: 0.5}}", "obs")).rules[0]
    grads, params = {"w": jnp.eye(4).reshape(4, 2, 2)}, {"w": jnp.arange(1.0, 5.0).reshape(2, 2)}
    rules = rule.saliency, *(hj.saliencies.obs(damping=x) for x in (hj.relative(0.5), 0.5))
    full = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    seen = hj.saliencies.Context(params, full, jnp.int32(1), per_example_grads=grads)
    scores = [r.scores(r.init(params), seen) for r in rules]
    np.testing.assert_array_equal(scores[0]["w"], scores[1]["w"])
    assert not np.array_equal(scores[0]["w"], scores[2]["w"])
    assert (rule.options["every"], rule.options["start"], rule.options["stop"]) == (2, 1, 9)
    np.testing.assert_allclose(rule.sparsity(5), 0.4 * (1 - 0.5**3))
    at_once = load(recipe("{final_sparsity: 0.4}").replace("ending_step: 9", "ending_step: 1"))
    assert at_once.rules[0].sparsity == 0.4


def test_a_printed_recipe_can_be_read():
    """Line, settings and target of every pruner."""
    lines = str(hj.load_recipe(SAMPLE, steps_per_epoch=4)).splitlines()
    assert lines[0] == f"Recipe of `{SAMPLE}`:"
    assert lines[1].startswith("  hidden (line 7, pruners.hidden.args): movement(optimizer=")
    assert lines[1].endswith(
        "0.1 to 0.75 (power 3), where='hidden*/kernel', allocation=uniform(), every=4, start=4, stop=20"
    )
    assert lines[2] == (
        "  first (line 21, pruners.first.args): magnitude(), 0 to 0.5 (power 3), where=('first/kernel',), "
        "allocation=global_threshold(floor=0.2), pattern={'first/*': filters()}, every=4, start=3, stop=17"
    )


def test_the_tables_name_arguments_that_exist():
    import inspect

    for name, kind in _kinds.KINDS.items():
        parameters = inspect.signature(kind.function).parameters
        assert kind.fields.keys() - {"seed"} <= parameters.keys(), name
        needed = {k for k, p in parameters.items() if p.default is p.empty} - {"key", "stop"}
        assert needed <= kind.fields.keys(), name


GOOD = recipe("{final_sparsity: 0.5}")


def with_args(more, name="magnitude"):
    return recipe(f"{{final_sparsity: 0.5, {more}}}", name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("version: 1\n", ""), "line 1: `version` is missing"),
        (GOOD.replace("version: 1", "version: 2"), "line 1, version: must be 1, got 2"),
        (GOOD.replace("magnitude", "magnitud"), "line 3, pruners.all: there is no class `magnitud`, only 'm"),
        (GOOD.replace("    class: magnitude\n", ""), "line 3, pruners.all: must have a `class`"),
        (GOOD.replace("final", "finl"), "@.finl_sparsity: there is no `finl_sparsity` here"),
        (GOOD.replace("0.5", "90"), "@.final_sparsity: must be less than 1, got 90"),
        (recipe("{}"), "@: either `final_sparsity` or `final_threshold` must be given"),
        (with_args("final_threshold: 0.5"), "@: either `final_sparsity` or `final_threshold` must be given"),
        (with_args("least: 0.1"), "@: `least` has no meaning without `final_threshold`"),
        (with_args("pattern: {class: n_of_m, args: {n: 2}}"), "@.pattern.args: `m` is missing"),
        (with_args("pattern: {class: n_of_m, args: {n: 4, m: 2}}"), "@: `n` must be"),
        (with_args("where: 3"), "@.where: must be a valid string, got 3"),
        (
            with_args("update: best", "obs"),
            "@.update: must be 'joint', 'greedy', 'summed' or 'none'",
        ),
        (with_args("regrow: true", "random"), "@: `seed` is missing"),
        (GOOD.replace("ending_step: 9", "ending_step: 0"), "$: `ending_step` must not lie before"),
        (GOOD.replace("frequency: 2", "frequency: 0"), "$.frequency: must be greater than or equal to 1"),
        (GOOD.replace("ending_step", "ending_epoch"), "$: `starting_epoch` and `ending_epoch` must be given"),
        (GOOD.replace("starting_step: 1, ", ""), "$: `starting_epoch` and `ending_epoch` must be given"),
        (GOOD.replace("_step", "_epoch"), "$.starting_epoch: counts epochs: pass `steps_per_epoch`"),
        (
            GOOD.replace("name: all", "name: one"),
            "$.pruner.instance_name: must be one of the pruners all, got",
        ),
        (GOOD.replace("name: all", "name: one"), "line 3, pruners.all: has no policy"),
        (GOOD + WHEN.partition("\n")[2], "line 8, policies.1.pruner.instance_name: all has a policy already"),
        (GOOD + "version: 1\n", "line 8, version: this key stands here twice"),
        (GOOD + "lr_schedulers: {}\n", "line 8, lr_schedulers: there is no `lr_schedulers` here"),
        ("version: 1\npruners: [", "line 2: not YAML"),
        ("", "line 1: must be a valid dictionary"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_is_wrong_is_said_with_line_and_field(load, text, message):
    message = message.replace("@", "line 5, pruners.all.args").replace("$", "line 7, policies.0")
    with pytest.raises(ValueError, match=r"recipe.yaml` must be a recipe, but\n(?:.|\n)*" + message):
        load(text)


@pytest.mark.parametrize("name", ["where", "allocation", "pattern", "final_threshold"])
def test_a_field_left_empty_is_refused(load, name):
    with pytest.raises(
        ValueError, match=f"line 5, pruners.all.args.{name}: must have a value, or be left out"
    ):
        load(with_args(f"{name}: null"))


@pytest.mark.parametrize("name", ["starting_epoch", "ending_epoch", "starting_step", "ending_step"])
def test_a_time_left_empty_is_refused(load, name):
    times = {"starting_step": 1, "ending_step": 9} | {name: "null"}
    shown = ", ".join(f"{key}: {value}" for key, value in times.items())
    with pytest.raises(ValueError, match=f"line 7, policies.0.{name}: must have a value, or be left out"):
        load(GOOD.replace("starting_step: 1, ending_step: 9", shown))


def test_null_is_a_value_where_none_is_one(load):
    parts = (
        load(with_args("block_size: null", "obs")),
        load(with_args("pattern: {class: heads, args: {num_heads: null}}")),
    )
    assert all(recipe.rules for recipe in parts)


def test_all_that_is_wrong_is_said_at_once(load):
    text = GOOD.replace("0.5", "90, where: 3").replace("frequency: 2", "frequency: 0")
    with pytest.raises(ValueError, match="line 5") as caught:
        load(text)
    assert len(str(caught.value).splitlines()) == 1 + 3


def test_rules_that_do_not_fit_the_network_are_named(load):
    def begin(text):
        return load(text).prune(optax.sgd(0.1)).init(network())

    with pytest.raises(
        ValueError, match=r"recipe.yaml`, line 5, pruners.all.args: `where` .*`\*/kern` matches none"
    ):
        begin(recipe("{final_sparsity: 0.5, where: '*/kern'}"))
    with pytest.raises(ValueError, match=r"line 5, pruners.all.args: .*n_of_m.* does not fit first/kernel"):
        begin(recipe("{final_sparsity: 0.5, pattern: {class: n_of_m, args: {n: 2, m: 4}}}"))
    both = GOOD.replace(
        "policies", "  two: {class: magnitude, args: {final_sparsity: 0.1, where: first/*nel}}\npolicies"
    )
    both += "  - {pruner: {instance_name: two}, starting_step: 1, ending_step: 2}\n"
    with pytest.raises(ValueError, match=r"line 6.*: first/kernel is pruned by all already \(line 5"):
        begin(both)


def test_multisteps_and_bad_arguments(load):
    tx = load(GOOD).prune(optax.MultiSteps(optax.sgd(0.1), 2))
    updates, _ = tx.update(network(), tx.init(network()), network())
    assert jax.tree.structure(updates) == jax.tree.structure(network())
    with pytest.raises(ValueError, match="`steps_per_epoch` must be at least 1, got 0"):
        load(GOOD, steps_per_epoch=0)
    with pytest.raises(FileNotFoundError):
        hj.load_recipe("no such recipe.yaml")


def test_without_the_extra_it_says_what_to_install(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hessjax[recipes]'")):
        load(GOOD)
