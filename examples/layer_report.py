"""A report by layer: how curved each is, how many zeros it can spare, and how to distribute them.

python examples/layer_report.py --probes 100
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import hessjax as hj
from hessjax.flax import linen_loss, linen_model


def cross_entropy(logits, batch):
    """The mean over the batch."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def data(key, num_examples):
    """Sixteen inputs, and which of four sums of four is the largest."""
    x = jax.random.normal(key, (num_examples, 16))
    return x, jnp.argmax(x.reshape(-1, 4, 4).sum(axis=2), axis=1)


def trained(loss_fn, params, batch, steps):
    """The params after some steps of Adam."""
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        updates, state = optimizer.update(jax.grad(loss_fn)(carry[0], batch), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


def main(steps, probes):
    """Train, measure, suggest."""
    key = jax.random.key(0)
    model = nn.Sequential([nn.Dense(48), nn.tanh, nn.Dense(48), nn.tanh, nn.Dense(4)])
    loss_fn, model_fn = linen_loss(model, cross_entropy), linen_model(model)
    batch = data(key, 1000)
    params = trained(loss_fn, model.init(key, batch[0])["params"], batch, steps)
    batches = [jax.tree.map(lambda x, i=i: x[i : i + 250], batch) for i in range(0, 1000, 250)]

    # The Gauss-Newton matrix: its traces are positive, and one run gives those of all layers.
    G = hj.over_batches(lambda b: hj.ggn(model_fn, cross_entropy, params, b), batches)
    traces = hj.trace_by_leaf(G, key, params, probes, groups={"biases": "*/bias", "kernels": "*/kernel"})
    print(f"{'':20} {'trace':>9} {'probes ±':>9} {'data ±':>9}")
    for name, part in {**traces.leaves, **traces.groups, "all": traces.total}.items():
        print(f"{name:20} {part.mean:9.3f} {part.stderr:9.3f} {part.data_stderr:9.3f}")

    diagonal = hj.diagonal(G, key, params, probes).mean
    metric = jax.jit(lambda params: loss_fn(params, batch))
    levels = hj.sensitivity(
        lambda p: {"loss": metric(p)}, params, [0.0, 0.5, 0.8], diagonal=diagonal, where="*/kernel"
    )
    print("", levels, sep="\n")

    print("\n80 % zeros, distributed")
    for name, allocation in {
        "in one ranking": hj.allocations.global_threshold(),
        "alike": hj.allocations.uniform(),
        "by curvature": hj.allocations.by_curvature(traces.leaves),
    }.items():
        pruned = hj.prune_once(
            params, hj.saliencies.magnitude(), 0.8, allocation=allocation, where="*/kernel"
        )
        print(f"{name:20} loss {metric(pruned.params):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--probes", type=int, default=100)
    main(**vars(parser.parse_args()))
