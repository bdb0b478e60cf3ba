"""Where should the zeros go, layer by layer? `python notebooks/studies/where_zeros_go.py` measures."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rows  # first, as it finds the benchmarks

# isort: split
import one_shot_pruning as problem

import hessjax as hj

Params = problem.Params
LEVELS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
SOFT = 4.0
"""The temperature of a softened Gauss-Newton matrix."""

QUADRATIC = "slope and Gauss-Newton matrix"
r = hj.relative


class Settings(NamedTuple):
    """Of all measurements.

    Attributes:
        seeds: networks trained from other weights.
        sizes: of their layers.
        epochs: of their training.
        levels: sparsities of one layer alone, from 0.
        sparsities: of the whole network.
        num_grads: the rows of a Fisher.
        retraining: epochs of Adam behind the mask.
    """

    seeds: int = 5
    sizes: tuple[int, ...] = (64, 128, 64, 32, 32, 16, 10)
    epochs: int = 60
    levels: tuple[float, ...] = LEVELS
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    num_grads: int = 256
    retraining: int = 5


QUICK = Settings(1, (64, 16, 12, 10), 5, (0.0, 0.5, 0.9), (0.8,), 64, 1)


class Method(NamedTuple):
    """Which weights of a layer go (a rule), and how many (an allocation)."""

    saliency: hj.saliencies.Saliency
    allocation: Any
    recomputes: int = 1


def main(settings: Settings = Settings()) -> None:  # noqa: B008 (a value, never changed)
    kept = rows.Rows("where_zeros_go", settings._asdict())
    for name in kept.missing(f"seed {seed}" for seed in range(settings.seeds)):
        kept.keep(name, measure(settings, int(name.split()[1])))


def measure(settings: Settings, seed: int) -> dict[str, Any]:
    """Curves and allocations of one network."""
    params = problem.trained(seed, settings.epochs, settings.sizes)
    curves = curves_of(params, settings)
    found = {
        name: {f"{s:.2f}": outcome(params, method, s, settings) for s in settings.sparsities}
        for name, method in methods(params, curves["rise"], settings).items()
    }
    dense = {"errors": problem.errors(params), "loss": float(problem.training_loss(params))}
    sizes = {str(i): kernel.size for i, kernel in enumerate(params)}
    return {"dense": dense, "sizes": sizes, "curves": curves, "curvature": traces(params), "found": found}


# -- sensitivity ---------------------------------------------------------------------------------


def curves_of(params: Params, settings: Settings) -> dict[str, dict[str, list[float]]]:
    """By kind and layer, a number for each level: magnitudes pruned in one layer, measured and predicted.

    `rise` and `errors` are measured; the others predict the rise, `moved` that after the layer's other
    weights have made up for it, of which `moved, measured` is the truth.
    """
    grads_fn = functools.partial(problem.example_grads, number=settings.num_grads)
    rule = hj.saliencies.obs("joint", r(0.01))
    magnitude = hj.sensitivity(quality, params, settings.levels, diagonal=diagonal(params))
    softened = hj.sensitivity(None, params, settings.levels, diagonal=diagonal(params, SOFT))
    moved = hj.sensitivity(quality, params, settings.levels, rule, grads_fn=grads_fn)
    base = float(problem.training_loss(params))
    return {
        "rise": _columns(magnitude, lambda row: row.metrics["loss"] - base),
        "errors": _columns(magnitude, lambda row: row.metrics["errors"]),
        "diagonal": _columns(magnitude, lambda row: row.predicted),
        "diagonal, softened": _columns(softened, lambda row: row.predicted),
        "trace": by_trace(params, settings.levels),
        QUADRATIC: by_quadratic(params, settings.levels),
        "moved": _columns(moved, lambda row: row.predicted),
        "moved, measured": _columns(moved, lambda row: row.metrics["loss"] - base),
    }


def _columns(result: hj.Sensitivity, number: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in result.rows:
        found.setdefault(row.parameter, []).append(float(number(row)))
    return found


def quality(params: Params) -> dict[str, Any]:
    """Training loss, and errors in percent of the test images."""
    return {"loss": problem.training_loss(params), "errors": problem.errors(params)}


@functools.partial(jax.jit, static_argnums=1)
def diagonal(params: Params, temperature: float = 1.0) -> Params:
    """Of the Gauss-Newton matrix, exactly, as Σ_c r_c r_cᵀ = diag(p) − p pᵀ with r_c = √p_c (e_c − p).

    With p at a temperature above 1 examples that the network is sure of count too.
    """
    x, _ = problem.data()[0]

    def squares(x: jax.Array, unit: jax.Array) -> Params:
        z, pull_back = jax.vjp(lambda p: problem.logits(p, x[None])[0], params)
        p = jax.nn.softmax(z / temperature)
        return jax.tree.map(jnp.square, pull_back(jnp.sqrt(unit @ p) * (unit - p))[0])

    def of_class(unit: jax.Array) -> Params:
        return jax.tree.map(lambda s: jnp.mean(s, axis=0), jax.vmap(squares, (0, None))(x, unit))

    return jax.tree.map(lambda s: jnp.sum(s, axis=0), jax.lax.map(of_class, jnp.eye(10)))


def traces(params: Params, temperature: float = 1.0) -> dict[str, float]:
    """The mean curvature per weight of every layer."""
    return {str(i): float(jnp.mean(part)) for i, part in enumerate(diagonal(params, temperature))}


def matvec(params: Params) -> Any:
    """Products with the Gauss-Newton matrix of the training loss."""
    return hj.ggn(model, output_loss, params, problem.data()[0])


def model(params: Params, batch: Any) -> jax.Array:
    """Logits."""
    return problem.logits(params, batch[0])


def output_loss(logits: jax.Array, batch: Any) -> jax.Array:
    """Cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def by_trace(params: Params, levels: Sequence[float]) -> dict[str, list[float]]:
    """½ tr(G_l)/n_l ‖δ‖², one number for all weights of a layer."""
    means = traces(params)
    squares = {
        (path, level): sum(float(jnp.sum(x**2)) for x in change)
        for path, level, change in _changes(params, levels)
    }
    return {path: [0.5 * mean * squares[path, level] for level in levels] for path, mean in means.items()}


def by_quadratic(params: Params, levels: Sequence[float]) -> dict[str, list[float]]:
    """g·δ + ½ δᵀGδ: as good as a quadratic model gets, for a product each."""
    slope, product = jax.jit(jax.grad(problem.training_loss))(params), jax.jit(matvec(params))
    found: dict[str, list[float]] = {}
    for path, _, change in _changes(params, levels):
        linear, square = (optax.tree.vdot(v, change) for v in (slope, product(change)))
        found.setdefault(path, []).append(float(linear + square / 2))
    return found


def _changes(params: Params, levels: Sequence[float]) -> Any:
    """Path, level and what magnitude takes away there."""
    for i, kernel in enumerate(params):
        for level in levels:
            mask = hj.allocations.uniform()((jnp.abs(kernel),), level)[0]
            zeros = [jnp.zeros_like(x) for x in params]
            zeros[i] = jnp.where(mask, 0.0, -kernel)
            yield str(i), level, tuple(zeros)


# -- allocations ---------------------------------------------------------------------------------


def methods(params: Params, rise: Mapping[str, list[float]], settings: Settings) -> dict[str, Method]:
    """In the first seven magnitudes decide within a layer; the others also differ in which weights go."""
    magnitude, rule = hj.saliencies.magnitude(), hj.saliencies.obs
    uniform, one_ranking = hj.allocations.uniform(), hj.allocations.global_threshold()
    measured = rise, settings.levels
    return {
        "uniform": Method(magnitude, uniform),
        "Erdős–Rényi": Method(magnitude, hj.allocations.erdos_renyi()),
        "one ranking": Method(magnitude, one_ranking),
        "by curvature": Method(magnitude, hj.allocations.by_curvature(traces(params))),
        "curvature, softened": Method(magnitude, hj.allocations.by_curvature(traces(params, SOFT))),
        "measured, same rise": Method(magnitude, functools.partial(by_reading, same_rise, *measured)),
        "measured, least sum": Method(magnitude, functools.partial(by_reading, least_sum, *measured)),
        "OBD": Method(hj.saliencies.obd(), one_ranking),
        "OBS, uniform": Method(rule("joint", r(0.01)), uniform),
        "OBS, one ranking": Method(rule("joint", r(0.01)), one_ranking),
        "OBS, uniform, 10 steps": Method(rule("joint", r(0.01)), uniform, 10),
        "OBS, one ranking, 10 steps": Method(rule("joint", r(0.01)), one_ranking, 10),
    }


def by_reading(
    how: Any,
    rise: Mapping[str, list[float]],
    levels: Sequence[float],
    scores: Params,
    sparsity: float,
    pattern: Any = None,
) -> Params:
    """An allocation that reads every layer's sparsity off the measured curves."""
    fine = np.linspace(0.0, 0.99, 199)
    ends = np.append(levels, 1.0)
    # To the right of the last level a curve goes on steeply, so that every sparsity can be reached.
    curves = [np.interp(fine, ends, np.append(np.maximum(curve, 0), 1e3)) for curve in rise.values()]
    weights = np.array([x.size for x in scores]) / sum(x.size for x in scores)
    shares = fine[how(curves, weights, fine, float(sparsity))]
    shares = np.minimum(shares + max(0.0, sparsity - weights @ shares) * 1.001, 0.995)
    return hj.allocations.explicit({str(i): float(x) for i, x in enumerate(shares)})(scores, sparsity)


def same_rise(
    curves: list[np.ndarray], weights: np.ndarray, levels: np.ndarray, sparsity: float
) -> np.ndarray:
    """As people read them: every layer up to the same rise, which is found by halving."""
    rising, low, high = [np.maximum.accumulate(curve) for curve in curves], -20.0, 7.0
    for _ in range(60):
        middle = (low + high) / 2
        chosen = [np.searchsorted(curve, np.exp(middle), "right") - 1 for curve in rising]
        low, high = (middle, high) if weights @ levels[chosen] < sparsity else (low, middle)
    return np.array(chosen)


def least_sum(
    curves: list[np.ndarray], weights: np.ndarray, levels: np.ndarray, sparsity: float
) -> np.ndarray:
    """Levels whose rises add up to the least, as if layers did not know each other: dynamic programming."""
    budget = round(2000 * sparsity)
    best, paths = np.full(budget + 1, np.inf), []
    best[0] = 0.0
    for curve, weight in zip(curves, weights, strict=True):
        zeros = np.floor(2000 * weight * levels).astype(int)
        left = np.maximum(np.arange(budget + 1)[:, None] - zeros, 0)
        total = best[left] + curve
        paths.append((left, np.argmin(total, axis=1)))
        best = np.min(total, axis=1)
    chosen, at = [], budget
    for left, index in reversed(paths):
        chosen.append(index[at])
        at = left[at, index[at]]
    return np.array(chosen[::-1])


def outcome(params: Params, method: Method, sparsity: float, settings: Settings) -> dict[str, Any]:
    """Errors before and after some epochs behind the mask, and what is left of every layer."""
    pruned = hj.prune_once(
        params,
        method.saliency,
        sparsity,
        grads_fn=functools.partial(problem.example_grads, number=settings.num_grads),
        allocation=method.allocation,
        recomputes=method.recomputes,
    )
    again = retrained(pruned.params, pruned.mask, settings.retraining)
    return {
        "errors": problem.errors(pruned.params),
        "loss": float(problem.training_loss(pruned.params)),
        "retrained": problem.errors(again),
        "left": [float(jnp.mean(mask)) for mask in pruned.mask],
    }


@functools.partial(jax.jit, static_argnums=2)
def retrained(params: Params, mask: Params, epochs: int) -> Params:
    """Adam behind the mask, at a rate that falls to 0."""
    x, y = problem.data()[0]
    steps = epochs * (len(x) // 64)
    tx = optax.adam(optax.linear_schedule(3e-3, 0.0, steps))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        chosen = jax.random.randint(key, (64,), 0, len(x))
        updates, state = tx.update(jax.grad(problem.loss_fn)(params, (x[chosen], y[chosen])), state)
        params = jax.tree.map(jnp.multiply, optax.apply_updates(params, updates), mask)
        return (params, state), None

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(0), steps))[0][0]


if __name__ == "__main__":
    main()
