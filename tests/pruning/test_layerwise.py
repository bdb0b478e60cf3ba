"""Wanda, optimal brain compression and SparseGPT's sweep beside brute force on small layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from tests.layers.cases import CASES

S = hj.saliencies
UNIFORM = hj.allocations.uniform()


def linear(w, x):
    return x @ w


def transposed(w, x):
    return x @ w.T


def layer(width, outputs, number=60, seed=0, out_in=False):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(number, width)) @ rng.normal(size=(width, width)))
    w = jnp.asarray(rng.normal(size=(outputs, width) if out_in else (width, outputs)))
    fn = transposed if out_in else linear
    return w, x, hj.layers.moments(fn, w, [x], likelihood=hj.likelihoods.gaussian)


def pruned(w, rule, sparsity, **options):
    return hj.prune_once(w, rule, sparsity, where="*", **options)


@pytest.mark.parametrize("out_in", [False, True])
def test_wanda_compares_within_an_output(x64, out_in):
    w, x, moments = layer(8, 5, out_in=out_in)
    mask = pruned(w, S.wanda(moments), 0.5, allocation=UNIFORM).mask
    size = np.abs(w.T if out_in else w) * np.linalg.norm(x, axis=0)[:, None]
    expected = size >= np.sort(size, axis=0)[4]
    np.testing.assert_array_equal(mask.T if out_in else mask, expected)


def test_wanda_under_n_of_m_takes_the_lowest_of_each_group(x64):
    w, x, moments = layer(8, 5)
    mask = pruned(w, S.wanda(moments), 0.5, pattern=hj.patterns.n_of_m(2, 4)).mask
    size = (np.abs(w) * np.linalg.norm(x, axis=0)[:, None]).reshape(2, 4, 5)
    np.testing.assert_array_equal(mask.reshape(2, 4, 5), size >= np.sort(size, axis=1)[:, 2:3])


def test_within_the_network_it_is_the_diagonal_of_kfac(x64):
    case = CASES["heads"]
    params, batch = case.params(), case.batch(5)
    moments = hj.layers.moments(case.loss_fn, params, [batch])
    seen = S.Context(params, jax.tree.map(lambda x: x != 0, params), jnp.int32(1))
    scores = S.wanda(moments, "network").scores((), seen)
    diagonal = hj.layers.kfac(moments).diagonal()
    for path, w in params.items():
        np.testing.assert_allclose(scores[path], w**2 * diagonal[path] / 2, rtol=1e-8, atol=1e-14)


def greedy(hessian, column, number):
    """Brute force: at every step the weight without which the best others do best; and what they lose."""
    gone, losses = [], []
    for _ in range(number):
        trials = {q: loss_without(hessian, column, [*gone, q]) for q in range(len(column)) if q not in gone}
        best = min(trials, key=trials.get)
        gone.append(best)
        losses.append(trials[best])
    return gone, losses


def loss_without(hessian, column, gone):
    inverse = np.linalg.inv(hessian)[np.ix_(gone, gone)]
    return column[gone] @ np.linalg.solve(inverse, column[gone]) / 2


def test_greedy_order_is_that_of_brute_force(x64):
    w, x, moments = layer(9, 3)
    hessian = np.asarray(x.T @ x) / len(x)
    hessian += 0.01 * np.trace(hessian) / 9 * np.eye(9)
    scores = S.obc(moments).scores((), S.Context(w, w != 0, jnp.int32(1)))
    for o in range(3):
        order, losses = greedy(hessian, np.asarray(w[:, o]), 9)
        # A weight that is cheaper than the one before it ties with it.
        assert np.all(np.diff(scores[order, o]) >= 0)
        steps = np.maximum.accumulate(np.diff([0, *losses]))
        np.testing.assert_allclose(scores[order, o], steps, rtol=1e-8)


def test_blocks_cost_what_the_best_others_leave(x64):
    w, x, moments = layer(6, 4)
    hessian = np.asarray(x.T @ x) / len(x)
    hessian += 0.01 * np.trace(hessian) / 6 * np.eye(6)
    seen = S.Context(w, w != 0, jnp.int32(1), pattern=hj.patterns.blocks((2, 2)))
    scores = S.obc(moments).scores((), seen)
    for i, o in itertools.product(range(3), range(2)):
        columns = [np.asarray(w[:, c]) for c in (2 * o, 2 * o + 1)]
        expected = sum(loss_without(hessian, c, [2 * i, 2 * i + 1]) for c in columns)
        block = scores[2 * i : 2 * i + 2, 2 * o : 2 * o + 2]
        np.testing.assert_allclose(block, np.full((2, 2), expected / 4), rtol=1e-8)


def test_the_move_is_the_reconstruction_and_steps_change_nothing(x64):
    w, _, moments = layer(8, 5)
    rule = S.obc(moments)
    found = pruned(w, rule, 0.5)
    rebuilt = hj.layers.reconstruct(w, found.mask, moments, empty="allow")
    np.testing.assert_allclose(found.params, rebuilt.params, rtol=1e-8, atol=1e-12)
    steps = pruned(w, rule, 0.5, recomputes=3)
    again = hj.layers.reconstruct(w, steps.mask, moments, empty="allow")
    np.testing.assert_allclose(steps.params, again.params, rtol=1e-7, atol=1e-11)


def test_the_increase_is_that_of_the_loss_of_a_linear_network(x64):
    w, x, moments = layer(8, 5)
    found = pruned(w, S.compensated(S.magnitude(), by=S.obc(moments)), 0.5)
    rise = jnp.mean(jnp.sum((x @ (w - found.params)) ** 2, axis=1)) / 2
    np.testing.assert_allclose(found.predicted_increase, rise, rtol=1e-8)


def swept_by_columns(hessian, w, zeros, block):
    """SparseGPT as it is written down, one input after the other."""
    upper, w = np.linalg.cholesky(np.linalg.inv(hessian)).T, np.array(w)
    mask, width = np.ones(w.shape, bool), len(w)
    for start in range(0, width, block):
        stop = min(start + block, width)
        due = round(zeros * stop / width) - int(np.sum(~mask))
        score = (w[start:stop] / np.diag(upper)[start:stop, None]) ** 2
        mask[start:stop].reshape(-1)[np.argsort(score.ravel())[:due]] = False
        for j in range(start, stop):
            error = np.where(mask[j], 0, w[j]) / upper[j, j]
            w[j:] -= np.outer(upper[j, j:], error)
    return mask


@pytest.mark.parametrize("block", [4, 16])
def test_the_sweep_takes_one_input_after_the_other(x64, block):
    w, x, moments = layer(10, 6)
    hessian = np.asarray(x.T @ x) / len(x)
    hessian += 0.01 * np.trace(hessian) / 10 * np.eye(10)
    found = pruned(w, S.sparsegpt(moments, block_size=block, exchanges=0), 0.5)
    np.testing.assert_array_equal(found.mask, swept_by_columns(hessian, w, 30, block))
    rebuilt = hj.layers.reconstruct(w, found.mask, moments, empty="allow")
    np.testing.assert_allclose(found.params, rebuilt.params, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_exchanges_bring_the_sweep_within_two_percent_of_the_greedy_choice(x64, seed):
    w, _, moments = layer(16, 12, seed=seed)
    best, swept = (pruned(w, rule(moments), 0.5).predicted_increase for rule in (S.obc, S.sparsegpt))
    assert swept <= 1.02 * best


@pytest.mark.parametrize("name", ["heads", "convolution"])
def test_the_sweep_keeps_the_counts_of_groups(x64, name):
    case = CASES[name]
    params, batch = case.params(), case.batch(9)
    moments = hj.layers.moments(case.loss_fn, params, [batch])
    path, axis = {"heads": ("o", 1), "convolution": ("k", 2)}[name]
    pattern = hj.patterns.n_of_m(1, 2, axis=axis)
    found = hj.prune_once(params, S.sparsegpt(moments), 0.5, where=path, pattern=pattern)
    assert bool(jnp.all(found.mask[path].sum(axis=axis) == params[path].shape[axis] // 2))


def test_groups_along_outputs_are_refused_by_the_sweep(x64):
    w, _, moments = layer(8, 4)
    with pytest.raises(ValueError, match="along the inputs"):
        pruned(w, S.sparsegpt(moments), 0.5, pattern=hj.patterns.n_of_m(2, 4, axis=1))


@pytest.mark.parametrize("make", [S.wanda, S.obc, S.sparsegpt])
def test_jit_gives_the_same(x64, make):
    w, _, moments = layer(8, 4)
    rule = make(moments)
    jitted = jax.jit(lambda w: pruned(w, rule, 0.5, allocation=UNIFORM).params)
    expected = pruned(w, rule, 0.5, allocation=UNIFORM).params
    np.testing.assert_allclose(jitted(w), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("make", [S.wanda, S.obc, S.sparsegpt])
def test_moments_of_other_leaves_are_refused(make):
    w, _, moments = layer(8, 4)
    with pytest.raises(ValueError, match=r"moments of shape \(8, 4\)"):
        pruned(w[:4], make(moments), 0.5)
    with pytest.raises(ValueError, match="no moments"):
        pruned({"w": w}, make(moments), 0.5)


def test_gradients_that_are_all_zero_rank_nothing(x64):
    w, x, _ = layer(4, 1)
    moments = hj.layers.moments(linear, w, [x], likelihood=hj.likelihoods.categorical)  # one class
    for rule in (S.obc, S.sparsegpt, lambda m: S.wanda(m, within="network")):
        with pytest.raises(ValueError, match="`moments` must have gradients that are not all zero"):
            rule(moments)
    assert int(jnp.sum(pruned(w, S.wanda(moments), 0.5).mask)) == 2
