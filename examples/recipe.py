"""Who is pruned, how and when stands in recipe.yaml; the training loop does not know.

python examples/recipe.py --epochs 8        (needs `pip install 'hessjax[recipes]'`)
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import hessjax as hj

RECIPE = pathlib.Path(__file__).with_name("recipe.yaml")
STEPS_PER_EPOCH = 30


class Net(nn.Module):
    """Layers whose names the recipe refers to."""

    @nn.compact
    def __call__(self, x):
        """Logits of four classes."""
        x = nn.relu(nn.Dense(32, name="first")(x))
        for number in range(2):
            x = nn.relu(nn.Dense(32, name=f"hidden{number}")(x))
        return nn.Dense(4, name="head")(x)


def data(key, num_examples):
    """Sixteen inputs, and which of four sums of four is the largest."""
    x = jax.random.normal(key, (num_examples, 16))
    return x, jnp.argmax(x.reshape(-1, 4, 4).sum(axis=2), axis=1)


def main(epochs):
    """Train by the recipe, and say what is left of each layer after every epoch."""
    key = jax.random.key(0)
    model = Net()
    params = model.init(key, jnp.zeros((1, 16)))["params"]
    recipe = hj.load_recipe(RECIPE, steps_per_epoch=STEPS_PER_EPOCH)
    tx = recipe.prune(optax.adam(3e-3))
    state, test = tx.init(params), data(jax.random.key(1), 2000)

    @jax.jit
    def step(params, state, batch):
        def loss_fn(params):
            logits = model.apply({"params": params}, batch[0])
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    for epoch in range(epochs):
        for number in range(STEPS_PER_EPOCH):
            params, state = step(
                params, state, data(jax.random.fold_in(key, epoch * STEPS_PER_EPOCH + number), 128)
            )
        right = (model.apply({"params": params}, test[0]).argmax(axis=1) == test[1]).mean()
        kernels = {name: float((layer["kernel"] == 0).mean()) for name, layer in params.items()}
        print(
            f"epoch {epoch}: {right:.1%} right, zeros",
            *(f"{name} {zeros:.0%}" for name, zeros in kernels.items()),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    main(**vars(parser.parse_args()))
