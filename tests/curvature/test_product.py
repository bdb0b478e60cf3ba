"""Functions and arguments that no product can be made of, refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

W, X = jnp.ones(3), jnp.ones((2, 3))
LIKELIHOOD = hj.likelihoods.gaussian


def mean_square(outputs, *_):
    return jnp.mean(outputs**2)


MAKERS = {
    "hessian": lambda f, *args: hj.hessian(f, W, *args)(W),
    "linearized": lambda f, *args: hj.hessian(f, W, *args, linearize=True)(W),
    "reverse over forward": lambda f, *args: hj.hessian(f, W, *args, mode="reverse-over-forward")(W),
    "hvp": lambda f, *args: hj.hvp(f, W, W, *args),
    "ggn": lambda f, *args: hj.ggn(f, mean_square, W, *args)(W),
    "linearized ggn": lambda f, *args: hj.ggn(f, mean_square, W, *args, linearize=True)(W),
    "fisher": lambda f, *args: hj.fisher(f, W, *args, likelihood=LIKELIHOOD)(W),
    "empirical_fisher": lambda f, *args: hj.empirical_fisher(f, W, *args)(W),
    "in parts": lambda f, *args: hj.empirical_fisher(f, W, *args, microbatch=1)(W),
    "per_example_grads": lambda f, *args: hj.per_example_grads(f, W, *args),
    "ggn_roots": lambda f, *args: hj.ggn_roots(f, W, *args),
    "sampled_grads": lambda f, *args: hj.sampled_grads(f, W, *args, key=jax.random.key(0)),
}
OF_MODELS = ("ggn", "linearized ggn", "fisher", "ggn_roots", "sampled_grads")


def function(name, body):
    """A loss, or a model with outputs of two axes, with this in it."""

    def loss(w, x, *rest):
        return body(jnp.mean((x @ w) ** 2), *rest)

    def model(w, x, *rest):
        return body((x @ w)[:, None], *rest)

    return model if name in OF_MODELS else loss


def named(name):
    return "`model_fn`" if name in OF_MODELS else "`loss_fn`"


def loop(x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 1.5), (0, x))[1]


@pytest.mark.parametrize("name", MAKERS)
def test_a_while_loop_cannot_be_gone_back_through(name):
    with pytest.raises(TypeError, match=f"(?s){named(name)} must be differentiable backwards.*`scan`"):
        MAKERS[name](function(name, loop), X)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "decide",
    [
        lambda y, flag: y if flag else 2 * y,
        lambda y, flag: y * int(flag),
        lambda y, flag: y * float(np.asarray(flag)),
        lambda y, flag: y * [1.0, 2.0][flag],
    ],
    ids=["if", "int", "numpy", "index"],
)
def test_what_a_function_decides_by_must_be_bound_beforehand(name, decide):
    f = function(name, decide)
    with pytest.raises(TypeError, match=f"{named(name)} must not look at values.*functools.partial"):
        MAKERS[name](f, X, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_arguments_too_many_or_too_few_are_counted(name):
    def two(w, x):
        raise AssertionError("not called")

    target = "model_fn" if name in OF_MODELS else "loss_fn"
    with pytest.raises(TypeError, match=rf"`{target}` must take `params` and the 2 `args`.*\(w, x\)"):
        MAKERS[name](two, X, X)
    if name not in (
        "hessian",
        "linearized",
        "reverse over forward",
        "hvp",
        "ggn",
        "linearized ggn",
        "fisher",
    ):
        return  # the others need a batch
    with pytest.raises(TypeError, match=rf"`{target}` must take `params` and the 0 `args`"):
        MAKERS[name](two)


@pytest.mark.parametrize("name", MAKERS)
def test_arguments_that_are_no_arrays_are_named(name):
    f = function(name, lambda y, *_: y)
    with pytest.raises(TypeError, match=r"`args\[1\]` must hold arrays .*got a str: bind it"):
        MAKERS[name](f, X, "mean")
    with pytest.raises(TypeError, match=r"`args\[1\]`, at how/norm, must hold arrays .*the function `tanh`"):
        MAKERS[name](f, X, {"how": {"norm": jnp.tanh}})


def test_what_only_numpy_reads_is_to_be_converted():
    class Tensor:
        def __array__(self, *_, **__):
            return np.ones((2, 3), np.float32)

    with pytest.raises(TypeError, match=r"`args\[0\]` must hold .*got a Tensor: convert it, `jnp.asarray"):
        hj.hessian(function("hessian", lambda y: y), W, Tensor())


@pytest.mark.parametrize(
    "args",
    [(np.ones(2),), (1,), (2.5,), (True,), (1j,), (jax.random.key(0),), (None,), ({"a": [np.int8(3)]},)],
)
def test_whatever_jax_takes_passes(args):
    np.testing.assert_array_equal(hj.hvp(lambda w, *_: jnp.sum(w**2), W, W, *args), 2 * W)


def test_a_function_without_a_signature_passes():
    np.testing.assert_array_equal(hj.hvp(jax.jit(lambda w: jnp.sum(w**2)), W, W), 2 * W)


def test_errors_of_the_users_own_stay_as_they_are():
    def broken(w):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hj.hvp(broken, W, W)


@pytest.mark.usefixtures("untyped")
def test_sizes_that_are_traced_are_to_be_made_static():
    def top(k):
        return hj.eigenpairs(lambda v: v, jax.random.key(0), W, k, on_device=True).values

    with pytest.raises(TypeError, match="`k` must be an integer, got a traced value.*static_argnames='k'"):
        jax.jit(top)(1)
