"""Arguments that count something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax._core._messages import checked_count


def test_any_integer_will_do():
    for number in (3, np.int64(3), np.uint8(3), jnp.int32(3)):
        assert checked_count("k", number) == 3
        assert type(checked_count("k", number)) is int


def test_what_is_none_is_named():
    for number in (2.5, 2.0, float("nan"), "2", None, np.ones(2)):
        with pytest.raises(TypeError, match="`k` must be an integer, got"):
            checked_count("k", number)
    with pytest.raises(ValueError, match="`k` must be at least 3, one step's need, got 2."):
        checked_count("k", 2, 3, ", one step's need")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_probes", lambda n: hj.estimators.slq(n, 2)),
        ("num_matvecs", lambda n: hj.estimators.slq(1, n)),
        ("num_matvecs", hj.estimators.xtrace),
        ("num_matvecs", hj.estimators.hutchpp),
        ("k", hj.estimators.lanczos),
        ("k", hj.estimators.power_iteration),
        ("n", lambda n: hj.patterns.n_of_m(n, 4)),
        ("axis", lambda n: hj.patterns.n_of_m(2, 4, axis=n)),
        ("axis", hj.patterns.channels),
        ("shape", lambda n: hj.patterns.blocks((n, 2))),
        ("num_heads", hj.patterns.heads),
        ("num_grads", lambda n: hj.saliencies.obs(num_grads=n)),
        ("num_grads", lambda n: hj.saliencies.obd(num_grads=n)),
        ("block_size", lambda n: hj.saliencies.obs(block_size=n)),
        ("stop", lambda n: hj.saliencies.hard_concrete(1.0, jax.random.key(0), stop=n)),
        ("microbatch", lambda n: hj.per_example_grads(jnp.vdot, jnp.ones(2), jnp.ones((3, 2)), microbatch=n)),
    ],
)
def test_numbers_of_the_public_functions(name, call):
    with pytest.raises(TypeError, match=name):
        call(2.5)


@pytest.mark.parametrize(
    "call",
    [
        hj.saliencies.random,
        lambda key: hj.saliencies.sparse_evolution(0.3, key),
        lambda key: hj.saliencies.hard_concrete(1.0, key, stop=2),
    ],
)
def test_keys_of_the_public_functions(call):
    for wrong in (0, None, jax.random.split(jax.random.key(0)), jax.random.PRNGKey(0)):
        with pytest.raises(TypeError, match="key"):
            call(wrong)
    call(jax.random.key(0))
