import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessjax._core import _numbers


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_units_are_powers_of_two(x64, dtype):
    info = jnp.finfo(dtype)
    for size in (0.0, 1e-30, 0.75, 1.0, 3e7, float(info.max)):
        unit = _numbers.power_of_two(jnp.array([size, -size / 3], dtype))
        assert unit.dtype == dtype
        assert np.frexp(unit)[0] == 0.5  # a power of two
        assert size / float(unit) <= 2
        assert size == 0 or size / float(unit) >= 0.5


def test_numbers_meet_in_their_common_dtype_when_nothing_may_promote():
    with jax.numpy_dtype_promotion("strict"):
        a, b, c = _numbers.promoted(jnp.ones(2, jnp.bfloat16), np.float32(2.0), 3)
    assert a.dtype == b.dtype == c.dtype == jnp.float32


def test_what_is_not_there_is_nan_under_debug_nans_too():
    with jax.debug_nans(True):
        got = _numbers.or_nan(jnp.array([True, False]), jnp.ones(2))
        assert np.isnan(got).tolist() == [False, True]
        with pytest.raises(FloatingPointError):
            jnp.log(-jnp.ones(())).block_until_ready()
