"""What does it cost beyond the bare sharded product, and how does a step's cost grow with the weights?"""

import math
import os
from collections.abc import Callable
from typing import Any

# Before jax is imported: a machine without accelerators has as many devices as it is told.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import table
import timing
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hessjax as hj

LAYOUTS = {
    "data parallel": (P(), P("data")),
    "FSDP": (P("data", None), P("data")),
    "tensor parallel": (P(None, "model"), P("data")),
}
SIZES = 10**5, 10**6, 10**7, 10**8
PRODUCTS = 4


def measure(quick: bool) -> table.Measured:
    figures, raw = [], {}
    for name, specs in LAYOUTS.items():
        times = timing.interleave(products(*specs, quick), 3 if quick else 7)
        raw[name] = times
        for ours in ("hessian", "hessian in a run"):
            ratio = timing.ratio(times, ours, "bare")
            note = f"bare {timing.milliseconds(times['bare']):.0f} ms; 8 simulated devices"
            figures.append(
                table.Figure(f"{ours}, {name}", ratio.median, "bare products", 1.1, ratio[1:], note)
            )
    for name, estimator in ESTIMATORS.items():
        sizes = SIZES[:2] if quick else SIZES
        steps = {size: step_seconds(estimator, size) for size in sizes}
        raw[name] = {str(size): seconds for size, seconds in steps.items()}
        figures.append(growth(name, steps))
    return figures, raw


def products(of_params: P, of_batch: P, quick: bool) -> dict[str, timing.Call]:
    """The product in one line of jax, hessjax's, and one as a step of a run: each after a first call."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    width = 256 if quick else 2500
    shardings = NamedSharding(mesh, of_params), NamedSharding(mesh, of_batch)
    params = [jax.device_put(normal(i, (width, width)) / math.sqrt(width), shardings[0]) for i in range(4)]
    batch = jax.device_put(normal(9, (64, width)), shardings[1])

    @jax.jit
    def bare(params: Any, vector: Any, batch: Any) -> Any:
        product = jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (vector,))[1]
        return jax.lax.with_sharding_constraint(product, [shardings[0]] * len(params))

    vector = jax.tree.map(jnp.sin, params)
    matvec = hj.hessian(loss_fn, params, batch)
    calls = {
        "bare": lambda: [bare(params, vector, batch) for _ in range(PRODUCTS)],
        "hessian": lambda: [matvec(vector) for _ in range(PRODUCTS)],
        "hessian in a run": lambda: hj.run(
            hj.estimators.minres(vector), matvec, KEY, params, max_matvecs=PRODUCTS
        ),
    }
    timing.first_calls(calls)
    return calls


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
    for kernel in params:
        batch = jnp.tanh(batch @ kernel)
    return jnp.mean(batch**2)


KEY = jax.random.key(0)
ESTIMATORS: dict[str, Callable[[Any], Any]] = {
    "hutchinson": lambda _like: hj.estimators.hutchinson(),
    "minres": hj.estimators.minres,
    "slq, two vectors": lambda _like: hj.estimators.slq(1, 80, reorthogonalise=False),
}


def step_seconds(estimator: Callable[[Any], Any], size: int) -> float:
    """Of one step with the cheapest product there is, on one device: from two runs of different lengths."""
    like = [jnp.full((size // 10,), 0.1) for _ in range(10)]
    matvec = jax.tree_util.Partial(jax.jit(lambda d, v: jax.tree.map(jnp.multiply, d, v)), like)
    steps = min(20, max(2, 5 * 10**7 // size))
    calls = {
        name: lambda number=number: hj.run(estimator(like), matvec, KEY, like, max_matvecs=number)[0]
        for name, number in {"short": steps, "long": 3 * steps}.items()
    }
    timing.first_calls(calls)
    times = timing.interleave(calls, 3 if size >= 10**8 else 9)
    return max(min(times["long"]) - min(times["short"]), 1e-6) / (2 * steps)


def growth(name: str, steps: dict[int, float]) -> table.Figure:
    """The exponent of the number of weights, over the whole range."""
    (small, few), *_, (large, many) = steps.items()
    exponent = math.log(many / few) / math.log(large / small)
    shown = ", ".join(f"{size:.0e}: {1e3 * seconds:.1f} ms" for size, seconds in steps.items())
    return table.Figure(f"growth of a step, {name}", exponent, "power of the weights", 1.05, note=shown)


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape)


if __name__ == "__main__":
    table.main(__doc__, measure)
