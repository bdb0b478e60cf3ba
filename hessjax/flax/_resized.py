"""Flax modules at the widths of smaller params: linen and nnx, layer by layer, or an error that names one."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import errors, linen, nnx

from hessjax._core import _tree
from hessjax._core._messages import shown
from hessjax.flax._linen import check_module


class Width(NamedTuple):
    """A field of a layer that is another at the smaller widths.

    Attributes:
        layer: the layer's path.
        field: the field's name: `features`, `num_heads`, ...
        before: what the module says.
        after: what its params say.
    """

    layer: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.layer}: {self.field} {self.before} -> {self.after}"


# -- linen ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinenResized:
    """A linen module of which every layer takes its width from its params; it is called by `apply`.

    Attributes:
        module: the module at its full widths.
        widths: what is another, layer by layer: to write the module anew by.
    """

    module: Any
    widths: tuple[Width, ...] = field(default=(), compare=False)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`module.apply` at the widths of the variables: training mode, mutable collections, keys and all."""
        with _refusals(), linen.intercept_methods(functools.partial(_resize, [])):
            return self.module.apply(variables, *args, **kwargs)


def linen_resized(module: Any, variables: Any, *args: Any, **kwargs: Any) -> LinenResized:
    """A linen module at the widths of smaller variables, such as `hessjax.compact` leaves.

    Its layers (`Dense`, `Conv`, `Embed`, attention, recurrent cells, and any other with `features` and a
    `kernel`) take their number of features, heads or groups from the params instead of from the code around
    them. All else is the module's own: BatchNorm, dropout, derivative rules, any batch size. Compare the
    two once: `small.check(linen_model(narrow), ...)`.

    Args:
        module: a `flax.linen.Module`.
        variables: the smaller variables, `{"params": ..., "batch_stats": ...}`.
        *args: an example of its inputs.
        **kwargs: of `module.apply`, such as `train=False`.

    Returns:
        What has an `apply` like the module's, for `TrainState`, `linen_loss`, `linen_model`,
        `linen_recalibrate`; and `widths`, which tells what to change in the module's code instead.

    Raises:
        TypeError: if `module` is no linen module, or `variables` no mapping of collections.
        ValueError: if a layer's params are of another shape than its code allows: it is named.

    Cost:
        One trace here; nothing is compiled. Nothing but tracing at a call.

    Example:
        >>> import jax, jax.numpy as jnp, hessjax as hj
        >>> from flax import linen as nn
        >>> from hessjax.flax import linen_resized
        >>> x, net = jnp.ones((2, 3)), nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
        >>> variables = net.init(jax.random.key(0), x)
        >>> kernel = variables["params"]["layers_2"]["kernel"].at[1].set(0)
        >>> variables["params"]["layers_2"]["kernel"] = kernel
        >>> small = hj.compact(net.apply, variables, x)
        >>> narrow = linen_resized(net, small.params, x)
        >>> print(*narrow.widths)
        layers_0: features 4 -> 3
        >>> narrow.apply(small.params, jnp.ones((8, 3))).shape
        (8, 1)
    """
    check_module(module)
    _check_variables(variables)
    found: list[Width] = []
    with _refusals(), linen.intercept_methods(functools.partial(_resize, found)):
        jax.eval_shape(functools.partial(module.apply, **kwargs), variables, *args)
    return LinenResized(module, tuple(dict.fromkeys(found)))


def _check_variables(variables: Any) -> None:
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            '`variables` must be a mapping of collections, `{"params": small.params}` or, of variables that '
            f"were made smaller as a whole, `small.params`, got {shown(variables)}."
        )


def _resize(found: list[Width], call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Set the fields of a layer by its params, just before it is called."""
    for module in (context.module, getattr(context.module, "cell", None)):  # `nn.RNN` asks its cell's width
        if isinstance(module, linen.Module) and module.scope is not None:
            for name, new in _linen_fields(module, args).items():
                old = getattr(module, name)
                if old != new:
                    found.append(Width("/".join(module.path) or type(module).__name__, name, old, new))
                    object.__setattr__(module, name, new)
    return call(*args, **kwargs)


def _linen_fields(module: Any, args: Any) -> dict[str, Any]:
    params = module.variables.get("params", {})
    if isinstance(module, linen.Embed) and "embedding" in params:
        return dict(zip(("num_embeddings", "features"), params["embedding"].shape, strict=True))
    if isinstance(module, linen.RNNCellBase):
        # The recurrent kernels read the state: their inputs are as many as it has.
        inner = [x["kernel"].shape[-2] for name, x in params.items() if name[0] == "h" and "kernel" in x]
        return {"features": inner[0]} if inner else {}
    if "kernel" not in params or not hasattr(module, "features"):
        return {}
    shape = params["kernel"].shape
    if isinstance(module, linen.ConvTranspose):
        return {"features": shape[-2 if module.transpose_kernel else -1]}
    if isinstance(module.features, int):
        fields = {"features": shape[-1]}
        if getattr(module, "feature_group_count", 1) > 1 and args:
            fields["feature_group_count"] = args[0].shape[-1] // shape[-2]
        return fields
    return {"features": tuple(shape[-len(module.features) :])}


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except errors.ScopeParamShapeError as error:
        raise ValueError(
            "`variables` must be of shapes that the module's layers can take, but the code of one fixes it: "
            f"{error} Write this layer's width into the module."
        ) from error


# -- nnx ------------------------------------------------------------------------------------------


def nnx_resized(model: Any, *trees: Any) -> Any:
    """An nnx model with smaller arrays, such as `hessjax.compact` leaves, and its layers' sizes set to match.

    Compare the two once: `small.check` of the new model's function.

    Args:
        model: an `nnx.Module` at the full widths; it is left as it is.
        *trees: the smaller arrays, as the nested dicts of `nnx_model` or as `nnx.State`s: params, batch
            statistics.

    Returns:
        A model of the same class with these arrays, for any batch size, that trains on as any other.

    Raises:
        ValueError: if a tree has what the model lacks or an array of another number of axes; or a layer of a
            kind that is not known here holds a size of an axis that became shorter: it is named.

    Cost:
        None; the arrays are not copied.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> from flax import nnx
        >>> from hessjax.flax import nnx_model, nnx_resized
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 1, rngs=rngs))
        >>> model_fn, params, state = nnx_model(net)
        >>> params["layers"][2]["kernel"] = params["layers"][2]["kernel"].at[1].set(0)
        >>> small = hj.compact(model_fn, params, jnp.ones((2, 3)))
        >>> narrow = nnx_resized(net, small.params)
        >>> narrow.layers[0].out_features, narrow(jnp.ones((8, 3))).shape
        (3, (8, 1))
    """
    copy = nnx.clone(model, graph=True)
    before = _shapes(nnx.state(copy, graph=True))
    for tree in trees:
        _check_fits(before, tree)
        nnx.update(copy, tree)
    for path, node in nnx.iter_graph(copy, graph=True):
        if isinstance(node, nnx.Module):
            _set_sizes("/".join(map(str, path)), node, before)
    return copy


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    pure = nnx.to_pure_dict(state)
    pairs = zip(_tree.leaf_paths(pure), jax.tree.leaves(pure), strict=True)
    return {path: np.shape(x) for path, x in pairs}


def _check_fits(before: dict[str, tuple[int, ...]], tree: Any) -> None:
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    for path, leaf in zip(_tree.leaf_paths(pure), jax.tree.leaves(pure), strict=True):
        if path not in before or len(before[path]) != np.ndim(leaf):
            want = before.get(path, "no such array")
            raise ValueError(
                f"`trees` must be parts of the model's arrays, but {path} has {np.shape(leaf)}, the "
                f"model {want}."
            )


def _set_sizes(path: str, node: Any, before: dict[str, tuple[int, ...]]) -> None:
    for kind, sizes_of in _NNX_SIZES.items():
        if isinstance(node, kind):
            for name, size in sizes_of(path, node).items():
                setattr(node, name, size)
            return
    own = {name: x for name, x in vars(node).items() if isinstance(x, nnx.Variable)}
    for name, variable in own.items():
        full = before.get(f"{path}/{name}" if path else name, ())
        gone = {old for old, new in zip(full, np.shape(variable[...]), strict=False) if old != new}
        held = [key for key, value in vars(node).items() if isinstance(value, int) and value in gone]
        if held:
            raise ValueError(
                f"`model` must be of layers whose sizes are known, but {path or type(node).__name__} "
                f"({type(node).__name__}) holds `{held[0]}` = {getattr(node, held[0])}, the old size of an "
                f"axis of `{name}`. Build it anew at {np.shape(variable[...])}."
            )


Sizes: TypeAlias = Callable[[str, Any], dict[str, Any]]


def _linear(path: str, node: Any) -> dict[str, Any]:
    inputs, outputs = node.kernel[...].shape
    return {"in_features": inputs, "out_features": outputs}


def _linear_general(path: str, node: Any) -> dict[str, Any]:
    shape, num_out = node.kernel[...].shape, len(_as_tuple(node.out_features))
    num_in = len(_as_tuple(node.in_features))
    return {
        "in_features": shape[len(shape) - num_out - num_in : len(shape) - num_out],
        "out_features": shape[len(shape) - num_out :],
    }


def _as_tuple(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _conv(path: str, node: Any) -> dict[str, Any]:
    shape, groups = node.kernel[...].shape, node.feature_group_count
    if groups > 1 and shape[-2] == node.kernel_shape[-2]:  # if anything went, then whole groups
        groups, rest = divmod(shape[-1] * groups, node.kernel_shape[-1])
        if rest:
            raise ValueError(
                f"`trees` must leave whole groups of channels, got a kernel of {shape} for {path}."
            )
    sizes = {"kernel_shape": shape, "in_features": shape[-2] * groups, "out_features": shape[-1]}
    return {**sizes, "feature_group_count": groups}


def _conv_transpose(path: str, node: Any) -> dict[str, Any]:
    shape = node.kernel[...].shape
    outputs, inputs = shape[-2:] if node.transpose_kernel else shape[:-3:-1]
    return {"kernel_shape": shape, "in_features": inputs, "out_features": outputs}


def _embed(path: str, node: Any) -> dict[str, Any]:
    number, features = node.embedding[...].shape
    return {"num_embeddings": number, "features": features}


def _norm(path: str, node: Any) -> dict[str, Any]:
    arrays = [x for x in (getattr(node, name, None) for name in ("scale", "bias", "mean")) if x is not None]
    return {"num_features": arrays[0][...].size} if arrays else {}


def _attention(path: str, node: Any) -> dict[str, Any]:
    inputs, heads, width = node.query.kernel[...].shape
    sizes = {"in_features": inputs, "num_heads": heads, "head_dim": width, "qkv_features": heads * width}
    kv_inputs, kv_heads, _ = node.key.kernel[...].shape
    kv = {"in_kv_features": kv_inputs, "num_kv_heads": kv_heads}
    sizes |= {name: size for name, size in kv.items() if hasattr(node, name)}
    return {**sizes, "out_features": node.out.kernel[...].shape[-1]}


def _cell(path: str, node: Any) -> dict[str, Any]:
    hidden = next(x for x in (getattr(node, n, None) for n in ("dense_h", "hi")) if x is not None)
    inputs = next(x for x in (getattr(node, n, None) for n in ("dense_i", "ii")) if x is not None)
    return {"hidden_features": hidden.kernel[...].shape[0], "in_features": inputs.kernel[...].shape[0]}


_NNX_SIZES: dict[Any, Sizes] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    nnx.Embed: _embed,
    (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm): _norm,
    nnx.MultiHeadAttention: _attention,
    (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell): _cell,
}
