"""BatchNorm's running statistics taken anew over a data set, as they are after pruning."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import core, linen, nnx, traverse_util
from jaxtyping import Array, Float, Int

from hessjax._core._messages import shown
from hessjax._core._sources import Source, check_source
from hessjax.curvature._data import check_not_filled, unweighed
from hessjax.flax._linen import Inputs, LinenModel, arguments, check_hashable, check_module, frozen
from hessjax.flax._nnx import check_model

Moments: TypeAlias = dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]
"""`{path: (mean, variance)}` of every BatchNorm."""


class _Pooled(NamedTuple):
    """Moments over all examples so far."""

    num: Int[Array, ""]
    moments: Moments


def linen_recalibrate(
    module: Any,
    variables: Any,
    batches: Source,
    *,
    inputs: Inputs = 0,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Any:
    """The variables of a linen module with the running statistics of its BatchNorms taken over `batches`.

    Pruning changes what reaches a BatchNorm; its statistics, still those of the dense network, then cost
    more accuracy than the weights that went. The mean and variance of the whole data set are pooled from
    those of its batches, each weighted by its number of examples,

        m = Σ n_b m_b / N,   v = Σ n_b (v_b + (m_b − m)²) / N,

    whatever the modules' momentum, and nothing is left of the old ones. A BatchNorm that is not in training
    mode, frozen or not called, keeps its own, and the network runs with them. The new ones are those of the
    data set, exactly, for every BatchNorm that no other comes before. The inputs of a later one are
    normalised by the statistics of their own batch, as in training; these too come out exactly with one
    batch that holds all.

    Args:
        module: a `flax.linen.Module`.
        variables: `{"params": ..., "batch_stats": ...}`, and whatever else the module reads.
        batches: the data, as for `hj.over_batches`, gone through once: of any size, the last smaller or not.
        inputs: what the module takes from a batch, as in `linen_loss`.
        rngs: fixed keys for dropout and the like, `{"dropout": key}`, where training mode needs them.
        **apply_kwargs: static arguments of `module.apply` that put BatchNorm into training mode, such as
            `train=True`.

    Returns:
        The variables, their `batch_stats` new.

    Raises:
        ValueError: if `variables` has no `batch_stats`, no BatchNorm is in training mode, or there is no
            batch.

    Cost:
        One forward pass over the data; one compilation for each shape of a batch.

    References:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3 ("precise BatchNorm");
        Chan, Golub and LeVeque 1983 for the pooling.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from hessjax.flax import linen_recalibrate
        >>> module, data = nn.BatchNorm(), jnp.array([[1.0], [2.0], [6.0]])
        >>> variables = module.init(jax.random.key(0), data, use_running_average=True)
        >>> new = linen_recalibrate(module, variables, [data[:2], data[2:]], use_running_average=False)
        >>> jax.tree.map(lambda x: round(x.item(), 4), new["batch_stats"])
        {'mean': 3.0, 'var': 4.6667}
    """
    check_module(module)
    if not isinstance(variables, (dict, core.FrozenDict)):
        raise TypeError(f"`variables` must be a mapping, as `module.init` gives it, got {shown(variables)}.")
    check_source(batches)
    check_not_filled(batches)
    if "batch_stats" not in variables:
        raise ValueError(
            f'`variables` must hold the collection "batch_stats", got {sorted(variables)}: without BatchNorm '
            "there is nothing to recalibrate."
        )
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    identity = frozen(module)
    check_hashable(module=identity, inputs=inputs, **apply_kwargs)
    model = LinenModel(module, identity, inputs, tuple(sorted(apply_kwargs.items())))
    pooled = _pool(lambda batch: _linen_moments(model, variables, batch, rngs), unweighed(batches), inputs)
    if not pooled:
        raise ValueError(
            _NO_NORM.format("`apply_kwargs`", "such as `train=True` or `use_running_average=False`")
        )
    return type(variables)({**variables, "batch_stats": _replaced(variables["batch_stats"], pooled)})


def _replaced(stats: Any, pooled: Moments) -> Any:
    """The collection with new moments where there are any, in its own containers and dtypes."""
    flat = traverse_util.flatten_dict(core.unfreeze(stats), sep="/")
    for path, moments in pooled.items():
        for name, new in zip((_join(path, "mean"), _join(path, "var")), moments, strict=True):
            flat[name] = new.astype(flat[name].dtype)
    leaves = jax.tree.leaves(traverse_util.unflatten_dict(flat, sep="/"))
    return jax.tree.unflatten(jax.tree.structure(stats), leaves)


def nnx_recalibrate(model: Any, batches: Source, *, inputs: Inputs = 0, **call_kwargs: Any) -> Any:
    """The running statistics of an nnx model's BatchNorms, taken over `batches`.

    As `linen_recalibrate`, for `nnx.BatchNorm`s. The model runs in the mode that it is in, so that those that
    are frozen (`use_running_average=True`) stay so: after `model.eval()`, call `model.train()` first. The
    model itself is left as it is: put the statistics in by `nnx.update(model, statistics)`.

    Args:
        model: an `nnx.Module`; a copy runs, dropout with the keys that it holds.
        batches: the data, as for `hj.over_batches`, gone through once.
        inputs: what the model takes from a batch, as in `nnx_loss`.
        **call_kwargs: further static arguments of the model's call, such as `train=True`.

    Returns:
        The `nnx.State` of the `nnx.BatchStat`s, new for every BatchNorm in training mode.

    Raises:
        ValueError: if no BatchNorm is in training mode, or there is no batch.

    Cost:
        One forward pass over the data, and one more over the first batch, which shows who is in training
        mode; one compilation for each shape of a batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from hessjax.flax import nnx_recalibrate
        >>> model, data = nnx.BatchNorm(1, rngs=nnx.Rngs(0)), jnp.array([[1.0], [2.0], [6.0]])
        >>> nnx.update(model, nnx_recalibrate(model, [data[:2], data[2:]]))
        >>> model.mean[...].item()
        3.0
    """
    check_model(model)
    check_source(batches)
    check_not_filled(batches)
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    check_hashable(inputs=inputs, **call_kwargs)
    # As a graph whatever flax's setting: in its tree mode a shared module is refused.
    copy, batches = nnx.clone(model, graph=True), unweighed(batches)
    norms = _nnx_norms(copy)
    for norm in norms.values():
        norm.momentum = 0.0  # so that a call leaves the batch's own moments
    run = functools.partial(
        _nnx_moments, nnx.graphdef(copy, graph=True), inputs, tuple(sorted(call_kwargs.items()))
    )
    first = list(itertools.islice(batches, 1))
    active = _nnx_active(run, copy, *first) if first else {}
    _clear(active)
    state = nnx.state(copy, graph=True)
    pooled = _pool(lambda batch: run(state, batch), itertools.chain(first, batches), inputs)
    if not active:
        raise ValueError(
            _NO_NORM.format("`model` or `call_kwargs`", "by `model.train()` or such as `train=True`")
        )
    for path, norm in active.items():
        norm.mean[...], norm.var[...] = pooled[path]
    return nnx.state(copy, nnx.BatchStat, graph=True)


def _pool(moments_of: Callable[[Any], Moments], batches: Iterable[Any], inputs: Inputs) -> Moments:
    pooled = None
    for batch in batches:
        num = jnp.asarray(len(jax.tree.leaves(arguments(batch, inputs))[0]))
        new = _Pooled(num, moments_of(batch))
        pooled = new if pooled is None else _merge(pooled, new)
    if pooled is None:
        raise ValueError("`batches` must hold at least one batch, got none: an iterator that is used up?")
    return pooled.moments


_NO_NORM = "{} must put BatchNorm into training mode, {}: no BatchNorm took the statistics of its batch."


@jax.jit
def _merge(a: _Pooled, b: _Pooled) -> _Pooled:
    """The moments of two sets of examples together (Chan et al., equation 1.5)."""
    # Pairwise, not by sums of squares: E[x²] − m² cancels where the mean is large beside the deviation.
    num = a.num + b.num
    share = b.num / num

    def pair(old: Any, new: Any) -> Any:
        (mean, var), (mean_, var_) = old, new
        shift, part = mean_ - mean, share.astype(mean.dtype)
        return mean + part * shift, (1 - part) * var + part * var_ + part * (1 - part) * shift**2

    moments = {path: pair(a.moments[path], b.moments[path]) for path in a.moments}
    return _Pooled(num, moments)


@functools.partial(jax.jit, static_argnums=0)
def _linen_moments(model: LinenModel, variables: Any, batch: Any, rngs: Any) -> Moments:
    """The moments of one batch at the input of every BatchNorm that is in training mode."""
    seen = set[str]()

    def forget(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        if isinstance(norm, linen.BatchNorm) and context.method_name == "__call__":
            object.__setattr__(norm, "momentum", 0.0)  # a call then leaves the batch's own moments
            if not _uses_running_average(norm, args, kwargs):
                seen.add("/".join(norm.path))
                _clear_linen(norm)
        return call(*args, **kwargs)

    # By intercepting calls, not by reading the module's fields: only a call tells which mode it is in.
    with linen.intercept_methods(forget):
        _, state = model.module.apply(
            variables,
            *arguments(batch, model.inputs),
            rngs=rngs,
            mutable=[name for name in variables if name != "params"],
            **dict(model.kwargs),
        )
    found = traverse_util.flatten_dict(core.unfreeze(state["batch_stats"]), sep="/")
    return {path: (found[_join(path, "mean")], found[_join(path, "var")]) for path in seen}


def _uses_running_average(norm: linen.BatchNorm, args: Any, kwargs: Any) -> bool:
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return bool(norm.use_running_average if given is None else given)


def _clear_linen(norm: linen.BatchNorm) -> None:
    for name in ("mean", "var"):  # 0 · NaN would keep a NaN of the old ones
        norm.put_variable("batch_stats", name, jnp.zeros_like(norm.get_variable("batch_stats", name)))


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nnx_moments(graphdef: Any, inputs: Inputs, kwargs: Any, state: Any, batch: Any) -> Moments:
    model = nnx.merge(graphdef, state)
    model(*arguments(batch, inputs), **dict(kwargs))
    return {path: (x.mean[...], x.var[...]) for path, x in _nnx_norms(model).items()}


def _nnx_active(run: Callable[[Any, Any], Moments], model: Any, batch: Any) -> dict[str, nnx.BatchNorm]:
    """The BatchNorms of which a call changes the variance, set to one that no batch has."""
    marked = nnx.clone(model, graph=True)
    for norm in _nnx_norms(marked).values():
        norm.var[...] = jnp.full_like(norm.var[...], _mark(norm))  # finite, so that 0 · mark is 0
    norms, found = _nnx_norms(model), run(nnx.state(marked, graph=True), batch)
    changed = jax.device_get({path: jnp.any(found[path][1] != _mark(x)) for path, x in norms.items()})
    return {path: norm for path, norm in norms.items() if changed[path]}


def _clear(norms: dict[str, nnx.BatchNorm]) -> None:
    for norm in norms.values():  # 0 · NaN would keep a NaN of the old ones
        norm.mean[...], norm.var[...] = jnp.zeros_like(norm.mean[...]), jnp.zeros_like(norm.var[...])


def _mark(norm: nnx.BatchNorm) -> Any:
    return jnp.finfo(norm.var[...].dtype).max


def _nnx_norms(model: Any) -> dict[str, nnx.BatchNorm]:
    nodes = nnx.iter_graph(model, graph=True)
    return {"/".join(map(str, path)): x for path, x in nodes if isinstance(x, nnx.BatchNorm)}
