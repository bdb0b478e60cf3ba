"""What does pruning add to a training step?"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import models
import optax
import table
import timing

import hessjax as hj

PROBLEMS = {"MLP": (models.mlp, 60), "transformer": (models.transformer, 15), "ResNet-20": (models.resnet, 7)}
EVERY = 100
LARGE_ROUNDS = 5


def measure(quick: bool) -> table.Measured:
    figures, raw = [], {}
    # Compiling is what a short run takes: one problem shows that it runs.
    for name, (make, rounds) in list(PROBLEMS.items())[: 1 if quick else None]:
        problem = make(quick)
        steps = {kind: training(problem, tx) for kind, tx in optimizers().items()}
        timing.first_calls(steps)
        times = timing.interleave(steps, 3 if quick else rounds)
        raw[name] = times
        figures += figures_of(name, times)
    raw["update alone"] = times = updates(10**6 if quick else 10**8)
    figures.append(beside(times))
    return figures, raw


def updates(number: int) -> timing.Times:
    """Updates of so many weights under Adam, without a model: every other one is a mask step."""
    side = math.isqrt(number // 8)
    params = {f"Dense_{i}": {"kernel": jax.random.normal(jax.random.key(i), (side, side))} for i in range(8)}
    schedule = optax.polynomial_schedule(0.0, 0.9, 3, 1000)
    tx = hj.prune(optax.adam(1e-4), hj.saliencies.magnitude(), schedule, every=2, start=2)

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(params, state, params)  # gradients of their own would only take memory
        return optax.apply_updates(params, updates), state

    compiled, carry = jax.jit(step, donate_argnums=(0, 1)), (params, jax.jit(tx.init)(params))
    times: list[float] = []
    for _ in range(2 * (1 + LARGE_ROUNDS)):
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(*carry))
        times.append(time.perf_counter() - start)
    return {"between": times[2::2], "mask step": times[3::2]}


def beside(times: timing.Times) -> table.Figure:
    """A mask step beside the step before it."""
    found = timing.ratio(times, "mask step", "between")
    note = f"step between {timing.milliseconds(times['between']):.1f} ms"
    return table.Figure("mask step over a step between, no model", found.median, "×", 4.0, found[1:], note)


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Adam, bare and pruned: one that rests after its first mask step, and one that never does."""
    adam, schedule = optax.adam(1e-4), optax.polynomial_schedule(0.0, 0.9, 3, 1000)
    return {
        "bare": adam,
        "between": hj.prune(adam, hj.saliencies.magnitude(), schedule, every=1000),
        "mask step": hj.prune(adam, hj.saliencies.magnitude(), schedule, every=1),
    }


def training(problem: models.Problem, tx: optax.GradientTransformation) -> Callable[[], Any]:
    """A training loop: every call is one step further, params and state re-use their memory."""

    def step(params: Any, state: Any, *args: Any) -> tuple[Any, Any]:
        grads = jax.grad(problem.loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jax.numpy.copy, problem.params)
    carry = (params, tx.init(params))

    def advance() -> Any:
        nonlocal carry
        carry = compiled(*carry, *problem.args)
        return carry

    return advance


def figures_of(name: str, times: timing.Times) -> list[table.Figure]:
    bare = timing.milliseconds(times["bare"])
    between, mask_step = (added(times, kind) for kind in ("between", "mask step"))
    note = f"bare step {bare:.1f} ms"
    average = between.median + (mask_step.median - between.median) / EVERY
    return [
        table.Figure(f"between mask steps, {name}", between.median, "%", 5.0, between[1:], note),
        table.Figure(f"at a mask step, {name}", mask_step.median, "%", None, mask_step[1:], note),
        table.Figure(f"on average at every={EVERY}, {name}", average, "%", None, None, note),
    ]


def added(times: timing.Times, kind: str) -> timing.Ratio:
    """What a step takes beyond the bare one, in percent of it."""
    return timing.Ratio(*(100 * (x - 1) for x in timing.ratio(times, kind, "bare")))


if __name__ == "__main__":
    table.main(__doc__, measure)
