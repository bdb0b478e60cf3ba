"""Sparsities leaf by leaf: by shape, by hand, by curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj


def scores():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"conv": (3, 3, 4, 8), "large": (64, 32), "small": (4, 3)}
    return {k: jax.random.uniform(key, s) for (k, s), key in zip(shapes.items(), keys, strict=True)}


def zeros(mask):
    return {k: int((~m).sum()) for k, m in mask.items()}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_erdos_renyi_densities(sparsity):
    """In proportion to Σ axes / Π axes where no leaf is full, and exact in total."""
    tree = scores()
    found = zeros(hj.allocations.erdos_renyi()(tree, sparsity))
    sizes = {k: x.size for k, x in tree.items()}
    assert sum(found.values()) == round(sparsity * sum(sizes.values()))
    share = {k: sum(x.shape) / x.size for k, x in tree.items()}
    density = {k: 1 - found[k] / sizes[k] for k in tree}
    unfilled = [k for k in tree if found[k] > 0 and density[k] * sizes[k] > 1.5]
    ratios = [density[k] / share[k] for k in unfilled]
    tolerance = max(1 / (sizes[k] * share[k]) for k in unfilled) + 1e-6
    assert max(ratios) - min(ratios) <= 2 * tolerance
    assert all(density[k] >= min(ratios) * share[k] - 1 / sizes[k] or density[k] == 1 for k in tree)


def test_erdos_renyi_ranks_within_leaves():
    tree = scores()
    mask = hj.allocations.erdos_renyi()(tree, 0.8)
    for k in tree:
        gone, kept = np.asarray(tree[k])[~np.asarray(mask[k])], np.asarray(tree[k])[np.asarray(mask[k])]
        assert not gone.size or gone.max() < kept.min()


@pytest.mark.parametrize(
    "allocation",
    [
        hj.allocations.erdos_renyi(),
        hj.allocations.explicit({"*": 0.9}),
        hj.allocations.by_curvature({"a": 1.0, "b": 4.0}),
    ],
)
def test_traced_sparsity_gives_the_same(allocation):
    tree = {
        "a": jax.random.uniform(jax.random.key(1), (20, 9)),
        "b": jax.random.uniform(jax.random.key(2), (5, 7)),
    }
    for sparsity in (0.0, 0.35, 0.75):
        jax.tree.map(
            np.testing.assert_array_equal,
            allocation(tree, sparsity),
            jax.jit(allocation)(tree, jnp.float32(sparsity)),
        )


def test_explicit_levels_and_the_way_there():
    tree = scores()
    levels = {"conv": 0.5, "large": 0.9}
    total = (0.5 * 288 + 0.9 * 2048) / sum(x.size for x in tree.values())
    at_end = zeros(hj.allocations.explicit(levels)(tree, total))
    assert at_end == {"conv": 144, "large": round(0.9 * 2048), "small": 0}
    half = zeros(hj.allocations.explicit(levels)(tree, total / 2))
    assert half == {"conv": 72, "large": round(0.45 * 2048), "small": 0}


def test_explicit_in_a_training_run():
    params = {k: x + 0.5 for k, x in scores().items()}
    levels = {"conv": 0.5, "*": 0.75}
    with pytest.raises(ValueError, match=r"`sparsity` must be at most 0\.71933\d*, what the `sparsities`"):
        hj.prune_once(params, hj.saliencies.magnitude(), 0.9, allocation=hj.allocations.explicit(levels))
    pruned = hj.prune_once(
        params, hj.saliencies.magnitude(), 0.71933, allocation=hj.allocations.explicit(levels)
    )
    assert zeros({k: x != 0 for k, x in pruned.params.items()}) == {"conv": 144, "large": 1536, "small": 9}


def test_by_curvature_is_the_diagonal_model():
    """One ranking of w² · h̄ over all leaves, by argsort."""
    tree = scores()
    curvature = {"conv": 0.3, "large": 0.01, "small": 5.0}
    mask = hj.allocations.by_curvature(curvature, floor=0.0)(tree, 0.6)
    costs = np.concatenate([np.asarray(tree[k]).ravel() ** 2 * curvature[k] for k in tree])
    gone = np.argsort(costs)[: round(0.6 * costs.size)]
    expected = np.ones(costs.size, bool)
    expected[gone] = False
    np.testing.assert_array_equal(np.concatenate([np.asarray(mask[k]).ravel() for k in tree]), expected)


def test_by_curvature_takes_the_traces_of_the_spectral_half():
    tree = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 2), 2.0)}
    matvec = jax.tree_util.Partial(lambda v: {"a": 100.0 * v["a"], "b": v["b"]})
    traces = hj.trace_by_leaf(matvec, jax.random.key(0), tree, num_probes=4).leaves
    mask = hj.allocations.by_curvature(traces)(tree, 3 / 8)
    assert zeros(mask) == {"a": 0, "b": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t: hj.allocations.explicit({"nothing": 0.5})(t, 0.1),
            "`nothing` matches none of: conv, large, small",
        ),
        (lambda t: hj.allocations.explicit({"*": 1.0}), r"must be in \[0, 1\), got 1.0 for `\*`"),
        (lambda t: hj.allocations.explicit({"*": 0.0}), "at least one leaf"),
        (lambda t: hj.allocations.by_curvature({"conv": 1.0})(t, 0.5), "large is missing; it has conv"),
        (
            lambda t: hj.allocations.by_curvature({"conv": -1.0, "large": 1.0, "small": 1.0})(t, 0.5),
            "positive and finite, got -1 for conv",
        ),
        (lambda t: hj.allocations.by_curvature({}, floor=2), "`floor`"),
        (lambda t: hj.allocations.erdos_renyi()(t, 1.5), "`sparsity`"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(scores())


def test_what_is_no_mapping_of_curvatures_is_refused_and_leaves_that_stay_dense_may_have_any():
    with pytest.raises(TypeError, match="curvature"):
        hj.allocations.by_curvature(1.0)
    made = hj.allocations.by_curvature({"conv": 1.0, "large": 1.0, "small": 1.0, "bias": -1.0})
    assert jax.tree.leaves(made(scores(), 0.5))
