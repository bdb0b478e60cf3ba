"""A problem: a loss, its params and its data, as the command and `report` take them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _digests, _tree
from hessjax._core._messages import check_functions, checked_function, shown
from hessjax._core._sources import Source, check_reiterable
from hessjax._core._types import LossFn, ModelFn, Params
from hessjax.curvature._data import unweighed
from hessjax.curvature._ggn import check_likelihood
from hessjax.curvature._product import check_call, explained, scalar
from hessjax.curvature._weights import Weights, check_weights
from hessjax.curvature.likelihoods import Likelihood


class Problem(NamedTuple):
    """What `report` and the command `hessjax` look at: a loss, trained params, data, and what helps.

    The first three are needed. `hessjax init` writes a file with a commented one.

    Attributes:
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the examples of a batch.
        params: pytree of real floating-point arrays.
        batches: a source of data that starts afresh each time: a list of batches, a loader, or a function
            that opens one. All quantities are means over all of it.
        metric: `metric(params) -> number`, or a dict of them by name: an accuracy on a test set, say.
        model_fn: `model_fn(params, batch) -> outputs`, for multiply-adds, K-FAC and smaller networks.
        likelihood: what the outputs are to the loss, `hj.likelihoods.categorical` or another; with
            `model_fn`, for K-FAC.
        weights: `weights(batch) -> array`, how much each example counts, as `over_batches` takes it.
        optimizer: an optax optimizer, to fine-tune with while a recipe prunes; `optax.adam(1e-4)` if None.
        step: `step(optimizer, params, opt_state, batch) -> (params, opt_state)`, the training step, where it
            does more than to follow the gradient of `loss_fn`.
        groups: modules by name, each a glob over paths or a list of them: `{"encoder": "encoder/*"}`.
        name: stands at the head of the report.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["w"]) ** 2)
        >>> problem = hj.Problem(loss_fn, {"w": jnp.ones(3)}, [jnp.eye(3)])
        >>> problem.metric is None
        True
    """

    loss_fn: LossFn
    params: Params
    batches: Source
    metric: Callable[[Params], Any] | None = None
    model_fn: ModelFn | None = None
    likelihood: Likelihood | None = None
    weights: Weights | None = None
    optimizer: Any = None
    step: Callable[..., tuple[Params, Any]] | None = None
    groups: Mapping[str, Any] | None = None
    name: str = ""


class ProblemError(ValueError):
    """A problem that is none: says which field, and what it must be."""


def checked_problem(found: Any) -> Problem:
    """`found`, every field of which is what it must be.

    Raises:
        ProblemError: naming the field.
    """
    if not isinstance(found, Problem):
        hint = "`return hj.Problem(loss_fn, params, batches)`"
        raise ProblemError(f"`problem()` must return an `hj.Problem`, got {shown(found)}: {hint}.")
    for field, check in _CHECKS.items():
        try:
            check(found)
        except (TypeError, ValueError) as error:
            raise ProblemError(f"field `{field}` of the problem: {error}") from error
    return found


def _check_loss(problem: Problem) -> None:
    checked_function("loss_fn", problem.loss_fn, "(params, batch) -> scalar")


def _check_params(problem: Problem) -> None:
    _tree.check_floating(problem.params)
    if not _tree.size(problem.params):
        raise ValueError("`params` must hold at least one weight, got none.")
    _tree.unique_paths(problem.params, "params")


def _check_batches(problem: Problem) -> None:
    check_reiterable(problem.batches)
    batch = first_batch(problem)
    check_call("loss_fn", problem.loss_fn, (batch,))
    try:
        with explained("loss_fn"):
            jax.eval_shape(scalar(problem.loss_fn, (batch,)), problem.params)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"`loss_fn(params, batch)` must work for each of `batches`, but for the first it raised {told}"
        ) from error


def _check_model(problem: Problem) -> None:
    if problem.model_fn is not None:
        checked_function("model_fn", problem.model_fn, "(params, batch) -> outputs")


def _check_step(problem: Problem) -> None:
    if problem.step is not None:
        form = "(optimizer, params, opt_state, batch) -> (params, opt_state)"
        checked_function("step", problem.step, form)


def _check_optimizer(problem: Problem) -> None:
    optimizer = problem.optimizer
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"`optimizer` must be an optax optimizer, got {shown(optimizer)}.")


def _check_groups(problem: Problem) -> None:
    if problem.groups is not None and not isinstance(problem.groups, Mapping):
        raise TypeError(f"`groups` must map names to globs over paths, got {shown(problem.groups)}.")


def _check_name(problem: Problem) -> None:
    if not isinstance(problem.name, str):
        raise TypeError(f"`name` must be text, got {shown(problem.name)}.")


def _check_likelihood(problem: Problem) -> None:
    if problem.likelihood is not None:
        check_likelihood(problem.likelihood)


_CHECKS: dict[str, Callable[[Problem], None]] = {
    "loss_fn": _check_loss,
    "params": _check_params,
    "metric": lambda problem: check_functions(metric=problem.metric),
    "model_fn": _check_model,
    "likelihood": _check_likelihood,
    "weights": lambda problem: check_weights(problem.weights),
    "optimizer": _check_optimizer,
    "step": _check_step,
    "groups": _check_groups,
    "name": _check_name,
    "batches": _check_batches,  # last: it reads data, and calls the loss on its shapes
}


def first_batch(problem: Problem) -> Any:
    """The first batch of a pass."""
    for batch in unweighed(problem.batches):
        return batch
    raise ValueError("`batches` must hold at least one batch when iterated anew, got none.")


def fingerprint(problem: Problem) -> dict[str, Any]:
    """What makes it this problem: the loss by name, every bit of the params, and of the first batch."""
    loss = problem.loss_fn
    return {
        "loss": getattr(loss, "__qualname__", type(loss).__name__),
        "params": _marks(problem.params),
        "first batch": _marks(first_batch(problem)),
    }


def _marks(tree: Any) -> dict[str, str]:
    leaves = [_numbers(leaf) for leaf in jax.tree.leaves(tree)]
    named = zip(_tree.leaf_paths(tree), leaves, _digests.digests(leaves), strict=True)
    return {path: f"{x.dtype}{list(np.shape(x))} {digest}" for path, x, digest in named}


def _numbers(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """Which parts of two fingerprints differ, in words."""
    for part in {**one, **other}:
        a, b = one.get(part), other.get(part)
        if a != b and isinstance(a, Mapping) and isinstance(b, Mapping):
            paths = [path for path in {**a, **b} if a.get(path) != b.get(path)]
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            yield f"{part}: {', '.join(paths[:3])}{more}"
        elif a != b:
            yield f"{part}: {a} there, {b} here"
