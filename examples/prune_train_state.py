"""Train a Flax network to 90 % zeros: `prune` wraps the optimizer of a `TrainState`; the loop is as it was.

python examples/prune_train_state.py --steps 600
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import hessjax as hj


class Net(nn.Module):
    """Two hidden layers with BatchNorm, and logits of four classes."""

    @nn.compact
    def __call__(self, x, train):  # noqa: D102
        for width in (64, 64):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(width)(x)))
        return nn.Dense(4)(x)


def data(key, num_examples):
    """Sixteen inputs, and which of four sums of four is the largest."""
    x = jax.random.normal(key, (num_examples, 16))
    return x, jnp.argmax(x.reshape(-1, 4, 4).sum(axis=2), axis=1)


@jax.jit
def train_step(state, stats, batch):
    """A step as it is without pruning."""

    def loss_fn(params):
        logits, new = state.apply_fn(
            {"params": params, **stats}, batch[0], train=True, mutable=["batch_stats"]
        )
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), new

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), stats, loss


@jax.jit
def accuracy(state, stats, batch):
    """The share of right answers, with running statistics."""
    logits = state.apply_fn({"params": state.params, **stats}, batch[0], train=False)
    return (logits.argmax(axis=1) == batch[1]).mean()


def main(steps):
    """Train and prune at once; the last fifth of the steps is for settling."""
    key = jax.random.key(0)
    model = Net()
    variables, stop = model.init(key, jnp.zeros((1, 16)), train=False), steps * 4 // 5
    tx = hj.prune(
        optax.adamw(3e-3, weight_decay=1e-2),
        hj.saliencies.magnitude(),
        optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=stop),
        where="*/kernel",
        every=max(1, stop // 20),
        stop=stop,
    )
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    stats, test = {"batch_stats": variables["batch_stats"]}, data(jax.random.key(1), 2000)
    for step in range(1, steps + 1):
        state, stats, loss = train_step(state, stats, data(jax.random.fold_in(key, step), 256))
        if step % max(1, steps // 6) == 0:
            print(f"step {step:4}  loss {loss:.3f}  right {accuracy(state, stats, test):.1%}")
    print(hj.summary(state.params))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    main(**vars(parser.parse_args()))
