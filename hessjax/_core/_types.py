"""The nouns that rooms hand to each other. No behaviour lives here."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

Params: TypeAlias = PyTree
"""Weights: any pytree whose leaves are real floating-point arrays."""

Vector: TypeAlias = PyTree
"""A direction in weight space: the structure and shapes of the params."""

Block: TypeAlias = PyTree
"""Several vectors at once: a vector whose leaves carry one more, leading, axis."""

Matvec: TypeAlias = Callable[[Vector], Vector]
"""A symmetric linear map on vectors; those that hessjax makes are `jax.tree_util.Partial`s."""

LossFn: TypeAlias = Callable[..., Any]
"""`loss_fn(params, *args) -> scalar`, a mean over the examples in `args`."""

ModelFn: TypeAlias = Callable[..., Any]
"""`model_fn(params, *args) -> outputs`, any pytree of arrays."""

Key: TypeAlias = jax.Array
"""A JAX random key, `jax.random.key(0)`."""

Scalar: TypeAlias = Float[Array, ""]

Where: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool]
"""Which leaves: a glob over their paths (`"*/kernel"`), several, or `(path, leaf) -> bool`."""


class Relative(NamedTuple):
    """A tolerance or damping given as a fraction of the natural scale of what it is compared with."""

    factor: float


Tolerance: TypeAlias = float | Relative


class Estimate(NamedTuple):
    """The mean of independent samples, with its doubt.

    Attributes:
        mean: the estimate, in the units of what was estimated: a number, or a tree like the params.
        stderr: its standard error; infinite where too few samples were taken to tell.
        num_samples: how many samples entered.
        data_stderr: where the matvec is a mean over batches of data: the standard error that comes from
            the data being a sample, whatever the number of probes. None where it is not known.
    """

    mean: PyTree[Float[Array, "..."]]
    stderr: PyTree[Float[Array, "..."]]
    num_samples: Int[Array, ""]
    data_stderr: Float[Array, "..."] | None = None


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of a symmetric matrix, with their doubt.

    Attributes:
        values: (k,) eigenvalues, largest first, in loss per squared parameter; NaN where too few products
            were made to have one.
        vectors: the eigenvectors of norm 1, as a block: the params' structure, leading axis k.
        residuals: (k,) ‖Av − θv‖: some eigenvalue of A lies within this of each value.
        converged: (k,) whether the residual is within the tolerance asked for.
        num_matvecs: how many products it took, those for the residuals included.
        data_stderr: (k,) where the matvec is a mean over batches of data: the standard error of the values
            that comes from the data being a sample, to first order. None where it is not known.
        asymmetry: by how much the products contradicted each other, the largest |uᵀAv − vᵀAu| seen among
            vectors of norm 1: far above the rounding errors of the values, the matvec is not symmetric, and
            nothing here holds (`check` says where). None where it was not looked at.
    """

    values: Float[Array, " k"]
    vectors: Block
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    num_matvecs: Int[Array, ""]
    data_stderr: Float[Array, " k"] | None = None
    asymmetry: Scalar | None = None


class Forms(NamedTuple):
    """How vᵀAv is made up, for an A that is a mean over batches.

    Attributes:
        parts: (batches, leaves) v_l·(A_b v)_l for every batch b and leaf l.
        weights: (batches,) the number of examples in each.
    """

    parts: Float[Array, "batches leaves"]
    weights: Float[Array, " batches"]


@runtime_checkable
class BatchMatvec(Protocol):
    """A matvec that is a mean over batches of data, and can say how the batches differ."""

    def by_batch(self, vector: Vector) -> tuple[Vector, Forms]:
        """The product, and what each batch contributes to vᵀAv."""


class Estimator(NamedTuple):
    """An iterative method that asks for matrix-vector products and never calls the matvec itself.

    An optimizer is a pair of pure functions around a gradient; an estimator is the same around a
    product. `hessjax.run` drives it; so can any loop of your own:

        state = estimator.init(key, like)
        while not done:
            block = estimator.query(state)                    # leaves have a leading axis
            state = estimator.update(state, products_of(block))
        result = estimator.result(state)

    Attributes:
        init: `(key, like) -> state`; `like` gives structure, shapes and dtypes. It alone may carry arrays
            (a right-hand side, vectors to start from), as a `jax.tree_util.Partial`.
        query: `(state) -> block`, the vectors to be multiplied next (leading axis, often of length 1).
        update: `(state, products) -> state`, with the products in the query's order and shape.
        result: `(state) -> result`, readable after any number of products, none included.
        error: `(state) -> scalar`, its own estimate of its error, in the result's units. NaN says that it
            cannot go on (more products would change nothing): a run with a `tol` then ends.
        scale: `(state) -> scalar`, the magnitude that a `relative` tolerance refers to, in the same units;
            an estimator without one takes absolute tolerances only.
    """

    init: Callable[[Key, Params], Any]
    query: Callable[[Any], Block]
    update: Callable[[Any, Block], Any]
    result: Callable[[Any], Any]
    error: Callable[[Any], Scalar]
    scale: Callable[[Any], Scalar] | None = None
