"""Random networks with random slices of zeros: whatever `compact` removes, the outputs stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

ACTIVATIONS = (
    jax.nn.relu,
    jax.nn.gelu,
    jnp.tanh,
    jax.nn.silu,
    jax.nn.sigmoid,
    lambda x: jnp.where(x > 0, x, -x),
)
"""All but one give zero at zero."""


class Network:
    """Layers drawn at random; `weights` makes a leaf with zero slices along every axis."""

    def __init__(self, seed):
        self.rng, self.params, self.layers, self.widths = np.random.default_rng(seed), {}, [], [3]
        for _ in range(int(self.rng.integers(3, 8))):
            options = [
                self.dense,
                self.dense,
                self.bias,
                self.activation,
                self.residual,
                self.gate,
                self.heads,
            ]
            options += [
                self.concatenate,
                self.split,
                self.pad,
                self.conv,
                self.outer,
                self.attention,
                self.cut,
            ]
            self.layers.append(options[self.rng.integers(len(options))](self.widths[-1]))
        out = self.weights(self.widths[-1], 2)
        self.layers.append(lambda p, xs: xs[-1] @ p[out] + 1)

    def weights(self, *shape):
        values = self.rng.normal(size=shape)
        for axis, n in enumerate(shape):
            np.moveaxis(values, axis, 0)[(self.rng.random(n) < 0.35) & (n > 1)] = 0
        self.params[f"w{len(self.params)}"] = values
        return f"w{len(self.params) - 1}"

    def __call__(self, params, x):
        xs = [x]
        for layer in self.layers:
            xs.append(layer(params, xs))
        return xs[-1]

    def add(self, width, layer):
        self.widths.append(width)
        return layer

    def dense(self, n, width=5):
        w = self.weights(n, width)
        return self.add(width, lambda p, xs: xs[-1] @ p[w])

    def bias(self, n):
        b = self.weights(n)
        return self.add(n, lambda p, xs: xs[-1] + p[b])

    def activation(self, n):
        f = ACTIVATIONS[self.rng.integers(len(ACTIVATIONS))]
        return self.add(n, lambda p, xs: f(xs[-1]))

    def residual(self, n):
        other = int(self.rng.choice([i for i, m in enumerate(self.widths) if m == n]))
        return self.add(n, lambda p, xs: xs[-1] + xs[other])

    def gate(self, n):
        w = self.weights(n, n)
        return self.add(n, lambda p, xs: xs[-1] * (xs[-1] @ p[w]))

    def heads(self, n):
        w, out = self.weights(n, 6), self.weights(6, 4)

        def layer(p, xs):
            x = xs[-1] @ p[w]
            return jnp.tanh(x.reshape(*x.shape[:-1], 3, -1)).reshape(x.shape) @ p[out]

        return self.add(4, layer)

    def concatenate(self, n):
        other = int(self.rng.integers(len(self.widths)))
        return self.add(n + self.widths[other], lambda p, xs: jnp.concatenate([xs[-1], xs[other]], -1))

    def split(self, n):
        w = self.weights(n, 6)

        def layer(p, xs):
            value, gate = jnp.split(xs[-1] @ p[w], 2, -1)
            return value * jax.nn.sigmoid(gate)

        return self.add(3, layer)

    def pad(self, n):
        return self.add(n + 3, lambda p, xs: jnp.pad(xs[-1], [(0, 0), (0, 0), (1, 2)]))

    def cut(self, n):
        return self.add(max(1, n - 1), lambda p, xs: xs[-1][..., ::-1][..., : max(1, n - 1)])

    def conv(self, n):
        w, numbers = self.weights(3, n, 4), ("NWC", "WIO", "NWC")
        return self.add(
            4,
            lambda p, xs: jax.lax.conv_general_dilated(xs[-1], p[w], (1,), "SAME", dimension_numbers=numbers),
        )

    def outer(self, n):
        a, b = self.weights(n, 3), self.weights(n, 2)

        def layer(p, xs):
            pairs = jnp.einsum("bsi,bsj->bsij", xs[-1] @ p[a], xs[-1] @ p[b])
            return pairs.reshape(*xs[-1].shape[:-1], -1)

        return self.add(6, layer)

    def attention(self, n):
        q, k, v = (self.weights(n, 2, 2) for _ in range(3))
        out = self.weights(2, 2, 4)

        def layer(p, xs):
            query, key, value = (jnp.einsum("bsi,ihd->bshd", xs[-1], p[w]) for w in (q, k, v))
            weights = jax.nn.softmax(jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", query, key)))
            return jnp.einsum("bhqk,bkhd,hdo->bqo", weights, value, p[out])

        return self.add(4, layer)


@pytest.mark.parametrize("seed", range(12))
def test_the_outputs_stay(seed, x64):
    network = Network(seed)
    small = hj.compact(network, network.params, np.random.default_rng(seed).normal(size=(2, 4, 3)))
    assert small.difference < 1e-10
    assert small.after.weights <= small.before.weights
