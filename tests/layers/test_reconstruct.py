"""Reconstruction beside least squares on the captured inputs, column by column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax.layers import _rows
from tests.layers.cases import CASES

LEAVES = {
    "dense": "wv",
    "tokens": "wv",
    "heads": "qkvo",
    "experts": "w",
    "convolution": "kg",
    "vmapped": "w",
}


def masks_of(params, pruned, share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.random(x.shape) > share) if k in pruned else jnp.asarray(True)
        for k, x in params.items()
    }


def rows_of(captured, path):
    """The inputs of a leaf, examples and positions one below the other: (rows, stack, inputs)."""
    place = captured.paths.index(path)
    found = [np.asarray(use.inputs) for use in captured.uses[place]]
    return np.concatenate([x.reshape(-1, *x.shape[2:]) for x in found]), captured.layouts[place][0].moves


def least_squares(dense_rows, rows, matrices, kept, damping, num):
    """By `lstsq`: the rows, and below them √λ of the identity."""
    best = np.zeros(matrices.shape)
    for s, o in np.ndindex(matrices.shape[0], matrices.shape[2]):
        a, w = rows[:, s] / num**0.5, matrices[s, :, o]
        shift = damping * np.trace(a.T @ a) / len(w)
        below = np.sqrt(shift) * np.eye(len(w))
        target = np.concatenate([dense_rows[:, s] / num**0.5 @ w, below @ w])
        columns = np.concatenate([a, below])[:, kept[s, :, o]]
        best[s, kept[s, :, o], o] = np.linalg.lstsq(columns, target)[0]
    return best


@pytest.mark.parametrize("name", LEAVES)
def test_it_is_constrained_least_squares(x64, name):
    case = CASES[name]
    params, batch = case.params(), case.batch(7)
    mask = masks_of(params, LEAVES[name])
    moments = hj.layers.moments(case.loss_fn, params, [batch])
    found = hj.layers.reconstruct(params, mask, moments, empty="allow")
    captured = hj.layers.capture(case.loss_fn, params, batch)
    for path in LEAVES[name]:
        rows, moves = rows_of(captured, path)
        sides = moves.apply(np.asarray(params[path])), moves.apply(np.asarray(mask[path]))
        expected = least_squares(rows, rows, *sides, 0.01, 7)
        np.testing.assert_allclose(moves.apply(found.params[path]), expected, rtol=1e-8, atol=1e-11)
        assert found.leaves[path].error <= found.leaves[path].masked
    assert all(found.params[path] is params[path] for path in params if path not in LEAVES[name])


@pytest.mark.parametrize("name", ["tokens", "heads"])
def test_in_sequence_every_layer_sees_the_pruned_ones_before(x64, name):
    case = CASES[name]
    params, batch = case.params(), case.batch(7)
    mask = masks_of(params, LEAVES[name])
    moments = hj.layers.moments(case.loss_fn, params, [batch])
    found = hj.layers.reconstruct(params, mask, moments, [batch], empty="allow").params
    dense = hj.layers.capture(case.loss_fn, params, batch)
    pruned = hj.layers.capture(case.loss_fn, found, batch)
    for path in LEAVES[name]:
        (before, moves), (now, _) = rows_of(dense, path), rows_of(pruned, path)
        sides = moves.apply(np.asarray(params[path])), moves.apply(np.asarray(mask[path]))
        expected = least_squares(before, now, *sides, 0.01, 7)
        np.testing.assert_allclose(moves.apply(found[path]), expected, rtol=1e-8, atol=1e-11)


def deep(p, x):
    """Three layers in a scan."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["ws"])[0]
    return x @ p["v"]


def unrolled(p, x):
    for name in "abc":
        x = jnp.tanh(x @ p[name])
    return x @ p["v"]


def test_steps_of_a_scan_are_taken_one_after_the_other(x64):
    rng = np.random.default_rng(0)
    ws, v = jnp.asarray(rng.normal(size=(3, 4, 4))), jnp.asarray(rng.normal(size=(4, 2)))
    kept = jnp.asarray(rng.random(ws.shape) > 0.4)
    x = jnp.asarray(rng.normal(size=(9, 4)))
    likelihood = hj.likelihoods.gaussian
    stacked, apart = {"ws": ws, "v": v}, {**dict(zip("abc", ws, strict=True)), "v": v}
    found = hj.layers.reconstruct(
        stacked,
        {"ws": kept, "v": True},
        hj.layers.moments(deep, stacked, [x], likelihood=likelihood),
        [x[:4], x[4:]],
        empty="allow",
    )
    expected = hj.layers.reconstruct(
        apart,
        {**dict(zip("abc", kept, strict=True)), "v": True},
        hj.layers.moments(unrolled, apart, [x], likelihood=likelihood),
        [x],
        empty="allow",
    )
    np.testing.assert_allclose(
        found.params["ws"], jnp.stack([expected.params[name] for name in "abc"]), rtol=1e-8, atol=1e-11
    )


def twice(p, batch):
    """A leaf that is used again behind another."""
    x, y = batch
    x = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])
    return jnp.mean((jnp.tanh(x @ p["a"]) @ p["c"] - y) ** 2)


def test_what_comes_behind_a_leaf_that_is_used_twice_sees_both_of_its_uses_pruned(x64):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(4, 4))) for name in "abc"}
    mask = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) > 0.4), params)
    batch = tuple(jnp.asarray(rng.normal(size=(9, 4))) for _ in range(2))
    moments = hj.layers.moments(twice, params, [batch])
    parts = (jax.tree.map(lambda x, own=own: x[own], batch) for own in (slice(4), slice(4, 9)))
    found = hj.layers.reconstruct(params, mask, moments, parts, empty="allow").params
    assert not np.allclose(found["a"][mask["a"]], params["a"][mask["a"]])
    (before, moves), (now, _) = (rows_of(hj.layers.capture(twice, p, batch), "c") for p in (params, found))
    sides = moves.apply(np.asarray(params["c"])), moves.apply(np.asarray(mask["c"]))
    expected = least_squares(before, now, *sides, 0.01, 9)
    np.testing.assert_allclose(moves.apply(found["c"]), expected, rtol=1e-8, atol=1e-11)


TRACES = []


def counted(p, x):
    TRACES.append(x.shape)
    return jnp.tanh(x @ p["a"]) @ p["b"]


def test_a_network_of_the_same_shapes_is_traced_no_more():
    rng = np.random.default_rng(0)
    p = {name: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for name in "ab"}
    x = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)
    mask = jax.tree.map(lambda w: jnp.eye(4, dtype=bool), p)

    def run(p):
        moments = hj.layers.moments(counted, p, [x], likelihood=hj.likelihoods.gaussian)
        return hj.layers.reconstruct(p, mask, moments, [x]).params

    first, traces = run(p), len(TRACES)
    other = run(jax.tree.map(lambda w: 2 * w, p))
    assert len(TRACES) == traces
    assert not bool(jnp.all(first["b"] == other["b"]))


def linear(w, x):
    return x @ w


def of_matrix(width, outputs, number, seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(number, width)) @ rng.normal(size=(width, width))
    w, x = jnp.asarray(rng.normal(size=(width, outputs)), dtype), jnp.asarray(mixed, dtype)
    return w, x, hj.layers.moments(linear, w, [x], likelihood=hj.likelihoods.gaussian)


@pytest.fixture
def as_if_large(monkeypatch):
    """Systems as small as they can be, which small matrices do without."""
    monkeypatch.setattr(_rows, "SMALL", 0)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_zeros_and_kept_entries_give_the_same(x64, as_if_large, share):
    w, x, moments = of_matrix(20, 6, 50)
    mask = jnp.asarray(np.random.default_rng(1).random(w.shape) > share)
    found = hj.layers.reconstruct(w, mask, moments, empty="allow").params
    expected = least_squares(x[:, None], x[:, None], w[None], np.asarray(mask)[None], 0.01, 50)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-11)
    assert bool(jnp.all((found == 0) | mask))


def test_columns_that_share_a_mask_share_a_factor(x64, as_if_large):
    w, x, moments = of_matrix(12, 8, 40)
    mask = jnp.asarray(np.repeat(np.random.default_rng(1).random((12, 2)) > 0.5, 4, axis=1))
    found = hj.layers.reconstruct(w, mask, moments).params
    expected = least_squares(x[:, None], x[:, None], w[None], np.asarray(mask)[None], 0.01, 40)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-11)


def test_fewer_examples_than_inputs_go_by_the_damping(x64):
    w, x, moments = of_matrix(12, 3, 5)
    mask = jnp.asarray(np.random.default_rng(1).random(w.shape) > 0.3)
    found = hj.layers.reconstruct(w, mask, moments).params
    expected = least_squares(x[:, None], x[:, None], w[None], np.asarray(mask)[None], 0.01, 5)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-11)
    with pytest.raises(ValueError, match="`damping` must make"):
        hj.layers.reconstruct(w, mask, moments, damping=0.0)


def test_scale_and_dtype():
    w, x, moments = of_matrix(12, 3, 40, dtype=jnp.float32)
    mask = jnp.asarray(np.random.default_rng(1).random(w.shape) > 0.4)
    found = hj.layers.reconstruct(w, mask, moments).params
    large = hj.layers.moments(linear, w, [1e4 * x], likelihood=hj.likelihoods.gaussian)
    np.testing.assert_allclose(hj.layers.reconstruct(w, mask, large).params, found, rtol=1e-3, atol=1e-4)
    half = w.astype(jnp.bfloat16)
    low = hj.layers.moments(linear, half, [x.astype(jnp.bfloat16)], likelihood=hj.likelihoods.gaussian)
    assert hj.layers.reconstruct(half, mask, low).params.dtype == jnp.bfloat16


def refused(params, mask, moments, words, **options):
    with pytest.raises((ValueError, TypeError), match=words):
        hj.layers.reconstruct(params, mask, moments, **options)


def test_bad_input_is_named():
    w, x, moments = of_matrix(4, 3, 9, dtype=jnp.float32)
    mask = jnp.ones((4, 3), bool).at[0, 0].set(False)
    refused(w, mask.at[:, 1].set(False), moments, "1 of 3 outputs, the first 1")
    refused(w, mask.astype(float), moments, "must be boolean")
    refused(w, mask[:2], moments, "of shape")
    refused(w, jnp.asarray(False), moments, "must be boolean")
    refused({"w": w}, {"w": mask}, moments, r"shape \(4, 3\), no moments")
    refused(w[:, :2], mask[:, :2], moments, r"moments of shape \(4, 3\)")
    refused(w + 1, mask, moments, "had other values")
    means = hj.layers.moments(linear, w, [x], likelihood=hj.likelihoods.gaussian, positions="reduce")
    refused(w, mask, means, 'positions="expand"')


def test_tied_leaves_with_inputs_on_both_sides_are_refused_unless_they_stay():
    def tied(p, x):
        return jnp.tanh(x @ p["e"]) @ p["e"].T @ p["w"]

    rng = np.random.default_rng(0)
    p = {"e": jnp.asarray(rng.normal(size=(4, 3))), "w": jnp.asarray(rng.normal(size=(4, 2)))}
    x = jnp.asarray(rng.normal(size=(5, 4)))
    moments = hj.layers.moments(tied, p, [x], likelihood=hj.likelihoods.gaussian)
    one = jnp.ones((4, 3), bool).at[0, 0].set(False)
    refused(p, {"e": one, "w": True}, moments, "on one side")
    kept = jnp.ones((4, 2), bool).at[0, 0].set(False)
    assert hj.layers.reconstruct(p, {"e": True, "w": kept}, moments).params["w"][0, 0] == 0


def test_it_prints_a_table():
    w, _, moments = of_matrix(4, 3, 9, dtype=jnp.float32)
    mask = jnp.ones((4, 3), bool).at[0, 0].set(False)
    assert "8.3" in str(hj.layers.reconstruct(w, mask, moments))


def test_a_number_in_the_batch_is_no_row_of_it(x64):
    case = CASES["dense"]
    params, batch = case.params(), {"x": case.batch(7), "t": 2.0}
    fn = lambda p, b: b["t"] * case.loss_fn(p, b["x"])
    moments = hj.layers.moments(fn, params, [batch])
    mask = masks_of(params, LEAVES["dense"])
    found = hj.layers.reconstruct(params, mask, moments, [batch], empty="allow")
    assert bool(jnp.all(jnp.where(mask["w"], True, found.params["w"] == 0)))


def test_readers_of_channels_that_went_are_fitted_by_ridge_regression(x64):
    """And the smaller network computes the same."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 4)))
    params = {"in": jnp.asarray(rng.normal(size=(4, 8))), "out": jnp.asarray(rng.normal(size=(8, 3)))}
    model_fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]
    moments = hj.layers.moments(model_fn, params, [x], likelihood=hj.likelihoods.gaussian)
    gone = jnp.arange(8) % 2 == 0
    mask = {"in": jnp.broadcast_to(~gone, (4, 8)), "out": jnp.ones((8, 3), bool)}
    found = hj.layers.reconstruct(params, mask, moments, [x], damping=0.1, empty="allow").params
    np.testing.assert_allclose(found["in"], jnp.where(gone, 0, params["in"]), rtol=1e-12)
    dense, now = (np.tanh(x @ w) for w in (params["in"], found["in"]))
    matrix = now.T @ now / 40 + 0.1 * np.eye(8)
    wanted = np.linalg.solve(matrix, now.T @ dense @ params["out"] / 40 + 0.1 * params["out"])
    np.testing.assert_allclose(found["out"], wanted, rtol=1e-9)
    small = hj.compact(model_fn, found, x)
    assert small.params["out"].shape == (4, 3)
    np.testing.assert_allclose(small.model_fn(small.params, x), model_fn(found, x), rtol=1e-12)
