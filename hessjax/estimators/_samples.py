"""Independent samples: who draws them, one by one, and what the data's being a sample adds to their error."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _sharding, _tree
from hessjax._core._messages import checked_function, shown
from hessjax._core._results import Estimate
from hessjax._core._types import BatchMatvec, Block, Forms, Key, Params, Vector, settings
from hessjax._run._estimator import Estimator
from hessjax.estimators.probes import Probe, rademacher


@settings()
class Sampling(Estimator):
    """An estimator that multiplies random vectors one by one; sample i uses `fold_in(key, i)`.

    Args:
        probe: `(key, like) -> vector` with independent entries of mean 0 and variance 1.
    """

    probe: Probe = rademacher

    def __post_init__(self) -> None:
        check_probe(self.probe)

    def draw(self, key: Key, index: Int[Array, ""] | int, like: Params) -> Vector:
        """The vector of sample `index`."""
        return drawn(self.probe, jax.random.fold_in(key, index), like)

    def query(self, state: Any) -> Block:
        """The probe under way."""
        return jax.tree.map(lambda x: x[None], state.probe)


def check_probe(probe: Any) -> None:
    """Raise a TypeError unless it can be called, as jax's own samplers cannot."""
    if getattr(probe, "__module__", "").startswith("jax."):
        raise TypeError(
            f"`probe` must be a function `(key, like) -> vector`, such as `hessjax.probes.rademacher`, got "
            f"{shown(probe)} of jax, which takes a shape."
        )
    checked_function("probe", probe, "(key, like) -> vector")


def drawn(probe: Callable[..., Any], key: Key, like: Params) -> Vector:
    """A vector of the probe, which must be like the params."""
    vector = probe(key, like)
    _tree.check_like(vector, like, "probe(key, like)", "like")
    return vector


def when(condition: Bool[Array, ""], step: Callable[..., Any], state: Any, *args: Any) -> Any:
    """`step(state, *args)` if the condition holds, else the state.

    A loop of no or one turn: a `lax.cond` whose branch makes new arrays copies the whole state, taken or
    not, and the state holds a basis.
    """

    def turn(loop: tuple[Bool[Array, ""], Any]) -> tuple[Bool[Array, ""], Any]:
        return jnp.asarray(False), step(loop[1], *args)

    return jax.lax.while_loop(lambda loop: loop[0], turn, (condition, state))[1]


@dataclasses.dataclass(eq=False)
class Watched:
    """A matvec over batches that remembers what each batch contributed to every product's vᵀAv."""

    matvec: BatchMatvec
    total: Any = 0.0
    weights: Any = None
    count: int = 0
    recent: list[Forms] = dataclasses.field(default_factory=list)

    def __call__(self, vector: Vector) -> Vector:
        """The product."""
        product, forms = self.matvec.by_batch(vector)
        self.recent.append(forms)
        return product

    def gathered(self, num_products: int) -> dict[str, np.ndarray]:
        """The sum over that many products, in float64; later ones (after one that failed) are forgotten."""
        # One by one in their order: a run that was stopped adds in the same order, to the same bits.
        for parts, weights in jax.device_get(self.recent[: num_products - self.count]):
            self.total = self.total + parts.astype(np.float64)
            self.weights, self.count = weights if self.weights is None else self.weights, self.count + 1
        self.recent = []
        return {"total": self.total, "weights": self.weights, "count": np.int64(self.count)}

    def go_on(self, gathered: dict[str, np.ndarray]) -> None:
        """Take up what a run before this one had gathered."""
        self.total, self.weights = gathered["total"], gathered["weights"]
        self.count = int(gathered["count"])

    def forms(self, num_products: Any) -> Forms:
        """The mean over that many products."""
        self.gathered(int(num_products))
        return Forms(
            jnp.asarray((self.total / self.count).astype(self.weights.dtype)), jnp.asarray(self.weights)
        )


def sampling_error(values: Any, weights: Any) -> Any:
    """The standard error of a mean over batches, from how the batches differ.

    Batches of n_b examples have means of variance σ²/n_b, so Σ n_b (x_b − x̄)²/(B − 1) estimates σ², and the
    mean of all N examples has variance σ²/N. Infinite for a single batch.

    Args:
        values: (batches, ...) the mean over each batch; of numpy or of jax.
        weights: (batches,) the number of examples in each, n_b.

    Returns:
        (...) the standard error, in the units of the values.
    """
    weights = weights.reshape(-1, *[1] * (values.ndim - 1))
    mean = (weights * values).sum(axis=0) / weights.sum()
    if len(values) < 2:
        return abs(mean) + math.inf
    deviations = abs(values - mean[None])
    # In units of the largest, whose squares stay within float32; 1 where all are 0.
    unit = deviations.max(axis=0)
    unit = unit + (unit == 0).astype(unit.dtype)
    squares = (weights * (deviations / unit[None]) ** 2).sum(axis=0)
    return unit * (squares / ((len(values) - 1) * weights.sum())) ** 0.5


@functools.partial(jax.jit, static_argnums=1)
def sampling_errors(forms: Forms, groups: tuple[tuple[int, ...], ...]) -> Float[Array, " parts"]:
    """Of the total, the leaves and the groups."""
    sums = [jnp.sum(forms.parts[:, jnp.array(group)], axis=1) for group in groups]
    # A sum over leaves has an error of its own: taken batch by batch, before the spread.
    columns = jnp.column_stack([jnp.sum(forms.parts, axis=1), forms.parts, *sums])
    return sampling_error(columns, forms.weights)


def one_by_one(estimate: Estimate) -> list[Estimate]:
    """An estimate of several numbers as so many estimates."""
    data = [None] * len(estimate.mean) if estimate.data_stderr is None else estimate.data_stderr
    columns = zip(estimate.mean, estimate.stderr, data, strict=True)
    return [Estimate(mean, stderr, estimate.num_samples, of_data) for mean, stderr, of_data in columns]


def hashed_signs(seed: Int[Array, ""] | int, like: Params) -> Vector:
    """Signs from an integer hash (the finalizer of MurmurHash3): no statistics, just no structure.

    For directions that only have to be new. It compiles in a tenth of the time of a random generator.
    """
    leaves, structure = jax.tree.flatten(like)

    def signs(index: int, leaf: Array) -> Array:
        place = jnp.asarray(seed * 64 + index + 1, jnp.uint32)  # the seed of a loop without `jit` is an int
        bits = _sharding.places(leaf) + place * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
        return jnp.where(bits & 1, 1, -1).astype(leaf.dtype)

    return jax.tree.unflatten(structure, [signs(i, leaf) for i, leaf in enumerate(leaves)])
