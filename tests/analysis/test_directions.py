import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def params(dtype=None):
    rng = np.random.default_rng(0)
    shapes = {"bias": (4,), "conv": (3, 3, 2, 4), "dense": (5, 4), "empty": (0, 2), "scale": ()}
    return {k: jnp.asarray(rng.normal(size=shape) * 3, dtype) for k, shape in shapes.items()}


@pytest.mark.smoke
def test_every_filter_has_the_norm_of_the_params_filter(x64):
    like = params()
    like["dense"] = like["dense"].at[:, 1].set(0)
    direction = hj.directions.random(KEY, like)
    for name in ("conv", "dense"):
        norms = [jnp.linalg.norm(np.reshape(tree[name], (-1, 4)), axis=0) for tree in (direction, like)]
        np.testing.assert_allclose(*norms, rtol=1e-12)
    assert not jnp.any(direction["bias"])
    assert not direction["scale"]
    assert direction["empty"].shape == (0, 2)


def test_whole_leaves_and_other_axes(x64):
    like = params()
    whole = hj.directions.random(KEY, like, filter_axis=None)
    for name in ("conv", "dense"):
        np.testing.assert_allclose(jnp.linalg.norm(whole[name]), jnp.linalg.norm(like[name]), rtol=1e-12)
    rows = hj.directions.random(KEY, like, filter_axis=0)["dense"]
    np.testing.assert_allclose(
        jnp.linalg.norm(rows, axis=1), jnp.linalg.norm(like["dense"], axis=1), rtol=1e-12
    )


def test_directions_are_gaussian_up_to_scale_and_differ_by_key():
    like = jnp.ones((4000, 2))
    first, second = (np.asarray(hj.directions.random(jax.random.key(i), like)) for i in range(2))
    assert abs(np.mean(first**4) / np.mean(first**2) ** 2 - 3) < 0.3
    assert abs(np.vdot(first, second)) / np.vdot(first, first) < 0.05
    same = hj.directions.random(jax.random.key(0), like)
    np.testing.assert_array_equal(first, same)


@pytest.mark.parametrize("name", oracles.CONTAINERS)
def test_any_container_and_low_precision(name):
    like = oracles.CONTAINERS[name](oracles.leaves(dtype=jnp.bfloat16))
    for direction in (hj.directions.random(KEY, like), hj.directions.line(like, like)):
        assert jax.tree.structure(direction) == jax.tree.structure(like)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(direction))


def test_a_line_leads_from_one_to_the_other(x64):
    a, b, data = oracles.leaves(0), oracles.leaves(1), oracles.batch()
    ends = hj.landscape(
        oracles.loss_fn, a, data, directions=hj.directions.line(a, b), distances=[0.0, 1.0]
    ).losses
    np.testing.assert_allclose(ends, [oracles.loss_fn(p, data) for p in (a, b)], rtol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="`params` must have a leaf with two or more axes, got none"):
        hj.directions.random(KEY, jnp.ones(3))
    with pytest.raises(ValueError, match=r"`filter_axis` must be .* which have \[2, 4\] axes, got 2"):
        hj.directions.random(KEY, params(), filter_axis=2)
    with pytest.raises(TypeError, match="`other` must have real"):
        hj.directions.line(jnp.ones(3), jnp.arange(3))
    with pytest.raises(ValueError, match=r"`other` must have the structure of `params`, but\n  b: missing"):
        hj.directions.line({"a": jnp.ones(3), "b": jnp.ones(1)}, {"a": jnp.ones(3)})


def test_scanned_layers_have_directions_of_their_own(x64):
    like = {"norm": {"scale": jnp.ones((3, 4))}, "dense": {"kernel": params()["conv"].reshape(3, 6, 4)}}
    found = hj.directions.random(KEY, like)
    assert not found["norm"]["scale"].any()
    lengths = [jnp.linalg.norm(tree["dense"]["kernel"], axis=1) for tree in (found, like)]
    np.testing.assert_allclose(*lengths, rtol=1e-12)
    whole = hj.directions.random(KEY, like, filter_axis=None)
    lengths = [jnp.linalg.norm(tree["dense"]["kernel"], axis=(1, 2)) for tree in (whole, like)]
    np.testing.assert_allclose(*lengths, rtol=1e-12)
    with pytest.raises(
        ValueError, match="`filter_axis` must not count layers, as axis 0 does in dense/kernel"
    ):
        hj.directions.random(KEY, like, filter_axis=0)


def test_directions_of_kernels_that_are_out_in_and_of_heads(x64):
    like = {
        "linear": {"weight": params()["dense"]},
        "query": {"kernel": params()["conv"][0], "bias": jnp.ones((2, 4))},
    }
    found = hj.directions.random(KEY, like)
    lengths = [jnp.linalg.norm(tree["linear"]["weight"], axis=1) for tree in (found, like)]
    np.testing.assert_allclose(*lengths, rtol=1e-12)
    lengths = [jnp.linalg.norm(tree["query"]["kernel"], axis=0) for tree in (found, like)]
    np.testing.assert_allclose(*lengths, rtol=1e-12)
    assert not found["query"]["bias"].any()
    turned = hj.directions.random(KEY, {"kernel": params()["dense"]}, axes={"kernel": "out in"})
    np.testing.assert_allclose(
        jnp.linalg.norm(turned["kernel"], axis=1), jnp.linalg.norm(params()["dense"], axis=1), rtol=1e-12
    )
