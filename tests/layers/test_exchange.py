"""Exchanges of kept weights and zeros beside brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessjax.layers import _exchange
from hessjax.layers._exchange import exchanged

WIDTH, OUTPUTS = 9, 4


def problem(width=WIDTH, outputs=OUTPUTS, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * width, width)) @ rng.normal(size=(width, width))
    hessian = x.T @ x / len(x)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(width)
    kept = rng.permutation(np.arange(width * outputs) % 2 == 0).reshape(width, outputs)
    return hessian, rng.normal(size=(width, outputs)), kept


def loss_of(hessian, column, kept):
    """Of the best kept weights, which the Schur complement of the zeros gives."""
    inverse = np.linalg.inv(hessian)[np.ix_(~kept, ~kept)]
    return column[~kept] @ np.linalg.solve(inverse, column[~kept]) / 2


def total(hessian, weights, kept):
    return sum(loss_of(hessian, *column) for column in zip(weights.T, kept.T, strict=True))


def run(hessian, weights, kept, rounds, gone=None, size=1, each=False):
    gone = np.zeros_like(kept) if gone is None else gone
    data = (jnp.asarray(x)[None] for x in (hessian, weights, kept, gone))
    return np.asarray(exchanged(*data, jnp.arange(len(weights)), size, each, rounds)[0])


def test_costs_and_gains_are_those_of_brute_force(x64):
    hessian, weights, kept = problem()
    gone = np.zeros_like(kept)
    gone[np.argwhere(~kept)[0][0], np.argwhere(~kept)[0][1]] = True
    found = _exchange._look(WIDTH, 2, *map(jnp.asarray, (hessian, weights, gone, kept)))
    for i, o in itertools.product(range(WIDTH), range(OUTPUTS)):
        other = kept[:, o].copy()
        other[i] = not other[i]
        rise = loss_of(hessian, weights[:, o], other) - loss_of(hessian, weights[:, o], kept[:, o])
        expected = (rise, -np.inf) if kept[i, o] else (np.inf, -np.inf if gone[i, o] else -rise)
        np.testing.assert_allclose((found.costs[i, o], found.gains[i, o]), expected, rtol=1e-8)
    np.testing.assert_allclose(found.loss, total(hessian, weights, kept), rtol=1e-9)


def test_in_the_end_no_exchange_between_columns_helps(x64):
    hessian, weights, kept = problem()
    found = run(hessian, weights, kept, 50)
    least = total(hessian, weights, found)
    assert found.sum() == kept.sum()
    assert least < total(hessian, weights, kept)
    places = [np.argwhere(found), np.argwhere(~found)]
    for (i, o), (j, p) in itertools.product(*places):
        other = found.copy()
        other[i, o], other[j, p] = False, True
        assert o == p or total(hessian, weights, other) >= least * (1 - 1e-9)


@pytest.mark.parametrize("rounds", [1, 3])
def test_more_rounds_never_cost_more_and_what_is_gone_stays(x64, rounds):
    hessian, weights, kept = problem(seed=1)
    gone = ~kept & (np.random.default_rng(2).random(kept.shape) < 0.5)
    losses = [total(hessian, weights, run(hessian, weights, kept, n, gone)) for n in (0, rounds)]
    assert losses[1] <= losses[0]
    assert not np.any(run(hessian, weights, kept, rounds, gone) & gone)


def test_groups_keep_their_numbers(x64):
    hessian, weights, _ = problem(8)
    kept = np.tile([[True], [True], [False], [False]], (2, OUTPUTS))
    found = run(hessian, weights, kept, 20, size=4, each=True)
    np.testing.assert_array_equal(found.reshape(2, 4, -1).sum(axis=1), 2)
    assert total(hessian, weights, found) < total(hessian, weights, kept)


def test_traced_masks_give_the_same(x64):
    hessian, weights, kept = (jnp.asarray(x)[None] for x in problem())
    gone, order = jnp.zeros_like(kept), jnp.arange(WIDTH)[::-1]
    call = functools.partial(exchanged, order=order, size=1, each=False, rounds=3)
    np.testing.assert_array_equal(
        jax.jit(call)(hessian, weights, kept, gone), call(hessian, weights, kept, gone)
    )


def test_masks_that_cannot_change_and_singular_systems_come_back(x64):
    hessian, weights, kept = problem()
    np.testing.assert_array_equal(run(hessian, weights, np.ones_like(kept), 2), True)
    np.testing.assert_array_equal(run(hessian, weights, np.zeros_like(kept), 2), False)
    np.testing.assert_array_equal(run(np.zeros_like(hessian), weights, kept, 2), kept)
