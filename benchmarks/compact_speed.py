"""What does pruning save once the zeros are gone: time, weights, bytes on disk?"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import table
import timing

import hessjax as hj
from hessjax.flax import linen_model

SPARSITY = 0.9


def measure(quick: bool) -> table.Measured:
    figures, raw = [], {}
    for part in (resnet_inner, resnet_all, transformer, unstructured):
        found, times = part(quick)
        figures += found
        raw[part.__name__] = times
    return figures, raw


def resnet_inner(quick: bool) -> table.Measured:
    """Half the channels between the two convolutions of every block."""
    problem, widths = models.resnet(quick), stages(quick)
    params = {"params": without_inner(problem.params), **problem.args[1]}
    half = tuple(n // 2 for n in widths)
    return compacted(
        "ResNet-20, half of the blocks' inner channels", problem, params, resnet(quick, inner=half), quick
    )


def resnet_all(quick: bool) -> table.Measured:
    """Half of the residual stream as well."""
    problem, widths = models.resnet(quick), stages(quick)
    params = {"params": without_stream(without_inner(problem.params)), **problem.args[1]}
    half = tuple(n // 2 for n in widths)
    module = resnet(quick, inner=half, stream=half)
    return compacted("ResNet-20, half of all channels", problem, params, module, quick, bar=0.5)


def transformer(quick: bool) -> table.Measured:
    """Half of the heads and half of the hidden units; the stream is normalised, and stays."""
    problem = models.transformer(quick)
    layers = {name: x for name, x in problem.params.items() if name.startswith("EncoderLayer")}
    params = {"params": {**problem.params, **{name: half_layer(x) for name, x in layers.items()}}}
    return compacted("transformer, half of heads and hidden units", problem, params, None, quick)


def half_layer(layer: Any) -> Any:
    """Nothing reads every other head and every other hidden unit."""
    name = "MultiHeadDotProductAttention_0"
    attention = {**layer[name], "out": zero_rows(layer[name]["out"], 0)}
    return {**layer, name: attention, "Dense_0": zero_rows(layer["Dense_0"], 0)}


def compacted(
    name: str, problem: models.Problem, params: Any, module: Any, quick: bool, bar: float | None = None
) -> table.Measured:
    """Time and size of the compact model, built anew or as it was traced, against the full one."""
    batch = problem.args[0]
    full_fn = as_variables(problem.model_fn)
    small = hj.compact(full_fn, params, batch)
    small_fn = small.model_fn if module is None else as_variables(linen_model(module))
    assert small.check(small_fn, batch) < 1e-4
    assert small.difference < 1e-4
    calls = {"full": call(full_fn, params, batch), "compact": call(small_fn, small.params, batch)}
    timing.first_calls(calls)
    times = timing.interleave(calls, 3 if quick else 30)
    ratio = timing.ratio(times, "compact", "full")
    note = f"{timing.milliseconds(times['full']):.1f} → {timing.milliseconds(times['compact']):.1f} ms"
    products = small.after.multiply_adds / small.before.multiply_adds
    weights = small.after.weights / small.before.weights
    counts = f"{small.before.weights:,} → {small.after.weights:,}; multiply-adds × {products:.2f}"
    return [
        table.Figure(f"time of a forward pass, {name}", ratio.median, "of full", bar, ratio[1:], note),
        table.Figure(f"weights, {name}", weights, "of full", None, None, counts),
    ], times


def unstructured(quick: bool) -> table.Measured:
    """90 % zeros anywhere: what BCOO costs and a file saves."""
    problem = models.mlp(quick, batch=16 if quick else 512)
    params = hj.prune_once(problem.params, hj.saliencies.magnitude(), SPARSITY).params
    sparse, inputs = hj.to_sparse(params, least_sparsity=0.5), problem.args[0][0]
    calls = {"dense": call(perceptron, params, inputs), "BCOO": call(perceptron, sparse, inputs)}
    timing.first_calls(calls)
    times = timing.interleave(calls, 3 if quick else 10)
    ratio = timing.ratio(times, "BCOO", "dense")
    note = f"{timing.milliseconds(times['dense']):.1f} → {timing.milliseconds(times['BCOO']):.1f} ms"
    with tempfile.TemporaryDirectory() as folder:
        saved = hj.save_npz(Path(folder) / "params.npz", params)
    held = sum(x.nbytes for x in jax.tree.leaves(sparse)) / saved.dense_bytes
    name = f"MLP, {SPARSITY:.0%} unstructured zeros"
    return [
        table.Figure(
            f"time of a forward pass with BCOO, {name}", ratio.median, "of dense", None, ratio[1:], note
        ),
        table.Figure(f"memory with BCOO, {name}", held, "of dense", None),
        table.Figure(f"file of save_npz, {name}", saved.bytes / saved.dense_bytes, "of dense", 0.2),
    ], times


def perceptron(params: Any, x: jax.Array) -> jax.Array:
    """The MLP of `models`, for any kind of matrix."""
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def call(fn: Callable[..., Any], *args: Any) -> timing.Call:
    compiled = jax.jit(fn)
    return lambda: compiled(*args)


def as_variables(model_fn: Any) -> Callable[..., Any]:
    """Batch statistics become part of the params: they shrink with them."""

    def fn(variables: Any, batch: Any) -> Any:
        rest = {name: x for name, x in variables.items() if name != "params"}
        return model_fn(variables["params"], batch, *([rest] if rest else []))

    return fn


def resnet(quick: bool, **widths: Any) -> models.ResNet:
    return models.ResNet(1, 4, **widths) if quick else models.ResNet(**widths)


def stages(quick: bool) -> tuple[int, ...]:
    return (4, 8, 16) if quick else (16, 32, 64)


def without_inner(params: Any) -> Any:
    """The second convolution of every block reads every other channel of the first."""
    blocks = {name: x for name, x in params.items() if name.startswith("ResidualBlock")}
    return {**params, **{n: {**x, "Conv_1": zero_rows(x["Conv_1"], -2)} for n, x in blocks.items()}}


def without_stream(params: Any) -> Any:
    """All that reads the stream reads every other channel of it."""
    blocks = {name: x for name, x in params.items() if name.startswith("ResidualBlock")}
    new = {n: {**x, "Conv_0": zero_rows(x["Conv_0"], -2)} for n, x in blocks.items()}
    return {**params, **new, "Dense_0": zero_rows(params["Dense_0"], 0)}


def zero_rows(layer: Any, axis: int) -> Any:
    """A layer whose kernel is zero at every other index of an axis."""
    kernel = np.array(layer["kernel"])
    np.moveaxis(kernel, axis, 0)[1::2] = 0
    return {**layer, "kernel": jnp.asarray(kernel)}


if __name__ == "__main__":
    table.main(__doc__, measure)
