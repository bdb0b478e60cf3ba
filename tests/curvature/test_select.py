import jax
import numpy as np
import oracles
import pytest

import hessjax as hj


def block_of(params, paths):
    """Flat indices of the leaves at these paths."""
    offsets, start = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in paths:
            offsets += range(start, start + leaf.size)
        start += leaf.size
    return np.array(offsets)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("d_*", ["d_kernel"]),
        (["a_bias", "*scale"], ["a_bias", "c_scale"]),
        (lambda path, leaf: leaf.ndim == 1, ["a_bias"]),
        ("*", ["a_bias", "b_empty", "c_scale", "d_kernel"]),
    ],
)
def test_the_part_has_its_block_of_the_hessian(x64, where, paths):
    params, batch = oracles.leaves(), oracles.batch()
    selection = hj.select(params, where)
    matvec = hj.hessian(selection.restrict(oracles.loss_fn), selection.part, batch)
    index = block_of(params, paths)
    want = oracles.dense_hessian(oracles.loss_fn, params, batch)[np.ix_(index, index)]
    np.testing.assert_allclose(oracles.matrix_of(matvec, selection.part), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_merge_gives_the_whole_back_in_every_container(container):
    params = oracles.CONTAINERS[container](oracles.leaves())
    selection = hj.select(params, lambda path, leaf: leaf.ndim == 2)
    whole = selection.merge(selection.part)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    assert len(jax.tree.leaves(selection.part)) == 2


def test_another_checkpoint_compiles_nothing(compilations):
    vector = hj.select(oracles.leaves(7), "d_*").part
    batch = oracles.batch()
    checkpoints = [oracles.leaves(i) for i in range(2)]
    for params in checkpoints:
        selection = hj.select(params, "d_*")
        del compilations[:]
        hj.hessian(selection.restrict(oracles.loss_fn), selection.part, batch)(vector)
    assert not compilations


def test_works_over_batches_and_in_the_one_liners():
    params = oracles.leaves()
    part = hj.select(params, "d_kernel")
    loss = part.restrict(oracles.loss_fn)
    batches = [oracles.batch(3), oracles.batch(4, 1)]
    matvec = hj.over_batches(lambda b: hj.hessian(loss, part.part, b), batches)
    parts = hj.trace_by_leaf(matvec, jax.random.key(0), part.part, 3)
    assert list(parts.leaves) == ["d_kernel"]


def test_a_glob_that_matches_nothing_is_named():
    message = r"`where`.*`conv\*` matches none of: a_bias, b_empty, c_scale, d_kernel"
    with pytest.raises(ValueError, match=message):
        hj.select(oracles.leaves(), ["d_*", "conv*"])
    with pytest.raises(ValueError, match="its predicate matches none"):
        hj.select(oracles.leaves(), lambda path, leaf: False)
    with pytest.raises(ValueError, match="`where` must name at least one pattern, got an empty list"):
        hj.select(oracles.leaves(), [])
