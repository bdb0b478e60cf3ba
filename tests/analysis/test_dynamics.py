"""The dynamics of training against dense values, and how often two standard errors hold them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

D = hj.dynamics
KEY = jax.random.key(0)


def loss_fn(params, batch):
    """Of a small network, every example's loss of its own curvature."""
    x, y = batch
    out = jnp.tanh(x @ params["in"]) @ params["out"]
    return jnp.mean((out - y) ** 2) / 2


def network(count, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    params = {"in": rng.normal(size=(4, 3)) / 2, "out": rng.normal(size=3) / 2}
    x = rng.normal(size=(count, 4))
    data = x, x @ [1, -1, 0.5, 2] + rng.normal(size=count)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, data))


def block(count=9, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 2), "b": (0, 2), "c": ()}
    return {name: jnp.asarray(rng.normal(1, 1, size=(count, *shape))) for name, shape in shapes.items()}


def jackknifed(statistic, count):
    left_out = np.array([statistic([j for j in range(count) if j != i]) for i in range(count)])
    left_out = left_out - left_out.mean(axis=0)
    return (count - 1) / count * left_out.T @ left_out


def naive(rows, H=None):
    """(tr HΣ, GᵀHG) and their ratio, with jackknife errors, from their definitions."""
    H = np.eye(rows.shape[1]) if H is None else H

    def both(kept):
        covariance = np.cov(rows[kept].T, ddof=1).reshape(H.shape)
        noise = np.trace(H @ covariance)
        mean = rows[kept].mean(axis=0)
        return np.array([noise, mean @ H @ mean - noise / len(kept)])

    values = both([*range(len(rows))])
    error = fieller(*values, jackknifed(both, len(rows)))
    return *values, values[0] / values[1], *np.sqrt(np.diag(jackknifed(both, len(rows)))), error


def fieller(noise, gradient, covariance):
    """Half of the longer side of {r: (noise − r·gradient)² ≤ 4 Var(noise − r·gradient)}."""
    (nn, ng), (_, gg) = covariance
    polynomial = [gradient**2 - 4 * gg, -2 * (noise * gradient - 4 * ng), noise**2 - 4 * nn]
    return np.inf if polynomial[0] <= 0 else np.max(np.abs(np.roots(polynomial) - noise / gradient)) / 2


def numbers(found):
    parts = found.noise, found.gradient, found.scale
    return [float(x.mean) for x in parts] + [float(x.stderr) for x in parts]


@pytest.mark.smoke
def test_noise_scale_is_that_of_its_definition(x64):
    grads = block()
    found = D.noise_scale(grads)
    np.testing.assert_allclose(numbers(found), naive(oracles.rows(grads)), rtol=1e-10)
    assert list(found.leaves) == ["a", "c"]
    for name, leaf in found.leaves.items():
        np.testing.assert_allclose(numbers(leaf), naive(oracles.rows(grads[name])), rtol=1e-10)
    of_means = D.noise_scale(grads, batch_size=4)
    assert float(of_means.scale.mean / found.scale.mean) == pytest.approx(4)
    assert float(of_means.scale.stderr / found.scale.stderr) == pytest.approx(4)
    assert float(of_means.gradient.mean) == pytest.approx(float(found.gradient.mean))
    assert "9 samples" in str(found)


@pytest.mark.parametrize("traced", [False, True])
def test_critical_batch_size_is_that_of_its_definition(x64, traced):
    grads = block(7)
    matrix, _ = oracles.symmetric(np.linspace(0.5, 4, 7))
    A = oracles.matvec_of(matrix, jax.tree.map(lambda x: x[0], grads))
    call = jax.jit(D.critical_batch_size) if traced else D.critical_batch_size
    np.testing.assert_allclose(numbers(call(grads, A)), naive(oracles.rows(grads), matrix), rtol=1e-9)


def test_weights_count_examples_and_absent_ones_may_be_anything(x64):
    grads = block(9)
    there = np.array([0, 1, 2, 4, 5, 7])
    weights = np.zeros(9)
    weights[there] = 3.0
    absent = jax.tree.map(lambda x: x.at[3].set(jnp.nan), grads)
    found = D.noise_scale(absent, weights=weights)
    np.testing.assert_allclose(numbers(found), naive(oracles.rows(grads)[there]), rtol=1e-10)
    weights[0] = 6.0
    rows = oracles.rows(grads)
    mean = weights @ rows / weights.sum()
    centred = (weights / weights[there].mean())[:, None] * (rows - mean)
    noise = np.sum(centred**2) / 5
    uneven = D.noise_scale(grads, weights=jnp.asarray(weights))
    assert float(uneven.noise.mean) == pytest.approx(noise, rel=1e-10)
    assert float(uneven.gradient.mean) == pytest.approx(mean @ mean - noise / 6, rel=1e-10)
    assert int(uneven.scale.num_samples) == 6


@pytest.mark.parametrize("power", [-50, 50])
def test_noise_scale_follows_a_rescaling_of_the_loss(power):
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), block())
    scaled = jax.tree.map(lambda x: x * 2.0**power, grads)
    found, other = D.noise_scale(grads), D.noise_scale(scaled)
    assert float(found.scale.mean) == float(other.scale.mean)
    assert float(found.scale.stderr) == float(other.scale.stderr)
    assert float(found.gradient.mean) * 2.0 ** (2 * power) == float(other.gradient.mean)


def test_a_leaf_is_judged_by_itself_whatever_the_others_are_and_what_is_absent():
    """Squares of 2⁻⁷⁰ and of 1e30 leave float32."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    grads = {**jax.tree.map(lambda x: x.astype(jnp.float32), block()), "zero": jnp.zeros((9, 2))}
    found = D.noise_scale(grads)
    beside = D.noise_scale({**grads, "c": grads["c"] * 2.0**-70})
    close(beside.leaves["c"].scale.mean, found.leaves["c"].scale.mean)
    close(beside.scale.mean, found.leaves["a"].scale.mean)
    close(D.noise_scale(jax.tree.map(lambda x: x * 2.0**-70, grads)).scale.mean, found.scale.mean)
    there = np.arange(9) != 3
    padded = D.noise_scale(jax.tree.map(lambda x: x.at[3].set(1e30), grads), weights=there * 1e-42)
    close(numbers(padded), numbers(D.noise_scale(grads, weights=there)))


def test_a_gradient_lost_in_noise_has_no_finite_scale():
    rows = jnp.array([[1.0, 0.0], [-1.0, 0.1], [0.0, 1.0], [0.1, -1.0]])
    found = D.noise_scale(rows)
    assert float(found.gradient.mean) < 0
    assert np.isinf([found.scale.mean, found.scale.stderr]).all()
    assert np.isnan(D.noise_scale(rows.at[0].set(jnp.nan)).scale.mean)


def test_two_batch_sizes_agree_with_all_gradients(x64):
    """Of the same gradients the pair of their means over parts and their mean says the same."""
    rows = np.asarray(block(24)["a"]).reshape(4, 6, 6)  # four steps of six gradients
    whole = [D.noise_scale(jnp.asarray(step)) for step in rows]
    small = jnp.asarray(np.mean(np.sum(rows**2, axis=2), axis=1))
    large = jnp.asarray(np.sum(rows.mean(axis=1) ** 2, axis=1))
    found = D.noise_scale_from_norms(small, large, 1, 6)
    noises, gradients = ([float(x[k].mean) for x in whole] for k in (2, 1))
    assert float(found.noise.mean) == pytest.approx(np.mean(noises), rel=1e-10)
    assert float(found.gradient.mean) == pytest.approx(np.mean(gradients), rel=1e-10)
    ratio = np.mean(noises) / np.mean(gradients)
    error = fieller(np.mean(noises), np.mean(gradients), np.cov(noises, gradients) / 4)
    assert float(found.scale.stderr) == pytest.approx(error, rel=1e-9)
    assert float(found.scale.mean) == pytest.approx(ratio, rel=1e-10)
    tree = D.noise_scale_from_norms({"a": small, "b": small}, {"a": large, "b": large}, 1, 6)
    np.testing.assert_allclose(numbers(tree.leaves["b"]), numbers(found), rtol=1e-10)
    assert float(tree.noise.mean) == pytest.approx(2 * float(found.noise.mean))


def second_derivatives(params, data, update):
    """The dense Hessian of the mean loss along an update."""
    H = oracles.dense_hessian(loss_fn, params, data)
    v = oracles.flat(update)
    return v @ H @ v / (v @ v)


@pytest.mark.smoke
def test_directional_sharpness_is_that_of_the_dense_hessian(x64):
    params, data = network(12, dtype=jnp.float64)
    update = jax.tree.map(lambda x: -0.1 * x, jax.grad(loss_fn)(params, data))
    found = D.directional_sharpness(loss_fn, params, data, update=update)
    assert float(found.mean) == pytest.approx(second_derivatives(params, data, update), rel=1e-10)
    each = [second_derivatives(params, jax.tree.map(lambda x, i=i: x[i : i + 1], data), update)
            for i in range(12)]  # fmt: skip
    assert float(found.stderr) == pytest.approx(np.std(each, ddof=1) / np.sqrt(12), rel=1e-9)
    weights = np.arange(12.0)
    share = weights / weights.sum()
    weighed = D.directional_sharpness(
        loss_fn, params, (data[0].at[0].set(jnp.nan), data[1]), update=update, weights=lambda batch: weights
    )
    assert float(weighed.mean) == pytest.approx(share @ each, rel=1e-6)
    assert int(weighed.num_samples) == 11
    traced = jax.jit(functools.partial(D.directional_sharpness, loss_fn))(params, data, update=update)
    np.testing.assert_allclose(traced.mean, found.mean, rtol=1e-12)


@pytest.mark.parametrize("rate", [1e-6, 1e-2, 10.0])
def test_critical_sharpness_of_a_quadratic_is_its_directional_sharpness(x64, rate):
    H, _ = oracles.symmetric([0.1, 1.0, 3.0, 8.0])
    centres = np.random.default_rng(0).normal(size=(20, 4))
    quadratic = lambda w, c: jnp.mean(jnp.einsum("ni,ij,nj->n", w[None] - c, jnp.asarray(H), w[None] - c)) / 2
    w, c = jnp.ones(4), jnp.asarray(centres)
    g = np.asarray(jax.grad(quadratic)(w, c))
    options = {"update": jnp.asarray(-rate * g), "learning_rate": rate}
    found = D.critical_sharpness(quadratic, w, c, **options)
    want = g @ H @ g / (g @ g)
    assert float(found.sharpness.mean) == pytest.approx(float(want), rel=3e-3)  # one Newton step
    assert float(found.learning_rate.mean) == pytest.approx(2 / float(want), rel=3e-3)
    low, high = found.bracket
    assert low <= 2 / want <= high
    assert bool(found.converged)
    exact = D.critical_sharpness(quadratic, w, c, tol=1e-6, **options)
    assert float(exact.sharpness.mean) == pytest.approx(float(want), rel=1e-9)
    # At the critical rate η each example's loss has changed by η²/2 gᵀHg − η gᵢ·g.
    eta, slopes = 2 / want, (1 - centres) @ H @ g
    rises = eta**2 / 2 * (g @ H @ g) - eta * slopes
    error = np.std(rises, ddof=1) / np.sqrt(20) / float(eta * (g @ H @ g) - g @ g)
    assert float(exact.learning_rate.stderr) == pytest.approx(error, rel=1e-4)


def test_updates_that_never_raise_the_loss_or_always_do():
    params, data = network(8)
    up = jax.grad(loss_fn)(params, data)
    found = D.critical_sharpness(loss_fn, params, data, update=up, max_evaluations=12)
    assert not found.converged
    assert np.isnan(found.sharpness.mean)
    assert found.bracket.tolist() == [0, 0]
    assert int(found.num_evaluations) == 1
    unknown = D.critical_sharpness(
        loss_fn, params, (data[0].at[0].set(jnp.nan), data[1]), update=up, max_evaluations=12
    )
    assert np.isnan(unknown.bracket).all()
    flat = D.critical_sharpness(lambda p, x: jnp.mean(x) - p, jnp.zeros(()), data[1], update=jnp.ones(()))
    assert np.isinf(flat.bracket[1])
    assert not flat.converged
    assert "not found" in str(flat)
    zero = D.directional_sharpness(loss_fn, params, data, update=jax.tree.map(jnp.zeros_like, params))
    assert np.isnan(zero.mean)


@jax.custom_vjp
def squared(x):
    return x**2


squared.defvjp(lambda x: (x**2, x), lambda x, t: (2 * x * t,))


def test_a_custom_vjp_is_named_with_the_way_out():
    bad = lambda p, x: jnp.mean(squared(x * p))
    with pytest.raises(TypeError, match="`loss_fn` must have no `custom_vjp` inside, .*hvp"):
        D.directional_sharpness(bad, jnp.ones(()), jnp.ones(3), update=jnp.ones(()))


def covered(estimate, truth):
    return float(jnp.mean(jnp.abs(estimate.mean - truth) <= 2 * estimate.stderr))


def test_two_standard_errors_hold_the_dense_values():
    """Batches of 256 out of 3000 examples, 400 of them; the noise scale is 6."""
    params, data = network(3000, seed=1)
    grads = hj.per_example_grads(loss_fn, params, data)
    update = jax.tree.map(lambda g: -0.1 * jnp.mean(g, axis=0), grads)

    def run(key):
        rows = jax.random.randint(key, (256,), 0, 3000)
        batch, own = jax.tree.map(lambda x: x[rows], (data, grads))
        critical = D.critical_sharpness(loss_fn, params, batch, update=update, learning_rate=0.1)
        sharpness = D.directional_sharpness(loss_fn, params, batch, update=update)
        return D.noise_scale(own), sharpness, critical.sharpness

    noise, sharpness, critical = jax.jit(jax.vmap(run))(jax.random.split(KEY, 400))
    rows = oracles.rows(grads).astype(float)
    spread, mean = np.sum(np.var(rows, axis=0)), rows.mean(axis=0)
    assert covered(noise.scale, spread / (mean @ mean)) >= 0.93
    assert covered(noise.noise, spread) >= 0.9  # squares of gradients have heavy tails
    assert float(jnp.median(noise.scale.stderr / noise.scale.mean)) < 0.4  # no empty claims
    for leaf, name in ((noise.leaves["in"], "in"), (noise.leaves["out"], "out")):
        part = oracles.rows(grads[name]).astype(float)
        own = np.sum(np.var(part, axis=0)) / np.sum(part.mean(axis=0) ** 2)
        assert covered(leaf.scale, own) >= 0.93
    assert covered(sharpness, second_derivatives(params, data, update)) >= 0.93
    whole = D.critical_sharpness(loss_fn, params, data, update=update, learning_rate=0.1, tol=1e-4)
    assert covered(critical, whole.sharpness.mean) >= 0.93
    assert float(jnp.median(critical.stderr / critical.mean)) < 0.3


def density(low, high, seed=0, probes=4):
    """Nodes and weights of a quadrature: what the distances are made from, whoever found them."""
    rng = np.random.default_rng(seed)
    nodes = np.sort(rng.uniform(low, high, size=(probes, 20)), axis=1)
    count = jnp.int32(probes)
    weights = jnp.asarray(rng.dirichlet(5 * np.ones(20), size=probes))
    return hj.SpectralDensity(jnp.asarray(nodes), weights, count, 20 * count, jnp.asarray(50.0))


def distance_by_hand(p, q):
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    kl = lambda a: np.sum(np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / np.where(m > 0, m, 1)), 0))
    return np.sqrt((kl(p) + kl(q)) / 2 / np.log(2))


def test_heterogeneity_is_that_of_its_definition(x64):
    ranges = {"a": (0, 1), "b": (0, 30), "c": (-2, 2)}
    densities = {name: density(*ends, i) for i, (name, ends) in enumerate(ranges.items())}
    found = D.heterogeneity(densities)
    unit = 1e-3 * max(float(jnp.max(jnp.abs(x.nodes))) for x in densities.values())
    places = {name: np.arcsinh(np.asarray(x.nodes) / unit) for name, x in densities.items()}
    every = np.stack(list(places.values()))
    ends = every.min(), every.max()
    grid = np.linspace(ends[0] - 1.2, ends[1] + 1.2, 512)
    curves = {
        name: np.einsum("pm,pmn->pn", x.weights, np.exp(-(((grid - places[name][..., None]) / 0.3) ** 2) / 2))
        for name, x in densities.items()
    }

    def mean(curves):
        names = list(curves)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        return np.mean([distance_by_hand(curves[a].sum(0), curves[b].sum(0)) for a, b in pairs])

    assert float(found.mean.mean) == pytest.approx(mean(curves), rel=1e-9)
    variance = 0.0
    for name, curve in curves.items():
        left = [mean({**curves, name: np.delete(curve, i, axis=0)}) for i in range(4)]
        variance += 3 / 4 * np.sum((left - np.mean(left)) ** 2)
    assert float(found.mean.stderr) == pytest.approx(np.sqrt(variance), rel=1e-7)
    assert "Mean distance" in str(found)


def test_like_spectra_are_near_and_unlike_ones_far():
    alike = D.heterogeneity({str(i): density(0.1, 1.0, i) for i in range(3)})
    assert float(alike.mean.mean) < 0.1
    spread = {str(scale): density(0.1 * scale, 1.0 * scale) for scale in (1, 100)}
    scales = D.heterogeneity(spread)
    assert float(scales.mean.mean) > 0.95
    one = D.heterogeneity({str(i): density(0.0, 1.0, i, 1) for i in range(2)})
    assert np.isinf(one.mean.stderr)


BAD = {
    "two gradients": (lambda: D.noise_scale(block(2)), "`grads` must hold at least 3 gradients"),
    "two that count": (
        lambda: D.noise_scale(block(5), weights=[1.0, 1.0, 0.0, 0.0, 0.0]),
        "`weights` must be above 0 for at least 3 gradients, got 2",
    ),
    "sizes the wrong way round": (
        lambda: D.noise_scale_from_norms(jnp.ones(3), jnp.ones(3), 8, 8), "`small_size` must be below"
    ),
    "a matvec of other vectors": (
        lambda: D.critical_batch_size(block(4), lambda v: jnp.ones(3)),
        r"`matvec\(vector\)` must have the structure of `a row of `grads``",
    ),
    "an update of another network": (
        lambda: D.directional_sharpness(loss_fn, *network(3), update={"in": jnp.ones((4, 3))}),
        "`update` must have the structure of `params`",
    ),
    "one leaf": (
        lambda: D.heterogeneity({"a": density(0, 1)}), "`densities` must be of at least two leaves, got 1"
    ),
    "Gaussians between the points": (
        lambda: D.heterogeneity({"a": density(0, 1), "b": density(0, 1)}, bandwidth=0.01),
        "`num_points` must be at least 1530 for a bandwidth of 0.01, got 512",
    ),
    "densities of several calls": (
        lambda: D.heterogeneity({"a": density(0, 1), "b": density(0, 1, 0, 2)}),
        "`densities` must have nodes of one shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_no_dynamics_can_be_told_of_is_refused_by_name(name):
    call, words = BAD[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()
