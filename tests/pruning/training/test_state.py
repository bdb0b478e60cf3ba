import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import hessjax as hj
from hessjax.pruning.training._state import MaskSteps


def test_mask_steps_and_the_last_one_off_the_beat():
    due = [t for t in range(60) if MaskSteps(every=10, start=5, stop=42).are_at(jnp.int32(t))]
    assert due == [5, 15, 25, 35, 42]
    assert [t for t in range(30) if MaskSteps(10, 5, None).are_at(jnp.int32(t))] == [5, 15, 25]


def test_the_sample_of_steps_fits_the_counter():
    assert max(MaskSteps(10**6, 0, None).some()) < 2**31
    assert MaskSteps(10, 5, 42).some() == [5, 15, 25, 42]


@pytest.mark.parametrize("every", [1, 10**4, 10**6])
def test_long_beats_are_no_overflow(every):
    tx = hj.prune(
        optax.sgd(0.1), hj.saliencies.magnitude(), optax.linear_schedule(0.1, 0.5, 100), every=every
    )
    assert float(tx.init({"w": jnp.ones((4, 4))}).sparsity) == pytest.approx(0.1)


def test_a_schedule_must_reach_its_target_before_the_masks_rest():
    params, schedule = {"w": jnp.ones((4, 4))}, optax.polynomial_schedule(0.0, 0.75, 3, 100)
    with pytest.raises(ValueError, match=r"which is 0\.75: at step 50 it gives 0\.656"):
        hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), schedule, stop=50).init(params)
    hj.prune(optax.sgd(0.1), hj.saliencies.magnitude(), schedule, stop=100).init(params)


@pytest.mark.promotes
def test_movement_goes_on_from_an_orbax_checkpoint(tmp_path):
    tx = hj.prune(optax.adam(0.1), hj.saliencies.movement(), lambda t: 0.1 * jnp.minimum(t, 5), every=1)
    params = {"w": jnp.arange(1.0, 13.0).reshape(3, 4)}
    grads = [{"w": jnp.sin(jnp.arange(12.0) + t).reshape(3, 4)} for t in range(6)]

    def train(params, state, grads):
        for g in grads:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    half = train(params, tx.init(params), grads[:3])
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "half", half)
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "half", half)
    found, _ = train(*restored, grads[3:])
    expected, _ = train(*half, grads[3:])
    np.testing.assert_array_equal(found["w"], expected["w"])
