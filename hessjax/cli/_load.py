"""A problem by name: `my_module:problem`, or a file, `path/to/problem.py:problem`."""

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hessjax._report._problem import Problem, checked_problem

TOUR = "tour"
"""What stands for the network of the tour."""


@contextlib.contextmanager
def alone(json: bool) -> Iterator[None]:
    """Beside JSON, what the functions of a problem print goes where errors go."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


class LoadError(ValueError):
    """The problem cannot be had; says why."""


def load_problem(target: str) -> Problem:
    """What `target` names, called where it is a function.

    Args:
        target: a module, or a file that ends in `.py`, and after a colon the name in it; `problem` if none
            is given. `tour` is the network of the tour.

    Raises:
        LoadError: there is no such module or name, or it raises.
        ProblemError: what it returns is no problem; names the field.
    """
    if target == TOUR:
        target = "hessjax.cli._tour:problem"
    place, _, name = target.rpartition(":") if ":" in target else (target, "", "problem")
    if not place or not name:
        raise LoadError(f"`{target}` must be of the form `my_module:problem`, or `problem.py:problem`.")
    module = _module(place, target)
    try:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        there = ", ".join(
            sorted(x for x, value in vars(module).items() if x[0] != "_" and callable(value))[:6]
        )
        raise LoadError(f"`{place}` has no `{name}`; it has {there or 'no functions'}.") from None
    return checked_problem(_called(found, target) if callable(found) else found)


def _module(place: str, target: str) -> ModuleType:
    path = Path(place).expanduser()
    if path.suffix == ".py":
        return _from_file(path, target)
    # As `python -m` does: modules beside where one is.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise LoadError(f"there is no module `{place}` here or among what is installed.") from error
        raise _raised(error, f"importing `{place}`") from error
    except Exception as error:
        raise _raised(error, f"importing `{place}`") from error


def _from_file(path: Path, target: str) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"there is no file `{path}`; `hessjax init` writes one to start from.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))  # what stands beside it can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _raised(error, f"running `{path}`") from error
    return module


def _called(found: Any, target: str) -> Any:
    try:
        return found()
    except Exception as error:
        raise _raised(error, f"`{target}`") from error


def _raised(error: BaseException, doing: str) -> LoadError:
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = "" if last is None else f" (line {last.lineno} of {last.filename})"
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return LoadError(f"{doing} raised {told}{place}")
