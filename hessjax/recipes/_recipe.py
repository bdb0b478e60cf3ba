"""Recipes: who is pruned, how and when, from a YAML file of Distiller's structure."""

import functools
import os
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from hessjax._core import _files, _tree
from hessjax._core._messages import checked_count
from hessjax._core._types import Params, settings
from hessjax.pruning._ranking import Schedule
from hessjax.pruning.allocations._threshold import Threshold, threshold
from hessjax.pruning.saliencies._saliency import Saliency
from hessjax.pruning.training._prune import prune

_Place: TypeAlias = Callable[[tuple[Any, ...]], tuple[int, str]]


class Rule(NamedTuple):
    """One pruner of a recipe, as `prune` takes it; printed, its settings.

    Attributes:
        name: of the pruner in the file.
        place: its line and field there, as messages give it.
        saliency: what a weight is worth.
        sparsity: a number, a schedule, or a threshold.
        options: the keyword arguments of `prune`.
    """

    name: str
    place: str
    saliency: Saliency
    sparsity: float | Schedule | Threshold
    options: dict[str, Any]

    def prune(
        self, inner: optax.GradientTransformation | optax.MultiSteps
    ) -> optax.GradientTransformationExtraArgs:
        """Train with `inner` while this rule prunes."""
        return prune(inner, self.saliency, self.sparsity, **self.options)

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        return (
            f"{self.name} ({self.place}): {', '.join([repr(self.saliency), repr(self.sparsity), *options])}"
        )


class Recipe(NamedTuple):
    """What `load_recipe` returns.

    Attributes:
        path: of the file.
        rules: one per pruner, in the order of the policies.
    """

    path: str
    rules: tuple[Rule, ...]

    def prune(
        self, inner: optax.GradientTransformation | optax.MultiSteps
    ) -> optax.GradientTransformationExtraArgs:
        """Train with `inner` while pruning by this recipe: `hj.prune` round `inner` for every rule.

        Args:
            inner: any optimizer.

        Returns:
            `prune(prune(inner, first rule), second rule)` and so on. Its `init` raises a ValueError that
            names the line for a rule that matches no leaf or does not fit it, and for two rules of one leaf.
        """
        transformation: Any = functools.reduce(lambda within, rule: rule.prune(within), self.rules, inner)

        def init(params: Params) -> Any:
            _check_rules(self, params)
            return transformation.init(params)

        return optax.GradientTransformationExtraArgs(init, transformation.update)

    def __repr__(self) -> str:
        return "\n".join([f"Recipe of `{self.path}`:", *(f"  {rule!r}" for rule in self.rules)])


def load_recipe(path: str | os.PathLike[str], *, steps_per_epoch: int | None = None) -> Recipe:
    """Read who is pruned, how and when from a YAML file, and check all of it.

    The structure is Distiller's, the names are this library's: a `class` is a function of `hessjax`, its
    `args` are the arguments of that function. Distiller's own classes and fields are understood where they
    mean the same; what has no counterpart here is an error that names it.

    Arguments of every pruner: `where` (one glob, or a list); `axes` (words by glob); `final_sparsity`, and
    `initial_sparsity` (0); or `final_threshold`, `initial_threshold` (0) and `least`; `power` (3);
    `allocation`, `pattern` (one, or by glob over paths), `regrow`, `straight_through`. Where a function takes
    a key, the file gives a `seed`; a relative damping is `{relative: 0.01}`; optimizers (`sgd`, `adam`,
    `adamw`) and schedules (`linear_schedule`, `polynomial_schedule`, `cosine_decay_schedule`) are optax's.

    A policy says when: from its start t₀ to its end, n later, the target rises as

        s(t) = s_f + (s_i − s_f)(1 − (t − t₀)/n)^power,

    in mask steps `frequency` apart, and s_f is reached at the end whatever the frequency. All three count
    epochs (`starting_epoch`, `ending_epoch`: the beginning of an epoch, the first is 0), or all three steps
    (`starting_step`, `ending_step`). Every pruner has one policy, and no leaf two pruners.

    Args:
        path: of the file.
        steps_per_epoch: how many updates an epoch has; needed where a policy counts epochs.

    Returns:
        A `Recipe`; `.prune(inner)` is the optax transformation, the same to the last bit as if written in
        Python.

    Raises:
        ValueError: naming line and field, for all that cannot be.
        ImportError: without pydantic and PyYAML: `pip install 'hessjax[recipes]'`.

    Cost:
        None beyond `prune`.

    References:
        Zmora et al., Neural network Distiller (2019), arXiv 1910.12232: the structure of the file. Zhu and
        Gupta, To prune, or not to prune (2017), arXiv 1710.01878: the schedule.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp, optax, hessjax as hj
        >>> text = '''
        ... version: 1
        ... pruners:
        ...   layers:
        ...     class: magnitude
        ...     args: {where: "*/kernel", final_sparsity: 0.9, allocation: uniform}
        ... policies:
        ...   - pruner: {instance_name: layers}
        ...     starting_epoch: 1
        ...     ending_epoch: 5
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "recipe.yaml"
        ...     _ = file.write_text(text)
        ...     tx = hj.load_recipe(file, steps_per_epoch=100).prune(optax.adam(1e-3))
        >>> state = tx.init({"dense": {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}})
    """
    if steps_per_epoch is not None:
        steps_per_epoch = checked_count("steps_per_epoch", steps_per_epoch)
    name = os.fspath(_files.local_path("path", path))
    file, place = _read(name)
    wrong = [(*place(loc), reason) for loc, reason in _mismatches(file, steps_per_epoch)]
    if wrong:
        raise _refusal(name, wrong)
    rules = []
    for policy in file.policies:
        pruner = policy.pruner.instance_name
        here = place(("pruners", pruner, "args"))
        try:
            rules.append(_rule(pruner, _at(*here), file.pruners[pruner], policy, steps_per_epoch))
        except (TypeError, ValueError, OverflowError) as error:
            raise _refusal(name, [(*here, str(error))]) from error
    return Recipe(name, tuple(rules))


def _read(path: str) -> tuple[Any, _Place]:
    """The file, checked part by part, and what tells line and field of a location."""
    try:
        import pydantic

        from hessjax.recipes import _distiller, _models, _yaml
    except ImportError as error:
        raise ImportError(
            "`load_recipe` needs pydantic and PyYAML: pip install 'hessjax[recipes]'."
        ) from error
    try:
        content, node = _yaml.load_yaml(Path(path).read_bytes())
    except _yaml.YamlError as error:
        raise _refusal(path, [(error.line, error.field, error.reason)]) from error
    translation = _distiller.translated(content)

    def place(location: tuple[Any, ...]) -> tuple[int, str]:
        return _yaml.find_in_yaml(node, translation.in_file(location))

    # By location in the file: what is translated has its reasons from there.
    wrong = [(*_yaml.find_in_yaml(node, location), reason) for location, reason in translation.wrong]
    try:
        file = _models.RecipeFile.model_validate(translation.content)
    except pydantic.ValidationError as error:
        # Nothing is missing where all that there was has no counterpart.
        told = [each for each in error.errors() if not (wrong and each["type"] == "too_short")]
        wrong += [(*place(each["loc"]), _reason(each)) for each in told]
    if wrong:
        raise _refusal(path, wrong)
    return file, place


def _rule(name: str, place: str, pruner: Any, policy: Any, steps_per_epoch: int | None) -> Rule:
    from hessjax.recipes._kinds import build

    unit = (steps_per_epoch or 1) if policy.in_epochs else 1
    start, stop = (t * unit for t in policy.span)
    if max(stop, policy.frequency * unit) >= 2**31:
        raise ValueError(f"a policy must end before step 2³¹, got {max(stop, policy.frequency * unit)}")
    args, who = pruner.args, pruner.args.model_fields_set
    # Only what the file gives: the defaults are those of `prune`, in one place.
    options = {k: build(getattr(args, k)) for k in _OPTIONS if k in who}
    options |= {"every": policy.frequency * unit, "start": start, "stop": stop}
    if args.final_threshold is None:
        target = _risen(args.initial_sparsity, args.final_sparsity, args.power, start, stop)
    else:
        level = _risen(args.initial_threshold, args.final_threshold, args.power, start, stop)
        target = threshold(level, least=args.least)
    rule = Rule(name, place, build(pruner, stop), target, options)
    rule.prune(optax.identity())  # to hear now what it has against its arguments
    return rule


_OPTIONS = ("where", "axes", "allocation", "pattern", "regrow", "straight_through")


@settings()
class _Rise:
    """s_f + (s_i − s_f)(1 − (t − t₀)/n)^power, as a schedule that can be printed."""

    initial: float
    final: float
    power: float
    start: int
    stop: int

    def __call__(self, step: Any) -> Any:
        """The target at T = `step`."""
        n = self.stop - self.start
        return optax.polynomial_schedule(self.initial, self.final, self.power, n, self.start)(step)

    def __repr__(self) -> str:
        return f"{self.initial:g} to {self.final:g} (power {self.power:g})"


def _risen(initial: float, final: float, power: float, start: int, stop: int) -> Any:
    """A schedule; its end alone where there is no time to rise."""
    # optax takes no transition steps for a schedule that stays at its initial value.
    return final if stop == start else _Rise(initial, final, power, start, stop)


# -- errors ----------------------------------------------------------------------------------------


def _mismatches(file: Any, steps_per_epoch: int | None) -> Iterator[tuple[tuple[Any, ...], str]]:
    """What each part alone cannot see, as location and reason."""
    seen: set[str] = set()
    for index, policy in enumerate(file.policies):
        name = policy.pruner.instance_name
        here = ("policies", index, "pruner", "instance_name")
        if name not in file.pruners:
            yield here, f"must be one of the pruners {', '.join(file.pruners)}, got {name}"
        elif name in seen:
            yield here, f"{name} has a policy already: name a second pruner, with leaves of its own"
        seen.add(name)
        if policy.in_epochs and steps_per_epoch is None:
            yield (
                ("policies", index, "starting_epoch"),
                "counts epochs: pass `steps_per_epoch` to `load_recipe`",
            )
    for name in sorted(file.pruners.keys() - seen):
        yield ("pruners", name), "has no policy that says when"


def _reason(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "union_tag_invalid":
        return f"there is no class `{context['tag']}`, only {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return "must have a `class`"
    if kind == "extra_forbidden":
        return f"there is no `{error['loc'][-1]}` here"
    if kind == "missing":
        return f"`{error['loc'][-1]}` is missing"
    if kind == "value_error":
        return str(context["error"])
    message = error["msg"].replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]}, got {reprlib.repr(error['input'])}"


def _at(line: int, field: str) -> str:
    return f"line {line}, {field}" if field else f"line {line}"


def _refusal(path: str, wrong: list[tuple[int, str, str]]) -> ValueError:
    """One message for all that is wrong; where no branch of a choice fits, the first branch's reason."""
    first = {_at(line, field): reason for line, field, reason in reversed(wrong)}
    lines = [f"  {place}: {reason}" for place, reason in reversed(first.items())]
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return ValueError(f"`{path}` must be a recipe, but\n" + "\n".join(lines[:_SHOWN] + more))


_SHOWN = 20
"""Lines of a message: a file of another kind may be wrong everywhere."""


def _check_rules(recipe: Recipe, params: Params) -> None:
    """Every rule by itself on the shapes of the params, and no leaf under two."""
    claimed: dict[str, Rule] = {}
    for rule in recipe.rules:
        try:
            # By shapes, and without `inner`: whether a rule fits does not depend on it.
            state = jax.eval_shape(rule.prune(optax.identity()).init, params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{recipe.path}`, {rule.place}: {error}") from error
        for path in _tree.leaf_paths(state.mask):
            if path in claimed:
                raise ValueError(
                    f"`{recipe.path}`, {rule.place}: {path} is pruned by {claimed[path].name} already "
                    f"({claimed[path].place}): narrow one `where`."
                )
            claimed[path] = rule
