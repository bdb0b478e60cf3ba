"""How much an example counts: products, gradients, roots and means over batches agree about it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj
from hessjax.curvature._weights import check_weights

LENGTHS = (3, 1, 4, 2)


def params():
    rng = np.random.default_rng(0)
    return {"embedding": jnp.asarray(rng.normal(size=(5, 2))), "head": jnp.asarray(rng.normal(size=(2, 3)))}


def make_batch(lengths=LENGTHS, seed=0, width=4, dtype=float):
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(0, 5, (len(lengths), width)), rng.integers(0, 3, (len(lengths), width))
    mask = np.arange(width) < np.array(lengths)[:, None]
    return {"tokens": jnp.asarray(tokens), "labels": jnp.asarray(labels), "mask": jnp.asarray(mask, dtype)}


def model_fn(params, batch):
    return jnp.tanh(params["embedding"][batch["tokens"]]) @ params["head"]


def output_loss(logits, batch):
    """The mean over tokens: 0/0 for a batch of padding."""
    mask = batch["mask"].astype(logits.dtype)
    chosen = jax.nn.one_hot(batch["labels"], 3, dtype=logits.dtype)
    losses = -jnp.sum(jax.nn.log_softmax(logits) * chosen, axis=-1)
    return jnp.sum(mask * losses) / jnp.sum(mask)


def loss_fn(params, batch):
    return output_loss(model_fn(params, batch), batch)


def mask(batch):
    return batch["mask"]


def lengths(batch):
    return np.asarray(batch["mask"]).sum(axis=1)  # NumPy's: weights are not traced


def total(batch):
    return int(batch["mask"].sum())


def join(*batches):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def take(batch, index):
    return jax.tree.map(lambda x: x[np.array(index)], batch)


def categorical(params, batch, **options):
    return hj.fisher(model_fn, params, batch, likelihood=hj.likelihoods.categorical, **options)


def dense_empirical(batch, weights):
    """Σ w g gᵀ / Σ w, over the examples that count."""
    grads = [oracles.flat(jax.grad(loss_fn)(params(), take(batch, [i]))) for i in range(len(weights))]
    kept = [(w, g) for w, g in zip(np.asarray(weights, float), grads, strict=True) if w > 0]
    return sum(w * np.outer(g, g) for w, g in kept) / sum(w for w, _ in kept)


def square(block):
    rows = oracles.rows(block)
    return rows.T @ rows / len(rows)


def same(a, b, rtol=1e-10):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.smoke
@pytest.mark.parametrize("weights", [mask, lengths], ids=["positions", "examples"])
@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("sizes", [LENGTHS, (3, 0, 4, 0)], ids=["padded", "all padding"])
def test_weighted_gradients_add_up_to_the_gradient(x64, weights, microbatch, sizes):
    batch = make_batch(sizes)
    options = {"weights": weights, "microbatch": microbatch}
    block = hj.per_example_grads(loss_fn, params(), batch, **options)
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), block)
    oracles.close(mean, jax.grad(loss_fn)(params(), batch), rtol=1e-10, atol=1e-13)
    assert not np.any(oracles.rows(block)[np.array(sizes) == 0])
    expected = dense_empirical(batch, sizes)
    same(oracles.matrix_of(hj.empirical_fisher(loss_fn, params(), batch, **options), params()), expected)
    same(square(hj.empirical_fisher_roots(loss_fn, params(), batch, **options)), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [LENGTHS, (3, 0, 4, 0)], ids=["padded", "all padding"])
def test_the_fisher_is_the_ggn_of_the_masked_loss(x64, sizes):
    batch = make_batch(sizes)
    ggn = oracles.matrix_of(hj.ggn(model_fn, output_loss, params(), batch), params())
    for linearize in (False, True):
        fisher = categorical(params(), batch, weights=mask, linearize=linearize)
        same(oracles.matrix_of(fisher, params()), ggn)
    same(square(hj.ggn_roots(model_fn, params(), batch, weights=mask)), ggn)


def test_the_sampled_fisher_is_unbiased_and_padding_draws_nothing(x64):
    batch = make_batch((3, 0, 4, 2))
    exact = oracles.matrix_of(categorical(params(), batch, weights=mask), params())
    block = hj.sampled_grads(model_fn, params(), batch, weights=mask, key=jax.random.key(0), num_samples=3000)
    squares = np.einsum("ni,nj->nij", rows := oracles.rows(block), rows)
    assert not np.any(rows.reshape(4, 3000, -1)[1])
    stderr = squares.std(axis=0) / np.sqrt(len(rows))
    assert (np.abs(squares.mean(axis=0) - exact) <= 6 * stderr + 1e-9).all()
    options = {"weights": mask, "key": jax.random.key(1)}
    sampled = oracles.matrix_of(categorical(params(), batch, num_samples=3000, **options), params())
    assert np.linalg.norm(sampled - exact) < 0.1 * np.linalg.norm(exact)
    # Other tokens where there is padding, same keys: the same matrix.
    other = batch | {"tokens": jnp.where(batch["mask"] > 0, batch["tokens"], 0)}
    one, two = (oracles.matrix_of(categorical(params(), b, **options), params()) for b in (batch, other))
    same(one, two)


FISHERS = {
    "fisher": lambda p, b, w: oracles.matrix_of(categorical(p, b, weights=w), p),
    "empirical_fisher": lambda p, b, w: oracles.matrix_of(hj.empirical_fisher(loss_fn, p, b, weights=w), p),
    "in parts": lambda p, b, w: oracles.matrix_of(
        hj.empirical_fisher(loss_fn, p, b, weights=w, microbatch=2), p
    ),
    "ggn_roots": lambda p, b, w: square(hj.ggn_roots(model_fn, p, b, weights=w)),
    "empirical_fisher_roots": lambda p, b, w: square(hj.empirical_fisher_roots(loss_fn, p, b, weights=w)),
    "per_example_grads": lambda p, b, w: oracles.rows(hj.per_example_grads(loss_fn, p, b, weights=w)).mean(0),
    "over_batches": lambda p, b, w: oracles.matrix_of(
        hj.over_batches(
            lambda b: categorical(p, b, weights=lambda b: b["weight"]),
            [take(b, [0, 1]), take(b, list(range(2, len(b["mask"]))))],
            weights=w,
        ),
        p,
    ),
}


@pytest.mark.parametrize("name", FISHERS)
def test_a_weight_of_two_is_the_example_twice_and_of_zero_not_at_all(x64, name):
    """Fractions too: only ratios count."""
    batch = make_batch((4, 2, 3, 0, 1))
    weighted = batch | {"weight": jnp.array([2, 1, 0, 0, 1])}
    repeated = take(batch, [0, 0, 1, 4]) | {"weight": jnp.ones(4)}
    matrix = FISHERS[name]
    expected = matrix(params(), repeated, lambda b: b["weight"])
    same(matrix(params(), weighted, lambda b: b["weight"]), expected)
    tenth = weighted | {"weight": weighted["weight"] / 10}
    same(matrix(params(), tenth, lambda b: b["weight"]), expected)


@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.bfloat16, jnp.float32], ids=str)
@pytest.mark.parametrize("name", ["fisher", "empirical_fisher", "ggn_roots", "per_example_grads"])
def test_weights_of_any_dtype(x64, name, dtype):
    batch = make_batch()
    same(
        FISHERS[name](params(), batch, lambda b: b["mask"].astype(dtype)),
        FISHERS[name](params(), batch, mask),
    )


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_what_does_not_count_may_be_anything(x64, kind):
    """Inputs, outputs, losses and derivatives that are not finite, of examples of weight zero."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(2, 3)))
    x = jnp.asarray(rng.normal(size=(4, 2))).at[1].set(kind)
    batch, there = {"x": x, "weight": jnp.array([1.0, 0.0, 2.0, 1.0])}, [0, 2, 3]
    options = {"weights": lambda b: b["weight"]}
    model = lambda w, b: b["x"] @ w
    loss = lambda w, b: jnp.mean(jnp.sum((b["x"] @ w) ** 2, axis=1))
    kept = take(batch, there)
    gaussian = {"likelihood": hj.likelihoods.gaussian}
    one, two = (hj.fisher(model, w, b, **options, **gaussian) for b in (batch, kept))
    same(oracles.matrix_of(one, w), oracles.matrix_of(two, w))
    one, two = (hj.empirical_fisher(loss, w, b, **options) for b in (batch, kept))
    same(oracles.matrix_of(one, w), oracles.matrix_of(two, w))
    for roots in (hj.ggn_roots, hj.sampled_grads):
        key = {"key": jax.random.key(0)} if roots is hj.sampled_grads else {}
        assert np.isfinite(oracles.rows(roots(model, w, batch, **options, **gaussian, **key))).all()
    grads = hj.per_example_grads(loss, w, batch, **options)
    same(grads.mean(axis=0), hj.per_example_grads(loss, w, kept, **options).mean(axis=0))


def test_padding_whose_outputs_are_not_finite_in_a_sentence_that_counts(x64):
    batch = make_batch()
    holed = lambda p, b: jnp.where(b["mask"][..., None] > 0, model_fn(p, b), jnp.nan)
    want = oracles.matrix_of(categorical(params(), batch, weights=mask), params())
    fisher = hj.fisher(holed, params(), batch, likelihood=hj.likelihoods.categorical, weights=mask)
    same(oracles.matrix_of(fisher, params()), want)
    same(square(hj.ggn_roots(holed, params(), batch, weights=mask)), want)


def test_a_model_that_couples_its_examples_sees_them_as_they_are(x64):
    """Fisher and GGN agree for BatchNorm in train mode too: an example of weight zero is not replaced."""
    batch = make_batch((4, 4, 0, 4))

    def coupled(p, b):
        h = jnp.tanh(p["embedding"][b["tokens"]])
        return (h - h.mean(axis=(0, 1), keepdims=True)) @ p["head"]

    fisher = hj.fisher(coupled, params(), batch, likelihood=hj.likelihoods.categorical, weights=mask)
    ggn = hj.ggn(coupled, output_loss, params(), batch)
    same(oracles.matrix_of(fisher, params()), oracles.matrix_of(ggn, params()))


# -- batches ---------------------------------------------------------------------------------------


def batches():
    return [make_batch((1, 2)), make_batch((0, 0, 0), seed=1), make_batch((4, 3, 4), seed=2)]


@pytest.mark.smoke
@pytest.mark.parametrize("weights", [mask, lengths, total], ids=["positions", "examples", "number"])
def test_batches_are_their_concatenation(x64, weights):
    """A batch of padding among them is not there."""
    together = join(*batches())
    makes = {
        "hessian": lambda b: hj.hessian(loss_fn, params(), b),
        "ggn": lambda b: hj.ggn(model_fn, output_loss, params(), b),
        "fisher": lambda b: categorical(params(), b, weights=mask),
        "empirical_fisher": lambda b: hj.empirical_fisher(loss_fn, params(), b, weights=lengths),
    }
    for make in makes.values():
        matvec = hj.over_batches(make, batches(), weights=weights)
        oracles.close(matvec(params()), make(together)(params()), rtol=1e-10, atol=1e-13)
    axes = {"directions": params(), "distances": [-0.5, 0.0, 1.0]}
    drawn = hj.landscape(loss_fn, params(), batches=batches(), weights=weights, **axes)
    same(drawn.losses, hj.landscape(loss_fn, params(), together, **axes).losses)
    assert drawn.num_batches == 2


def test_errors_of_the_data_know_the_weights(x64):
    """A batch of padding changes neither the trace by leaf nor what it says of other data."""
    make = lambda b: categorical(params(), b, weights=mask)
    key = jax.random.key(0)
    with_padding, without = (
        hj.trace_by_leaf(hj.over_batches(make, data, weights=mask), key, params(), 8)
        for data in (batches(), [batches()[0], batches()[2]])
    )
    for path, part in without.leaves.items():
        same(with_padding.leaves[path].mean, part.mean)
        same(with_padding.leaves[path].data_stderr, part.data_stderr)
        assert 0 < float(part.data_stderr) < np.inf
    whole = hj.trace_by_leaf(make(join(*batches())), key, params(), 8)
    same(with_padding.total.mean, whole.total.mean)


# -- how they are called ---------------------------------------------------------------------------


def test_jit_and_no_weights(x64):
    batch = make_batch((3, 0, 4, 2))

    def all_of_them(batch, weights):
        p = params()
        roots = hj.ggn_roots(model_fn, p, batch, weights=weights)
        return (
            hj.per_example_grads(loss_fn, p, batch, weights=weights),
            hj.empirical_fisher(loss_fn, p, batch, weights=weights)(p),
            categorical(p, batch, weights=weights)(p),
            jax.tree.map(lambda x: jnp.mean(x**2, axis=0), roots),  # a root of zero is one of rounding
            hj.sampled_grads(model_fn, p, batch, weights=weights, key=jax.random.key(0)),
        )

    jitted = jax.jit(lambda batch: all_of_them(batch, mask))
    oracles.close(jitted(batch), all_of_them(batch, mask), rtol=1e-10, atol=1e-13)
    nothing = jitted(batch | {"mask": jnp.zeros_like(batch["mask"])})
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(nothing))
    full = make_batch((4, 4, 4, 4))
    oracles.close(all_of_them(full, mask), all_of_them(full, None), rtol=1e-10, atol=1e-13)


@pytest.mark.smoke
def test_another_function_for_the_weights_compiles_nothing(compilations):
    p = jax.tree.map(lambda x: x.astype(jnp.float32), params())
    for seed in range(2):
        batch = make_batch(seed=seed)
        del compilations[:]
        weights = lambda b: b["mask"]
        jax.block_until_ready(
            (
                hj.per_example_grads(loss_fn, p, batch, weights=weights),
                hj.empirical_fisher(loss_fn, p, batch, weights=weights, microbatch=2)(p),
                categorical(p, batch, weights=weights)(p),
                hj.ggn_roots(model_fn, p, batch, weights=weights),
            )
        )
    assert not compilations


def test_params_in_bfloat16():
    batch = make_batch(dtype=jnp.bfloat16)
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), short)
    for function in (
        lambda p: hj.per_example_grads(loss_fn, p, batch, weights=mask),
        lambda p: categorical(p, batch, weights=mask)(p),
        lambda p: hj.ggn_roots(model_fn, p, batch, weights=mask),
        lambda p: hj.empirical_fisher(loss_fn, p, batch, weights=mask)(p),
    ):
        got, want = function(short), function(wide)
        assert jax.tree.leaves(jax.tree.map(lambda x: x.dtype == jnp.bfloat16, got)) == [True, True]
        got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
        oracles.close(jax.tree.map(jnp.abs, got), jax.tree.map(jnp.abs, want), rtol=0.2, atol=0.1)


CUT = {
    "per_example_grads": lambda b, w: hj.per_example_grads(loss_fn, params(), b, weights=w),
    "empirical_fisher": lambda b, w: hj.empirical_fisher(loss_fn, params(), b, weights=w)(params()),
    "fisher": lambda b, w: categorical(params(), b, weights=w)(params()),
    "ggn_roots": lambda b, w: hj.ggn_roots(model_fn, params(), b, weights=w),
}
WRONG = {
    "one number for the whole batch": (lambda b: 3, ValueError),
    "`weights` must give one number for each": (lambda b: np.ones(3), ValueError),
    "finite numbers of at least 0, got -1 for `args[0]`": (lambda b: -b["mask"], ValueError),
    "finite numbers of at least 0, got nan for": (lambda b: b["mask"] * np.nan, ValueError),
    "finite numbers of at least 0, got inf for": (lambda b: b["mask"] / 0, ValueError),
    "must not be zero everywhere": (lambda b: 0 * b["mask"], ValueError),
    "must give an array, got a dict": (lambda b: b, TypeError),
    "must give an array, got a NoneType": (lambda b: None, TypeError),
    "must give real numbers, got complex64": (lambda b: b["mask"].astype(complex), TypeError),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("words", WRONG)
def test_wrong_weights_for_examples(name, words):
    weights, kind = WRONG[words]
    with pytest.raises(kind) as error, np.errstate(all="ignore"):
        CUT[name](make_batch(dtype=jnp.float32), weights)
    assert words in str(error.value)


def test_wrong_weights_for_positions_and_batches():
    batch = make_batch()
    for name in ("fisher", "ggn_roots"):
        with pytest.raises(
            ValueError, match=r"output position, \(., 4\), or each example, \(.,\), got shape"
        ):
            CUT[name](batch, lambda b: jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="no arguments"):
        hj.fisher(lambda p: p, jnp.ones((2, 2)), likelihood=hj.likelihoods.gaussian, weights=mask)
    make = lambda b: hj.hessian(loss_fn, params(), b)
    for words, weights in [
        ("`weights` must give finite numbers of at least 0, got -2 for batch 0", lambda b: -2),
        ("`weights` must not be zero everywhere, but of all 2 batches they are", lambda b: 0 * b["mask"]),
    ]:
        with pytest.raises(ValueError, match=words):
            hj.over_batches(make, [batch, batch], weights=weights)(params())
        with pytest.raises(ValueError, match=words):
            hj.landscape(loss_fn, params(), directions=params(), batches=[batch, batch], weights=weights)
    with pytest.raises(TypeError, match="must be a function of the batch.*got a list"):
        check_weights([1, 2, 3])
    with pytest.raises(ValueError, match="`weights` must come with `batches`"):
        hj.landscape(loss_fn, params(), batch, directions=params(), weights=mask)


# -- what is built on rows -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empirical", "ggn"])
def test_inverse_fisher_and_obs_agree_with_the_dense_matrix(x64, kind):
    """Of one padded batch, and of a stream of them with the sums of their masks."""
    streamed = [batches()[0], batches()[2]]
    together = join(*streamed)
    p = params()
    if kind == "empirical":
        rows = lambda p, b: hj.empirical_fisher_roots(loss_fn, p, b, weights=mask)
        F = oracles.matrix_of(hj.empirical_fisher(loss_fn, p, together, weights=mask), p)
    else:
        rows = lambda p, b: hj.ggn_roots(model_fn, p, b, weights=mask)
        F = oracles.matrix_of(categorical(p, together, weights=mask), p)
    inverse = np.linalg.inv(F + 0.01 * np.eye(len(F)))
    one = hj.inverse_fisher(rows(p, together), 0.01)
    many = hj.inverse_fisher((rows(p, b) for b in streamed), 0.01, weights=(total(b) for b in streamed))
    for found in (one, many):
        same(oracles.flat(found.diagonal()), np.diag(inverse), rtol=1e-8)
    pruned = hj.prune_once(
        p, hj.saliencies.obs("none", 0.01), 0.5, grads_fn=lambda p: rows(p, together), where="*"
    )
    w = oracles.flat(p)
    scores = w**2 / np.diag(inverse)
    kept = np.isin(np.arange(len(w)), np.argsort(scores)[len(w) // 2 :])
    np.testing.assert_array_equal(oracles.flat(pruned.mask), kept)
    gone = np.where(kept, 0, w)
    same(pruned.predicted_increase, gone @ (F + 0.01 * np.eye(len(F))) @ gone / 2, rtol=1e-8)
