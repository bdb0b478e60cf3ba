"""How much is left after pruning by the moments of layers, and how long does it take?"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import fine_tuning
import jax
import jax.numpy as jnp
import one_shot_pruning as digits
import optax
import table

import hessjax as hj

SPARSITIES = digits.SPARSITIES
SEEDS = 3
STEPS = 32
SLOW = "GGN at temperature 4, best of three dampings, 64 steps (no moments)"
BARS = {"moments anew, in sequence, 32 steps, 95% zeros": 17.0}
ENCODER = {"length": 32, "calibration": 256, "size": 64, "steps": 600}

Params = Any
S = hj.saliencies


def measure(quick: bool) -> table.Measured:
    sparsities = SPARSITIES[:1] if quick else SPARSITIES
    nets = [digits.trained(seed, 5 if quick else 80) for seed in range(1 if quick else SEEDS)]
    figures: list[table.Figure] = []
    raw: dict[str, Any] = {}
    rows: dict[str, list[list[float]]] = {}
    for name, method in METHODS.items():
        if quick and name == SLOW:
            continue
        method(nets[0], 0.5)  # compiles
        found = [[timed(method, params, s) for s in sparsities] for params in nets]
        rows[name] = [[100 - errors for errors, _ in column] for column in zip(*found, strict=True)]
        raw[name] = found
        for s, column in zip(sparsities, zip(*found, strict=True), strict=True):
            label, (errors, seconds) = f"{name}, {s:.0%} zeros", zip(*column, strict=True)
            note = f"{statistics.median(seconds):.2g} s"
            figures.append(
                table.Figure(label, statistics.mean(errors), "% errors", BARS.get(label), note=note)
            )
    if not quick:
        more, raw["encoder"] = encoder_figures()
        figures += more
    grid = table.Grid("% right, no retraining", [f"{s:.0%} zeros" for s in sparsities], rows)
    return figures, raw, grid


def timed(method: Callable[[Params, float], Params], params: Params, sparsity: float) -> tuple[float, float]:
    """Errors in percent of the test images, and seconds."""
    start = time.perf_counter()
    pruned = jax.block_until_ready(method(params, sparsity))
    return digits.errors(pruned), time.perf_counter() - start


# -- digits ----------------------------------------------------------------------------------------


def softened(params: Params, x: jax.Array) -> jax.Array:
    return digits.logits(params, x) / 4.0


def moments_of(params: Params) -> hj.layers.LayerMoments:
    """Of all training images, their gradients those of labels drawn at a temperature of 4."""
    x, _ = digits.data()[0]
    likelihood = hj.likelihoods.categorical
    return hj.layers.moments(
        softened, params, [x], likelihood=likelihood, key=jax.random.key(0), num_samples=2
    )


def by_rule(make: Callable[[Any], Any], params: Params, sparsity: float, **options: Any) -> Params:
    """One step by moments."""
    return hj.prune_once(params, make(moments_of(params)), sparsity, where="*", **options).params


def fisher_mask(params: Params, sparsity: float) -> Params:
    """Of the global ranking by the inverse Fisher."""
    grads = functools.partial(digits.softened_roots, number=600, temperature=4.0)
    rule = S.obs("none", hj.relative(0.1))
    return hj.prune_once(params, rule, sparsity, grads_fn=grads, where="*").mask


def fisher_densities(params: Params, sparsity: float) -> Params:
    """OBC in every layer, with as many zeros as the Fisher gives it."""
    mask = fisher_mask(params, sparsity)
    levels = {str(i): 1 - float(jnp.mean(leaf)) for i, leaf in enumerate(mask)}
    total = sum(float(jnp.sum(~leaf)) for leaf in mask) / sum(leaf.size for leaf in mask)
    return by_rule(S.obc, params, total, allocation=hj.allocations.explicit(levels))


def fisher_scores(params: Params, sparsity: float) -> Params:
    """The Fisher's mask, and the layer-wise move in the order of the layers."""
    mask = fisher_mask(params, sparsity)
    x, _ = digits.data()[0]
    return hj.layers.reconstruct(params, mask, moments_of(params), [x], empty="allow").params


def in_steps(params: Params, sparsity: float, steps: int = STEPS) -> Params:
    """Densities in geometric progression: scores by moments taken anew, the move from the dense network."""
    x, _ = digits.data()[0]
    dense, pruned = moments_of(params), params
    for i in range(1, steps + 1):
        scores = S.wanda(moments_of(pruned), within="network")
        mask = hj.prune_once(pruned, scores, 1 - (1 - sparsity) ** (i / steps), where="*").mask
        pruned = hj.layers.reconstruct(params, mask, dense, [x], empty="allow").params
    return pruned


def combined(params: Params, sparsity: float) -> Params:
    """The last half of the density by the joint move of the inverse Fisher, from where layers got to."""
    between = 1 - (1 - sparsity) * 2
    grads = functools.partial(digits.softened_roots, number=1200, temperature=4.0)
    rules = [S.obs("joint", hj.relative(r)) for r in (0.03, 0.1, 0.3)]
    return hj.prune_once(
        in_steps(params, between),
        rules,
        sparsity,
        grads_fn=grads,
        recomputes=16,
        where="*",
        loss_fn=digits.training_loss,
    ).params


def slow(params: Params, sparsity: float) -> Params:
    """The best row of `one_shot_pruning`."""
    method = digits.methods(digits.NUM_GRADS)[digits.BEST]
    for level, recomputes in zip(SPARSITIES, method.recomputes, strict=True):
        if level > sparsity + 1e-9:
            break
        params = hj.prune_once(
            params,
            method.rule,
            level,
            grads_fn=method.grads,
            recomputes=recomputes,
            loss_fn=digits.training_loss,
        ).params
    return params


UNIFORM = {"allocation": hj.allocations.uniform()}
METHODS: dict[str, Callable[[Params, float], Params]] = {
    "Wanda": functools.partial(by_rule, S.wanda, **UNIFORM),
    "SparseGPT's sweep": functools.partial(by_rule, S.sparsegpt, **UNIFORM),
    "OBC": functools.partial(by_rule, S.obc, **UNIFORM),
    "OBC, one ranking of all layers": functools.partial(by_rule, S.obc),
    "OBC, densities of the Fisher": fisher_densities,
    "Fisher scores, layer-wise move in sequence": fisher_scores,
    "moments anew, in sequence, 32 steps": in_steps,
    "the same, and OBS for the last half": combined,
    SLOW: slow,
}


# -- a pretrained encoder --------------------------------------------------------------------------


def encoder_figures() -> tuple[list[table.Figure], dict[str, Any]]:
    """Fine-tuned on sentences, pruned without training to 50 % and to 2:4."""
    task = fine_tuning.problem(6, ENCODER["length"], None)
    steps = ENCODER["steps"]
    tx = fine_tuning.adamw(5e-5, 1e-3, steps)
    trained = fine_tuning.train(task, tx, steps, 32)
    task = task._replace(params=trained.params)
    figures, raw = [], {}
    total = len(task.test.labels)
    dense = 100 * len(trained.wrong) / total
    figures.append(table.Figure("encoder, dense", dense, "% errors"))
    for name, pattern in {"50 %": hj.patterns.unstructured(), "2:4": hj.patterns.n_of_m(2, 4)}.items():
        start = time.perf_counter()
        pruned = jax.block_until_ready(pruned_encoder(task, pattern))
        seconds = time.perf_counter() - start
        errors = 100 * len(fine_tuning.mistakes(task, pruned)) / total
        bar = dense + 1 if name == "50 %" else None
        figures.append(table.Figure(f"encoder, {name}", errors, "% errors", bar))
        figures.append(table.Figure(f"encoder, {name}, time", seconds, "s", 300.0))
        raw[name] = {"errors": errors, "seconds": seconds}
        print(name, errors, seconds, "dense", dense, flush=True)
    return figures, raw


def pruned_encoder(task: fine_tuning.Task, pattern: Any) -> Params:
    """By moments of a few hundred sentences, in one step."""
    number, size = ENCODER["calibration"], ENCODER["size"]
    parts = [task.train[i : i + size] for i in range(0, number, size)]
    batches = [(jnp.asarray(part.tokens), jnp.asarray(part.labels)) for part in parts]
    fn = functools.partial(encoder_loss, task.module, task.embeddings)
    moments = hj.layers.moments(fn, task.params, batches)
    large = jax.tree.map(lambda group: group == "large", fine_tuning.groups(task.params))
    rule = S.compensated(S.sparsegpt(moments), by=S.obc(moments))
    return hj.prune_once(
        task.params, rule, 0.5, where=large, pattern=pattern, allocation=hj.allocations.uniform()
    ).params


def encoder_loss(module: Any, embeddings: Any, params: Params, batch: Any) -> jax.Array:
    tokens, labels = batch
    logits = fine_tuning.logits(module, params, embeddings, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


if __name__ == "__main__":
    table.main(__doc__, measure)
