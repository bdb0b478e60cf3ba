"""Prune a trained network without training: single weights by their curvature, then units that really go.

python examples/one_shot.py --steps 400
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import hessjax as hj
from hessjax.flax import linen_loss, linen_model


class Net(nn.Module):
    """Logits of four classes, through two hidden layers of any widths."""

    widths: tuple[int, int] = (48, 48)

    @nn.compact
    def __call__(self, x):  # noqa: D102
        for number, width in enumerate(self.widths):
            x = nn.tanh(nn.Dense(width, name=f"hidden{number}")(x))
        return nn.Dense(4, name="head")(x)


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


def main(steps):
    """Train, prune in two ways, compare on data not seen before."""
    key = jax.random.key(0)
    train, test = data(key, 1000), data(jax.random.key(1), 2000)
    loss_fn, model_fn = linen_loss(Net(), cross_entropy), linen_model(Net())
    params = trained(loss_fn, Net().init(key, train[0])["params"], train, steps)
    few = (train[0][:200], train[1][:200])
    grads_fn = jax.jit(lambda params: hj.per_example_grads(loss_fn, params, few))

    def report(name, params):
        print(f"{name:10} {(model_fn(params, test).argmax(axis=1) == test[1]).mean():6.1%} right")

    report("dense", params)
    report("magnitude", hj.prune_once(params, hj.saliencies.magnitude(), 0.8).params)
    report("surgeon", hj.prune_once(params, hj.saliencies.obs(), 0.8, grads_fn=grads_fn, recomputes=4).params)

    how = {"pattern": hj.patterns.filters(), "where": "hidden*/kernel", "grads_fn": grads_fn}
    pruned = hj.prune_once(params, hj.saliencies.obs(), 0.5, recomputes=4, **how)
    small = hj.compact(model_fn, pruned.params, train, drop_constants=True)
    print(small)
    widths = tuple(small.params[f"hidden{i}"]["kernel"].shape[1] for i in (0, 1))
    model_fn = linen_model(Net(widths))  # built again at the new widths
    report("small", small.params)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    main(**vars(parser.parse_args()))
