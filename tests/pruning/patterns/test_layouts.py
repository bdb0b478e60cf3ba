"""Every pattern in every layout: each layer as if it stood alone, each kernel as if it were (in, out)."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

MAGNITUDE, UNIFORM = hj.saliencies.magnitude(), hj.allocations.uniform()


def numbers(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def masked(params, pattern, sparsity=0.5, allocation=UNIFORM, **options):
    return hj.prune_once(params, MAGNITUDE, sparsity, pattern=pattern, allocation=allocation, **options).mask


@dataclasses.dataclass(frozen=True)
class Halves(hj.patterns.Pattern):
    """A pattern of one's own."""

    def group(self, leaf):
        return leaf.reshape(2, -1)

    def ungroup(self, rows, shape):
        return rows.reshape(shape)


PATTERNS = [
    hj.patterns.unstructured(),
    hj.patterns.n_of_m(2, 4),
    hj.patterns.filters(),
    hj.patterns.channels(),
    hj.patterns.rows(),
    hj.patterns.blocks((2, 2)),
    Halves(),
]
NAMES = [pattern.name.partition("(")[0] for pattern in PATTERNS]


@pytest.mark.parametrize("pattern", PATTERNS, ids=NAMES)
@pytest.mark.parametrize("counts", [(3,), (2, 3)], ids=["scanned", "twice"])
def test_layers_are_pruned_as_if_each_stood_alone(pattern, counts):
    """Under a ranking in every leaf, and in every layer then, bit for bit."""
    kernel = numbers(*counts, 4, 8)
    mask = masked({"Dense_0": {"kernel": kernel}}, pattern)["Dense_0"]["kernel"]
    for index in itertools.product(*map(range, counts)):
        alone = masked({"Dense_0": {"kernel": kernel[index]}}, pattern)["Dense_0"]["kernel"]
        np.testing.assert_array_equal(mask[index], alone)


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=NAMES[:4])
def test_convolutions_are_scanned_too(pattern):
    kernel = numbers(2, 2, 2, 4, 4)
    params = {"conv": {"kernel": kernel, "bias": jnp.ones((2, 4))}}
    mask = masked(params, pattern)["conv"]["kernel"]
    for i in range(2):
        alone = masked({"conv": {"kernel": kernel[i], "bias": jnp.ones(4)}}, pattern)["conv"]["kernel"]
        np.testing.assert_array_equal(mask[i], alone)


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=NAMES[:5])
def test_a_stack_may_lie_anywhere(pattern):
    kernel = numbers(3, 4, 8)
    first = masked({"Dense_0": {"kernel": kernel}}, pattern)["Dense_0"]["kernel"]
    moved = {"kernel": jnp.moveaxis(kernel, 0, 1)}
    for axes in ({"*": "in layer out"}, {"kernel": "in layer out", "*": "out"}):
        found = masked(moved, pattern, axes=axes if len(axes) == 1 else {"kernel": axes["kernel"]})["kernel"]
        np.testing.assert_array_equal(jnp.moveaxis(found, 1, 0), first)


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=NAMES[:5])
@pytest.mark.parametrize("place", [1, -1])
def test_a_stack_that_is_found_elsewhere(pattern, place):
    """The norm of a block shows where its layers lie."""
    up, down, scale = numbers(3, 4, 8), numbers(3, 8, 4, seed=1), jnp.ones((3, 4))
    block = {"norm": {"scale": scale}, "fc1": {"kernel": up}, "fc2": {"kernel": down}}
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, place), block)
    first, found = masked(block, pattern), masked(moved, pattern)
    for name in ("fc1", "fc2"):
        again = jnp.moveaxis(found[name]["kernel"], place, 0)
        np.testing.assert_array_equal(again, first[name]["kernel"])


@pytest.mark.parametrize(
    "allocation", [hj.allocations.global_threshold(), hj.allocations.erdos_renyi()], ids=repr
)
@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[2]], ids=["unstructured", "filters"])
def test_one_ranking_sees_layers_as_leaves(allocation, pattern):
    """Floors, shares and thresholds are those of as many leaves."""
    kernel, other = numbers(4, 4, 6) * jnp.array([1.0, 1e-3, 2.0, 1.0])[:, None, None], numbers(32, 6, seed=1)
    stacked = masked({"dense": {"kernel": kernel}, "other": other}, pattern, allocation=allocation)
    apart = {f"dense{i}": {"kernel": x} for i, x in enumerate(kernel)} | {"other": other}
    alone = masked(apart, pattern, allocation=allocation)
    np.testing.assert_array_equal(
        stacked["dense"]["kernel"], [alone[f"dense{i}"]["kernel"] for i in range(4)]
    )
    np.testing.assert_array_equal(stacked["other"], alone["other"])


@pytest.mark.parametrize("pattern", PATTERNS[1:5], ids=NAMES[1:5])
@pytest.mark.parametrize(
    ("name", "axes"), [("weight", None), ("kernel", {"*": "out in"})], ids=["by name", "by word"]
)
def test_kernels_that_are_out_in(pattern, name, axes):
    kernel = numbers(8, 4)
    mask = masked({"linear": {"kernel": kernel}}, pattern)["linear"]["kernel"]
    turned = masked({"linear": {name: kernel.T}}, pattern, axes=axes)["linear"][name]
    np.testing.assert_array_equal(turned.T, mask)


@pytest.mark.parametrize("pattern", PATTERNS[1:4], ids=NAMES[1:4])
@pytest.mark.parametrize(
    ("order", "words"),
    [((0, 1, 3, 2), "h w out in"), ((3, 2, 0, 1), "out in h w")],
    ids=["transposed", "torch"],
)
def test_convolutions_in_other_layouts(pattern, order, words):
    kernel = numbers(4, 4, 8, 4)
    mask = masked({"kernel": kernel}, pattern)["kernel"]
    turned = masked({"kernel": kernel.transpose(order)}, pattern, axes={"kernel": words})["kernel"]
    np.testing.assert_array_equal(turned, mask.transpose(order))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((4, 4, 8, 12), -2), ((8, 8, 4, 6), -2), ((4, 8, 6), -2), ((8, 6), 0), ((4, 4, 4, 8, 2), -2)],
)
def test_n_of_m_runs_along_what_is_summed(shape, axis):
    mask = masked({"kernel": numbers(*shape)}, hj.patterns.n_of_m(2, 4))["kernel"]
    assert (jnp.moveaxis(mask, axis, -1).reshape(-1, 4).sum(-1) == 2).all()


def test_n_of_m_in_attentions():
    shapes = {"query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8)}
    params = {name: {"kernel": numbers(*shape)} for name, shape in shapes.items()}
    mask = masked(params, hj.patterns.n_of_m(2, 4))
    assert (mask["query"]["kernel"].reshape(2, 4, 2, 4).sum(1) == 2).all()
    assert (mask["out"]["kernel"].sum(1) == 2).all()


def test_n_of_m_refuses_by_name():
    with pytest.raises(ValueError, match=r"does not fit conv/kernel .*one input channel .*depthwise"):
        masked({"conv": {"kernel": numbers(4, 4, 1, 8)}}, hj.patterns.n_of_m(2, 4))
    with pytest.raises(
        ValueError, match=r"dense/kernel of shape \(3, 6, 4\) \(layers of \(6, 4\)\): 4 does not"
    ):
        masked({"dense": {"kernel": numbers(3, 6, 4)}}, hj.patterns.n_of_m(2, 4))
    with pytest.raises(ValueError, match=r"does not fit dense/kernel .*axis 0 counts layers"):
        masked({"dense": {"kernel": numbers(4, 6, 4)}}, hj.patterns.n_of_m(2, 4, axis=0))
    with pytest.raises(ValueError, match=r"rows\(\) does not fit kernel .*a convolution has no rows"):
        masked({"kernel": numbers(3, 3, 4, 4)}, hj.patterns.rows())


def test_an_axis_given_is_one_of_the_leaf():
    kernel = numbers(2, 4, 8)
    (by_front, by_back) = (
        masked({"dense": {"kernel": kernel}}, hj.patterns.n_of_m(2, 4, axis=axis))["dense"]["kernel"]
        for axis in (2, -1)
    )
    np.testing.assert_array_equal(by_front, by_back)
    assert (by_front.reshape(2, 4, 2, 4).sum(-1) == 2).all()


def test_filters_of_a_transposed_convolution_are_its_outputs():
    """By its bias; without one its kernel says nothing, and the user does."""
    for bias in (True, False):
        module = nn.ConvTranspose(5, (3, 3), use_bias=bias, transpose_kernel=True)
        x = numbers(1, 2, 2, 6)
        params = module.init(jax.random.key(0), x)["params"]
        axes = None if bias else {"kernel": "h w out in"}
        pruned = hj.prune_once(params, MAGNITUDE, 0.4, pattern=hj.patterns.filters(), axes=axes).params
        out = module.apply(
            {"params": {"kernel": pruned["kernel"]} | ({"bias": jnp.zeros(5)} if bias else {})}, x
        )
        assert int((out == 0).all((0, 1, 2)).sum()) == 2
        assert hj.summary(pruned, axes=axes).rows[-1].zero_filters == pytest.approx(0.4)


def test_prune_and_prune_once_agree():
    """The tree that a ranking sees has no biases; what they say is handed down all the same."""
    params = {"deconv": {"kernel": numbers(2, 2, 4, 6), "bias": jnp.zeros(4)}, "b": numbers(3, 4, 4)}
    axes = {"b": "layer out in"}
    for pattern in (hj.patterns.filters(), hj.patterns.n_of_m(1, 2)):
        tx = hj.prune(optax.sgd(0.1), MAGNITUDE, 0.5, pattern=pattern, axes=axes, every=1)
        once = hj.prune_once(params, MAGNITUDE, 0.5, pattern=pattern, axes=axes).mask
        state = tx.init(params)
        jax.tree.map(np.testing.assert_array_equal, hj.mask_of(state), once)
        _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        jax.tree.map(np.testing.assert_array_equal, hj.mask_of(state), once)


def test_explicit_and_by_curvature_by_layer():
    params = {"dense": {"kernel": numbers(2, 4, 4)}}
    explicit = hj.allocations.explicit({"dense/kernel[1]": 0.75, "dense/*": 0.25})
    mask = masked(params, hj.patterns.unstructured(), allocation=explicit)["dense"]["kernel"]
    assert mask.sum((1, 2)).tolist() == [12, 4]
    steep = {"dense/kernel[0]": 1.0, "dense/kernel[1]": 1e6}
    mask = masked(
        params, hj.patterns.unstructured(), allocation=hj.allocations.by_curvature(steep, floor=0.0)
    )
    assert mask["dense"]["kernel"].sum((1, 2)).tolist() == [0, 16]
