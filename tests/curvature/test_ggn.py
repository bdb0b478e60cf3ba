import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import hessjax as hj

KEY = jax.random.key(0)


def model_fn(params, batch):
    """Three numbers an example, from params in any container."""
    bias = jax.tree.leaves(params)[0]
    bias, empty, scale, kernel = (leaf.astype(bias.dtype) for leaf in jax.tree.leaves(params))
    x = batch[0].astype(bias.dtype)
    return scale * jnp.tanh(x @ kernel + bias.reshape(*[1] * (x.ndim - 1), 3)) + jnp.sum(empty)


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(batch[1], axis=1)).mean()


def half_squares(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=-1)) / 2


def quartic(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 4)


def dense_jacobian(model, params, *args):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jacobian(lambda p: ravel_pytree(model(unravel(p), *args))[0])(flat))


def dense_ggn(model, output_loss, params, *args):
    J = dense_jacobian(model, params, *args)
    outputs, unravel = ravel_pytree(model(params, *args))
    return J.T @ jax.hessian(lambda o: output_loss(unravel(o), *args))(outputs) @ J


def dense_product(matrix, vector):
    return matrix @ ravel_pytree(vector)[0]


@pytest.mark.smoke
@pytest.mark.parametrize("linearize", [False, True])
@pytest.mark.parametrize("loss", [cross_entropy, quartic])
def test_ggn_is_the_dense_one_and_semidefinite(x64, loss, linearize):
    params, batch = oracles.leaves(), oracles.batch()
    got = oracles.matrix_of(hj.ggn(model_fn, loss, params, batch, linearize=linearize), params)
    np.testing.assert_allclose(got, dense_ggn(model_fn, loss, params, batch), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got, got.T, rtol=1e-10, atol=1e-12)
    assert np.linalg.eigvalsh(got).min() > -1e-12


@pytest.mark.parametrize("linearize", [False, True])
@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_every_container(x64, container, linearize):
    params, batch = oracles.CONTAINERS[container](oracles.leaves()), oracles.batch()
    vector = jax.tree.map(lambda leaf: leaf + 1, params)
    product = hj.ggn(model_fn, cross_entropy, params, batch, linearize=linearize)(vector)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    want = dense_product(dense_ggn(model_fn, cross_entropy, params, batch), vector)
    np.testing.assert_allclose(ravel_pytree(product)[0], want, rtol=1e-10, atol=1e-12)


def test_outputs_of_any_structure(x64):
    def model(params, batch):
        outputs = model_fn(params, batch)
        return {"mean": outputs, "deep": [jnp.sum(outputs**2), outputs[:, :1]]}

    def loss(outputs, batch):
        total, first = outputs["deep"]
        return half_squares(outputs["mean"], batch) + total**2 + jnp.mean(first**2 * outputs["mean"])

    params, batch = oracles.leaves(), oracles.batch()
    got = oracles.matrix_of(hj.ggn(model, loss, params, batch), params)
    np.testing.assert_allclose(got, dense_ggn(model, loss, params, batch), rtol=1e-10, atol=1e-11)


def test_a_linear_model_has_no_other_curvature(x64):
    def linear(params, batch):
        return batch[0] @ params["kernel"] + params["bias"][None]

    params = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}
    vector, batch = jax.tree.map(jnp.cos, params), oracles.batch()
    loss = lambda p, b: quartic(linear(p, b), b)
    oracles.close(
        hj.ggn(linear, quartic, params, batch)(vector), hj.hessian(loss, params, batch)(vector), rtol=1e-11
    )


@pytest.mark.smoke
@pytest.mark.parametrize("linearize", [False, True])
@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [(hj.likelihoods.categorical, cross_entropy), (hj.likelihoods.gaussian, half_squares)],
)
def test_the_exact_fisher_is_the_ggn_of_its_loss(x64, likelihood, loss, linearize):
    params, batch = oracles.leaves(), oracles.batch()
    matvec = hj.fisher(model_fn, params, batch, likelihood=likelihood, linearize=linearize)
    want = dense_ggn(model_fn, loss, params, batch)
    np.testing.assert_allclose(oracles.matrix_of(matvec, params), want, rtol=1e-10, atol=1e-12)


def test_tokens_are_examples(x64):
    params, (x, y) = oracles.leaves(), oracles.batch(6)
    flat = hj.fisher(model_fn, params, (x, y), likelihood=hj.likelihoods.categorical)(params)
    in_sentences = (x.reshape(2, 3, 2), y.reshape(2, 3, 3))
    oracles.close(
        hj.fisher(model_fn, params, in_sentences, likelihood=hj.likelihoods.categorical)(params), flat
    )


@pytest.mark.parametrize("likelihood", [hj.likelihoods.categorical, hj.likelihoods.gaussian])
def test_the_sampled_fisher_is_the_mean_outer_product_at_its_labels(x64, likelihood):
    params, batch = oracles.leaves(), oracles.batch()
    J = dense_jacobian(model_fn, params, batch).reshape(7, 3, -1)
    outputs, want = model_fn(params, batch), 0
    for sample in range(2):
        scores = likelihood.score(jax.random.fold_in(KEY, sample), outputs)
        grads = np.einsum("ncd,nc->nd", J, scores)
        want = want + grads.T @ grads / 14
    for linearize in (False, True):
        matvec = hj.fisher(
            model_fn, params, batch, likelihood=likelihood, num_samples=2, key=KEY, linearize=linearize
        )
        np.testing.assert_allclose(oracles.matrix_of(matvec, params), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("likelihood", [hj.likelihoods.categorical, hj.likelihoods.gaussian])
def test_the_sampled_fisher_is_unbiased(x64, likelihood):
    """Over 400 keys every entry's mean is within its error of the exact one: z-scores have size 1."""
    params, batch = oracles.leaves(), oracles.batch()
    vector = oracles.leaves(1)
    exact = ravel_pytree(hj.fisher(model_fn, params, batch, likelihood=likelihood)(vector))[0]

    @jax.jit
    @jax.vmap
    def draw(key):
        matvec = hj.fisher(model_fn, params, batch, likelihood=likelihood, num_samples=3, key=key)
        return ravel_pytree(matvec(vector))[0]

    samples = np.asarray(draw(jax.random.split(KEY, 400)))
    scores = (samples.mean(axis=0) - exact) / (samples.std(axis=0, ddof=1) / 20)
    assert np.abs(scores).max() < 4
    assert np.abs(samples.mean(axis=0) - exact).max() < 0.2 * np.abs(exact).max()


def test_scores_have_the_information_as_their_covariance(x64):
    outputs, tangents = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[1.0, 2.0, -1.0]])
    for likelihood in (hj.likelihoods.categorical, hj.likelihoods.gaussian):
        scores = np.asarray(likelihood.score(KEY, jnp.repeat(outputs, 40_000, axis=0)))
        np.testing.assert_allclose(scores.mean(axis=0), 0, atol=0.02)
        want = likelihood.information(outputs, tangents)[0]
        np.testing.assert_allclose(scores.T @ (scores @ tangents[0]) / 40_000, want, atol=0.06)


@pytest.mark.parametrize("linearize", [False, True])
def test_jit_equals_eager_and_float32_is_near_float64(x64, linearize):
    point = oracles.leaves(), oracles.batch(), oracles.leaves(3)

    def product(params, batch, vector):
        return hj.ggn(model_fn, cross_entropy, params, batch, linearize=linearize)(vector)

    eager = product(*point)
    oracles.close(jax.jit(product)(*point), eager, rtol=1e-12, atol=1e-13)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), point)
    oracles.close(product(*single), eager, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("linearize", [False, True])
def test_mixed_and_short_dtypes_come_back_as_they_went_in(linearize):
    short = oracles.leaves()
    short["d_kernel"] = short["d_kernel"].astype(jnp.bfloat16)
    all_short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), oracles.leaves())
    options = {"likelihood": hj.likelihoods.categorical, "linearize": linearize}
    want = hj.fisher(model_fn, oracles.leaves(), oracles.batch(), **options)(oracles.leaves(1))
    for params in (short, all_short):
        for key in (None, KEY):
            product = hj.fisher(model_fn, params, oracles.batch(), key=key, **options)(oracles.leaves(1))
            assert jax.tree.map(lambda x: x.dtype, product) == jax.tree.map(lambda x: x.dtype, params)
            if key is None:
                wide = jax.tree.map(lambda x: x.astype(jnp.float32), product)
                oracles.close(wide, want, rtol=0.05, atol=0.02)


@pytest.mark.smoke
@pytest.mark.parametrize("linearize", [False, True])
def test_new_params_batches_and_keys_compile_nothing(compilations, linearize):
    apply = jax.jit(lambda matvec, vector: matvec(vector))
    vector, batches = oracles.leaves(5), [oracles.batch(seed=i) for i in range(2)]
    points = [oracles.leaves(i) for i in range(2)]
    keys = [jax.random.key(i) for i in range(2)]
    options = {"likelihood": hj.likelihoods.categorical, "linearize": linearize}
    for params, batch, key in zip(points, batches, keys, strict=True):
        del compilations[:]
        matvecs = [
            hj.ggn(model_fn, cross_entropy, params, batch, linearize=linearize),
            hj.fisher(model_fn, params, batch, **options),
            hj.fisher(model_fn, params, batch, key=key, **options),
        ]
        jax.block_until_ready([(matvec(vector), apply(matvec, vector)) for matvec in matvecs])
    assert not compilations


def test_over_ragged_batches_and_on_a_part(x64):
    params, (x, y) = oracles.leaves(), oracles.batch(9)
    part = hj.select(params, "d_*")
    index = np.arange(4, 10)
    want = dense_ggn(model_fn, cross_entropy, params, (x, y))[np.ix_(index, index)]
    model = part.restrict(model_fn)
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    ways = [
        lambda b: hj.ggn(model, cross_entropy, part.part, b),
        lambda b: hj.fisher(model, part.part, b, likelihood=hj.likelihoods.categorical, linearize=True),
    ]
    for make in ways:
        got = oracles.matrix_of(hj.over_batches(make, batches), part.part)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_a_key_in_each_batch(x64):
    params, (x, y) = oracles.leaves(), oracles.batch(4)
    batches = [(x[i : i + 2], y[i : i + 2], jax.random.key(i)) for i in (0, 2)]

    def make(batch):
        return hj.fisher(
            model_fn, params, batch[:2], likelihood=hj.likelihoods.categorical, key=batch[2], num_samples=2
        )

    got = hj.over_batches(make, batches)(params)
    halves = [make(batch)(params) for batch in batches]
    oracles.close(got, jax.tree.map(lambda a, b: (a + b) / 2, *halves), rtol=1e-12, atol=1e-13)


def test_models_losses_and_likelihoods_that_carry_arrays(x64, compilations):
    def scaled(factor, *args):
        return factor * model_fn(*args)

    def weighted(factor, outputs, batch):
        return factor * quartic(outputs, batch)

    def information(variance, outputs, tangents):
        return tangents / variance

    params, batch, products = oracles.leaves(), oracles.batch(), []
    for factor in map(jnp.asarray, (1.0, 2.0)):
        del compilations[:]
        likelihood = hj.likelihoods.Likelihood(Partial(information, factor), hj.likelihoods.gaussian.score)
        products.append(
            [
                hj.ggn(model_fn, Partial(weighted, factor), params, batch)(params),
                hj.fisher(model_fn, params, batch, likelihood=likelihood)(params),
                hj.fisher(Partial(scaled, factor), params, batch, likelihood=likelihood)(params),
            ]
        )
    assert not compilations
    for (one, two), ratio in zip(zip(*products, strict=True), (2, 0.5, 2), strict=True):
        oracles.close(two, jax.tree.map(lambda x, r=ratio: r * x, one))


@jax.custom_vjp
def square(x):
    return x**2


square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))


@pytest.mark.parametrize("linearize", [False, True])
def test_a_custom_vjp_in_model_or_loss_is_no_obstacle(linearize):
    w = jnp.array([1.0, 2.0])
    product = hj.ggn(square, lambda out: jnp.sum(square(square(out))), w, linearize=linearize)(w)
    np.testing.assert_allclose(product, (2 * w) ** 2 * 12 * w**4 * w, rtol=1e-6)


@pytest.mark.parametrize("linearize", [False, True])
def test_what_cannot_be_multiplied_is_named(linearize):
    w, total = jnp.ones(2), lambda outputs: jnp.sum(outputs)
    make = lambda model, loss: hj.ggn(model, loss, w, linearize=linearize)(w)
    with pytest.raises(TypeError, match=r"`output_loss` must return one real number.*got float32\[2\]"):
        make(lambda w: w, lambda outputs: outputs**2)
    with pytest.raises(TypeError, match=r"`model_fn` must return real floating-point.*, got .*int32\[2\]"):
        make(lambda w: (w, w.astype(int)), lambda outputs: jnp.sum(outputs[0]))
    with pytest.raises(TypeError, match="`model_fn` must return.*got none"):
        make(lambda w: None, lambda outputs: 0.0)
    with pytest.raises(ValueError, match=r"(?s)`vector` must have.*shape \(3,\), must be \(2,\)"):
        hj.ggn(lambda w: w, total, w, linearize=linearize)(jnp.ones(3))
    with pytest.raises(TypeError, match=r"(?s)`params` must have real floating-point.*int32"):
        hj.ggn(lambda w: w, total, jnp.ones(2, int), linearize=linearize)


def test_fishers_that_make_no_sense():
    w = jnp.ones(2)
    make = lambda model, **options: hj.fisher(model, w, likelihood=hj.likelihoods.categorical, **options)
    with pytest.raises(ValueError, match="`key` must be given with `num_samples`"):
        make(lambda w: w[None], num_samples=3)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        make(lambda w: w[None], num_samples=0, key=KEY)
    for key in (None, KEY):
        with pytest.raises(ValueError, match=r"an axis of examples before the last.*got float32\[2\]"):
            make(lambda w: w, key=key)(w)
        with pytest.raises(TypeError, match="one array for a Fisher, got a tuple; for other outputs"):
            make(lambda w: (w, w), key=key)(w)


@pytest.mark.parametrize("linearize", [False, True])
def test_products_ask_for_full_precision_unless_told_otherwise(linearize):
    params, batch = oracles.leaves(), oracles.batch()

    def program(precision):
        def run(p, v):
            options = {"precision": precision, "linearize": linearize}
            return hj.ggn(model_fn, cross_entropy, p, batch, **options)(v)

        return jax.jit(run).lower(params, params).as_text()

    full, default = program("highest"), program(None)
    assert full.count("dot_general") == full.count("HIGHEST, HIGHEST") > 2
    assert "HIGHEST" not in default


def test_a_likelihood_is_told_from_another_and_refuses_what_is_no_function():
    categorical = hj.likelihoods.categorical
    same = hj.likelihoods.Likelihood(categorical.information, categorical.score)
    assert same == categorical != hj.likelihoods.gaussian
    assert hash(same) == hash(categorical)
    with pytest.raises(TypeError, match="score"):
        hj.likelihoods.Likelihood(categorical.information, 3)
