"""The estimate of XTrace from its small matrices: every test vector judged by the basis of the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hessjax._core import _numbers
from hessjax._core._results import Estimate
from hessjax.estimators._moments import (
    longer,
    moments_of,
    skewness_share,
    standard_error,
    students_factor,
)


class Small(NamedTuple):
    """What the estimate is made of, from n test vectors Ω whose products are AΩ = QR.

    Attributes:
        R: (n, n) upper triangular; a zero on the diagonal marks a row of zeros in the basis.
        H: (n, n) QᵀAQ.
        W: (n, n) QᵀΩ.
        forms: (n,) ωᵀAω.
        squares: (n,) ‖ω‖².
    """

    R: Float[Array, "n n"]
    H: Float[Array, "n n"]
    W: Float[Array, "n n"]
    forms: Float[Array, " n"]
    squares: Float[Array, " n"]


class Estimates(NamedTuple):
    """What each test vector says of the trace.

    Attributes:
        estimates: t_i.
        sampled: the part of t_i that ω_i samples, at least 0 if A is positive semidefinite.
        changes: (n, n) in row i, by what t_i changes where the basis has test vector j in it too.
    """

    estimates: Float[Array, " n"]
    sampled: Float[Array, " n"]
    changes: Float[Array, "n n"]


def combined(found: Estimates, inside: Bool[Array, " n"], count: Int[Array, ""]) -> Estimate:
    """The mean of all t_i, and its standard error.

    The deviation of the t_i over √n would be that of independent ones, but they share a basis. Let Δ_ij be
    what t_i changes by having ω_j in its basis. Whatever the basis, t_i is unbiased; so of the covariance of
    t_i and t_j all terms vanish but one, E[Δ_ij Δ_ji], and

        Var(mean) = E[s²]/n + mean over pairs of E[Δ_ij Δ_ji].
    """
    moments = moments_of(found.estimates, inside, count)
    spread, n = moments.spread, jnp.maximum(count, 2).astype(moments.spread.dtype)
    pairs = jnp.where(inside[:, None] & inside[None], found.changes, 0)
    unit = jnp.max(jnp.abs(pairs), initial=0)  # whose squares would leave float32
    pairs = pairs / jnp.where(unit > 0, unit, 1)
    # Of few pairs the mean may be negative: then nothing is taken off.
    shared = unit * jnp.sqrt(jnp.maximum(jnp.sum(pairs * pairs.T), 0) / (n * (n - 1)))
    sampled = jnp.sum(jnp.where(inside, found.sampled, 0)) / n
    # Student's factor is for the spread of n numbers; the pairs are many, and theirs is known better.
    alone = students_factor(count, n.dtype) * standard_error(spread, count)
    # A quarter of what `_moments.estimate` adds for skewness: the pairs, skewed themselves, add the rest.
    skewed = 1 + skewness_share(spread, sampled, moments.skewness, count) / 2
    stderr = skewed * longer(alone, shared)
    return Estimate(_numbers.or_nan(count > 0, moments.mean), stderr, count)


def leave_one_out(small: Small, size: int, inside: Bool[Array, " n"]) -> Estimates:
    """t_i of every test vector (arXiv 2301.07825, §2.1 and §3.1; row i of what is here speaks of it).

    The basis without i is Q less one direction s_i, the i-th column of R⁻ᵀ: I − Q_(i)Q_(i)ᵀ comes from Q
    and P = I − s_i s_iᵀ. Where the rank is smaller than the number of products, see `_missing`.
    """
    # Transposed once here, so that row i of every matrix belongs to test vector i.
    R = jnp.where(inside[None], small.R, 0).T
    H = jnp.where(inside[:, None] & inside[None], small.H, 0)
    W = jnp.where(inside[:, None] & inside[None], small.W, 0).T
    S, rank = _missing(R.T)
    # P_i Qᵀω_i: the components of ω_i in the span of the others.
    along = jnp.sum(S * W, axis=1)
    PW = W - along[:, None] * S
    HPW, SHS = _product(PW, H), _product(_product(S, H), S.T)
    # tr Q_(i)ᵀAQ_(i) = tr H − s_iᵀH s_i.
    captured = jnp.trace(H) - jnp.diag(SHS)
    # μᵀAμ with μ = ω_i − Q P_i Qᵀω_i, where ω_iᵀAQ is row i of Rᵀ: no product with μ is needed.
    form = small.forms + jnp.sum(PW * (HPW - 2 * R), axis=1)
    # ‖μ‖² by Pythagoras.
    square = small.squares - jnp.sum(W**2, axis=1) + along**2
    rest = float(size) - rank.astype(form.dtype)
    sampled = _sampled(rest, form, square)
    # The same without j in the basis: less a second direction u.
    pairs = _Pairs.of(S)
    share, slope = (pairs.along(_product(x, S.T)) for x in (W, HPW - R))
    form_of_u = pairs.form(SHS)
    fewer = _sampled(
        rest[:, None] + pairs.exist.astype(rest.dtype),
        form[:, None] - 2 * share * slope + share**2 * form_of_u,
        square[:, None] + share**2,
    )
    changes = jnp.where(pairs.exist, sampled[:, None] + form_of_u - fewer, 0)
    return Estimates(captured + sampled, sampled, changes)


class _Pairs(NamedTuple):
    """The directions u_ij = (s_j − ρ s_i) / √(1 − ρ²): of s_j what is left beside s_i.

    Attributes:
        cosine: ρ = s_iᵀs_j.
        length: √(1 − ρ²).
        exist: not where i is j, where the basis without j is the basis, or where only rounding is left.
    """

    cosine: Float[Array, "n n"]
    length: Float[Array, "n n"]
    exist: Bool[Array, "n n"]

    @classmethod
    def of(cls, S: Float[Array, "n k"]) -> "_Pairs":
        """Of the directions s_i."""
        cosine, there = _product(S, S.T), jnp.any(S != 0, axis=1)
        square = 1 - cosine**2
        exist = there[None] & ~jnp.eye(len(S), dtype=bool) & (square > 1000 * jnp.finfo(S.dtype).eps)
        return cls(cosine, jnp.sqrt(jnp.where(exist, square, 1)), exist)

    def along(self, x: Float[Array, "n n"]) -> Float[Array, "n n"]:
        """x_iᵀu_ij, from x_iᵀs_j."""
        return jnp.where(self.exist, (x - self.cosine * jnp.diag(x)[:, None]) / self.length, 0)

    def form(self, x: Float[Array, "n n"]) -> Float[Array, "n n"]:
        """u_ijᵀXu_ij, from s_iᵀXs_j."""
        own = jnp.diag(x)
        found = own[None] - 2 * self.cosine * x + self.cosine**2 * own[:, None]
        return jnp.where(self.exist, found / self.length**2, 0)


def _sampled(rest: Float[Array, "..."], form: Float[Array, "..."], square: Float[Array, "..."]) -> Array:
    """The trace on so many dimensions, from one vector."""
    # μ = 0: the others span all, and there is nothing left to sample.
    enough = (rest > 0) & (square > 0)
    return jnp.where(enough, rest * form / jnp.where(enough, square, 1), 0)


def _missing(R: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Int[Array, " n"]]:
    """Row i: the direction s_i of the span that only product i gives (0 if the others span it too).

    And the dimension of the span of the others. A product inside the span of those before it (a zero on the
    diagonal of R) is a combination of them: each that takes part in it could be replaced by it.
    """
    own = jnp.diag(R) > 0
    # To entries of order 1: the triangular solve has no scaling of its own, and float32 ends at 1e38.
    R = R / jnp.where(jnp.any(own), jnp.max(jnp.abs(R)), 1)
    square = jnp.where(own[:, None] & own[None], R, 0) + jnp.diag(jnp.where(own, 0, 1).astype(R.dtype))
    inverse = jax.scipy.linalg.solve_triangular(square, jnp.eye(len(R), dtype=R.dtype))
    shares = _product(inverse, jnp.where(own[None], 0, R))
    # √eps: below it a share is what rounding makes of none.
    replaceable = jnp.max(jnp.abs(shares), axis=1) > jnp.sqrt(jnp.finfo(R.dtype).eps)
    needed = own & ~replaceable
    directions = inverse / jnp.linalg.norm(inverse, axis=1, keepdims=True)
    return jnp.where(needed[:, None], directions, 0), jnp.sum(own, dtype=jnp.int32) - needed.astype(jnp.int32)


def _product(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    # By default accelerators multiply in fewer digits than float32 has.
    return jnp.matmul(a, b, precision="highest")
