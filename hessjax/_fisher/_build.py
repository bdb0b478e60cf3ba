"""`inverse_fisher`: from gradients, in one block or a stream of blocks, to the inverse of their Fisher."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from hessjax._core import _tree
from hessjax._core._messages import checked_count, checked_number
from hessjax._core._types import Relative
from hessjax._fisher._blocking import Blocking, row
from hessjax._fisher._inverse_fisher import InverseFisher, built, streamed
from hessjax._fisher._rows import checked_damping
from hessjax._fisher._stream import gathered, stream


def inverse_fisher(
    grads: Any,
    damping: Any = Relative(0.01),  # noqa: B008 (a value, never changed)
    block_size: int | None = None,
    *,
    chunk_size: int = 64,
    batch_size: Any = 1,
    weights: Any = None,
) -> InverseFisher:
    """The inverse of F = b/m Σ gᵢgᵢᵀ + λI, the damped empirical Fisher of m gradients.

    With `block_size=B` F is block-diagonal: B consecutive weights of a leaf are a block, none crosses leaves.
    A block with at least as many gradients as weights keeps a B × B root of its inverse, updated by chunks of
    gradients; one with fewer keeps the gradients and an m × m factor, as the whole network does with
    `block_size=None`. What gradients are, is open: any vectors r with F = 1/m Σ rrᵀ + λI will do, such as
    `ggn_roots` and `sampled_grads` give. With `weights` F = b Σ wᵢ gᵢgᵢᵀ / Σ wᵢ + λI, and Σ w stands for m.

    Args:
        grads: a block (a tree like the params, its leaves with a leading axis of m gradients), as
            `per_example_grads` returns; or a stream of blocks, any iterable that is not itself a tree of
            arrays: an iterator, a generator or the function that makes one, a data loader. (A list is a
            tree: pass `iter(blocks)`.) A stream is read once, and no more of it kept than makes up B
            gradients (all, if `block_size=None`); inside `jit` it is unrolled.
        damping: λ, in the units of F, or `relative(r)`: r times the mean of F's undamped diagonal over all
            parameters, of all leaves. λ, and whether the inverse is accurate, is a matter of a whole stream.
        block_size: the most weights in a block, B; a smaller leaf is one block. None: one block in all.
        chunk_size: how many gradients enter a root at once: more are faster on an accelerator, fewer are more
            accurate in float32.
        batch_size: b, if every gradient is the mean over b examples: that makes gᵢgᵢᵀ smaller by b.
        weights: how much the gradients count: for a block an array (m,), or one number for all its rows
            together; for a stream an iterable of these, one for each block. So a stream of `ggn_roots(...,
            weights=mask)` of batches has the batches' sums of the mask. None: each counts once.

    Returns:
        An `InverseFisher`, a pytree, computed and kept in at least float32.

    Raises:
        TypeError: gradients that are not floating point; a size that is not an integer.
        ValueError: no gradient that counts; weights that do not fit, are negative or not finite; leaves, or
            blocks of a stream, that disagree; NaN or infinity among the gradients (names the leaf); `damping`
            not positive, or relative to gradients that are all zero; λ too small for the precision (names the
            block, and a damping that should do). Traced code cannot raise: inside `jit` such a block holds
            NaN, and `accurate` is False.

    Cost:
        Root: 6·m·B operations for each weight, memory B numbers for each weight. Dual: 2·m·min(m, B)
        operations and m numbers for each weight, and m² for each block. A stream costs 5·B² operations more
        for each weight whenever κ = mλ has doubled, and once at the end. The error in float32 is about
        1e-7·√(λmax/λ) times a modest factor, at worst 1e-7·λmax/λ.
        On s devices each does and holds a part of that, as the gradients are sharded, over weights, examples
        or both: a dual m·d/s numbers, roots B·d/s, and beside them m² numbers. While they are made it holds
        2·m·d/s more beside the gradients, about 5·m·d/s where shares are exchanged (as below). The numbers
        are those of one device, blocks the same B consecutive weights. Without blocks m² numbers are sent for
        each leaf, and m for a product. With blocks nothing is, where devices hold whole
        blocks: where B divides the stretches in which weights of a device follow each other, the columns of a
        device if a matrix is sharded along columns. Else the shares are exchanged first, m·d/s numbers each
        way; so are those of gradients sharded over examples. Results are laid out as one gradient is. Inside
        `jit` layouts on automatic meshes are not known: blocks are left to the compiler, which may gather.

    References:
        Singh & Alistarh (2020), WoodFisher, arXiv 2004.14340; Frantar et al. (2021), M-FAC, arXiv
        2107.03356; Andrews (1968), A square root formulation of the Kalman covariance equations.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> grads = {"w": jnp.array([[2.0, 0.0], [0.0, 2.0]])}  # F = 2I + λI
        >>> inverse = hj.inverse_fisher(grads, damping=2.0, block_size=2)
        >>> inverse.apply({"w": jnp.array([4.0, 8.0])})["w"].round(4).tolist()
        [1.0, 2.0]
        >>> inverse.add({"w": jnp.zeros((2, 2))}).diagonal()["w"].round(4).tolist()  # F = I + λI
        [0.3333, 0.3333]
    """
    block_size = None if block_size is None else checked_count("block_size", block_size)
    chunk_size = checked_count("chunk_size", chunk_size)
    if not isinstance(checked_number("batch_size", batch_size), jax.core.Tracer) and not batch_size >= 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    blocks = stream(grads, weights=weights)
    first = next(blocks)
    dtype, blocking = _tree.accumulator_dtype(row(first.block)), Blocking.of(first.block, block_size)
    setting = checked_damping(damping, dtype)
    first = gathered(itertools.chain([first], blocks), blocking.widest if block_size else None)
    return streamed(built(blocking, chunk_size, first, setting, jnp.asarray(batch_size, dtype)), blocks)
