from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from hessjax._core import _tree


def test_sums_over_bfloat16_are_taken_in_float32():
    ones = {"a": jnp.full(1000, 0.1, jnp.bfloat16), "b": jnp.ones((), jnp.bfloat16)}
    assert _tree.inner(ones, ones).dtype == jnp.float32
    want = 1000 * float(jnp.bfloat16(0.1)) ** 2 + 1
    np.testing.assert_allclose(_tree.inner(ones, ones), want, rtol=1e-5)


def test_block_algebra_is_matrix_algebra(x64):
    rng = np.random.default_rng(0)
    like = oracles.tree_like(11)
    block = {k: jnp.asarray(rng.normal(size=(4, *v.shape))) for k, v in like.items()}
    vector = _tree.row(block, 2)
    B = oracles.rows(block)
    np.testing.assert_allclose(_tree.block_inner(block, vector), B @ B[2], rtol=1e-12)
    np.testing.assert_allclose(_tree.gram(block, block), B @ B.T, rtol=1e-12)
    C = rng.normal(size=(2, 4))
    np.testing.assert_allclose(oracles.rows(_tree.combine(jnp.asarray(C), block)), C @ B, rtol=1e-12)
    np.testing.assert_allclose(_tree.norm(vector), np.linalg.norm(B[2]), rtol=1e-12)
    np.testing.assert_allclose(sum(_tree.inner_by_leaf(vector, vector)), B[2] @ B[2], rtol=1e-12)


@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_paths_are_readable_in_every_container(container):
    paths = _tree.leaf_paths(oracles.CONTAINERS[container](oracles.leaves()))
    assert len(paths) == 4
    if container != "tuple":
        assert paths == list(oracles.leaves())
    assert _tree.leaf_paths(jnp.zeros(2)) == ["."]


def test_size_counts_scalars_and_empty_leaves():
    assert _tree.size(oracles.tree_like(11)) == 11


def test_complex_vectors_are_refused():
    for leaf in (1j, jnp.full(2, 1j), np.full(2, 1j)):
        like = jnp.zeros(np.shape(leaf))
        with pytest.raises(TypeError, match=r"`vector` must be real, got .*complex"):
            _tree.check_like(leaf, like, "vector", "params")


class Trained(NamedTuple):
    """As flax's `TrainState` is made."""

    params: dict
    opt_state: tuple


STATES = {
    "a function": jax.tree_util.Partial(jnp.multiply, jnp.ones(2)),
    "take its `.params`": Trained({"w": jnp.ones(2)}, ()),
    "ScaleByAdamState": (optax.scale_by_adam().init(jnp.ones(2)), optax.EmptyState()),
    "TraceState": {"a": optax.trace(0.9).init({"w": jnp.ones(2)})},
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("check", [_tree.check_floating, _tree.check_leaves])
def test_functions_and_states_are_no_params(check, name):
    with pytest.raises(TypeError, match=f"`params` must be a tree of arrays, got .*{name}"):
        check(STATES[name])


def test_params_under_a_mask_of_optax_are_params():
    _tree.check_floating({"a": optax.MaskedNode(), "b": jnp.ones(2)})


NO_NUMBERS = [np.array(["a"]), np.array([1.0, "a"], object), np.array(["2020"], "datetime64[Y]"),
              np.zeros(2, [("x", float)])]  # fmt: skip


@pytest.mark.parametrize("leaf", NO_NUMBERS, ids=lambda leaf: leaf.dtype.kind)
@pytest.mark.parametrize("check", [_tree.check_floating, _tree.check_leaves])
def test_numpy_arrays_that_jax_has_no_dtype_for_are_named(check, leaf):
    with pytest.raises(TypeError, match=r"`params` must .*\n  a/0: "):
        check({"a": [leaf], "b": jnp.ones(2)})


@pytest.mark.parametrize("leaf", [jnp.ones(2, int), np.ones(2, bool), [1, 2]], ids=["jax", "bool", "list"])
def test_vectors_of_integers_are_refused(leaf):
    like = jax.tree.map(lambda x: jnp.ones(jnp.shape(x)), leaf)
    with pytest.raises(TypeError, match="`vector` must be floating point, got"):
        _tree.check_vector(leaf, like)
