"""Estimators that go through phases: a step that is taken, or not, without a copy of the state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def when(condition: Bool[Array, ""], step: Callable[..., Any], state: Any, *args: Any) -> Any:
    """`step(state, *args)` if the condition holds, else the state.

    A loop of no or one turn: a `lax.cond` whose branch makes new arrays copies the whole state, taken or
    not, and the state holds a basis.
    """

    def turn(loop: tuple[Array, Any]) -> tuple[Array, Any]:
        return jnp.asarray(False), step(loop[1], *args)

    return jax.lax.while_loop(lambda loop: loop[0], turn, (condition, state))[1]
