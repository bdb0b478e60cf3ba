"""Settings objects and tolerances."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax._core._types import Amount, Relative, settings

pytestmark = pytest.mark.smoke


@settings()
class Plain:
    count: int
    _: dataclasses.KW_ONLY
    name: str = "plain"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"`count` must be at least 1, got {self.count}.")


@settings()
class Other:
    count: int
    _: dataclasses.KW_ONLY
    name: str = "plain"


@settings(arrays=("weights", "inner"))
class WithArrays:
    weights: Any
    inner: Any = None
    size: int = 3

    def __post_init__(self) -> None:
        [float(jnp.sum(x)) for x in jax.tree.leaves(self.weights)]  # no tracer would pass


def test_equal_settings_are_equal_and_hash_alike():
    assert Plain(2) == Plain(2, name="plain")
    assert hash(Plain(2)) == hash(Plain(2))
    assert Plain(2) != Plain(3)
    assert Plain(2) != Other(2)
    assert jax.tree.structure(Plain(2)) != jax.tree.structure(Other(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plain(2).count = 3
    with pytest.raises(TypeError, match="positional"):
        Plain(2, "other")
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        Plain(0)


def test_arrays_are_leaves_and_compare_by_value():
    a, b = WithArrays(np.arange(3.0)), WithArrays(jnp.arange(3.0))
    assert a == b
    assert hash(a) == hash(b)
    assert a != WithArrays(np.arange(4.0))
    assert a != WithArrays(np.ones(3))
    assert WithArrays(np.arange(3.0), size=4) != a
    key = jax.random.key(0)
    assert dataclasses.replace(a, inner=key) == dataclasses.replace(a, inner=jax.random.key(0))
    assert dataclasses.replace(a, inner=key) != dataclasses.replace(a, inner=jax.random.key(1))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(a)]
    assert paths == [".weights"]


def test_keys_compare_with_keys_alone():
    keys = [jax.random.key(0), jax.random.key(0, impl="rbg"), jnp.zeros(()), None, jax.random.PRNGKey(0)]
    made = [WithArrays(np.zeros(1), inner=x) for x in keys]
    assert [[a == b for b in made] for a in made] == np.eye(5, dtype=bool).tolist()


@pytest.mark.parametrize("parent", [hj.estimators.hutchinson, hj.estimators.lanczos])
def test_a_plain_subclass_compares_field_by_field_and_runs(parent):
    """To jax its instances are leaves, not pytrees of their settings."""

    class Mine(parent):
        pass

    assert Mine() == Mine() != parent()
    assert hash(Mine()) == hash(Mine())
    like, product = jnp.zeros(10), jax.tree_util.Partial(jnp.multiply, jnp.arange(10.0))
    first, second = (hj.run(Mine(), product, jax.random.key(0), like, max_matvecs=10)[0] for _ in range(2))
    chex.assert_trees_all_equal(first, second)


def test_repr_shows_settings_functions_by_name_and_arrays_by_shape():
    assert repr(Plain(2)) == "Plain(count=2, name='plain')"
    nested = WithArrays({"w": jnp.zeros((2, 3))}, Plain(2))
    assert (
        repr(nested) == "WithArrays(weights={'w': float32[2,3]}, inner=Plain(count=2, name='plain'), size=3)"
    )
    assert repr(dataclasses.replace(nested, size=hj.relative)).endswith("size=relative)")


def test_equal_settings_share_compiled_code_and_other_arrays_too():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def total(made: Any) -> Any:
        return made.size * jnp.sum(made.weights)

    for weights in (jnp.ones(3), jnp.arange(3.0)):
        np.testing.assert_allclose(total(WithArrays(weights, Plain(1))), 3 * weights.sum())
    with pytest.raises(AssertionError, match="max_traces"):
        total(WithArrays(jnp.ones(3), Plain(2)))


def test_settings_are_rebuilt_around_whatever_jax_puts_in_them():
    made = WithArrays({"w": jnp.arange(3.0)}, Plain(2))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x, made), made)
    assert jax.tree.map(lambda _: object(), made).inner == Plain(2)  # no check of the constructor runs
    doubled = jax.vmap(lambda made: jax.tree.map(lambda x: 2 * x, made), axis_size=2, in_axes=None)(made)
    assert doubled.weights["w"].shape == (2, 3)


def test_tolerances_are_checked_in_one_place():
    assert Amount.of(2).limit(5.0) == 2.0
    assert Amount.of(hj.relative(0.5)).limit(4.0) == 2.0
    assert Amount.of(hj.relative(0.5)) == Relative(0.5) != Amount(0.5)
    assert hj.relative(0.5).factor == 0.5
    assert (repr(hj.relative(0.1)), repr(Amount.of(2))) == ("relative(0.1)", "2.0")
    with pytest.raises(ValueError, match="`damping` must be at least 0, got -1.0"):
        Amount.of(-1, "damping")
    with pytest.raises(ValueError, match="`tol` must be at least 0, got nan"):
        Amount.of(float("nan"))
    with pytest.raises(ValueError, match=r"`tol` must be a number or `relative\(r\)`: it decides"):
        Amount.of(None, meaning=": it decides")
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`factor` must be positive and finite"):
            hj.relative(factor)
    assert jax.vmap(lambda r: hj.relative(r).limit(3.0))(jnp.ones(2)).tolist() == [3.0, 3.0]
    traced = jax.jit(lambda tol: tol.limit(3.0))
    assert traced(hj.relative(2.0)) == 6.0
    assert traced(hj.relative(3.0)) == 9.0
