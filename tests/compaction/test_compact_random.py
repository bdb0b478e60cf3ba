"""Random networks with random slices of zeros: whatever `compact` removes, the outputs stay."""

import itertools

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
            options += [
                self.stack,
                self.recurrent,
                self.experts,
                self.grouped,
                self.rearranged,
                self.branches,
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

    def stack(self, n):
        """Layers of a scan, with a residual stream."""
        up, down = self.weights(2, n, 4), self.weights(2, 4, n)

        def layer(p, xs):
            def step(h, w):
                return h + jnp.tanh(h @ w[0]) @ w[1], None

            return jax.lax.scan(step, xs[-1], (p[up], p[down]))[0]

        return self.add(n, layer)

    def recurrent(self, n):
        w, u, b = self.weights(n, 8), self.weights(4, 8), self.weights(8)

        def layer(p, xs):
            def step(h, x):
                value, gate = jnp.split(x @ p[w] + h @ p[u] + p[b], 2, -1)
                return (h := 0.5 * h + jnp.tanh(value) * jax.nn.sigmoid(gate)), h

            x = xs[-1].swapaxes(0, 1)
            return jax.lax.scan(step, jnp.zeros((x.shape[1], 4)), x)[1].swapaxes(0, 1)

        return self.add(4, layer)

    def experts(self, n):
        router, up, down = self.weights(n, 3), self.weights(3, n, 4), self.weights(3, 4, 5)

        def layer(p, xs):
            x = xs[-1].reshape(-1, n)
            chosen = jnp.argmax(x @ p[router], -1)
            order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=3)
            hidden = jnp.tanh(jax.lax.ragged_dot(x[order], p[up], sizes))
            hidden = jnp.einsum("th,thd->td", hidden, jnp.asarray(p[down])[chosen])
            return jnp.zeros((len(x), 5)).at[order].add(hidden).reshape(*xs[-1].shape[:-1], 5)

        return self.add(5, layer)

    def grouped(self, n):
        w, kernel, numbers = self.weights(n, 6), self.weights(1, 3, 4), ("NWC", "WIO", "NWC")
        options = {"dimension_numbers": numbers, "feature_group_count": 2}
        return self.add(
            4,
            lambda p, xs: jax.lax.conv_general_dilated(xs[-1] @ p[w], p[kernel], (1,), "SAME", **options),
        )

    def rearranged(self, n):
        """What leaves channels alone, or copies them."""
        kind = int(self.rng.integers(6))
        ways = [
            lambda x: jnp.tile(x, 2),
            lambda x: jnp.stack([x, -x], -1).reshape(*x.shape[:-1], -1),
            lambda x: jnp.sort(x, axis=1),
            lambda x: jnp.stack(jnp.unstack(x, axis=1)[::-1], 1),
            lambda x: x[:, jnp.array([1, 0, 3, 2])],
            lambda x: x.at[:, jnp.array([2, 2])].add(x[:, :2]),
        ]
        return self.add(2 * n if kind < 2 else n, lambda p, xs: ways[kind](xs[-1]))

    def branches(self, n):
        w, v = self.weights(n, 4), self.weights(n, 4)

        def layer(p, xs):
            return jax.lax.cond(xs[0].sum() > 0, lambda x: x @ p[w], lambda x: jnp.tanh(x @ p[v]), xs[-1])

        return self.add(4, layer)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.promotes
def test_the_outputs_stay(seed, x64):
    network = Network(seed)
    small = hj.compact(network, network.params, np.random.default_rng(seed).normal(size=(2, 4, 3)))
    assert small.difference < 1e-10
    assert small.after.weights <= small.before.weights


def alive(weights, biases):
    """By hand: a unit stays if it is reached from an input or a bias, and reaches an output."""
    ahead = [np.ones(len(weights[0]), bool)]
    for w, b in zip(weights, biases, strict=True):
        ahead.append((w[ahead[-1]] != 0).any(axis=0) | (b != 0))
    behind = [np.ones(weights[-1].shape[1], bool)]
    for w in reversed(weights):
        behind.append((w[:, behind[-1]] != 0).any(axis=1))
    both = [a & b for a, b in zip(ahead, reversed(behind), strict=True)]
    return [units if units.any() else np.arange(len(units)) == 0 for units in both[1:-1]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.promotes
def test_all_that_can_go_goes(seed):
    """Against paths through a perceptron found by hand, written as layers one by one and as a scan's step."""
    rng = np.random.default_rng(seed)
    widths = [3, *rng.integers(4, 9, size=3), 2]
    weights = [rng.normal(size=shape) * (rng.random(shape) < 0.3) for shape in itertools.pairwise(widths)]
    biases = [rng.normal(size=n) * (rng.random(n) < 0.2) for n in widths[1:]]

    def layers(p, x):
        for w, b in p[:-1]:
            x = jnp.tanh(x @ w + b)
        return x @ p[-1][0] + p[-1][1]

    params = [(w.astype("f"), b.astype("f")) for w, b in zip(weights, biases, strict=True)]
    models = [layers, lambda p, x: jax.lax.map(lambda row: layers(p, row), x)]
    want = [np.flatnonzero(units).tolist() for units in alive(weights, biases)]
    for model in models:
        kept = hj.compact(model, params, rng.normal(size=(2, 3)).astype("f")).kept
        everything = zip(want, widths[1:-1], range(3), strict=True)
        for units, width, layer in everything:
            got = kept.get(f"{layer}/0", {}).get(1, np.arange(width))
            assert got.tolist() == units
