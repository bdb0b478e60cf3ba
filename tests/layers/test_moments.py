"""Moments of layers beside explicit outer products: over batches, with weights, for all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from tests.layers.cases import CASES
from tests.oracles import close

CATEGORICAL = hj.likelihoods.categorical


def outer_products(use, layout, positions, weights):
    """By loops over examples and positions, from what was captured at the examples' own labels."""
    inputs, gradients = np.asarray(use.inputs), np.asarray(use.gradients[:, 0])
    num, _, stack = gradients.shape[:3]
    if layout.is_lookup:
        inputs = np.eye(layout.shape[1])[inputs]
    left = np.zeros((stack, inputs.shape[-1], inputs.shape[-1]))
    right = np.zeros((stack, gradients.shape[-1], gradients.shape[-1]))
    for n in range(num):
        for s in range(stack):
            a, g = inputs[n, :, s], gradients[n, :, s]
            if positions == "reduce":
                a, g = a.mean(axis=0)[None], g.sum(axis=0)[None]
            left[s] += weights[n] * sum(np.outer(x, x) for x in a) / len(a)
            right[s] += weights[n] * sum(np.outer(x, x) for x in g)
    return (right, left) if layout.swapped else (left, right)


def like(full, ours):
    """The diagonal, if ours is one."""
    return np.diagonal(full, axis1=1, axis2=2) if ours.ndim == 2 else full


@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_they_are_means_of_outer_products(x64, name, positions):
    case = CASES[name]
    params, batch = case.params(), case.batch(3)
    captured = hj.layers.capture(case.loss_fn, params, batch)
    found = hj.layers.moments(case.loss_fn, params, [batch], positions=positions)
    for layouts, uses, moments in zip(captured.layouts, captured.uses, found.leaves, strict=True):
        for layout, use, (left, right) in zip(layouts, uses, moments, strict=True):
            expected = outer_products(use, layout, positions, np.full(3, 1 / 3))
            np.testing.assert_allclose(left, like(expected[0], left), rtol=1e-10, atol=1e-14)
            np.testing.assert_allclose(right, like(expected[1], right), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"likelihood": CATEGORICAL}])
def test_they_do_not_depend_on_how_the_data_is_cut(x64, options):
    case = CASES["convolution"]
    params, (x, labels) = case.params(), case.batch(5)
    fn = case.model_fn if options else case.loss_fn
    whole = x if options else (x, labels)
    parts = [jax.tree.map(lambda leaf, cut=cut: leaf[cut], whole) for cut in (slice(0, 3), slice(3, 5))]
    close(
        hj.layers.moments(fn, params, iter(parts), **options).leaves,
        hj.layers.moments(fn, params, [whole], **options).leaves,
        rtol=1e-10,
    )


def test_an_example_of_weight_two_is_there_twice(x64):
    case = CASES["dense"]
    params, (x, _) = case.params(), case.batch(3)
    options = {"likelihood": CATEGORICAL}
    weights = lambda batch: jnp.array([2.0, 1.0, 0.0])
    weighted = hj.layers.moments(case.model_fn, params, [x.at[2].set(jnp.nan)], weights=weights, **options)
    twice = hj.layers.moments(case.model_fn, params, [x[jnp.array([0, 0, 1])]], **options)
    close(weighted.leaves, twice.leaves, rtol=1e-10)


def test_tokens_of_padding_do_not_count(x64):
    """Where the positions of a layer are those of the mask, inputs count by it; gradients do anyway."""
    case = CASES["tokens"]
    params, (x, _) = case.params(), case.batch(3)
    mask = jnp.array([[1, 1], [1, 0], [0, 1]])
    options = {"likelihood": CATEGORICAL}
    masked = hj.layers.moments(case.model_fn, params, [x], weights=lambda batch: mask, **options)
    tokens = jnp.concatenate([x[0], x[1, :1], x[2, 1:]])[:, None]
    alone = hj.layers.moments(case.model_fn, params, [tokens], **options)
    close(masked.leaves, alone.leaves, rtol=1e-10)


def test_labels_drawn_are_those_of_sampled_grads(x64):
    case = CASES["dense"]
    params, (x, _) = case.params(), case.batch(4)
    key, options = jax.random.key(3), {"likelihood": CATEGORICAL, "num_samples": 2}
    rows = hj.sampled_grads(case.model_fn, params, x, key=jax.random.fold_in(key, 0), **options)
    found = hj.layers.moments(case.model_fn, params, [x], key=key, **options)
    bias = np.asarray(rows["c"])
    np.testing.assert_allclose(found.of("c")[0].right[0], bias.T @ bias / len(bias), rtol=1e-10)


def test_the_exact_information_is_what_many_draws_lead_to(x64):
    case = CASES["tokens"]
    params, (x, _) = case.params(), case.batch(2)
    exact = hj.layers.moments(case.model_fn, params, [x], likelihood=CATEGORICAL)
    drawn = hj.layers.moments(
        case.model_fn, params, [x], likelihood=CATEGORICAL, key=jax.random.key(0), num_samples=4000
    )
    np.testing.assert_allclose(drawn.of("v")[0].right, exact.of("v")[0].right, rtol=0.1, atol=0.01)


def test_wide_sides_have_diagonal_moments(x64):
    case = CASES["dense"]
    params, batch = case.params(), case.batch(3)
    full = hj.layers.moments(case.loss_fn, params, [batch]).of("w")[0]
    left, right = hj.layers.moments(case.loss_fn, params, [batch], max_width=3).of("w")[0]
    np.testing.assert_allclose(left, jnp.diagonal(full.left, axis1=1, axis2=2), rtol=1e-12)
    np.testing.assert_allclose(right, full.right, rtol=1e-12)


def test_it_prints_widths_and_traces():
    case = CASES["tied embedding"]
    text = str(hj.layers.moments(case.loss_fn, case.params(), [case.batch()]))
    assert "embedding 5 → 3" in text
    assert "5 d" in text


def test_bad_input_is_named(untyped):
    case = CASES["dense"]
    params, batch = case.params(), case.batch()
    moments = hj.layers.moments
    with pytest.raises(TypeError, match="put it into a list"):
        moments(case.loss_fn, params, batch)
    with pytest.raises(ValueError, match="at least one batch"):
        moments(case.loss_fn, params, [])
    with pytest.raises(ValueError, match="`likelihood` must be given with `key`"):
        moments(case.loss_fn, params, [batch], key=jax.random.key(0))
    with pytest.raises(ValueError, match="`key` must be given with `num_samples`"):
        moments(case.model_fn, params, [batch[0]], likelihood=CATEGORICAL, num_samples=2)
    with pytest.raises(ValueError, match="`positions` must be one of"):
        moments(case.loss_fn, params, [batch], positions="mean")
    with pytest.raises(TypeError, match="one array with a likelihood"):
        moments(case.loss_fn, params, [batch], likelihood=CATEGORICAL)
    with pytest.raises(ValueError, match="`path` must be that of a leaf, one of b, c, v, w, got 'x'"):
        moments(case.loss_fn, params, [batch]).of("x")


def test_leaves_that_are_not_covered_are_named_with_the_way_out(untyped):
    def loss_fn(params, x):
        return jnp.mean((x @ params["w"] / params["t"]) ** 2)

    params = {"t": jnp.ones(()), "w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"t divides, which is not linear.*\n.*hessjax.select"):
        hj.layers.moments(loss_fn, params, [jnp.ones((4, 2))])
    part = hj.select(params, "w")
    found = hj.layers.moments(part.restrict(loss_fn), part.part, [jnp.ones((4, 2))])
    assert found.of("w")[0].left.shape == (1, 2, 2)


def test_batches_of_any_source_and_none_that_are_filled_up():
    params, x = jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [1.0, 2.0], [0.5, 1.0]])
    model = lambda w, batch: batch @ w
    made = lambda data: hj.layers.moments(model, params, data, likelihood=hj.likelihoods.gaussian)
    want, got = made([x[:2], x[2:]]), made(lambda: iter([np.asarray(x[:2]), x[2:]]))
    close(hj.layers.kfac(got).trace(), hj.layers.kfac(want).trace())
    with pytest.raises(ValueError, match="`batches` must not be filled up"):
        made(hj.batches([x[:2], x[2:]], with_weights=lambda batch, weights: batch))


def test_params_that_they_are_not_of_are_named(untyped):
    case = CASES["dense"]
    params = case.params()
    found = hj.layers.moments(case.loss_fn, params, [case.batch()])
    found.check(jax.tree.map(jnp.array, params))
    with pytest.raises(
        ValueError, match=r"`params` must be those that the moments.*\n  w: other values\nTake"
    ):
        found.check({**params, "w": params["w"].at[1, 1].add(1e-6)})
    with pytest.raises(ValueError, match=r"w: shape \(3, 4\), not \(4, 3\)"):
        found.check({**params, "w": params["w"].T})
    with pytest.raises(ValueError, match="u: no such leaf"):
        found.check({**params, "u": params["w"]})
    jax.jit(found.check)({**params, "w": -params["w"]})  # traced: no numbers to compare


def test_rows_that_an_embedding_does_not_have_are_refused(untyped):
    case = CASES["tied embedding"]
    tokens, labels = case.batch()
    with pytest.raises(
        ValueError, match="`args` must hold numbers of rows that the embeddings have, but e are"
    ):
        hj.layers.moments(case.loss_fn, case.params(), [(tokens.at[0, 0].set(5), labels)])


def test_an_example_that_is_not_finite_is_named_or_left_out(x64):
    case = CASES["dense"]
    params, (x, labels) = case.params(), case.batch(4)
    bad = x.at[1, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="b, c, v, w are NaN or infinite in number 1 of"):
        hj.layers.moments(case.loss_fn, params, [(x, labels), (bad, labels)])
    there = jnp.array([0, 2, 3])
    found = hj.layers.moments(case.loss_fn, params, [(bad, labels)], weights=lambda batch: jnp.arange(4) != 1)
    close(found.leaves, hj.layers.moments(case.loss_fn, params, [(x[there], labels[there])]).leaves)
