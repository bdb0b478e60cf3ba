"""Distiller's classes and fields: the same masks at the same epochs, or by name that there are none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

SHAPES = {"conv1": (3, 3, 4, 8), "conv2": (3, 3, 8, 4), "fc1": (12, 10), "fc2": (10, 6)}


def network(leaf="kernel"):
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: {leaf: jax.random.normal(key, shape), "bias": jnp.ones(shape[-1])}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


@pytest.fixture
def load(tmp_path):
    def of(text, steps_per_epoch=4):
        (tmp_path / "schedule.yaml").write_text(text)
        return hj.load_recipe(tmp_path / "schedule.yaml", steps_per_epoch=steps_per_epoch)

    return of


def policy(name, start, end, frequency=1):
    return (
        f"  - pruner:\n      instance_name : {name}\n    starting_epoch: {start}\n    ending_epoch: {end}\n"
        f"    frequency: {frequency}\n"
    )


GRADUAL = f"""
version: 1
pruners:
  fc_pruner:
    class: 'AutomatedGradualPruner'
    initial_sparsity : 0.05
    final_sparsity: 0.60
    weights: ['module.fc1.weight', 'fc2.weight']

  filter_pruner:
    class: L1RankedStructureParameterPruner_AGP
    initial_sparsity: 0.10
    final_sparsity: 0.50
    group_type: Filters
    weights: [module.conv1.weight]

policies:
{policy("fc_pruner", 1, 10, 2)}
{policy("filter_pruner", 0, 3)}
"""


def gradual(start, end, frequency, initial, final):
    """Zhu and Gupta's schedule, as Distiller computes it: epoch and target of every mask."""
    span = (end - start - 1) // frequency * frequency
    return {
        epoch: final + (initial - final) * (1 - (epoch - start) / span) ** 3
        for epoch in range(start, end, frequency)
    }


@pytest.mark.parametrize("leaf", ["kernel", "weight"])
def test_gradual_pruning_has_the_same_zeros_at_the_same_epochs(load, leaf):
    tx = load(GRADUAL).prune(optax.sgd(0.0))
    params = network(leaf)
    state, update = tx.init(params), jax.jit(tx.update)
    wanted, done = {"fc1": 0.0, "fc2": 0.0}, 0.0
    for epoch in range(12):
        target = gradual(1, 10, 2, 0.05, 0.6).get(epoch)
        wanted = wanted if target is None else dict.fromkeys(wanted, target)
        done = gradual(0, 3, 1, 0.1, 0.5).get(epoch, done)
        for batch in range(4):
            if epoch or batch:  # before the first update the params are the caller's
                zeros = {name: int(jnp.sum(params[name][leaf] == 0)) for name in SHAPES}
                for name, sparsity in wanted.items():
                    assert zeros[name] == round(sparsity * params[name][leaf].size), (epoch, name)
                dead = jnp.all(params["conv1"][leaf] == 0, axis=(0, 1, 2))
                assert int(jnp.sum(dead)) * 36 == zeros["conv1"]
                assert int(jnp.sum(dead)) == int(done * 8 + 1e-6)  # whole filters, no more than asked for
                assert zeros["conv2"] == 0
            updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
            params = optax.apply_updates(params, updates)
    assert all(bool(jnp.all(params[name]["bias"] == 1)) for name in SHAPES)


def rules(load, pruner, when="    starting_epoch: 2\n    ending_epoch: 8\n    frequency: 3\n", more=""):
    body = "".join(f"    {line}\n" for line in pruner.strip().splitlines())
    return load(
        f"version: 1\npruners:\n  my:\n{body}policies:\n  - pruner:\n      instance_name: my\n{more}{when}"
    ).rules


@pytest.mark.parametrize("kind", ["SparsityLevelParameterPruner", "LevelPruner"])
def test_levels_by_name(load, kind):
    levels = "{fc1.weight: 0.5, 'module.fc2.weight': 0.25, conv1.weight: 0.5, conv2.weight: 0}"
    found = rules(load, f"class: {kind}\nlevels: {levels}")
    assert len(found) == 2
    assert [rule.options["regrow"] for rule in found] == [False, False]
    for rule in found:
        assert (rule.options["start"], rule.options["stop"], rule.options["every"]) == (8, 20, 12)
    assert [float(rule.sparsity(t)) for rule in found for t in (8, 20)] == [0.5, 0.5, 0.25, 0.25]
    assert [rule.options["where"] for rule in found] == [
        ("fc1[._/][kw]e[ri][ng][eh][lt]", "conv1[._/][kw]e[ri][ng][eh][lt]"),
        ("fc2[._/][kw]e[ri][ng][eh][lt]",),
    ]


def test_thresholds(load):
    (rule,) = rules(load, "class: MagnitudeParameterPruner\nthresholds: {fc1/kernel: 0.5, fc2/kernel: 0.5}")
    params = network()
    tx = rule._replace(options=rule.options | {"start": 0, "stop": 0}).prune(optax.sgd(0.0))
    mask = hj.mask_of(tx.init(params))
    for name in ("fc1", "fc2"):
        np.testing.assert_array_equal(mask[name]["kernel"], jnp.abs(params[name]["kernel"]) > 0.5)
    two = rules(load, "class: MagnitudeParameterPruner\nthresholds: {fc1.weight: 0.5, fc2.weight: 0.25}")
    assert [float(rule.sparsity.level(9)) for rule in two] == [0.5, 0.25]
    (every,) = rules(load, "class: MagnitudeParameterPruner\nthresholds: {'*': 0.1}")
    assert every.options["where"] == ("*",)


GROUPS = {
    "Filters": "filters()",
    "'3D'": "filters()",
    "Channels": "channels()",
    "Rows": "rows()",
    "Blocks\nkwargs:\n  block_shape: [1, 4, 1, 1]": "blocks((4, 1))",
    "Blocks\nkwargs:\n  block_shape: [2, 1, 1, 1]": "blocks((1, 2))",
}


@pytest.mark.parametrize(("group", "pattern"), GROUPS.items(), ids=GROUPS.values())
def test_groups(load, group, pattern):
    leaf = "fc1" if group == "Rows" else "conv1"  # a convolution has no rows
    fields = f"group_type: {group}\ndesired_sparsity: 0.5\nweights: [{leaf}.weight]"
    (rule,) = rules(load, f"class: L1RankedStructureParameterPruner\n{fields}")
    assert repr(rule.options["pattern"]) == pattern
    assert repr(rule.options["allocation"]) == "uniform()"
    assert float(rule.sparsity(8)) == 0.5
    jax.eval_shape(rule.prune(optax.sgd(0.1)).init, network())


def test_groups_of_the_first_version_and_by_threshold(load):
    regimes = "{'conv1.weight': [0.5, '3D'], 'conv2.weight': [0.25, '3D'], fc1.weight: [0.5, Rows]}"
    old = rules(load, f"class: 'L1RankedStructureParameterPruner'\nreg_regims: {regimes}")
    assert [(float(r.sparsity(9)), repr(r.options["pattern"])) for r in old] == [
        (0.5, "filters()"), (0.25, "filters()"), (0.5, "rows()"),
    ]  # fmt: skip
    fields = "threshold_criteria: Mean_Abs\nreg_regims: {conv1/kernel: [0.8, Filters]}"
    (rule,) = rules(load, f"class: StructureParameterPruner\n{fields}")
    params = network()
    tx = rule._replace(options=rule.options | {"start": 0, "stop": 0}).prune(optax.sgd(0.0))
    means = jnp.mean(jnp.abs(params["conv1"]["kernel"]), axis=(0, 1, 2))
    assert 0 < int(jnp.sum(means > 0.8)) < 8
    np.testing.assert_array_equal(hj.mask_of(tx.init(params))["conv1"]["kernel"][0, 0, 0], means > 0.8)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("RandomRankedFilterPruner", "desired_sparsity: 0.5"),
        ("RandomRankedFilterPruner_AGP", "initial_sparsity: 0.1\nfinal_sparsity: 0.5"),
    ],
)
def test_random_filters(load, kind, fields):
    (rule,) = rules(load, f"class: {kind}\n{fields}\ngroup_type: Filters\nweights: [conv1.weight]")
    assert repr(rule.saliency).startswith("random(")
    assert float(rule.sparsity(20)) == 0.5


def test_when(load):
    def span(when, kind="LevelPruner\nlevels: {fc1.weight: 0.5}"):
        (rule,) = rules(load, f"class: {kind}", when)
        return tuple(rule.options[name] // 4 for name in ("start", "stop", "every"))

    assert span("    starting_epoch: 0\n    ending_epoch: 38\n    frequency: 2\n") == (0, 36, 2)
    assert span("    starting_epoch: 0\n    ending_epoch: 18\n    frequency: 3\n") == (0, 15, 3)
    assert span("    starting_epoch: 3\n    ending_epoch: 4\n") == (3, 3, 1)
    assert span("    epochs: [0]\n") == (0, 0, 1)
    assert span("    epochs: [2, 5, 8]\n") == (2, 8, 3)
    ours = "magnitude\nargs: {where: fc1/*, final_sparsity: 0.5}"  # whose ending epoch has a mask step
    assert span("    starting_epoch: 0\n    ending_epoch: 38\n    frequency: 2\n", ours) == (0, 38, 2)


def test_dense_weights_beside_the_masked_ones(load):
    fields = "{initial_sparsity: 0, final_sparsity: 0.5, weights: [fc1.weight]}"
    pruner = f"class: AutomatedGradualPruner\nargs: {fields}"  # nested, as in a recipe
    args = lambda text: f"      args: {{{text}}}\n"
    both = "use_double_copies: true, mask_on_forward_only: true, keep_mask: true"
    (rule,) = rules(load, pruner, more=args(both))
    assert (rule.options["regrow"], rule.options["straight_through"]) == (True, True)
    (rule,) = rules(load, pruner, more=args(f"{both}, mask_gradients: true"))
    assert (rule.options["regrow"], rule.options["straight_through"]) == (True, False)
    (rule,) = rules(load, pruner, more=args("keep_mask: true, mini_batch_pruning_frequency: 0"))
    assert rule.options["regrow"] is False


BAD_PRUNERS = {
    "SensitivityPruner": ("sensitivities: {fc1.weight: 0.5}", "line 3, pruners.my: Sens.* has no counter"),
    "SplicingPruner": ("sensitivities: {}", "SplicingPruner has no counterpart"),
    "BaiduRNNPruner": ("q: 1", "BaiduRNNPruner has no counterpart: its thresholds rise"),
    "L2RankedStructureParameterPruner_AGP": ("weights: []", "L2Ranked.*_AGP has no counterpart"),
    "ActivationAPoZRankedFilterPruner": ("q: 1", "APoZ.* has no counterpart: nothing"),
    "AutomatedGradualPruner": ("initial_sparsity: 0\nweights: a", "`final_sparsity` of Auto.* is missing"),
    "LevelPruner": ("levels: {'*': 0.5, fc1.weight: 0.25}", r"line 5, pruners.my.levels.\*: a `\*` beside"),
    "MagnitudeParameterPruner": ("thresholds: 0.5", "line 5, pruners.my.thresholds: .* must have an entry"),
    "SparsityLevelParameterPruner": ("levels: {a: 0.5}\nlevel: 1", "my.level: there is no `level` in Spars"),
    "StructureParameterPruner": ("threshold_criteria: Max\nreg_regims: {a: [1, 3D]}", "groups are judged"),
    "L1RankedStructureParameterPruner": (
        "weights: [a]\ndesired_sparsity: 0.5\ngroup_type: Filters\ngroup_dependency: Leader",
        "line 8, pruners.my.group_dependency: every leaf is ranked by itself",
    ),
    "L1RankedStructureParameterPruner_AGP": (
        "weights: [a]\ninitial_sparsity: 0\nfinal_sparsity: 0.5\ngroup_type: 2D",
        "line 8, pruners.my.group_type: there is no group '2D', only Filters, 3D, Channels, Rows, Blocks",
    ),
    "RandomRankedFilterPruner": (
        "weights: [a]\ndesired_sparsity: 1.5\ngroup_type: Filters",
        "line 3, pruners.my: must be less than 1, got 1.5",
    ),
    "NoSuchPruner": ("weights: [a]", "line 3, pruners.my: there is no class `NoSuchPruner`"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), BAD_PRUNERS.items(), ids=BAD_PRUNERS)
def test_what_has_no_counterpart_is_named(load, kind, case):
    fields, message = case
    with pytest.raises(ValueError, match=message) as caught:
        rules(load, f"class: {kind}\n{fields}")
    assert "too_short" not in str(caught.value)
    assert "at least 1 item" not in str(caught.value)


def test_all_of_a_file_is_told_at_once(load):
    text = (
        GRADUAL
        + """
  - lr_scheduler: {instance_name: my_lr}
    starting_epoch: 0
    ending_epoch: 9
    frequency: 1
lr_schedulers:
  my_lr: {class: StepLR, step_size: 50, gamma: 0.1}
regularizers:
  groups: {class: GroupLassoRegularizer, reg_regims: {conv1.weight: [0.1, 3D]}}
quantizers:
  bits: {class: DorefaQuantizer}
extensions:
  net_thinner: {class: FilterRemover}
"""
    )
    with pytest.raises(ValueError, match="must be a recipe, but") as caught:
        load(text)
    lines = str(caught.value).splitlines()[1:]
    fields = ["lr_schedulers.my_lr", "regularizers.groups", "quantizers.bits", "extensions.net_thinner",
              "policies.2"]  # fmt: skip
    assert [line.split(":")[0].split(", ")[1] for line in lines] == fields
    classes = ["StepLR", "GroupLasso", "Dorefa", "FilterRemover", "lr_scheduler"]
    for line, name in zip(lines, classes, strict=True):
        assert name in line
        assert "has no counterpart" in line
    assert "line 36" in lines[0]


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("    epochs: [0, 1, 3]\n", "policies.0.epochs: `epochs` must be equally far apart"),
        ("    epochs: []\n", "policies.0.epochs"),
        ("    epochs: 3\n", "policies.0.epochs"),
        ("    starting_epoch: 3\n    ending_epoch: 3\n", "ending_epoch: must lie after .*, which is 3"),
        ("    starting_epoch: 3\n", "policies.0: `starting_epoch` and `ending_epoch` must be given"),
        ("    starting_epoch: 3\n    ending_epoch: x\n", "ending_epoch: must be a valid integer, got 'x'"),
        ("    starting_epoch: 3\n    ending_epoch: 5\n    frequency: 0\n", "frequency: must be greater than"),
        ("    starting_epoch: 3\n    ending_epoch: 5\n    level: 1\n", "level: there is no `level` here"),
    ],
)  # fmt: skip
def test_bad_times(load, when, message):
    with pytest.raises(ValueError, match=message):
        rules(load, "class: LevelPruner\nlevels: {fc1.weight: 0.5}", when)


@pytest.mark.parametrize(
    "args", ["mini_batch_pruning_frequency: 1", "fold_batchnorm: true", "use_double_copies: true",
             "levels: {a: 1}", "use_double_copies: true, mask_on_forward_only: true",
             "skip_first_minibatch: true"],
)  # fmt: skip
def test_bad_arguments_of_a_policy(load, args):
    with pytest.raises(ValueError, match="line 9, policies.0.pruner.args.*no counterpart"):
        rules(load, "class: LevelPruner\nlevels: {fc1.weight: 0.5}", more=f"      args: {{{args}}}\n")


def test_a_name_that_matches_nothing_is_told(load):
    tx = load(GRADUAL.replace("fc2.weight", "features.3.weight")).prune(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"line 4, pruners.fc_pruner: `where` .*features.* matches none of"):
        tx.init(network())
