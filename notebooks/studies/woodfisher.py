"""What decides how good second-order pruning is? `python notebooks/studies/woodfisher.py` measures."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
import rows  # first, as it finds the benchmarks

# isort: split
import one_shot_pruning as digits
import pruning_in_training as mnist

import hessjax as hj

GLOBAL, BY_LAYER = "one ranking", "layer by layer"
ALLOCATIONS = {GLOBAL: hj.allocations.global_threshold(), BY_LAYER: hj.allocations.uniform()}


class OneShot(NamedTuple):
    """One way to prune at one go.

    Attributes:
        update: how the kept weights move, as in `hj.saliencies.obs`; or `magnitude`.
        allocation: a key of `ALLOCATIONS`.
        sparsity: of the whole network.
        steps: to it, with gradients taken anew.
        num_grads: the rows of the Fisher.
        damping: relative to the mean of its diagonal.
        block_size: weights that it couples; None: all.
    """

    update: str
    allocation: str = GLOBAL
    sparsity: float = 0.9
    steps: int = 1
    num_grads: int = 400
    damping: float = 1e-2
    block_size: int | None = None

    @property
    def saliency(self) -> hj.saliencies.Saliency:
        """The rule."""
        if self.update == "magnitude":
            return hj.saliencies.magnitude()
        return hj.saliencies.obs(self.update, hj.relative(self.damping), self.block_size)


class Gradual(NamedTuple):
    """One way to prune while training.

    Attributes:
        update: as in `OneShot`.
        allocation: a key of `ALLOCATIONS`.
        sparsity: in the end.
        num_grads: how many mini-batch gradients of the loop the Fisher is made from.
        damping: relative to the mean of its diagonal.
    """

    update: str
    allocation: str = GLOBAL
    sparsity: float = 0.98
    num_grads: int = 128
    damping: float = 1e-2

    @property
    def saliency(self) -> hj.saliencies.Saliency:
        """The rule."""
        if self.update == "magnitude":
            return hj.saliencies.magnitude()
        damping = hj.relative(self.damping)
        return hj.saliencies.obs(self.update, damping, num_grads=self.num_grads, batch_size=mnist.BATCH)


class Settings(NamedTuple):
    """Of all measurements.

    Attributes:
        epochs: of the networks that are pruned at one go.
        plan: updates of the trainings that prune: dense, while zeros grow, at rest, and between two masks.
    """

    epochs: int = 80
    plan: tuple[int, int, int, int] = mnist.Plan()


SEEDS = 3
QUICK = Settings(5, (4, 4, 2, 2))
SPARSITIES = (0.8, 0.9, 0.95)
NUM_GRADS = (25, 100, 400, 1200)
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS = (1, 10)
UPDATES = ("none", "summed", "joint")


def one_shot_cells() -> Iterator[OneShot]:
    """Rules against spreads and steps; gradients against dampings; blocks."""
    for sparsity, allocation in itertools.product(SPARSITIES, ALLOCATIONS):
        yield OneShot("magnitude", allocation, sparsity)
        for steps, update in itertools.product(STEPS, UPDATES):
            yield OneShot(update, allocation, sparsity, steps)
    for steps, num_grads, damping in itertools.product(STEPS, NUM_GRADS, DAMPINGS):
        yield OneShot("joint", steps=steps, num_grads=num_grads, damping=damping)
    for steps, block_size in itertools.product(STEPS, (8, 64, 512)):
        yield OneShot("joint", steps=steps, block_size=block_size)


def gradual_cells() -> Iterator[Gradual]:
    """The same questions where training goes on."""
    for allocation, update in itertools.product(ALLOCATIONS, ("magnitude", *UPDATES)):
        yield Gradual(update, allocation)
    for num_grads in (16, 512):
        yield Gradual("joint", num_grads=num_grads)
    for damping in (1e-4, 1.0):
        yield Gradual("joint", damping=damping)
    for update in ("magnitude", "joint"):
        yield Gradual(update, sparsity=0.95)


def label(cell: OneShot | Gradual, seed: int) -> str:
    """The name of a row: what is not as usual."""
    usual = type(cell)._field_defaults
    parts = [f"{key}={x}" for key, x in cell._asdict().items() if key not in usual or usual[key] != x]
    return f"{type(cell).__name__}({', '.join(parts)}) seed {seed}"


def main(settings: Settings = Settings()) -> None:  # noqa: B008 (a value, never changed)
    kept = rows.Rows("woodfisher", settings._asdict())
    runs: dict[str, Callable[[], Any]] = {}
    for seed in range(SEEDS):
        runs[f"dense digits, seed {seed}"] = functools.partial(dense, settings, seed)
        for cell in one_shot_cells():
            runs[label(cell, seed)] = functools.partial(one_shot, cell, settings, seed)
    for seed in range(SEEDS):
        runs[f"dense MNIST, seed {seed}"] = functools.partial(gradual, None, settings, seed)
        for cell in gradual_cells():
            runs[label(cell, seed)] = functools.partial(gradual, cell, settings, seed)
    for name in kept.missing(iter(runs)):
        kept.keep(name, runs[name]())


# -- at one go -----------------------------------------------------------------------------------


def dense(settings: Settings, seed: int) -> dict[str, Any]:
    """The network before."""
    params = digits.trained(seed, settings.epochs)
    return {"errors": digits.errors(params), "loss": float(digits.training_loss(params))}


def one_shot(cell: OneShot, settings: Settings, seed: int) -> dict[str, Any]:
    """Errors in percent; and for every step the rise of the training loss, predicted and realised."""
    pruned = hj.prune_once(
        digits.trained(seed, settings.epochs),
        cell.saliency,
        cell.sparsity,
        grads_fn=functools.partial(digits.example_grads, number=cell.num_grads),
        allocation=ALLOCATIONS[cell.allocation],
        recomputes=cell.steps,
        loss_fn=digits.training_loss,
    )
    steps = [[float(x) for x in step] for step in pruned.steps]
    moves = cell.update != "magnitude"
    return {"errors": digits.errors(pruned.params), **({"steps": steps} if moves else {})}


# -- in training ---------------------------------------------------------------------------------


def gradual(cell: Gradual | None, settings: Settings, seed: int) -> dict[str, Any]:
    """Errors in percent of a network whose zeros grow while it trains; dense without a cell."""
    data, plan = mnist.split(seed), mnist.Plan(*settings.plan)
    tx, step = loop(cell, plan)
    params = mnist.MODEL.init(jax.random.key(seed), data.test[0])["params"]
    state = tx.init(params)
    for batch in itertools.islice(mnist.batches(data.train, seed), plan.updates):
        params, state = step(params, state, batch)
    return {"errors": float(mnist.errors(params, data.test))}


@functools.cache
def loop(cell: Gradual | None, plan: mnist.Plan) -> tuple[Any, Callable[..., Any]]:
    """The optimizer, and one update with it: the same for every seed, so that it compiles once."""
    tx: Any = optax.adam(1e-3)
    if cell is not None:
        tx = hj.prune(
            tx,
            cell.saliency,
            optax.polynomial_schedule(0.0, cell.sparsity, 3, plan.pruning, plan.dense),
            allocation=ALLOCATIONS[cell.allocation],
            every=plan.every,
            start=plan.dense,
            stop=plan.dense + plan.pruning,
        )

    @functools.partial(jax.jit, donate_argnums=(0, 1))  # else every update copies the ring of gradients
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(mnist.loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


if __name__ == "__main__":
    main()
