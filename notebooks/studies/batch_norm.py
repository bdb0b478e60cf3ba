"""What BatchNorm and shortcuts do to curvature: a grid of small ResNets, each measured as it learns.

    python notebooks/studies/batch_norm.py

adds to `notebooks/results/batch_norm.jsonl` a row for each network and checkpoint that is not there yet.
"""

import functools
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import hessjax as hj
from hessjax.cli import _digits as digits
from hessjax.flax import linen_loss, linen_recalibrate

ROWS = pathlib.Path(__file__).parents[1] / "results" / "batch_norm.jsonl"
ALL, NONE = (True, True, True), (False, False, False)


class Settings(NamedTuple):
    """How each network is trained and measured."""

    epochs: int = 30
    checkpoints: tuple[int, ...] = (0, 13, 30)  # epochs
    rate: float = 0.05
    warm_up: int = 4  # epochs of a rate that grows to it
    clip: float = 1.0  # the longest gradient
    batch_size: int = 64
    weight_decay: float = 5e-4
    num_examples: int = 256  # of the training set, others for each seed: it is the loss on these that curves
    num_probes: int = 20
    num_lanczos: int = 24


class Case(NamedTuple):
    """One network: its depth, which of its stages have BatchNorm, whether it has shortcuts, and its seed."""

    depth: int
    norms: tuple[bool, bool, bool] = ALL
    shortcuts: bool = True
    seed: int = 0


def _taps(size: int, stride: int) -> np.ndarray:
    """(3, in, out): 1 where the tap takes that input to that output, padded as by "SAME"."""
    out = -(-size // stride)
    before = max((out - 1) * stride + 3 - size, 0) // 2
    tap, at = np.ogrid[:3, :out]
    return (np.arange(size)[:, None] == (at * stride + tap - before)[:, None]).astype(np.float32)


class Conv(nn.Module):
    """A 3 × 3 convolution without bias."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        size, channels = x.shape[1], x.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (3, 3, channels, self.features))
        if size > 4:
            return jax.lax.conv_general_dilated(
                x, kernel, (self.stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        # As a matrix: the gradient of XLA's convolution of 2 × 2 images takes 40 times as long on a CPU.
        taps = _taps(size, self.stride)
        matrix = jnp.einsum("abio,apq,brs->priqso", kernel, taps, taps)
        out = taps.shape[2]
        return (x.reshape(len(x), -1) @ matrix.reshape(size**2 * channels, -1)).reshape(len(x), out, out, -1)


class Block(nn.Module):
    """Two convolutions, and round them the identity, which gains channels of zeros and loses pixels."""

    features: int
    stride: int
    norm: bool
    shortcut: bool

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = Conv(self.features, self.stride)(x)
        y = nn.relu(norm()(y) if self.norm else y)
        y = Conv(self.features)(y)
        y = norm()(y) if self.norm else y
        if self.shortcut:
            x = x[:, :: self.stride, :: self.stride]
            y += jnp.pad(x, ((0, 0),) * 3 + ((0, self.features - x.shape[-1]),))
        return nn.relu(y)


class ResNet(nn.Module):
    """ResNet-(6n + 2) of He et al. for 8 × 8 images: three stages of n blocks, 8, 16 and 32 channels wide."""

    depth: int
    norms: tuple[bool, bool, bool] = ALL
    shortcuts: bool = True

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = Conv(8, name="stem")(x)
        if self.norms[0]:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x)
        x = nn.relu(x)
        for stage, norm in enumerate(self.norms):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage and not block else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = Block(8 * 2**stage, stride, norm, self.shortcuts, name=name)(x, train)
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


def network(case: Case) -> ResNet:
    return ResNet(case.depth, case.norms, case.shortcuts)


def cross_entropy(logits: Any, batch: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


GROUPS = {"stage 1": ["stem*", "stage1*"], "stage 2": "stage2*", "stage 3": "stage3*", "head": "head*"}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(model: ResNet, optimizer: Any, variables: Any, state: Any, batch: Any) -> Any:
    def loss_fn(params: Any) -> Any:
        inputs = {"params": params, **stats}
        logits, new = model.apply(inputs, batch[0], train=True, mutable=["batch_stats"])
        return cross_entropy(logits, batch), new

    stats = {name: x for name, x in variables.items() if name != "params"}
    grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
    updates, state = optimizer.update(grads, state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], updates), **new}, state


@functools.cache
def _optimizer(settings: Settings, steps_per_epoch: int) -> Any:
    """Momentum, weight decay, and a tenth of the rate after 4/9 and 2/3 of the epochs, as in the paper.

    The slow start and the clipped gradients are not in the paper: without them the deep networks without
    BatchNorm do not learn at a rate at which the others do.
    """
    warm = settings.warm_up * steps_per_epoch
    drops = {round(settings.epochs * part) * steps_per_epoch - warm: 0.1 for part in (4 / 9, 2 / 3)}
    steady = optax.piecewise_constant_schedule(settings.rate, drops)
    rate = optax.join_schedules([optax.linear_schedule(0, settings.rate, warm), steady], [warm])
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(rate, momentum=0.9),
    )


def train(case: Case, data: Any, settings: Settings) -> Iterator[tuple[int, Any]]:
    """The variables at every checkpoint, BatchNorm's statistics taken anew over the training set."""
    model = network(case)
    x, y = (jnp.asarray(part) for part in data)
    variables = model.init(jax.random.key(case.seed), x[:2], train=False)
    per_epoch = len(y) // settings.batch_size
    optimizer = _optimizer(settings, per_epoch)
    state, draw = optimizer.init(variables["params"]), np.random.default_rng(case.seed)
    for epoch in range(settings.epochs + 1):
        if epoch in settings.checkpoints:
            yield epoch, _recalibrated(model, variables, (x, y))
        for some in draw.permutation(len(y))[: per_epoch * settings.batch_size].reshape(per_epoch, -1):
            batch = _shifted(x[some], jnp.asarray(draw.integers(3, size=(len(some), 2)))), y[some]
            variables, state = _step(model, optimizer, variables, state, batch)


@jax.jit
def _shifted(images: Any, by: Any) -> Any:
    """Each image one pixel to a side, or none: what padding by 4 and cropping is for 32 × 32."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, by)


def _recalibrated(model: ResNet, variables: Any, batch: Any) -> Any:
    if not any(model.norms):
        return variables
    return {
        "params": variables["params"],
        **{
            k: v for k, v in linen_recalibrate(model, variables, [batch], train=True).items() if k != "params"
        },
    }


@functools.partial(jax.jit, static_argnums=0)
def _quality(model: ResNet, variables: Any, batch: Any) -> Any:
    logits = model.apply(variables, batch[0], train=False)
    return cross_entropy(logits, batch), jnp.mean(jnp.argmax(logits, axis=-1) == batch[1])


def curvature(case: Case, variables: Any, data: Any, settings: Settings, mode: bool = False) -> Any:
    """The Hessian on some of the training examples; `mode` is BatchNorm's, evaluation unless it is True."""
    loss_fn, params, *args = _loss(case, variables, data, settings, mode)
    return hj.hessian(loss_fn, params, *args, linearize=True)


def landscape(case: Case, variables: Any, data: Any, vectors: Any, settings: Settings, points: int) -> Any:
    """The loss on the same examples in the plane of two vectors."""
    loss_fn, params, *args = _loss(case, variables, data, settings, mode=False)
    distances = np.linspace(-1, 1, points)
    return hj.landscape(loss_fn, params, *args, directions=vectors, distances=distances)


def _loss(case: Case, variables: Any, data: Any, settings: Settings, mode: bool) -> tuple[Any, ...]:
    some = np.random.default_rng(case.seed).permutation(len(data[1]))[: settings.num_examples]
    batch = jax.tree.map(lambda x: jnp.asarray(x[some]), data)
    stats = {name: x for name, x in variables.items() if name != "params"}
    return linen_loss(network(case), cross_entropy, train=mode), variables["params"], batch, stats


def measure(case: Case, variables: Any, data: digits.Digits, settings: Settings) -> dict[str, Any]:
    """Loss and accuracies, and the curvature with BatchNorm in evaluation mode."""
    key, params, model = jax.random.key(case.seed), variables["params"], network(case)
    H = curvature(case, variables, data.train, settings)
    traces = hj.trace_by_leaf(H, key, params, settings.num_probes, groups=GROUPS)
    pairs, density, _ = hj.spectrum(H, key, params, k=1, num_matvecs=settings.num_lanczos)
    loss, accuracy = _quality(model, variables, data.train)
    return {
        "loss": float(loss),
        "accuracy": float(accuracy),
        "test_accuracy": float(_quality(model, variables, data.test)[1]),
        "trace": _pair(traces.total),
        "stages": {name: _pair(part) for name, part in traces.groups.items()},
        "ends": [_rounded(x) for x in pairs.values],
        "residuals": [_rounded(x) for x in pairs.residuals],
        "nodes": [_rounded(x) for x in density.nodes[0]],
        "weights": [_rounded(x) for x in density.weights[0]],
        "num_params": int(density.dimension),
    }


def _pair(estimate: hj.Estimate) -> list[float]:
    return [_rounded(estimate.mean), _rounded(estimate.stderr)]


def _rounded(x: Any) -> float:
    return float(f"{float(x):.5g}")


def study(case: Case, data: digits.Digits, settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for every checkpoint of one network."""
    for epoch, variables in train(case, data.train, settings):
        row = {**case._asdict(), "epoch": epoch, **measure(case, variables, data, settings)}
        if epoch == settings.epochs and case.norms == ALL and case.depth == 20:
            H = curvature(case, variables, data.train, settings, mode=True)
            key = jax.random.key(case.seed)
            row["train_mode_trace"] = _pair(hj.trace(H, key, variables["params"], settings.num_probes))
        yield row


def grid(depths: tuple[int, ...], seeds: int) -> list[Case]:
    """All networks, seed after seed: what is there when it ends early is balanced."""
    whole = [(norms, shortcuts) for norms in (ALL, NONE) for shortcuts in (True, False)]
    parts = [tuple(stage != absent for stage in range(3)) for absent in range(3)]
    return [
        Case(depth, *rest, seed)
        for seed in range(seeds)
        for depth in depths
        for rest in whole + [(norms, True) for norms in parts] * (depth == 20)
    ]


def read(path: pathlib.Path = ROWS) -> list[dict[str, Any]]:
    """The rows that are kept, without the one that says where they were measured."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**row, "norms": tuple(row["norms"])} for row in rows if "depth" in row]


def main() -> None:
    data, settings = digits.load(), Settings()
    done = {Case(*(row[name] for name in Case._fields)) for row in read() if row["epoch"] == settings.epochs}
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        if not file.tell():
            where = {"processor": platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
            file.write(json.dumps({**where, "settings": settings._asdict()}) + "\n")
        for case in grid((8, 20, 32, 14), seeds=3):
            if case in done:
                continue
            start = time.perf_counter()
            rows = list(study(case, data, settings))
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            last = rows[-1]
            print(
                f"{case}: loss {last['loss']:.4f}, accuracy {last['test_accuracy']:.3f}, trace "
                f"{last['trace'][0]:.4g} ± {last['trace'][1]:.2g}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
