"""Arguments that count something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax._core._messages import (
    checked_choice,
    checked_count,
    checked_finite,
    checked_flag,
    checked_function,
    checked_instance,
    checked_number,
    shown,
)


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


# -- kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [1, 0.5, np.float16(2), np.int8(3), jnp.bfloat16(1), jnp.int32(4), np.array(1.0)]
)
def test_one_number_of_any_kind_will_do(number):
    assert checked_number("x", number) is number


@pytest.mark.parametrize(
    "wrong", [True, np.True_, "1", None, [1.0], np.ones(1), jnp.ones(2), 1j, jnp.bool_(True)]
)
def test_what_is_no_number_is_named(wrong):
    with pytest.raises(TypeError, match="`x` must be a number, or None, got"):
        checked_number("x", wrong, ", or None")


def test_traced_numbers_pass():
    assert float(jax.jit(lambda x: checked_finite("x", x))(2.0)) == 2.0
    for wrong in (float("nan"), float("inf"), np.float32("-inf")):
        with pytest.raises(ValueError, match="`x` must be finite, got"):
            checked_finite("x", wrong)


def test_what_is_merely_true_is_no_flag():
    assert checked_flag("x", np.True_) is True
    for wrong in ("no", 1, 0, None, [], jnp.bool_(True)):
        with pytest.raises(TypeError, match="`x` must be True or False, got"):
            checked_flag("x", wrong)


def test_choices_are_listed():
    assert checked_choice("x", "a", ("a", "b")) == "a"
    for wrong in ("c", None, ["a"], np.ones(2)):
        with pytest.raises(ValueError, match="`x` must be one of 'a', 'b' today, got"):
            checked_choice("x", wrong, ("a", "b"), " today")


@pytest.mark.parametrize("right", [lambda p: 0, lambda p, q=1: 0, lambda *_: 0, len, dict, jax.jit(jnp.sum)])
def test_functions_of_one_argument(right):
    assert checked_function("f", right, "(params) -> scalar") is right


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda: 0, r"got one with the signature \(\): too many"),
        (lambda p, q: 0, r"the signature \(p, q\): missing a required argument: 'q'"),
        (3, "got 3"),
        ("f", "got 'f'"),
    ],
)
def test_functions_that_do_not_take_it(wrong, got):
    with pytest.raises(TypeError, match=rf"`f` must be a function `\(params\) -> scalar`, .*{got}"):
        checked_function("f", wrong, "(params) -> scalar")


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (hj.saliencies.magnitude, "got the class `Magnitude`: call it, `magnitude()`."),
        (hj.saliencies.random, "got the class `Random`: call it, `random(key)`."),
        ("movement", "got 'movement': write `movement()`."),
        ("nothing", "got 'nothing'."),
        (dict, "got the class `dict`."),
        (jnp.ones((2, 3)), "got float32[2, 3]."),
        (len, "got the function `len`."),
    ],
)
def test_the_call_to_write_is_named(wrong, got):
    with pytest.raises(TypeError) as error:
        checked_instance("saliency", wrong, hj.saliencies.Saliency, "magnitude()")
    assert str(error.value) == f"`saliency` must be a `Saliency`, such as `magnitude()`, {got}"


def test_values_are_shown_on_one_line():
    assert shown(jax.nn.relu) == "the function `relu`"
    assert shown({"a": [1, 2]}) == "{'a': [1, 2]}"
    assert shown(list(range(100))) == "a list"
    assert shown(np.float32(1.5)) == repr(np.float32(1.5))
    assert jax.eval_shape(assert_traced, jnp.ones(2)).shape == (2,)


def assert_traced(x):
    assert shown(x) == "traced float32[2]"
    return x
