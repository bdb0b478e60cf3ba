"""Mistakes: every argument of everything public, given what people give it, is refused by name."""

import contextlib
import inspect
import io
import re
import traceback

import calls
import jax
import jax.numpy as jnp
import optax
import pytest
from test_face import CALLED

import hessjax as hj

pytestmark = pytest.mark.usefixtures("untyped")


# They take modules made anew at other widths.
APART = {"hj.flax.linen_resized", "hj.flax.nnx_resized"}
NAMES = sorted(CALLED.keys() - APART)


def arguments_of(name, made):
    """`argument -> (right value, kind)`; a kind that ends in `?` takes None too."""
    given = {}
    for p in inspect.signature(CALLED[name]).parameters.values():
        argument = {"args": "x", "options": "callbacks"}.get(p.name, p.name)
        if p.kind is p.VAR_KEYWORD and p.name != "options":
            continue
        kind, optional = calls.KIND_OF.get(argument, (None, False))
        given[argument] = (
            calls.RIGHT.get(argument, p.default),
            kind and f"{kind}?" if optional or p.default is None else kind,
        )
    return {**given, **calls.INSTEAD.get(name, {}), **made.get(name, {})}


def wrong_for(kind):
    if kind is None:
        return []
    return [x for x in calls.WRONG[kind.rstrip("?")] if x is not None or not kind.endswith("?")]


def call(name, given):
    """With positional arguments in front of `*args`."""
    parameters = inspect.signature(CALLED[name]).parameters.values()
    given = {argument: value for argument, value in given.items() if value is not inspect.Parameter.empty}
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return calls.use(name, CALLED[name](**given))
    front = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    values = [given.pop(argument) for argument in front]
    return calls.use(name, CALLED[name](*values, given.pop("x"), **given))


def verdict(name, argument, given):
    """`clear`, or what is wrong with the answer."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            call(name, given)
        except Exception as error:
            return judged(error, "args" if argument == "x" else argument)
    return "silent"


def judged(error, argument):
    """Clear is: raised by the package, as what it is, with the argument's name."""
    # What `where` selects nothing of are the params.
    names = f"{argument}|where" if argument == "params" else argument
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame.filename for frame in frames]
    if not isinstance(error, (TypeError, ValueError)) or "/hessjax/" not in files[-1]:
        ours = ("use", "once", "trained")
        theirs = any(f.filename.endswith("/calls.py") and f.name not in ours for f in frames)
        return "clear" if theirs else f"obscure: {error!r:.200}"
    return "clear" if re.search(rf"`({names})\b", str(error)) else f"another name: {error!r:.200}"


@pytest.fixture(scope="module")
def made():
    hj.save_npz(calls.FOLDER, calls.PARAMS)
    return calls.results()


@pytest.mark.parametrize("name", NAMES)
def test_every_mistake_is_refused_by_name(name, made):
    arguments, unclear = arguments_of(name, made), []
    right = {argument: value for argument, (value, _) in arguments.items()}
    for argument, (_, kind) in arguments.items():
        for wrong in wrong_for(kind):
            answer = verdict(name, argument, {**right, argument: wrong})
            unclear += [] if answer == "clear" else [f"{argument}={wrong!r:.50}: {answer}"]
    assert not unclear, "\n".join(unclear)


RIGL, OBS = hj.saliencies.rigl(0.3), hj.saliencies.obs()
TWICE = hj.prune(optax.sgd(0.1), calls.MAGNITUDE, 0.5)
PAIRS = {
    "a prune inside a prune of the same leaves": (
        lambda: hj.prune(optax.chain(optax.clip(1.0), TWICE), calls.MAGNITUDE, 0.5).init(calls.PARAMS),
        "`inner` must not prune what the `prune` around it does, but both have a mask for kernel",
    ),
    "one shot by a rule of training": (
        lambda: hj.prune_once(calls.PARAMS, RIGL, 0.5),
        r"`saliency` must rank weights, but rigl\(.*\) drops and grows them",
    ),
    "and inside another rule": (
        lambda: hj.prune_once(calls.PARAMS, hj.saliencies.compensated(RIGL, OBS), 0.5),
        "`saliency` must rank weights",
    ),
    "moved by a rule of training": (
        lambda: hj.saliencies.compensated(calls.MAGNITUDE, hj.saliencies.rigl(0.3, score=OBS)),
        "`by` must rank weights",
    ),
    "grown twice": (lambda: hj.saliencies.rigl(0.3, score=RIGL), "`score` must rank weights"),
    "counters among what is selected": (
        lambda: hj.select({"w": calls.W, "step": jnp.arange(3)}, "*"),
        r"`where` must select real floating-point leaves of `params` only, got step: int32\[3\]",
    ),
    "a metric without a return": (
        lambda: hj.sensitivity(lambda params: None, calls.PARAMS, [0.5]),
        "`metric` must return a scalar or a dict of scalars, real numbers, got None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_what_does_not_go_together_is_refused_by_name(name):
    call, words = PAIRS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_two_prunes_of_leaves_apart_go_together():
    inner = hj.prune(optax.sgd(0.1), calls.MAGNITUDE, 0.5, where="a")
    both = {"a": jnp.arange(1.0, 5.0), "b": jnp.arange(1.0, 5.0)}
    mask = hj.mask_of(hj.prune(inner, calls.MAGNITUDE, 0.5, where="b").init(both))
    assert jax.tree.map(lambda m: int(m.sum()), mask) == {"a": 2, "b": 2}


A = [
    lambda **options: hj.hessian(calls.loss, calls.W, calls.X, **options),
    lambda **options: hj.ggn(calls.model, calls.out_loss, calls.W, calls.X, **options),
    lambda **options: hj.fisher(calls.model, calls.W, calls.X, likelihood=hj.likelihoods.gaussian, **options),
    lambda **options: hj.empirical_fisher(calls.loss, calls.W, calls.X, **options),
]


@pytest.mark.parametrize("make", A)
@pytest.mark.parametrize("linearize", [False, True])
def test_products_with_whole_numbers_are_refused(make, linearize):
    with pytest.raises(TypeError, match=r"`vector` must be floating point, got int32\[3\]"):
        make(linearize=linearize)(jnp.arange(3))


def test_they_are_many(made):
    kinds = [kind for name in NAMES for _, kind in arguments_of(name, made).values()]
    assert sum(len(wrong_for(kind)) for kind in kinds) > 3000
