"""Calls that a type checker must refuse: mypy complains of each comment here that it does not need."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import hessjax as hj
from hessjax import flax

w, key, magnitude = jnp.ones(3), jax.random.key(0), hj.saliencies.magnitude()


def loss(w: jax.Array, *args: Any) -> jax.Array:
    return jnp.sum(w**2)


def choices(A: Callable[[Any], Any]) -> None:
    """Names of choices are literal."""
    hj.hessian(loss, w, mode="forward")  # type: ignore[arg-type]
    hj.eigenpairs(A, key, w, which="LM")  # type: ignore[arg-type]
    hj.estimators.lanczos(3, "LM")  # type: ignore[arg-type]
    hj.saliencies.obs("best")  # type: ignore[arg-type]
    hj.saliencies.wood_taylor("best")  # type: ignore[arg-type]
    hj.directions.random(key, w, filter_axis="outputs")  # type: ignore[arg-type]
    flax.nnx_model(None, mode="test")  # type: ignore[arg-type]


def names_for_settings(A: Callable[[Any], Any], optimizer: Any) -> None:
    """A name is no setting."""
    hj.prune(optimizer, "magnitude", 0.5)  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, "0.5")  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, pattern="2:4")  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, allocation="uniform")  # type: ignore[arg-type]
    hj.fisher(loss, w, likelihood="categorical")  # type: ignore[arg-type]
    hj.trace(A, key, w, estimator="xtrace")  # type: ignore[arg-type]
    hj.trace(A, key, w, probe="rademacher")  # type: ignore[arg-type]
    hj.solve(A, w, method="minres")  # type: ignore[arg-type]


def classes_for_settings(A: Callable[[Any], Any], optimizer: Any) -> None:
    """Parentheses are missing."""
    hj.prune(optimizer, hj.saliencies.magnitude, 0.5)  # type: ignore[arg-type]
    hj.prune_once(w, hj.saliencies.magnitude, 0.5)  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, pattern=hj.patterns.n_of_m)  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, pattern=hj.patterns.heads)  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, pattern=hj.patterns.filters)  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, allocation=hj.allocations.uniform)  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, allocation=hj.allocations.explicit)  # type: ignore[arg-type]
    hj.saliencies.rigl(0.3, score=hj.saliencies.magnitude)  # type: ignore[arg-type]
    hj.trace(A, key, w, callbacks=[hj.progress_bar])  # type: ignore[list-item]


def settings_for_classes(A: Callable[[Any], Any]) -> None:
    """Parentheses are too many."""
    hj.trace(A, key, w, estimator=hj.estimators.xtrace(10))  # type: ignore[arg-type]
    hj.solve(A, w, method=hj.estimators.minres(w))  # type: ignore[arg-type]
    hj.trace(A, key, w, callbacks=hj.progress_bar())  # type: ignore[arg-type]


def plain_mistakes(A: Callable[[Any], Any], optimizer: Any) -> None:
    """Numbers, keys and flags."""
    hj.trace(A, 0, w)  # type: ignore[arg-type]
    hj.trace(A, key, w, num_probes="100")  # type: ignore[arg-type]
    hj.trace(A, key, w, tol="1e-3")  # type: ignore[arg-type]
    hj.trace(None, key, w)  # type: ignore[arg-type]
    hj.hessian(loss, w, linearize="no")  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, every=1.5)  # type: ignore[arg-type]
    hj.prune(optimizer, magnitude, 0.5, regrow="no")  # type: ignore[arg-type]
    hj.patterns.n_of_m("2:4")  # type: ignore[call-arg, arg-type]
