"""Follow the largest eigenvalues of the loss while a network trains, against the limit of stability.

python examples/curvature_during_training.py --steps 400
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import hessjax as hj
from hessjax.flax import linen_loss

RATE = 0.05


def mean_squares(outputs, batch):
    """What the network is trained for; of the module's top level, so that nothing compiles twice."""
    return jnp.mean((outputs[:, 0] - batch[1]) ** 2)


def data(key, num_examples):
    """A smooth function of eight inputs."""
    x = jax.random.normal(key, (num_examples, 8))
    return x, jnp.sin(2 * x).sum(axis=1)


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer"))
def train_step(params, state, batch, loss_fn, optimizer):
    """One step of full-batch gradient descent."""
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss


def main(steps, every):
    """Train, and look at the curvature every few steps."""
    key = jax.random.key(0)
    batch = data(key, 256)
    model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(32), nn.tanh, nn.Dense(1)])
    loss_fn, params = linen_loss(model, mean_squares), model.init(key, batch[0])["params"]
    optimizer = optax.sgd(RATE)
    state, start = optimizer.init(params), None

    print(f"gradient descent is stable below 2/η = {2 / RATE:g}")
    print(" step     loss   largest    second  residual  products")
    for step in range(steps + 1):
        if step % every == 0:
            A = hj.hessian(loss_fn, params, batch, linearize=True)
            # Eigenvectors turn slowly: starting from the last ones saves a good part of the products.
            pairs = hj.eigenpairs(A, key, params, k=2, which="largest", start=start, tol=hj.relative(1e-2))
            start = pairs.vectors
            numbers = loss_fn(params, batch), *pairs.values, pairs.residuals[0], pairs.num_matvecs
            print("{:5} {:8.4f} {:9.3f} {:9.3f} {:9.1e} {:9}".format(step, *(n.item() for n in numbers)))
        params, state, _ = train_step(params, state, batch, loss_fn, optimizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50)
    main(**vars(parser.parse_args()))
