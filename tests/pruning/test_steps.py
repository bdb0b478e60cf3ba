import jax.numpy as jnp
import optax
import pytest

import hessjax as hj
from hessjax.pruning.steps import is_mask_step, some_mask_steps


def test_mask_steps_and_the_last_one_off_the_beat():
    due = [t for t in range(60) if is_mask_step(jnp.int32(t), every=10, start=5, stop=42)]
    assert due == [5, 15, 25, 35, 42]
    assert [t for t in range(30) if is_mask_step(jnp.int32(t), 10, 5, None)] == [5, 15, 25]


def test_the_sample_of_steps_fits_the_counter():
    assert max(some_mask_steps(10**6, 0, None)) < 2**31
    assert some_mask_steps(10, 5, 42) == [5, 15, 25, 42]


@pytest.mark.parametrize("every", [1, 10**4, 10**6])
def test_long_beats_are_no_overflow(every):
    tx = hj.prune(optax.sgd(0.1), hj.magnitude(), optax.linear_schedule(0.1, 0.5, 100), every=every)
    assert float(tx.init({"w": jnp.ones((4, 4))}).sparsity) == pytest.approx(0.1)
