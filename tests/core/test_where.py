"""Which leaves: globs, functions, booleans as a tree."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hessjax as hj
from hessjax._core import _tree
from hessjax._core._where import match


def test_a_path_matches_itself_even_where_it_reads_otherwise_as_a_glob():
    tree = {"w[a]": 1, "wa": 2}
    assert match(tree, "w[a]") == {"w[a]": True, "wa": True}
    assert match(tree, "w[[]a]") == {"w[a]": True, "wa": False}


TREE = {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "body": [jnp.ones(3), jnp.ones((2, 3))]}
KERNEL = {"head/kernel"}


def chosen(tree, where):
    hits = jax.tree.leaves(match(tree, where))
    return {path for path, hit in zip(_tree.leaf_paths(tree), hits, strict=True) if hit}


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ({"head": {"kernel": True, "bias": False}, "body": [False, False]}, KERNEL),
        ({"head": {"kernel": True, "bias": False}, "body": False}, KERNEL),
        ({"head": True, "body": [np.True_, False]}, {"head/kernel", "head/bias", "body/0"}),
        (True, {"head/kernel", "head/bias", "body/0", "body/1"}),
        (lambda params: {"head": {"kernel": True, "bias": False}, "body": False}, KERNEL),
        (lambda params: jax.tree.map(lambda x: x.shape == (2, 2), params), KERNEL),
        (flax.core.freeze({"head": {"kernel": jnp.array(True), "bias": False}, "body": False}), KERNEL),
        ({"head/k*", "body/1"}, KERNEL | {"body/1"}),
        (["head/k*", lambda path, leaf: leaf.ndim == 1], KERNEL | {"head/bias", "body/0"}),
    ],
)
def test_leaves_by_flags_globs_and_functions(where, paths):
    assert chosen(TREE, where) == paths


def test_a_dict_of_flags_serves_every_container():
    flags = {"kernel": True, "bias": False}
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    assert chosen(state, flags) == {"kernel"}
    assert chosen(state, jax.tree.map(lambda x: x.ndim == 2, state)) == {"kernel"}
    assert chosen(flax.core.freeze({"kernel": 1.0, "bias": 2.0}), flags) == {"kernel"}


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"head": False, "body": False}, ValueError, "a tree of booleans that are all False"),
        ({"head": True}, ValueError, "no entry for body/0, body/1"),
        ({"head": True, "body": False, "tail": True}, ValueError, "entries for no leaf: tail"),
        ([True, False], ValueError, "no entry for"),
        (None, TypeError, "must be a glob over paths, several, .*got None"),
        ({"head": "*"}, TypeError, "must be a glob .*got {'head': '\\*'}"),
        ({}, TypeError, "must be a glob"),
        (3, TypeError, "must be a glob"),
        (["*", 3], TypeError, "must be a glob"),
        ([], ValueError, "an empty list"),
        (lambda params: None, TypeError, r"`where\(params\)` must be a glob .*got None"),
        ("nothing", ValueError, "`nothing` matches none of"),
    ],
)  # fmt: skip
def test_what_selects_nothing_or_is_no_selection(where, error, message):
    with pytest.raises(error, match=message):
        match(TREE, where)


def test_everybody_reads_flags_alike():
    params = {"kernel": jnp.arange(16.0).reshape(4, 4) + 1, "bias": jnp.arange(1.0, 5) / 100}
    flags = {"kernel": True, "bias": False}
    rule = hj.saliencies.magnitude()
    pruned = hj.prune_once(params, rule, 0.5, where=flags)
    assert int((pruned.params["kernel"] == 0).sum()) == 8
    assert pruned.mask["bias"].shape == ()
    mask = hj.mask_of(hj.prune(optax.sgd(0.1), rule, 0.5, where=flags).init(params))
    jax.tree.map(np.testing.assert_array_equal, mask, pruned.mask)
    assert hj.select(params, flags).part["bias"] is None
    rows = hj.sensitivity(None, params, [0.5], diagonal=params, where=flags).rows
    assert [row.parameter for row in rows] == ["kernel"]
