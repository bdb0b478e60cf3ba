"""Mistakes: every argument of everything public, given what people give it, is refused by name."""

import contextlib
import inspect
import io
import re
import traceback

import calls
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


def test_they_are_many(made):
    kinds = [kind for name in NAMES for _, kind in arguments_of(name, made).values()]
    assert sum(len(wrong_for(kind)) for kind in kinds) > 3000
