"""Pruning at one go: exact counts, recomputing, params that are sparse already."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import CONTAINERS, leaves

import hessjax as hj


def network(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "one": jax.random.normal(keys[0], (5, 6)),
        "two": jax.random.normal(keys[1], (6, 3)),
        "b": jnp.ones(3),
    }


X = jax.random.normal(jax.random.key(7), (24, 5))
TARGET = jnp.sin(X[:, :3])


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean(
        jnp.sum((jnp.tanh(x @ params["one"]) @ params["two"] + params["b"][None] - y) ** 2, axis=1)
    )


def grads_fn(params):
    return hj.per_example_grads(loss_fn, params, (X, TARGET))


def kernels(params):
    return np.concatenate([np.asarray(params[name]).ravel() for name in ("one", "two")])


@pytest.mark.parametrize("recomputes", [1, 3])
@pytest.mark.parametrize(
    "rule",
    [
        hj.saliencies.magnitude(),
        hj.saliencies.obd(),
        hj.saliencies.obs(),
        hj.saliencies.obs("greedy", block_size=8),
    ],
)
def test_counts_are_exact(rule, recomputes):
    for sparsity in (0.0, 0.5, 0.9):
        pruned = hj.prune_once(network(), rule, sparsity, grads_fn=grads_fn, recomputes=recomputes)
        zeros = round(sparsity * 48)
        assert (kernels(pruned.params) == 0).sum() == zeros
        assert (~kernels(pruned.mask)).sum() == zeros
        np.testing.assert_array_equal(kernels(pruned.params) != 0, kernels(pruned.mask))
        np.testing.assert_array_equal(pruned.params["b"], network()["b"])
        assert pruned.mask["b"].shape == ()


def test_one_step_of_magnitude_is_its_mask():
    pruned = hj.prune_once(network(), hj.saliencies.magnitude(), 0.5)
    want = hj.allocations.global_threshold()(
        {"one": jnp.abs(network()["one"]), "two": jnp.abs(network()["two"])}, 0.5
    )
    np.testing.assert_array_equal(kernels(pruned.mask), kernels(want))
    np.testing.assert_array_equal(kernels(pruned.params), np.where(kernels(want), kernels(network()), 0))
    assert np.isnan(pruned.predicted_increase)


def test_recomputing_is_pruning_step_by_step():
    """Densities in geometric progression, each step from the params of the one before."""
    rule = hj.saliencies.obs("joint", hj.relative(0.1))
    together = hj.prune_once(network(), rule, 0.75, grads_fn=grads_fn, recomputes=2)
    first = hj.prune_once(network(), rule, 0.5, grads_fn=grads_fn)
    second = hj.prune_once(first.params, rule, 0.75, grads_fn=grads_fn)
    jax.tree.map(np.testing.assert_array_equal, together.params, second.params)
    rise = first.predicted_increase + second.predicted_increase
    np.testing.assert_allclose(together.predicted_increase, rise, rtol=1e-6)


def test_what_is_zero_stays_zero():
    sparse = hj.prune_once(network(), hj.saliencies.magnitude(), 0.5).params
    pruned = hj.prune_once(sparse, hj.saliencies.obs(), 0.8, grads_fn=grads_fn, recomputes=2).params
    assert (kernels(pruned)[kernels(sparse) == 0] == 0).all()
    assert (kernels(pruned) == 0).sum() == round(0.8 * 48)
    rested = hj.prune_once(sparse, hj.saliencies.obs(), 0.3, grads_fn=grads_fn).params
    np.testing.assert_array_equal(kernels(rested) == 0, kernels(sparse) == 0)


def test_compensation_pays():
    """Least squares is quadratic: the predicted increase is the realised one, and none is smaller."""
    x = jax.random.normal(jax.random.key(1), (40, 8)) @ jax.random.normal(jax.random.key(2), (8, 8))
    w = jax.random.normal(jax.random.key(3), (8, 1))
    gauss_newton = {"w": x[:, :, None] * np.sqrt(2)}
    squares = lambda p: jnp.mean((x @ (p["w"] - w)) ** 2)
    rises = {}
    for update in ("joint", "summed", "none"):
        rule = hj.saliencies.obs(update, hj.relative(1e-4))
        pruned = hj.prune_once({"w": w}, rule, 0.5, grads_fn=lambda p: gauss_newton, loss_fn=squares)
        np.testing.assert_allclose(pruned.predicted_increase, pruned.realised_increase, rtol=0.02)
        rises[update] = float(pruned.realised_increase)
    assert rises["joint"] < min(rises["summed"], rises["none"])


def test_of_several_rules_the_one_with_the_least_loss_takes_the_step():
    loss = jax.jit(lambda p: loss_fn(p, (X, TARGET)))
    rules = [
        hj.saliencies.magnitude(),
        hj.saliencies.obs("joint", hj.relative(1e-4)),
        hj.saliencies.obs("joint", hj.relative(1.0)),
    ]
    alone = [hj.prune_once(network(), rule, 0.5, grads_fn=grads_fn, loss_fn=loss) for rule in rules]
    together = hj.prune_once(network(), rules, 0.5, grads_fn=grads_fn, loss_fn=loss)
    want = min(alone, key=lambda pruned: float(pruned.realised_increase))
    jax.tree.map(np.testing.assert_array_equal, together.params, want.params)
    with pytest.raises(ValueError, match="`loss_fn` must be given to choose between several saliencies"):
        hj.prune_once(network(), rules, 0.5, grads_fn=grads_fn)


def test_allocation_and_where_are_heard():
    pruned = hj.prune_once(
        network(), hj.saliencies.obs(), 0.5, grads_fn=grads_fn, allocation=hj.allocations.uniform()
    ).params
    assert [(pruned[k] == 0).sum() for k in ("one", "two")] == [15, 9]
    pruned = hj.prune_once(network(), hj.saliencies.obs(), 0.5, grads_fn=grads_fn, where="two").params
    assert [(pruned[k] == 0).sum() for k in ("one", "two")] == [0, 9]


def test_inside_jit():
    f = lambda p: hj.prune_once(p, hj.saliencies.obs(), 0.5, grads_fn=grads_fn, recomputes=2)
    got, want = jax.jit(f)(network()), f(network())
    np.testing.assert_array_equal(kernels(got.mask), kernels(want.mask))
    np.testing.assert_allclose(kernels(got.params), kernels(want.params), rtol=1e-3, atol=1e-4)


def test_other_params_compile_nothing(compilations):
    rule = hj.saliencies.obs()
    f = lambda seed: hj.prune_once(network(seed), rule, 0.5, grads_fn=grads_fn, recomputes=3)
    f(0)
    network(1)
    del compilations[:]
    f(1)
    assert not compilations


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
def test_any_container(wrap):
    params = wrap(leaves(dtype=jnp.float32))
    grads = jax.tree.map(lambda x: jnp.stack([x + 1.0, x - 2.0]), params)
    where = lambda path, leaf: jnp.ndim(leaf) == 2 and leaf.size > 0
    pruned = hj.prune_once(params, hj.saliencies.obs(), 0.5, grads_fn=lambda p: grads, where=where)
    assert jax.tree.structure(pruned.params) == jax.tree.structure(params)
    assert sum(int((x == 0).sum()) for x in jax.tree.leaves(pruned.params)) == 3


def test_a_damping_too_small_for_float32_is_an_error():
    params = {"w": jnp.ones((2, 4))}
    grads = {"w": 1e6 * jnp.ones((3, 2, 4))}
    with pytest.raises(ValueError, match="`damping` must be about .*, got 1.0e-09"):
        hj.prune_once(params, hj.saliencies.obs(damping=1e-9), 0.5, grads_fn=lambda p: grads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "`sparsity` must be in [0, 1), the fraction of zeros, got 1.0."),
        ({"recomputes": 0}, "`recomputes` must be at least 1, the number of steps, got 0."),
        ({"grads_fn": None}, "`per_example_grads` must be given"),
        (
            {"grads_fn": lambda p: {"one": grads_fn(p)["one"]}},
            "`grads_fn(params)` must have the structure of",
        ),
        ({"where": "nothing"}, "`where` must match at least one leaf"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"sparsity": 0.5, "grads_fn": grads_fn, **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        hj.prune_once(network(), hj.saliencies.obs(), **given)


# -- the trust region -----------------------------------------------------------------------------


def steep():
    """A loss that a quadratic model underestimates more, the further one goes."""
    params = {"w": jnp.linspace(0.2, 2.0, 12).reshape(3, 4)}
    loss = lambda p: jnp.sum(jnp.cosh(2 * (params["w"] - p["w"])) - 1) / 12
    roots = jnp.sqrt(4.0) * jnp.eye(12).reshape(12, 3, 4)
    return params, loss, lambda p: {"w": roots}


def test_steps_beyond_their_prediction_are_cut_in_two():
    params, loss, grads_fn = steep()
    plain = hj.prune_once(params, hj.saliencies.obs(damping=1e-6), 0.75, grads_fn=grads_fn, loss_fn=loss)
    assert len(plain.steps) == 1
    assert float(plain.realised_increase / plain.predicted_increase) > 1.5
    cut = hj.prune_once(
        params, hj.saliencies.obs(damping=1e-6), 0.75, grads_fn=grads_fn, loss_fn=loss, max_ratio=1.5
    )
    assert len(cut.steps) > 2
    sparsities = [float(step.sparsity) for step in cut.steps]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == 0.75
    assert int((cut.params["w"] == 0).sum()) == 9
    np.testing.assert_allclose(sum(s.realised_increase for s in cut.steps), cut.realised_increase, rtol=1e-4)
    np.testing.assert_allclose(
        sum(s.predicted_increase for s in cut.steps), cut.predicted_increase, rtol=1e-5
    )
    for step, before in zip(cut.steps, [0.0, *sparsities], strict=False):
        zeros = round(12 * step.sparsity) - round(12 * before)
        assert zeros < 2 or step.realised_increase <= 1.5 * step.predicted_increase + 1e-4


def test_steps_within_their_prediction_are_left_alone():
    params, loss, grads_fn = steep()
    found = hj.prune_once(
        params,
        hj.saliencies.obs(damping=1e-6),
        0.25,
        grads_fn=grads_fn,
        loss_fn=loss,
        recomputes=2,
        max_ratio=50,
    )
    assert len(found.steps) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_ratio": 1.0}, "`max_ratio` must be above 1"),
        ({"loss_fn": None}, "`loss_fn` must be given for a `max_ratio`"),
        ({"saliency": hj.saliencies.magnitude()}, "`saliency` must predict an increase"),
    ],
)
def test_what_a_trust_region_needs(change, message):
    params, loss, grads_fn = steep()
    arguments = {
        "saliency": hj.saliencies.obs(),
        "sparsity": 0.5,
        "grads_fn": grads_fn,
        "loss_fn": loss,
        "max_ratio": 2.0,
    }
    with pytest.raises(ValueError, match=message):
        hj.prune_once(params, **{**arguments, **change})


def test_scores_that_are_not_numbers_are_an_error():
    with pytest.raises(FloatingPointError, match="must give every weight a score, got NaN for 1"):
        hj.prune_once({"w": jnp.array([[1.0, jnp.nan]])}, hj.saliencies.magnitude(), 0.5)


def test_biases_of_two_axes_are_left_alone():
    params = {"query": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((2, 2))}}
    mask = hj.prune_once(params, hj.saliencies.magnitude(), 0.5).mask
    assert mask["query"]["bias"].shape == ()


def test_a_group_that_cannot_be_halved_goes_as_it_is():
    """Rows of four, each beyond its prediction: one a step is as short as steps get."""
    params, loss, grads_fn = steep()
    found = hj.prune_once(
        params,
        hj.saliencies.obs(damping=1e-6),
        2 / 3,
        grads_fn=grads_fn,
        loss_fn=loss,
        max_ratio=1.01,
        pattern=hj.patterns.rows(),
        allocation=hj.allocations.global_threshold(floor=0.0),
    )
    assert len(found.steps) == 2
    np.testing.assert_array_equal(np.asarray(found.params["w"] == 0).sum(axis=1), [4, 4, 0])


@pytest.mark.parametrize(
    "pattern",
    [hj.patterns.unstructured(), hj.patterns.n_of_m(2, 4), hj.patterns.rows(), hj.patterns.blocks((2, 2))],
    ids=["unstructured", "2:4", "rows", "blocks"],
)
@pytest.mark.parametrize("recomputes", [1, 2])
def test_fewer_zeros_than_there_are_leave_all_of_them(pattern, recomputes):
    """What was zero is False in the mask, and a ticket of it revives nothing, however sparse it is to be."""
    params = {"k": jax.random.normal(jax.random.key(0), (8, 8)), "one": jnp.ones((4, 4)).at[0].set(0)}
    half = hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=pattern).params
    less = hj.prune_once(half, hj.saliencies.magnitude(), 0.25, pattern=pattern, recomputes=recomputes)
    for name, mask in less.mask.items():
        assert not np.any(np.asarray(mask) & (np.asarray(half[name]) == 0))
        np.testing.assert_array_equal(less.params[name] != 0, mask)
    for regrow in (True, False):
        tx = hj.prune(optax.sgd(0.1), hj.saliencies.static(less.mask), 0.25, regrow=regrow, every=1)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, half), tx.init(half), half)
        found = optax.apply_updates(half, updates)
        for name, mask in less.mask.items():
            assert not np.any((np.asarray(found[name]) != 0) & ~np.asarray(mask))
            np.testing.assert_array_equal(state.mask[name] & ~mask, False)
    again = hj.prune_once(params, hj.saliencies.static(less.mask), 0.25)
    assert not np.any(np.asarray(again.params["k"] != 0) & ~np.asarray(less.mask["k"]))


def test_scores_given_as_numbers_are_only_ranked():
    """Zeros among numbers are scores as others: only a mask of bools says what must go."""
    scores = {"k": jnp.array([[0.0, 0.0, 1.0, 2.0]])}
    pruned = hj.prune_once({"k": jnp.ones((1, 4))}, hj.saliencies.static(scores), 0.25)
    assert pruned.mask["k"].tolist() == [[False, True, True, True]]
