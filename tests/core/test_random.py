import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessjax._core import _random

KEY = jax.random.key(7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2)])
def test_numbers_are_those_of_jax(shape, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        like = jax.ShapeDtypeStruct(shape, dtype)
        np.testing.assert_array_equal(_random.normal(KEY, like), jax.random.normal(KEY, shape, dtype))
        np.testing.assert_array_equal(_random.signs(KEY, like), jax.random.rademacher(KEY, shape, dtype))


def test_a_part_is_drawn_as_in_the_whole():
    whole, part = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096,), (16, 8)))
    for draw in (_random.normal, _random.signs):
        np.testing.assert_array_equal(draw(KEY, part, 1000), draw(KEY, whole)[1000:1128].reshape(part.shape))


def test_places_beyond_32_bits_go_on_counting():
    upper, lower = _random._places(jax.ShapeDtypeStruct((4,), jnp.float32), 2**32 - 2)
    assert list(zip(upper.tolist(), lower.tolist(), strict=True)) == [
        (0, 2**32 - 2),
        (0, 2**32 - 1),
        (1, 0),
        (1, 1),
    ]
    upper, lower = jax.eval_shape(lambda: _random._places(jax.ShapeDtypeStruct((2**20, 2**20), "float32"), 0))
    assert upper.shape == lower.shape == (2**20, 2**20)


def test_leaves_of_more_than_32_bits_repeat_nothing(monkeypatch):
    monkeypatch.setattr(_random, "LOWER", 8)  # in the place of 2³²: the leading axes count above
    upper, lower = _random._places(jax.ShapeDtypeStruct((5, 2, 4), jnp.float32), 0)
    pairs = set(zip(np.ravel(upper).tolist(), np.ravel(lower).tolist(), strict=True))
    assert len(pairs) == 40
    assert max(np.ravel(lower)) < 8


def test_keys_of_every_kind():
    like = jax.ShapeDtypeStruct((1000,), jnp.float32)
    np.testing.assert_array_equal(
        _random.normal(jax.random.PRNGKey(3), like), _random.normal(jax.random.key(3), like)
    )
    one, two = (_random.normal(jax.random.key(seed, impl="rbg"), like) for seed in (0, 1))
    assert abs(float(one.mean())) < 0.15
    assert abs(float(jnp.vdot(one, two))) < 150


@pytest.mark.parametrize("draw", [_random.normal, _random.signs])
def test_memory_is_that_of_what_is_drawn(draw):
    like = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)
    sizes = jax.jit(lambda key: draw(key, like)).lower(KEY).compile().memory_analysis()
    assert sizes.temp_size_in_bytes < 0.01 * sizes.output_size_in_bytes
