"""Attention heads: the same ones everywhere, whatever the layout, and errors that name leaf and count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

MAGNITUDE = hj.saliencies.magnitude()
NAMES = ("query", "key", "value", "out")


def numbers(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def kernels(features=8, heads=4, kv=4, width=2):
    """One attention with heads on axes of their own."""
    shapes = [(features, n, width) for n in (heads, kv, kv)] + [(heads, width, features)]
    return dict(zip(NAMES, (numbers(i, *shape) for i, shape in enumerate(shapes)), strict=True))


def module(leaves):
    return {name: {"kernel": x} for name, x in leaves.items()}


def masks(params, pattern, sparsity=0.5, **options):
    return hj.prune_once(params, MAGNITUDE, sparsity, pattern=pattern, **options).mask


def fused(leaves):
    """Heads and their entries in one axis."""
    return {
        name: x.reshape(-1, x.shape[-1]) if name == "out" else x.reshape(x.shape[0], -1)
        for name, x in leaves.items()
    }


SPLIT = kernels()
MASK = {name: found["kernel"] for name, found in masks(module(SPLIT), hj.patterns.heads()).items()}


def assert_same(found, mask=MASK):
    for name, flags in fused(mask).items():
        np.testing.assert_array_equal(np.reshape(found[name], flags.shape), flags)


def test_the_mask_that_the_others_are_held_against():
    alive = MASK["query"].any((0, 2))
    assert int(alive.sum()) == 2
    for name, axes in zip(NAMES, ((0, 2), (0, 2), (0, 2), (1, 2)), strict=True):
        np.testing.assert_array_equal(MASK[name].any(axes), alive)
        np.testing.assert_array_equal(MASK[name].all(axes), alive)


@pytest.mark.parametrize("root", ["encoder", "readout_block", "layer_without_bias", "outer"])
def test_fused_whatever_the_modules_around_are_called(root):
    found = masks({root: {"attention": module(fused(SPLIT))}}, hj.patterns.heads(4))[root]["attention"]
    assert_same({name: found[name]["kernel"] for name in NAMES})


def test_berts_layout():
    parts = fused(SPLIT)
    params = {"attention": {
        "self": {name: {"kernel": parts[name]} for name in NAMES[:3]},
        "output": {"dense": {"kernel": parts["out"]}, "LayerNorm": {"scale": jnp.ones(8)}},
    }}  # fmt: skip
    found = masks(params, hj.patterns.heads(4))["attention"]
    assert_same(
        {**{n: found["self"][n]["kernel"] for n in NAMES[:3]}, "out": found["output"]["dense"]["kernel"]}
    )


@pytest.mark.parametrize("flip", [False, True], ids=["in out", "out in"])
def test_three_projections_in_one_kernel(flip):
    parts = fused(SPLIT)
    whole = jnp.concatenate([parts[name] for name in NAMES[:3]], axis=1)
    turn = jnp.transpose if flip else jnp.asarray
    params = {"attn": {"c_attn": {"kernel": turn(whole)}, "c_proj": {"kernel": turn(parts["out"])}}}
    found = masks(params, hj.patterns.heads(4))["attn"]
    pieces = jnp.split(turn(found["c_attn"]["kernel"]), 3, axis=1)
    assert_same({**dict(zip(NAMES, pieces, strict=False)), "out": turn(found["c_proj"]["kernel"])})


def test_three_projections_on_an_axis():
    whole = jnp.stack([SPLIT[name] for name in NAMES[:3]], axis=1)
    found = masks({"qkv": {"kernel": whole}, "out": {"kernel": SPLIT["out"]}}, hj.patterns.heads())
    pieces = jnp.moveaxis(found["qkv"]["kernel"], 1, 0)
    assert_same({**dict(zip(NAMES, pieces, strict=False)), "out": found["out"]["kernel"]})


def test_leaves_that_are_out_in():
    params = {f"{name}_proj": {"weight": x.T} for name, x in fused(SPLIT).items()}
    found = masks(params, hj.patterns.heads(4))
    assert_same({name: found[f"{name}_proj"]["weight"].T for name in NAMES})


def test_other_names_by_words():
    parts = fused(SPLIT)
    params = {"mixer": {name: {"kernel": parts[x]} for name, x in zip("abcd", NAMES, strict=True)}}
    axes = {"*/d/kernel": "heads out", "*": "in heads"}
    found = masks(params, hj.patterns.heads(4), axes=axes)["mixer"]
    assert_same({x: found[name]["kernel"] for name, x in zip("abcd", NAMES, strict=True)})


@pytest.mark.parametrize("counts", [(3,), (2, 2)])
def test_layers_lose_heads_of_their_own(counts):
    number = int(np.prod(counts))
    layers = [
        kernels() if i == 0 else {k: numbers(9 * i + j, *x.shape) for j, (k, x) in enumerate(SPLIT.items())}
        for i in range(number)
    ]
    stack = {
        name: jnp.stack([layer[name] for layer in layers]).reshape(*counts, *SPLIT[name].shape)
        for name in NAMES
    }
    uniform = hj.allocations.uniform()
    found = masks({"attn": module(stack)}, hj.patterns.heads(), allocation=uniform)["attn"]
    for i, layer in enumerate(layers):
        alone = masks({"attn": module(layer)}, hj.patterns.heads(), allocation=uniform)["attn"]
        for name in NAMES:
            flags = found[name]["kernel"].reshape(number, *SPLIT[name].shape)[i]
            np.testing.assert_array_equal(flags, alone[name]["kernel"])


def test_biases_lose_the_entries_of_a_head_and_the_outputs_none():
    params = {name: {"kernel": x, "bias": numbers(5, *x.shape[1:])} for name, x in SPLIT.items()}
    params["out"]["bias"] = numbers(6, 8)
    found = masks({"attn": params}, hj.patterns.heads(), where="*")["attn"]
    alive = found["query"]["kernel"].any((0, 2))
    assert int(alive.sum()) == 2
    for name in NAMES[:3]:
        np.testing.assert_array_equal(found[name]["bias"], jnp.broadcast_to(alive[:, None], (4, 2)))
    assert found["out"]["bias"].all()
    np.testing.assert_array_equal(found["out"]["kernel"].all((1, 2)), alive)


@pytest.mark.parametrize("is_fused", [False, True])
def test_grouped_queries_go_with_their_key_and_value(is_fused):
    leaves = kernels(heads=6, kv=3)
    params = module(fused(leaves) if is_fused else leaves)
    pattern = hj.patterns.heads(6 if is_fused else None, num_kv_heads=3)
    found = {
        name: np.reshape(x["kernel"], leaves[name].shape) for name, x in masks(params, pattern, 1 / 3).items()
    }
    alive = found["key"].any((0, 2))
    assert alive.sum() == 2
    np.testing.assert_array_equal(found["value"].any((0, 2)), alive)
    np.testing.assert_array_equal(found["query"].any((0, 2)), alive.repeat(2))
    np.testing.assert_array_equal(found["out"].any((1, 2)), alive.repeat(2))


def test_queries_alone_where_all_share_one_key():
    params = module(kernels(kv=1))
    found = masks(params, hj.patterns.heads(), where=["query/kernel", "out/kernel"])
    alive = found["query"]["kernel"].any((0, 2))
    assert int(alive.sum()) == 2
    np.testing.assert_array_equal(found["out"]["kernel"].any((1, 2)), alive)


@pytest.mark.parametrize(
    ("params", "pattern", "message"),
    [
        (module(kernels(kv=2)), hj.patterns.heads(), r"query has 4 heads .*heads\(num_kv_heads=2\)"),
        (module(fused(kernels(kv=2))), hj.patterns.heads(4), "must find heads of one width.*key has 4 heads"),
        (module(SPLIT), hj.patterns.heads(3), "key/kernel.*it has 4 heads, and `num_heads` is 3"),
        (module(kernels(kv=2)), hj.patterns.heads(num_kv_heads=4), "it has 2 heads, and `num_kv_heads` is 4"),
        (module(fused(SPLIT)), hj.patterns.heads(), "share an axis of 8: say how many heads"),
        (module(fused(SPLIT)), hj.patterns.heads(3), "3 does not divide axis"),
        ({"attn": module({k: SPLIT[k] for k in NAMES[:3]})}, hj.patterns.heads(), "attn has no output"),
        ({**module(SPLIT), "mlp": {"kernel": jnp.ones((8, 8))}}, hj.patterns.heads(), "mlp/kernel"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(params, pattern, message):
    with pytest.raises(ValueError, match=message):
        masks(params, pattern)


def test_numbers_of_heads():
    with pytest.raises(ValueError, match="`num_kv_heads` must divide `num_heads`, which is 8, got 3"):
        hj.patterns.heads(8, num_kv_heads=3)
    assert repr(hj.patterns.heads(8, num_kv_heads=2)) == "heads(8, num_kv_heads=2)"


def test_nothing_but_what_has_no_heads():
    params = {"attn": {**module(SPLIT), "out": {"kernel": SPLIT["out"], "bias": jnp.ones(8)}}}
    with pytest.raises(ValueError, match="`pattern` must let something go.*attn/out/bias"):
        masks(params, hj.patterns.heads(), where="*/bias")
