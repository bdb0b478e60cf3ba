"""The trace, in all and by leaf, layer or group of leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax

from hessjax._core import _tree
from hessjax._core._axes import Axes
from hessjax._core._layout import tree_axes
from hessjax._core._messages import checked_count, checked_flag, checked_function, checked_instance, shown
from hessjax._core._results import Estimate, by_shapes, counted, is_known, is_single
from hessjax._core._tables import Column, Row, Table, number, printable
from hessjax._core._types import BatchMatvec, Key, Matvec, Params, Tolerance, Where, readable_defaults
from hessjax._core._where import match
from hessjax._core._words import AxisWords
from hessjax._run._arguments import RunOptions, checked_options
from hessjax._run._drivers import run
from hessjax._run._estimator import Estimator
from hessjax.estimators import _samples
from hessjax.estimators._hutchinson import hutchinson, hutchinson_by_leaf
from hessjax.estimators.probes import Probe, rademacher


@printable
class TraceByLeaf(NamedTuple):
    """The trace and its parts.

    Attributes:
        total: the trace of the whole matrix.
        leaves: by path, the trace of each leaf's diagonal block, or of each layer's that it stacks; these sum
            to the total.
        groups: by name, the trace of the diagonal blocks of all leaves of a group.
    """

    total: Estimate
    leaves: dict[str, Estimate]
    groups: dict[str, Estimate] = {}  # noqa: RUF012 - never written to

    def _table(self) -> Table | str:
        if not (is_known(self) and is_single(self.total.num_samples)):
            return by_shapes(self)
        traces = {**self.leaves, **self.groups, "total": self.total}
        whole, has_data = float(self.total.mean), self.total.data_stderr is not None
        heads = [Column("Leaf", "name"), Column("Trace"), Column("± probes")]
        heads += [Column("± data", rank=2)] * has_data + [Column("Share %", rank=1)]
        rows = [Row((name, *_cells(x, whole, has_data))) for name, x in traces.items()]
        note = f"{counted(self.total.num_samples, 'sample')}."
        return Table(tuple(heads), (*rows[:-1], rows[-1]._replace(style="bold")), notes=(note,))


def _cells(trace: Estimate, whole: float, has_data: bool) -> tuple[str, ...]:
    share = f"{100 * float(trace.mean) / whole:.1f}" if whole else ""
    data = [number(trace.data_stderr, 2)] * has_data
    return f"{float(trace.mean):.5g}", number(trace.stderr, 2), *data, share


@readable_defaults
def trace(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    estimator: Callable[[int], Estimator] | None = None,
    **options: Unpack[RunOptions],
) -> Estimate:
    """The trace of a matvec, with its standard error.

    By Hutchinson's estimator, unless another is asked for. Where the eigenvalues decay `xtrace` needs far
    fewer products and `hutchpp` fewer; on flat spectra they need up to three times as many.

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: the most products to make; with Hutchinson's estimator each is a sample.
        tol: stop when the standard error is at most this: absolute, or `relative` to the trace. A run takes
            20 samples before it stops.
        probe: see `hutchinson`.
        estimator: makes another estimator from the number of products: `hj.estimators.xtrace`,
            `hj.estimators.hutchpp`.
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        `Estimate(mean, stderr, num_samples)`, in loss per squared parameter; with `data_stderr` for a matvec
        `over_batches`, if Hutchinson's.

    Raises:
        ValueError: `num_probes` below 1; both `probe` and `estimator` given.
        NonFiniteProductError: see `run`.

    Cost:
        At most `num_probes` products; memory 3·d, or the other estimator's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))
        >>> float(hj.trace(A, jax.random.key(0), jnp.zeros(10)).mean)  # exact: A is diagonal
        55.0
        >>> round(float(hj.trace(A, jax.random.key(0), jnp.zeros(10), 20,
        ...                                                      estimator=hj.estimators.xtrace).mean), 3)
        55.0
    """
    checked = checked_options("trace", options)
    _tree.check_floating(like, "like")
    if estimator is None and isinstance(matvec, BatchMatvec):
        return trace_by_leaf(matvec, key, like, num_probes, tol=tol, probe=probe, **checked).total
    num_probes = checked_count("num_probes", num_probes)
    if estimator is not None and probe is not rademacher:
        raise ValueError(
            "`probe` must be left out with `estimator`: where the estimator takes one, bind it, as in "
            "`functools.partial(hj.estimators.hutchpp, probe=hj.probes.gaussian)`."
        )
    method = hutchinson(probe) if estimator is None else _made(estimator, num_probes)
    result = run(method, matvec, key, like, max_matvecs=num_probes, tol=tol, **checked)[0]
    if not isinstance(result, Estimate):
        raise TypeError(
            "`estimator(num_probes)` must be one of traces, whose result is an `Estimate`, such as "
            f"`hessjax.estimators.xtrace`, got one with {type(result).__name__}."
        )
    return result


def _made(estimator: Any, num_probes: int) -> Estimator:
    checked_function("estimator", estimator, "(num_probes) -> Estimator`, such as `hessjax.estimators.xtrace")
    return checked_instance("estimator(num_probes)", estimator(num_probes), Estimator, "xtrace(100)")


@readable_defaults
def trace_by_leaf(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 100,
    *,
    groups: Mapping[str, Where] | None = None,
    tol: Tolerance | None = None,
    probe: Probe = rademacher,
    axes: AxisWords | None = None,
    by_layer: bool = False,
    **options: Unpack[RunOptions],
) -> TraceByLeaf:
    """The trace of every leaf's diagonal block, and of groups of leaves, for the price of the total's.

    Args:
        matvec: the symmetric linear map.
        key: random key.
        like: pytree like the vectors; usually the params.
        num_probes: the most samples to take, one product each.
        groups: a name for each group of leaves and which they are: `{"encoder": "enc/*", "biases":
            ["*/bias", "*/scale"]}`, `(path, leaf) -> bool`, or a tree of booleans. Groups may overlap and
            need not cover everything.
        tol: stop when the total's standard error is at most this, see `trace`.
        probe: see `hutchinson`.
        axes: what the axes of leaves mean, where names and shapes do not tell, as in `prune`.
        by_layer: one trace for every layer that a leaf stacks, as under `nn.scan`, in place of one for all of
            them: `blocks/Dense_0/kernel[0]`, ...; without `data_stderr`.
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        `TraceByLeaf(total, leaves, groups)`, `leaves` by path, `groups` by name. The standard error of a
        group is its own: leaves vary together, so theirs do not add up to it. For a matvec `over_batches`,
        `data_stderr` says how far each would move on other data of this size, if the batches come in the same
        order every time.

    Raises:
        ValueError: `num_probes` below 1; a group that matches no leaf; `axes` does not fit.
        NonFiniteProductError: see `run`.

    Cost:
        As `trace`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "kernel": 3 * v["kernel"]})
        >>> like = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
        >>> parts = hj.trace_by_leaf(A, jax.random.key(0), like, num_probes=2, groups={"both": ["b*", "k*"]})
        >>> {path: float(part.mean) for path, part in parts.leaves.items()}
        {'bias': 4.0, 'kernel': 12.0}
        >>> float(parts.groups["both"].mean)
        16.0
    """
    checked = checked_options("trace_by_leaf", options)
    checked_flag("by_layer", by_layer)
    num_probes = checked_count("num_probes", num_probes)
    _tree.check_floating(like, "like")
    paths = _tree.unique_paths(like, "like")
    groups = {} if groups is None else _checked_groups(groups)
    members = tuple(_members(like, name, where) for name, where in groups.items())
    # The batches of every product are listened to: they say how far other data would move the result.
    watched = _samples.Watched(matvec) if isinstance(matvec, BatchMatvec) else None
    found = tree_axes(like, axes)
    stacks = tuple(x.stack for x in found) if by_layer else ()
    method = hutchinson_by_leaf(probe, members, stacks if any(stacks) else ())
    estimate, _ = run(method, watched or matvec, key, like, max_matvecs=num_probes, tol=tol, **checked)
    number = 1 + len(paths) + len(members)  # behind those stand the layers
    data = None
    if watched:
        forms = watched.forms(estimate.num_samples)
        data = _samples.sampling_errors(forms, members)
    whole = Estimate(estimate.mean[:number], estimate.stderr[:number], estimate.num_samples, data)
    total, *parts = _samples.one_by_one(whole)
    leaves, of_groups = dict(zip(paths, parts, strict=False)), parts[len(paths) :]
    if any(stacks):
        layers = Estimate(estimate.mean[number:], estimate.stderr[number:], estimate.num_samples)
        leaves = _by_layer(leaves, found, _samples.one_by_one(layers))
    return TraceByLeaf(total, leaves, dict(zip(groups, of_groups, strict=True)))


def _by_layer(
    leaves: dict[str, Estimate], axes: Sequence[Axes], layers: list[Estimate]
) -> dict[str, Estimate]:
    """The layers in the place of the leaves that stack them."""
    rest = iter(layers)
    return {
        name: next(rest) if found.stack else leaves[found.path]
        for found in axes
        for name in found.layer_names()
    }


def _checked_groups(groups: Any) -> Mapping[str, Where]:
    if not isinstance(groups, Mapping):
        raise TypeError(f"`groups` must be a mapping `name -> where`, got {shown(groups)}.")
    return groups


def _members(like: Params, name: str, where: Where) -> tuple[int, ...]:
    """The indices of the leaves of a group."""
    flags = jax.tree.leaves(match(like, where, f'groups["{name}"]'))
    return tuple(i for i, flag in enumerate(flags) if flag)
