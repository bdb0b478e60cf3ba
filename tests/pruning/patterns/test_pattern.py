"""Patterns: groups and back again, masks against brute force, and shapes they do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj
from hessjax.pruning._units import units_of
from hessjax.pruning.patterns._fitting import patterns_of
from hessjax.pruning.patterns._heads import HeadGroups
from hessjax.pruning.patterns._patterns import Along

SHAPES = {
    "unstructured": (hj.patterns.unstructured(), (3, 4)),
    "rows": (hj.patterns.rows(), (3, 4)),
    "filters": (hj.patterns.filters(), (3, 3, 2, 4)),
    "channels": (hj.patterns.channels(), (3, 3, 2, 4)),
    "blocks": (hj.patterns.blocks((2, 3)), (4, 6)),
    "blocks over kernels": (hj.patterns.blocks((2, 2)), (3, 4, 6)),
    "2:4, axis 0": (hj.patterns.n_of_m(2, 4), (8, 3)),
    "2:4, axis 0, as many rows as columns": (hj.patterns.n_of_m(2, 4), (4, 4)),
    "1:3, last axis": (hj.patterns.n_of_m(1, 3, axis=-1), (2, 5, 6)),
    "heads": (HeadGroups(1, 2, (2,), "heads(2)", "attention", 2, 3), (5, 6)),
    "heads of the output": (HeadGroups(0, 2, (2,), "heads(2)", "attention", 2, 3), (6, 5)),
    "heads of queries, keys and values": (HeadGroups(1, 2, (4, 2, 2), "heads(4)", "a", 4, 3), (5, 24)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_groups_and_back(name):
    pattern, shape = SHAPES[name]
    x = jnp.arange(np.prod(shape)).reshape(shape)
    rows = pattern.group(x)
    assert rows.ndim == 2
    np.testing.assert_array_equal(pattern.ungroup(rows, shape), x)


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        (hj.patterns.rows(), np.arange(4)[:, None] * np.ones(6, int)),
        (hj.patterns.filters(), np.arange(6) * np.ones((4, 1), int)),
        (hj.patterns.channels(-2), np.arange(4)[:, None] * np.ones(6, int)),
        (hj.patterns.blocks((2, 3)), np.array([[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2)),
        (HeadGroups(1, 3, (3,), "heads(3)", "a", 3, 2), np.array([[0, 0, 1, 1, 2, 2]] * 4)),
        (HeadGroups(0, 2, (2,), "heads(2)", "a", 2, 2), np.array([[0] * 6] * 2 + [[1] * 6] * 2)),
    ],
)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_whole_groups_of_the_least_mean_go(pattern, index, sparsity):
    """Against a loop over the groups: which weights belong together is written out here."""
    scores = np.random.default_rng(0).uniform(size=(4, 6)).astype(np.float32)
    groups = sorted(range(index.max() + 1), key=lambda i: scores[index == i].mean())
    budget, gone = round(sparsity * 24), []
    for i in groups:
        if len(gone) * (index == 0).sum() + (index == i).sum() > budget:
            break
        gone.append(i)
    gone = gone[: len(groups) - 1]
    for allocation in (hj.allocations.global_threshold(floor=0.0), hj.allocations.uniform()):
        mask = allocation({"w": jnp.asarray(scores)}, sparsity, pattern)["w"]
        np.testing.assert_array_equal(mask, ~np.isin(index, gone))


@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.5])
def test_n_of_m_against_brute_force(sparsity):
    """Weights go in the order of their scores, but never the best two of four."""
    scores = np.random.default_rng(1).uniform(size=(8, 5)).astype(np.float32)
    scores[0, 0] = scores[1, 0] = scores[2, 0] = 0.5  # ties: the first ones go
    expected = np.ones((8, 5), bool)
    for place in np.argsort(scores.ravel(), kind="stable"):
        i, j = divmod(int(place), 5)
        column = expected[i // 4 * 4 : i // 4 * 4 + 4, j]
        if (~expected).sum() < round(sparsity * 40) and column.sum() > 2:
            expected[i, j] = False
    mask = hj.allocations.global_threshold(floor=0.0)(
        {"w": jnp.asarray(scores)}, sparsity, hj.patterns.n_of_m(2, 4)
    )["w"]
    np.testing.assert_array_equal(mask, expected)
    if sparsity == 0.5:
        assert (np.asarray(mask).reshape(2, 4, 5).sum(axis=1) == 2).all()


def test_groups_of_several_sizes_take_no_more_than_the_budget():
    scores = {"a": jnp.array([[3.0] * 5, [1.0] * 5]), "b": jnp.array([[2.0] * 3, [9.0] * 3])}
    masks = {
        s: hj.allocations.global_threshold(floor=0.0)(scores, s / 16, hj.patterns.rows())
        for s in (4, 5, 7, 8)
    }
    zeros = {s: int(sum((~m).sum() for m in mask.values())) for s, mask in masks.items()}
    assert zeros == {4: 3, 5: 5, 7: 5, 8: 8}


def test_heads_lose_the_same_ones_everywhere():
    rng = np.random.default_rng(2)
    shapes = {"query": (6, 3, 2), "key": (6, 3, 2), "value": (6, 3, 2), "out": (3, 2, 6)}
    params = {
        f"layer_{i}": {
            "attention": {k: {"kernel": jnp.asarray(rng.normal(size=s))} for k, s in shapes.items()}
        }
        for i in range(2)
    }
    pruned = hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=hj.patterns.heads())
    gone = []
    for i in range(2):
        part = pruned.params[f"layer_{i}"]["attention"]
        kept = {
            k: np.asarray(v["kernel"] != 0).any(axis=(1, 2) if k == "out" else (0, 2))
            for k, v in part.items()
        }
        full = {
            k: np.asarray(v["kernel"] != 0).all(axis=(1, 2) if k == "out" else (0, 2))
            for k, v in part.items()
        }
        for flags in (*kept.values(), *full.values()):
            np.testing.assert_array_equal(flags, kept["query"])
        gone.append(3 - kept["query"].sum())
    assert sum(gone) == 3


def test_weights_that_are_gone_do_not_drag_their_group_along():
    params = {"w": jnp.array([[0.0, 9.0], [1.0, 1.0]])}
    pruned = hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=hj.patterns.rows())
    np.testing.assert_array_equal(pruned.params["w"], [[0.0, 9.0], [0.0, 0.0]])


def test_one_pattern_per_path():
    params = {"conv": jnp.ones((2, 2, 4, 4)).at[..., 0].set(0.1), "dense": jnp.arange(1.0, 9.0).reshape(2, 4)}
    pattern = {"conv": hj.patterns.filters(), "*": hj.patterns.n_of_m(2, 4, axis=1)}
    mask = hj.prune_once(
        params, hj.saliencies.magnitude(), 0.25, pattern=pattern, allocation=hj.allocations.uniform()
    ).mask
    np.testing.assert_array_equal(mask["conv"].all(axis=(0, 1, 2)), [False, True, True, True])
    np.testing.assert_array_equal(mask["dense"], [[False, False, True, True], [True, True, True, True]])


@pytest.mark.parametrize(
    "pattern",
    [hj.patterns.filters(), hj.patterns.n_of_m(2, 4), hj.patterns.blocks((2, 2))],
    ids=lambda p: p.name,
)
def test_jit_is_eager(pattern):
    scores = {
        "a": jax.random.normal(jax.random.key(0), (8, 6)),
        "b": jax.random.normal(jax.random.key(1), (4, 2)),
    }
    for allocation in (
        hj.allocations.global_threshold(),
        hj.allocations.uniform(),
        hj.allocations.erdos_renyi(),
    ):
        eager = allocation(scores, 0.45, pattern)
        jitted = jax.jit(lambda x, s, a=allocation: a(x, s, pattern))(scores, 0.45)
        jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_empty_leaves_pass():
    scores = {"empty": jnp.zeros((0, 4)), "full": jnp.arange(8.0).reshape(2, 4)}
    for pattern in (
        hj.patterns.unstructured(),
        hj.patterns.rows(),
        hj.patterns.n_of_m(1, 2, axis=1),
        hj.patterns.blocks((1, 2)),
    ):
        mask = hj.allocations.global_threshold()(scores, 0.25, pattern)
        assert mask["empty"].shape == (0, 4)
        assert int(mask["full"].sum()) in (6, 8)


def test_equal_settings_are_equal_and_share_compiled_code():
    makers = [
        hj.patterns.unstructured,
        hj.patterns.filters,
        hj.patterns.rows,
        hj.patterns.channels,
        lambda: hj.patterns.channels(1),
        lambda: hj.patterns.n_of_m(2, 4),
        lambda: hj.patterns.n_of_m(2, 4, axis=1),
        lambda: hj.patterns.blocks((2, 3)),
        hj.patterns.heads,
        lambda: hj.patterns.heads(2),
    ]
    assert len({make() for make in [*makers, *makers]}) == len(makers)
    assert hj.patterns.blocks([2, 3]) == hj.patterns.blocks((2, 3))
    shown = [repr(make()) for make in makers]
    assert shown == [
        "unstructured()",
        "filters()",
        "rows()",
        "channels()",
        "channels(1)",
        "n_of_m(2, 4)",
        "n_of_m(2, 4, axis=1)",
        "blocks((2, 3))",
        "heads()",
        "heads(2)",
    ]


@dataclasses.dataclass(frozen=True)
class Halves(hj.patterns.Pattern):
    """A pattern of one's own: both halves of a leaf go as a whole."""

    def group(self, leaf):
        return leaf.reshape(2, -1)

    def ungroup(self, rows, shape):
        return rows.reshape(shape)


def test_a_pattern_of_ones_own():
    params = {"w": jnp.array([[1.0, 2.0], [0.1, 9.0]])}
    mask = hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=Halves()).mask
    np.testing.assert_array_equal(mask["w"], [[False, False], [True, True]])


# -- bad input ------------------------------------------------------------------------------------

PARAMS = {"dense": {"kernel": jnp.ones((6, 4))}}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            hj.patterns.n_of_m(2, 4),
            r"n_of_m\(2, 4, axis=0\) does not fit dense/kernel of shape \(6, 4\): 4 does not divide",
        ),
        (
            hj.patterns.blocks((4, 4)),
            r"does not fit dense/kernel of shape \(6, 4\): 4 does not divide axis 0, which has 6",
        ),
        (hj.patterns.blocks((1, 1, 1)), "it needs 3 axes, and there are 2"),
        (hj.patterns.channels(-3), "there is no axis -3"),
        (hj.patterns.heads(5), "dense/kernel.* belongs to no attention that is known by name"),
        ({"conv/*": hj.patterns.filters()}, "`conv/\\*` matches none of: dense/kernel"),
        ({"dense/*": {"conv": hj.patterns.rows()}}, "`conv` matches none of"),
    ],
)
def test_a_pattern_that_does_not_fit_names_the_leaf(pattern, message):
    with pytest.raises(ValueError, match=message):
        hj.prune_once(PARAMS, hj.saliencies.magnitude(), 0.5, pattern=pattern)


def test_a_leaf_without_a_pattern_is_named():
    params = {**PARAMS, "other": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="none matches other"):
        hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern={"dense/*": hj.patterns.rows()})


def test_more_zeros_than_the_pattern_lets_go():
    params = {"w": jnp.ones((8, 2))}
    for allocation in (hj.allocations.global_threshold(), hj.allocations.uniform()):
        with pytest.raises(ValueError, match="within what `pattern` allows, got 0.6"):
            hj.prune_once(
                params,
                hj.saliencies.magnitude(),
                0.6,
                pattern=hj.patterns.n_of_m(2, 4),
                allocation=allocation,
            )


@pytest.mark.parametrize(
    "bad",
    [
        lambda: hj.patterns.n_of_m(4, 4),
        lambda: hj.patterns.n_of_m(0, 4),
        lambda: hj.patterns.blocks((0, 2)),
        lambda: hj.patterns.blocks(()),
        lambda: hj.patterns.heads(0),
    ],
)
def test_impossible_patterns(bad):
    with pytest.raises(ValueError, match="must be"):
        bad()


def test_tied_leaves_need_as_many_groups():
    tied = Along(0, "rows()", tie="together")
    with pytest.raises(ValueError, match="tied as together must have as many groups"):
        units_of({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, tied)


def test_rules_of_path_and_leaf():
    rule = lambda path, leaf: hj.patterns.rows() if leaf.ndim == 2 else hj.patterns.unstructured()
    found = patterns_of(rule, {"a": jnp.ones(3), "b": jnp.ones((2, 2))})
    assert [p.name for p in found] == ["unstructured()", "rows()"]


def test_an_attention_at_the_root_is_tied_too():
    rng = np.random.default_rng(4)
    shapes = {"query": (6, 3, 2), "key": (6, 3, 2), "value": (6, 3, 2), "out": (3, 2, 6)}
    params = {k: {"kernel": jnp.asarray(rng.normal(size=s))} for k, s in shapes.items()}
    mask = hj.prune_once(params, hj.saliencies.magnitude(), 0.4, pattern=hj.patterns.heads()).mask
    kept = [mask[k]["kernel"].all(axis=(1, 2) if k == "out" else (0, 2)) for k in shapes]
    for flags in kept:
        np.testing.assert_array_equal(flags, kept[0])
    assert int(kept[0].sum()) == 2


def test_small_units_take_the_place_of_large_ones_that_do_not_fit():
    """Whole filters of 36 rank lowest, the budget of 50 holds one: 14 single weights make up for it."""
    rng = np.random.default_rng(5)
    scores = {"conv": jnp.full((3, 3, 4, 6), 0.01), "dense": jnp.asarray(rng.uniform(1, 2, size=(20, 10)))}
    pattern = {"conv": hj.patterns.filters(), "*": hj.patterns.unstructured()}
    mask = hj.allocations.global_threshold(floor=0.0)(scores, 50 / 416, pattern)
    assert int((~mask["conv"]).sum()) == 36
    lowest = np.sort(np.asarray(scores["dense"]).ravel())[:14]
    np.testing.assert_array_equal(np.sort(np.asarray(scores["dense"])[~np.asarray(mask["dense"])]), lowest)
    traced = jax.jit(lambda s: hj.allocations.global_threshold(floor=0.0)(scores, s, pattern))(
        jnp.float32(50 / 416)
    )
    jax.tree.map(np.testing.assert_array_equal, mask, traced)


def test_a_group_is_ranked_by_what_is_left_of_it():
    scores = {"w": jnp.array([[-1.0, -1.0], [-jnp.inf, -3.0], [5.0, 5.0]])}
    mask = hj.allocations.global_threshold(floor=0.0)(scores, 1 / 3, hj.patterns.rows())["w"]
    np.testing.assert_array_equal(mask.all(axis=1), [True, False, True])


def test_an_allocation_is_no_pattern_though_it_can_be_called():
    for wrong in (hj.allocations.uniform(), hj.patterns.filters):
        with pytest.raises(TypeError, match="`pattern` must be a `Pattern`"):
            hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), 0.5, pattern=wrong)
