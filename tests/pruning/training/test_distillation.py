"""The loss against its formula in numpy, its two ends, and a teacher that learns nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import close

import hessjax as hj

LABELS = jnp.array([0, 2, 1, 2])


def model_fn(params, batch):
    return jnp.tanh(batch @ params["w"]) @ params["v"]


def task(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def make(seed, dtype=None):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in {"w": (5, 6), "v": (6, 3)}.items()}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def formula(z, t, temperature, alpha):
    p, q = softmax(t / temperature), softmax(z / temperature)
    soft = temperature**2 * np.mean(np.sum(p * (np.log(p) - np.log(q)), -1))
    return alpha * soft - (1 - alpha) * np.mean(np.log(softmax(z))[np.arange(len(z)), LABELS])


@pytest.fixture
def problem(x64):
    batch = jnp.asarray(np.random.default_rng(9).normal(size=(4, 5)))
    return make(0), make(1), batch


def loss_of(teacher, temperature=2.0, alpha=0.5):
    return hj.distillation(model_fn, functools.partial(model_fn, teacher), task, temperature, alpha)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_it_is_the_formula(problem, temperature, alpha):
    params, teacher, batch = problem
    z, t = (np.asarray(model_fn(p, batch)) for p in (params, teacher))
    loss_fn = loss_of(teacher, temperature, alpha)
    np.testing.assert_allclose(loss_fn(params, batch), formula(z, t, temperature, alpha), rtol=1e-12)
    slope = jax.grad(lambda e: formula_in_jax(z + e, t, temperature, alpha))(jnp.zeros_like(z))
    _, pull = jax.vjp(lambda p: model_fn(p, batch), params)
    close(jax.jit(jax.grad(loss_fn))(params, batch), pull(slope)[0], 1e-10, 1e-12)


def formula_in_jax(z, t, temperature, alpha):
    p, q = jax.nn.softmax(t / temperature), jax.nn.softmax(z / temperature)
    return alpha * temperature**2 * jnp.mean(jnp.sum(p * jnp.log(p / q), -1)) + (1 - alpha) * task(z, None)


def test_the_ends_are_the_task_and_the_teacher(problem):
    params, teacher, batch = problem
    assert loss_of(teacher, alpha=0)(params, batch) == task(model_fn(params, batch), batch)
    assert loss_of(params, alpha=1)(params, batch) == 0
    refuses = hj.distillation(model_fn, lambda batch: 1 / 0, task, alpha=0)
    assert np.isfinite(refuses(params, batch))


def test_no_gradient_reaches_the_teacher(problem):
    params, teacher, batch = problem
    grads = jax.grad(lambda t: loss_of(t)(params, batch))(teacher)
    close(grads, jax.tree.map(jnp.zeros_like, teacher), 0, 0)
    both = jax.grad(lambda p: loss_of(p)(p, batch))(params)
    close(both, jax.grad(loss_of(params))(params, batch), 1e-12, 1e-15)


def test_teacher_logits_in_the_batch_and_several_heads(problem):
    params, teacher, x = problem
    two = lambda p, batch: {"start": model_fn(p, batch["x"]), "end": 2 * model_fn(p, batch["x"])}
    loss_fn = hj.distillation(two, lambda batch: batch["teacher"], lambda *_: 0.0, alpha=1.0)
    z, t = (np.asarray(model_fn(p, x)) for p in (params, teacher))
    want = formula(z, t, 2.0, 1.0) + formula(2 * z, 2 * t, 2.0, 1.0)
    batch = {"x": x, "teacher": two(teacher, {"x": x})}
    np.testing.assert_allclose(loss_fn(params, batch), want, rtol=1e-12)


def test_bfloat16_logits_are_softened_in_float32():
    params, teacher = make(0, jnp.bfloat16), make(1, jnp.bfloat16)
    batch = jnp.ones((4, 5), jnp.bfloat16)
    z, t = (np.asarray(model_fn(p, batch), np.float64) for p in (params, teacher))
    loss = loss_of(teacher, alpha=1)(params, batch)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, formula(z, t, 2.0, 1.0), rtol=1e-5)


def test_equal_parts_compile_once(compilations):
    params, batch = make(0), jnp.ones((4, 5))
    teach, grad = (
        functools.partial(model_fn, make(1)),
        jax.jit(jax.grad(lambda p, f, b: f(p, b)), static_argnums=1),
    )
    losses = [hj.distillation(model_fn, teach, task) for _ in range(2)]
    grad(params, losses[0], batch)
    del compilations[:]
    grad(params, losses[1], batch)
    assert not compilations


def test_bad_arguments():
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`temperature` must be positive and finite, got"):
            hj.distillation(model_fn, model_fn, task, temperature)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], the weight of the teacher, got 1.5"):
        hj.distillation(model_fn, model_fn, task, alpha=1.5)
    wrong = hj.distillation(model_fn, lambda batch: jnp.ones((4, 2)), task)
    with pytest.raises(ValueError, match=r"`teacher_fn\(\*args\)` must have the structure.*\n.*\(4, 2\)"):
        wrong(make(0), jnp.ones((4, 5)))
