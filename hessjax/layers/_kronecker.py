"""Kronecker-factored matrices as matvecs: products, inverses, traces, determinants, diagonals."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._messages import checked_choice
from hessjax._core._sharding import Layouts
from hessjax._core._types import Amount, Scalar, Vector
from hessjax.program._origins import Moves

Damping: TypeAlias = Literal["exact", "factored"]
"""How λ enters an inverse: added to every eigenvalue, or in parts to those of both factors."""


class Factors(NamedTuple):
    """U_L ⊗ U_R times a diagonal times its transpose, for each matrix of a leaf's stack.

    Attributes:
        left: eigenvectors, (stack, left, left); None: those are the unit vectors.
        right: likewise.
        values: the eigenvalues, (stack, left, right).
        sides: those of both factors, (stack, left) and (stack, right), where `values` are their products.
        whole: both factors themselves, or their diagonals, where products are taken by them: in half the
            operations of those by eigenvectors.
    """

    left: Array | None
    right: Array | None
    values: Array
    sides: tuple[Array, Array] | None
    whole: tuple[Array, Array] | None = None

    def rotated(self, x: Float[Array, "s l r"], *, back: bool = False) -> Float[Array, "s l r"]:
        """U_Lᵀ X U_R, or U_L X U_Rᵀ."""
        if self.left is not None:
            x = jnp.matmul(self.left if back else self.left.mT, x, precision="highest")
        if self.right is not None:
            x = jnp.matmul(x, self.right.mT if back else self.right, precision="highest")
        return x

    def times(self, x: Float[Array, "s l r"]) -> Float[Array, "s l r"]:
        """The product with a vector, as matrices."""
        if self.whole is None:
            return self.rotated(self.values * self.rotated(x), back=True)
        left, right = self.whole
        x = jnp.matmul(left, x, precision="highest") if left.ndim == 3 else left[:, :, None] * x
        return jnp.matmul(x, right, precision="highest") if right.ndim == 3 else x * right[:, None]

    def diagonal(self) -> Float[Array, "s l r"]:
        """The diagonal, as matrices: that of UDUᵀ is (U∘U)D."""
        left, right = (None if u is None else u**2 for u in (self.left, self.right))
        return Factors(left, right, self.values, None).rotated(self.values, back=True)


@dataclasses.dataclass(frozen=True)
class Structure:
    """How vectors are cut into the leaves' matrices.

    Attributes:
        tree: of the params.
        moves: for every leaf from the leaf to (stack, left, right).
        is_inverse: whether the matrix is the inverse of one that was made of moments.
    """

    tree: Any
    moves: tuple[Moves, ...]
    is_inverse: bool = False

    @property
    def like(self) -> Any:
        """A tree like the params, of shapes."""
        return jax.tree.unflatten(self.tree, [jax.ShapeDtypeStruct(m.shape, jnp.float32) for m in self.moves])

    def cut(self, vector: Vector) -> list[Array]:
        """The leaves as matrices, in at least float32."""
        return [m.apply(_tree.wide(x)) for m, x in zip(self.moves, jax.tree.leaves(vector), strict=True)]

    def join(self, matrices: list[Array]) -> Vector:
        """The leaves again."""
        leaves = [m.undo(x) for m, x in zip(self.moves, matrices, strict=True)]
        return jax.tree.unflatten(self.tree, leaves)

    def __call__(self, leaves: tuple[Factors, ...], vector: Vector) -> Vector:
        """The product."""
        _tree.check_vector(vector, self.like)
        cut = dataclasses.replace(self, is_inverse=False)  # products of both share compiled code
        return _product(cut, Layouts.of(vector), leaves, vector)


class Kronecker(Partial):
    """A block-diagonal matrix, for every leaf of the params U_L ⊗ U_R · D · (U_L ⊗ U_R)ᵀ; a matvec.

    Made by `kfac` and `ekfac`. It is a pytree and goes through `jit` as an argument, as other matvecs do: so
    do its inverse, and the inverse's own trace and diagonal. Leaves that a `scan` or a `vmap` stacks have a
    matrix for each of the stack.

    Attributes:
        leaves: eigenvectors `left` and `right` and eigenvalues `values` of every leaf.
        size: the number of parameters.
        is_inverse: whether it is what `.inverse(damping)` gave.
    """

    func: Structure

    @property
    def leaves(self) -> tuple[Factors, ...]:
        """Eigenvectors and eigenvalues of every leaf."""
        return self.args[0]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(moves.shape) for moves in self.func.moves)

    @property
    def is_inverse(self) -> bool:
        """Whether it is what `.inverse(damping)` gave."""
        return self.func.is_inverse

    def inverse(self, damping: Any, form: Damping = "exact") -> "Kronecker":
        """(K + λI)⁻¹, by both eigenbases.

        Args:
            damping: λ, in the units of K, or `relative(r)`: r times the mean of K's diagonal.
            form: `"exact"` adds λ to every eigenvalue; `"factored"` has (L + π√λ I) ⊗ (R + √λ/π I) in its
                place with π² = (tr L / dim L) / (tr R / dim R), as K-FAC optimizers do; where a side is a
                number, as of biases, both are the same.

        Returns:
            The matvec, a `Kronecker`.

        Raises:
            TypeError, ValueError: `damping` is negative or no number; `form` is neither, or `"factored"`
                where eigenvalues are no products; λ is 0 and K singular to rounding (the leaves are named,
                each with a damping that would do). Traced code cannot raise: such a leaf then holds NaN.

        Cost:
            d operations, and a product 4·(left + right)·d, left and right being the sides of a leaf's
            matrices. Factored: 2·left³ + 2·right³ operations and as much memory as the moments, and half as
            much for a product. A gradient takes 6·d for each token: with T of them an exact product costs
            ⅔·(left + right)/T gradients, a factored one half of that.
        """
        checked_choice("form", form, ("exact", "factored"))
        if form == "factored" and any(leaf.sides is None for leaf in self.leaves):
            raise ValueError('`form` must be "exact" where eigenvalues are no products, as those of `ekfac`.')
        shift = _shift(damping, self.trace() / self.size)
        inverted, least = _inverted(form, self.leaves, shift)
        self._check_regular(least, shift)
        structure = dataclasses.replace(self.func, is_inverse=not self.is_inverse)
        return Kronecker(structure, inverted)

    def log_determinant(self, damping: Any = 0.0) -> Scalar:
        """The logarithm of det(K + λI), in nats; −∞ where K + λI is singular.

        Args:
            damping: λ, a number or `relative(r)`, as in `inverse`.

        Cost:
            d logarithms.
        """
        shift = _shift(damping, self.trace() / self.size)
        return _total([jnp.log(leaf.values + shift.astype(leaf.values.dtype)) for leaf in self.leaves])

    def trace(self) -> Scalar:
        """The sum of the eigenvalues, which are those of K exactly."""
        return _total([leaf.values for leaf in self.leaves])

    def diagonal(self) -> Vector:
        """The diagonal, like the params, in at least float32, exactly.

        Cost:
            2·(left + right) operations for each weight.
        """
        return _diagonal(self.func, self.leaves)

    def _check_regular(self, least: list[tuple[Scalar, Scalar]], shift: Scalar) -> None:
        if any(isinstance(x, jax.core.Tracer) for pair in least for x in pair):
            return
        paths = _tree.leaf_paths(self.func.like)
        found = zip(paths, jax.device_get(least), strict=True)
        bad = [f"  {path}: {top:.3g}" for path, (low, top) in found if not low > 0]
        if bad:
            raise ValueError(
                f"`damping` must make K + λI regular, got {float(shift):.3g}, but the moments of these "
                "leaves are singular. A damping of at least this would do:\n" + "\n".join(bad)
            )

    def __repr__(self) -> str:
        what = ", inverted" * self.is_inverse
        return f"Kronecker({len(self.leaves)} leaves, {self.size:,} parameters{what})"


jax.tree_util.register_pytree_node(
    Kronecker,
    lambda matrix: ((matrix.args,), matrix.func),
    lambda structure, children: Kronecker(structure, *children[0]),
)


@jax.jit
def _total(arrays: list[Array]) -> Scalar:
    dtype = _tree.accumulator_dtype(arrays)
    return sum((jnp.sum(x.astype(dtype)) for x in arrays), jnp.zeros((), dtype))


def _shift(damping: Any, mean: Scalar) -> Scalar:
    amount = Amount.of(damping, "damping")
    dtype = mean.dtype
    return jnp.asarray(amount.limit(mean), dtype)


@functools.partial(jax.jit, static_argnums=0)
def _inverted(
    form: Damping, leaves: tuple[Factors, ...], shift: Scalar
) -> tuple[tuple[Factors, ...], list[tuple[Scalar, Scalar]]]:
    """The inverses, NaN where there is none; and for every leaf what tells."""
    found = [_inverse(leaf, shift.astype(leaf.values.dtype), form) for leaf in leaves]
    return tuple(leaf for leaf, _ in found), [least for _, least in found]


def _inverse(leaf: Factors, shift: Scalar, form: Damping) -> tuple[Factors, tuple[Scalar, Scalar]]:
    if form == "exact" or leaf.sides is None:
        inverse, least = _reciprocals(leaf.values + shift, shift)
        return leaf._replace(values=inverse, sides=None, whole=None), least
    left, right = _damped_sides(*leaf.sides, shift)
    inverse, least = _reciprocals(left[:, :, None] * right[:, None, :], shift)
    valid = jnp.where(least[0] > 0, 1, jnp.nan)
    whole = _whole(leaf.left, valid / left), _whole(leaf.right, valid / right)
    return leaf._replace(values=inverse, sides=None, whole=whole), least


def _reciprocals(values: Array, shift: Scalar) -> tuple[Array, tuple[Scalar, Scalar]]:
    """One over each, NaN for all if one is not above zero; and what tells."""
    least = _numbers_of(values, shift)
    return jnp.where(least[0] > 0, 1 / values, jnp.nan), least


def _damped_sides(
    left: Float[Array, "s l"], right: Float[Array, "s r"], shift: Scalar
) -> tuple[Float[Array, "s l"], Float[Array, "s r"]]:
    """The eigenvalues of both factors, each with its part of λ."""
    if left.shape[-1] == 1:
        return jnp.ones_like(left), left * right + shift
    if right.shape[-1] == 1:
        return left * right + shift, jnp.ones_like(right)
    means = [jnp.mean(x, axis=-1, keepdims=True) for x in (left, right)]
    root = jnp.sqrt(shift)
    # Where a side has no trace the split is even.
    ratio = jnp.sqrt(jnp.where((means[0] > 0) & (means[1] > 0), means[0] / means[1], 1))
    return left + ratio * root, right + root / ratio


def _whole(vectors: Array | None, values: Float[Array, "s k"]) -> Array:
    """U diag(values) Uᵀ, or the diagonal."""
    if vectors is None:
        return values
    return jnp.matmul(vectors * values[:, None], vectors.mT, precision="highest")


def _numbers_of(values: Array, shift: Scalar) -> tuple[Scalar, Scalar]:
    """By how much the least eigenvalue is above zero, and the rounding errors of the largest."""
    eps = float(jnp.finfo(values.dtype).eps) * jnp.max(values, initial=0)
    # Without a damping what is no larger than these is no eigenvalue; with one it is the damping's affair.
    return jnp.min(values, initial=jnp.inf) - jnp.where(shift > 0, 0, eps), 2 * eps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _product(structure: Structure, layouts: Layouts, leaves: tuple[Factors, ...], vector: Vector) -> Vector:
    pairs = zip(leaves, structure.cut(vector), strict=True)
    product = structure.join([leaf.times(x.astype(leaf.values.dtype)) for leaf, x in pairs])
    return layouts.laid(_tree.cast_like(product, vector))


@functools.partial(jax.jit, static_argnums=0)
def _diagonal(structure: Structure, leaves: tuple[Factors, ...]) -> Vector:
    return structure.join([leaf.diagonal() for leaf in leaves])
