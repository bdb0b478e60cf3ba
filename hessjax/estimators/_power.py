"""Block power iteration: there because people expect it, and honest about when it is done."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._messages import checked_count
from hessjax._core._packing import Packing
from hessjax._core._results import Eigenpairs
from hessjax._core._types import (
    CONVERGENCE,
    Amount,
    Block,
    Key,
    Params,
    Relative,
    Scalar,
    Tolerance,
    Vector,
    assign,
    settings,
)
from hessjax._run._estimator import Estimator, limit_of
from hessjax.estimators._basis import orthonormal
from hessjax.estimators.probes import gaussian


class PowerState(NamedTuple):
    """The next iterate, and the Ritz pairs of the last one.

    Attributes:
        iterate: (k, …) orthonormal block to be multiplied next.
        vectors: (k, …) the Ritz vectors that `values` and `residuals` belong to.
        values: (k,) Ritz values, NaN before the first product.
        residuals: (k,) ‖Av − θv‖ of these very vectors, infinite before the first product.
        packing: how the blocks are packed.
        num_matvecs: products so far.
    """

    iterate: Block
    vectors: Block
    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    packing: Packing
    num_matvecs: Int[Array, ""]


@settings(arrays=("tol",))
class PowerIteration(Estimator):
    """Subspace iteration with Rayleigh–Ritz, for the k eigenvalues of largest magnitude.

    It stops on the residual ‖Av − θv‖. (The change of θ from step to step, which others watch, has
    returned the second eigenvalue, or one 2 % low, as converged.) Values, vectors and residuals always
    belong together. `eigenpairs` needs several times fewer products; use that unless there is no memory
    for more than 3k vectors.

    Args:
        k: number of pairs, multiplied together as a block.
        tol: residual below which a pair counts as converged: absolute, or `relative` to the largest
            absolute eigenvalue.

    Returns:
        An `Estimator` with result `Eigenpairs` (largest value first) and error the largest residual.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` below 1, or above the number of parameters; `tol` negative or None.

    Cost:
        k products a step, (|λ_k+1| / |λ_k|) less error each; 6k²d operations; memory 7k·d.

    References:
        Golub & Van Loan (2013), Matrix Computations, §8.2.4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([9.0, -4.0, 1.0, 0.5]))
        >>> pairs, _ = hj.run(hj.estimators.power_iteration(2), A, jax.random.key(0), jnp.zeros(4),
        ...                   max_matvecs=100, tol=hj.relative(1e-3))
        >>> pairs.values.round(3).tolist(), pairs.converged.tolist()
        ([9.0, -4.0], [True, True])
    """

    k: int = 1
    _: dataclasses.KW_ONLY
    tol: Tolerance = Relative(1e-3)

    def __post_init__(self) -> None:
        assign(self, k=checked_count("k", self.k), tol=Amount.of(self.tol, meaning=CONVERGENCE))

    def init(self, key: Key, like: Params) -> PowerState:
        """A random orthonormal block."""
        k, packing = self.k, Packing.of(like)
        if k > packing.size:
            raise ValueError(f"`k` must be at most {packing.size}, the number of parameters, got {k}.")
        probes = jax.vmap(lambda key: packing.pack(gaussian(key, like)))(jax.random.split(key, k))
        # Orthonormal at every step: otherwise all columns turn into the first eigenvector.
        iterate = orthonormal(probes)
        none = _tree.block_of(*[packing.zeros()] * k)
        zeros = jnp.zeros(k, _tree.accumulator_dtype(like))
        unknown = _numbers.or_nan(False, zeros)
        return PowerState(iterate, none, unknown, zeros + jnp.inf, packing, jnp.int32(0))

    def query(self, state: PowerState) -> Block:
        """The iterate."""
        return state.packing.unpack_block(state.iterate)

    def update(self, state: PowerState, products: Block) -> PowerState:
        """Rayleigh–Ritz on the iterate, and the products made orthonormal as the next one."""
        products = jax.vmap(state.packing.pack)(products)
        projected = _tree.gram(state.iterate, products)
        # Symmetric but for rounding; `eigh` reads one triangle only, and the mean of both is closer.
        values, rotation = _numbers.eigh((projected + projected.T) / 2)
        values, rotation = values[::-1], rotation[:, ::-1]
        # The products are rotated with the vectors: residuals then cost no product of their own.
        vectors, products = _tree.combine(rotation.T, state.iterate), _tree.combine(rotation.T, products)
        residuals = jax.vmap(_residual)(vectors, products, values)
        count = state.num_matvecs + self.k
        return PowerState(orthonormal(products), vectors, values, residuals, state.packing, count)

    def result(self, state: PowerState) -> Eigenpairs:
        """The Ritz pairs of the last iterate that was multiplied."""
        limit = limit_of(self, Amount.of(self.tol), state)
        vectors = state.packing.unpack_block(state.vectors)
        return Eigenpairs(state.values, vectors, state.residuals, state.residuals <= limit, state.num_matvecs)

    def error(self, state: PowerState) -> Scalar:
        """The largest residual."""
        return jnp.max(state.residuals)

    def scale(self, state: PowerState) -> Scalar:
        """The largest absolute value."""
        return jnp.max(jnp.abs(state.values))


power_iteration = PowerIteration


def _residual(vector: Vector, product: Vector, value: Scalar) -> Scalar:
    return _tree.norm(_tree.add_scaled(product, -value, vector))
