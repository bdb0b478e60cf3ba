"""Can a pretrained encoder lose half of its weights in minutes, without training, and keep its accuracy?"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import fine_tuning
import jax
import jax.numpy as jnp
import numpy as np
import optax
import table

import hessjax as hj

Params = Any
S = hj.saliencies


class Settings(NamedTuple):
    """Of all runs.

    Attributes:
        layers: of the encoder.
        length: tokens of a sentence.
        sentences: for training, and for testing; None: all.
        steps: of the training of the dense network.
        calibration: sentences that moments are taken of.
        size: of a batch of them.
    """

    layers: int = 6
    length: int = 32
    sentences: int | None = None
    steps: int = 450
    calibration: int = 512
    size: int = 64


QUICK = Settings(1, 16, 200, 4, 32, 16)
PATTERNS = {"50 %": hj.patterns.unstructured(), "2:4": hj.patterns.n_of_m(2, 4)}


def measure(quick: bool) -> table.Measured:
    settings = QUICK if quick else Settings()
    task = fine_tuning.problem(settings.layers, settings.length, settings.sentences)
    tx = fine_tuning.adamw(5e-5, 5e-4, settings.steps)
    trained = fine_tuning.train(task, tx, settings.steps, 16)
    task = task._replace(params=trained.params)
    wrong = {"dense": trained.wrong}
    seconds = {"dense": 0.0}
    for pattern in PATTERNS:
        for name, method in METHODS.items():
            label = f"{name}, {pattern}"
            start = time.perf_counter()
            pruned = jax.block_until_ready(method(task, settings, PATTERNS[pattern]))
            seconds[label] = time.perf_counter() - start
            wrong[label] = fine_tuning.mistakes(task, pruned)
            print(label, len(wrong[label]), seconds[label], flush=True)
    size = len(task.test.labels)
    raw = {
        "num_test": size,
        "seconds": seconds,
        "wrong": {k: " ".join(map(str, v)) for k, v in wrong.items()},
    }
    return figures(wrong, seconds, size), raw


def figures(wrong: dict[str, list[int]], seconds: dict[str, float], size: int) -> list[table.Figure]:
    """Errors beyond those of the dense network, with their standard error over the sentences; and times."""
    found = [table.Figure("dense", 100 * len(wrong["dense"]) / size, "% errors")]
    for name in [name for name in wrong if name != "dense"]:
        differ = set(wrong[name]) ^ set(wrong["dense"])
        mean = (len(wrong[name]) - len(wrong["dense"])) / size
        stderr = 100 * np.sqrt((len(differ) / size - mean**2) / size)
        ours = BEST in name
        bar = 1.0 if ours and "50 %" in name else None
        note = f"standard error over the test sentences {stderr:.1f}"
        found.append(table.Figure(f"{name}, less dense", 100 * mean, "points of errors", bar, note=note))
        found.append(table.Figure(f"{name}, time", seconds[name], "s", 300.0 if ours else None))
    return found


# -- methods ---------------------------------------------------------------------------------------


def magnitude(task: fine_tuning.Task, settings: Settings, pattern: Any) -> Params:
    return pruned(task, S.magnitude(), pattern)


def by_rule(make: Callable[[Any], Any], task: fine_tuning.Task, settings: Settings, pattern: Any) -> Params:
    """In one step, by the moments of the dense network."""
    return pruned(task, make(moments(task, settings)), pattern)


def in_sequence(task: fine_tuning.Task, settings: Settings, pattern: Any) -> Params:
    """The mask of the sweep, the kept weights layer by layer at what the pruned ones before hand on."""
    found = moments(task, settings)
    mask = pruned(task, S.sparsegpt(found, exchanges=0), pattern, "mask")
    batches = calibration(task, settings)
    # Outputs that count for nothing, as of heads that look nowhere, lose all of their weights.
    return hj.layers.reconstruct(task.params, mask, found, batches, empty="allow").params


def pruned(task: fine_tuning.Task, rule: Any, pattern: Any, what: str = "params") -> Params:
    """The matrices of the encoder, all alike."""
    large = jax.tree.map(lambda group: group == "large", fine_tuning.groups(task.params))
    uniform = hj.allocations.uniform()
    found = hj.prune_once(task.params, rule, 0.5, where=large, pattern=pattern, allocation=uniform)
    return getattr(found, what)


BEST = "in sequence"
METHODS = {
    "magnitude": magnitude,
    "Wanda": functools.partial(by_rule, S.wanda),
    "SparseGPT's sweep": functools.partial(by_rule, functools.partial(S.sparsegpt, exchanges=0)),
    f"SparseGPT's sweep, {BEST}": in_sequence,
}


def moments(task: fine_tuning.Task, settings: Settings) -> hj.layers.LayerMoments:
    fn = loss_of(task.module)
    return hj.layers.moments(fn, task.params, calibration(task, settings), weights=tokens_there)


def tokens_there(batch: Any) -> jax.Array:
    """What stands where there is no token goes into no sum."""
    return batch[1].astype(jnp.float32)


@functools.cache
def loss_of(module: Any) -> Callable[..., jax.Array]:
    """One function for one module: what is compiled for it serves every call."""
    return functools.partial(loss_fn, module)


def calibration(task: fine_tuning.Task, settings: Settings) -> list[Any]:
    """Batches of training sentences, embedded."""
    starts = range(0, settings.calibration, settings.size)
    parts = [task.train[i : i + settings.size] for i in starts]
    return [
        (task.embeddings(jnp.asarray(part.tokens)), jnp.asarray(part.tokens > 0), jnp.asarray(part.labels))
        for part in parts
    ]


def loss_fn(module: Any, params: Params, batch: Any) -> jax.Array:
    x, present, labels = batch
    logits = module.apply({"params": params}, x, present)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


if __name__ == "__main__":
    table.main(__doc__, measure)
