"""What does the inverse Fisher by chunks of gradients cost beside the rank-one recursion, and is it exact?"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import table
import timing

import hessjax as hj

SCALE = 1e-3
DAMPING = 1e-7
"""A tenth of the mean of the diagonal of F, at this scale of the gradients."""


def measure(quick: bool) -> table.Measured:
    blocks, width, count, sample, rounds = (2, 32, 64, 8, 2) if quick else (64, 512, 1024, 32, 5)
    grads = SCALE * jax.random.normal(jax.random.key(0), (count, blocks * width))
    few = grads[:sample].reshape(sample, blocks, width)
    calls = {
        "recursion": functools.partial(rank_one, few, count),
        "ours": lambda: hj.inverse_fisher(grads, DAMPING, width),
    }
    timing.first_calls(calls)
    times = timing.interleave(calls, rounds)
    times["recursion"] = [t * count / sample for t in times["recursion"]]
    ratio = timing.ratio(times, "ours", "recursion")
    note = (
        f"{timing.milliseconds(times['ours']):.0f} against {timing.milliseconds(times['recursion']):.0f} ms"
    )
    note += f"; {blocks} blocks of {width}, {count} gradients, the recursion timed on {sample} of them"
    cost = table.Figure("ours over rank-one updates", ratio.median, "", 0.2, ratio[1:], note)
    return [cost, *errors(grads, width)], times


@functools.partial(jax.jit, static_argnums=1)
def rank_one(grads: jax.Array, count: int) -> jax.Array:
    """F⁻¹ ← F⁻¹ − F⁻¹g gᵀF⁻¹ / (m + gᵀF⁻¹g), gradient by gradient, all blocks together."""

    def of_block(rows: jax.Array) -> jax.Array:
        def step(i: Any, inverse: jax.Array) -> jax.Array:
            u = jnp.matmul(inverse, rows[i], precision="highest")
            return inverse - jnp.outer(u, u / (count + jnp.vdot(rows[i], u, precision="highest")))

        return jax.lax.fori_loop(0, len(rows), step, jnp.eye(rows.shape[1], dtype=rows.dtype) / DAMPING)

    return jax.vmap(of_block, in_axes=1)(grads)


def errors(grads: jax.Array, width: int) -> list[table.Figure]:
    """‖error‖ / ‖F⁻¹‖ of the first block, against NumPy in float64, for both."""
    first = np.asarray(grads[:, :width], np.float64)
    exact = np.linalg.inv(first.T @ first / len(first) + DAMPING * np.eye(width))
    found = {
        "ours": hj.inverse_fisher(grads[:, :width], DAMPING, width).blocks(0)[0],
        "rank-one updates": rank_one(grads[:, None, :width], len(grads))[0],
    }
    return [
        table.Figure(
            f"relative error in float32, {name}",
            float(np.linalg.norm(np.asarray(matrix, np.float64) - exact) / np.linalg.norm(exact)),
            "",
            1e-5 if name == "ours" else None,
            None,
            f"λ = {DAMPING:g}, a tenth of the mean of the diagonal of F",
        )
        for name, matrix in found.items()
    ]


if __name__ == "__main__":
    table.main(__doc__, measure)
