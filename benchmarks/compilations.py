"""How many compilations do changed params, a changed batch or a second call cause?"""

from collections.abc import Callable
from typing import Any

import jax
import models
import table

import hessjax as hj

COMPILED = "/jax/core/compile/backend_compile_duration"


class Counter:
    """Counts what XLA compiles, from the moment it is made."""

    def __init__(self) -> None:
        self.compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, _seconds: float, **_: Any) -> None:
        self.compilations += event == COMPILED

    def of(self, call: Callable[[], Any]) -> int:
        """How many a call causes."""
        before = self.compilations
        jax.block_until_ready(call())
        return self.compilations - before


def measure(quick: bool) -> table.Measured:
    del quick  # counts do not depend on sizes
    counter, first, second = Counter(), checkpoint(1), checkpoint(2)
    figures, raw = [], {}
    for name, use in USES.items():
        at_first = counter.of(lambda use=use: use(first, first))
        counts = {
            change: counter.of(lambda use=use, points=points: use(*points))
            for change, points in changes(first, second).items()
        }
        raw[name] = {"first call": at_first, **counts}
        note = f"the most of: {', '.join(counts)}; {at_first} at the first call"
        figures.append(table.Figure(f"{name}, changed", max(counts.values()), "compilations", 0, note=note))
    return figures, raw


def checkpoint(seed: int) -> models.Problem:
    """Everything made anew, as after a restart: model, loss, params, batch."""
    problem = models.small_conv_net(32)
    params = jax.tree.map(lambda x: x + 0.01 * models.normal(seed, x.shape), problem.params)
    return problem._replace(params=params, args=(models.images(32, (8, 8, 1), seed),))


def changes(first: models.Problem, second: models.Problem) -> dict[str, tuple[Any, Any]]:
    """For each change, whose loss and params, and whose batch."""
    return {
        "nothing changed": (first, first),
        "changed params": (first._replace(params=second.params), first),
        "changed batch": (first, second),
        "a new checkpoint": (second, second),
    }


def hessian(point: models.Problem, data: models.Problem, **options: Any) -> Callable[[Any], Any]:
    return hj.hessian(point.loss_fn, point.params, *data.args, **options)


def product(point: models.Problem, data: models.Problem) -> Any:
    return hessian(point, data)(point.params)


def linearized_product(point: models.Problem, data: models.Problem) -> Any:
    return hessian(point, data, linearize=True)(point.params)


def product_over_batches(point: models.Problem, data: models.Problem) -> Any:
    matvec = hj.over_batches(lambda batch: hj.hessian(point.loss_fn, point.params, batch), [*data.args] * 3)
    return matvec(point.params)


def product_of_a_part(point: models.Problem, data: models.Problem) -> Any:
    part = hj.select(point.params, "Conv_*")
    return hj.hessian(part.restrict(point.loss_fn), part.part, *data.args)(part.part)


def gauss_newton_product(point: models.Problem, data: models.Problem) -> Any:
    return hj.ggn(point.model_fn, models.cross_entropy, point.params, *data.args)(point.params)


def empirical_fisher_product(point: models.Problem, data: models.Problem) -> Any:
    return hj.empirical_fisher(point.loss_fn, point.params, *data.args)(point.params)


def eigenpairs(point: models.Problem, data: models.Problem) -> Any:
    return hj.eigenpairs(hessian(point, data), jax.random.key(0), point.params, k=1, max_matvecs=10)


def trace(point: models.Problem, data: models.Problem) -> Any:
    return hj.trace(hessian(point, data), jax.random.key(0), point.params, num_probes=3)


def trace_by_leaf(point: models.Problem, data: models.Problem) -> Any:
    return hj.trace_by_leaf(hessian(point, data), jax.random.key(0), point.params, num_probes=3)


def spectral_density(point: models.Problem, data: models.Problem) -> Any:
    return hj.spectral_density(hessian(point, data), jax.random.key(0), point.params, num_matvecs=5)


def spectrum(point: models.Problem, data: models.Problem) -> Any:
    return hj.spectrum(hessian(point, data), jax.random.key(0), point.params, k=1, num_matvecs=5)


def solve(point: models.Problem, data: models.Problem) -> Any:
    return hj.solve(hessian(point, data), point.params, damping=float(point.params["Dense_0"]["bias"][0]) + 9,
                    max_matvecs=3)  # fmt: skip


def landscape(point: models.Problem, data: models.Problem) -> Any:
    return hj.landscape(point.loss_fn, point.params, *data.args, directions=data.params, distances=[0.0, 1.0])


USES = {
    "product": product,
    "linearized product": linearized_product,
    "product over batches": product_over_batches,
    "product of a part": product_of_a_part,
    "Gauss-Newton product": gauss_newton_product,
    "empirical Fisher product": empirical_fisher_product,
    "eigenpairs": eigenpairs,
    "trace": trace,
    "trace_by_leaf": trace_by_leaf,
    "spectral_density": spectral_density,
    "spectrum": spectrum,
    "solve": solve,
    "landscape": landscape,
}


if __name__ == "__main__":
    table.main(__doc__, measure)
