"""What do estimators cost beyond their products?"""

import time
from typing import Any

import jax
import models
import table
import timing

import hessjax as hj

BATCH = 128


class Stopwatch:
    """A matvec that times itself: products and the work between them then share every moment's noise."""

    def __init__(self, matvec: Any) -> None:
        self.matvec = matvec
        self.products: list[tuple[float, float]] = []

    def __call__(self, vector: Any) -> Any:
        """The product of a vector that is waited for, so that no earlier work counts as the product's."""
        jax.block_until_ready(vector)
        start = time.perf_counter()
        product = jax.block_until_ready(self.matvec(vector))
        self.products.append((start, time.perf_counter()))
        return product


def measure(quick: bool) -> table.Measured:
    num_matvecs, num_batches = (10, 3) if quick else (90, 46)
    problem = models.mlp(quick, BATCH)
    batches = [models.images(BATCH, (784,), seed) for seed in range(num_batches)]
    matvec = hj.over_batches(lambda batch: hj.hessian(problem.loss_fn, problem.params, batch), batches)
    estimators = {
        f"slq(1, {num_matvecs})": hj.estimators.slq(1, num_matvecs),
        f"lanczos(3, basis_size={num_matvecs})": hj.estimators.lanczos(3, basis_size=num_matvecs),
        "hutchinson_by_leaf()": hj.estimators.hutchinson_by_leaf(),
    }
    raw = {name: timed_run(x, matvec, problem.params, num_matvecs) for name, x in estimators.items()}
    return [figure_of(name, times, num_batches) for name, times in raw.items()], raw


def timed_run(estimator: Any, matvec: Any, params: Any, num_matvecs: int) -> dict[str, Any]:
    """One run after a short one that compiled everything: in all, in each product, and around each."""
    key, watch = jax.random.key(0), Stopwatch(matvec)
    jax.block_until_ready(hj.run(estimator, matvec, key, params, max_matvecs=2))
    total = timing.seconds(lambda: hj.run(estimator, watch, key, params, max_matvecs=num_matvecs))
    starts, ends = zip(*watch.products, strict=True)
    return {
        "total": total,
        "products": [end - start for start, end in watch.products],
        "between": [start - end for start, end in zip(starts[1:], ends, strict=False)],
    }


def figure_of(name: str, times: dict[str, Any], num_batches: int) -> table.Figure:
    products = sum(times["products"])
    note = (
        f"{times['total']:.1f} s, of which {products:.1f} s for {len(times['products'])} products over "
        f"{num_batches} batches of {BATCH}; last step {1e3 * times['between'][-1]:.0f} ms beside its product"
    )
    return table.Figure(name, times["total"] / products, "× its products", 1.15, note=note)


if __name__ == "__main__":
    table.main(__doc__, measure)
