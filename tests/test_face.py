"""The public face: the names of the design, each in one place, each documented where it stands."""

import inspect
import pathlib
import pydoc
import re
import subprocess
import sys
from types import ModuleType

import pytest

import hessjax as hj
from hessjax import flax, plot

pytestmark = pytest.mark.smoke

VERBS = """
    hessian hvp ggn fisher empirical_fisher per_example_grads empirical_fisher_roots
    ggn_roots sampled_grads over_batches batches select weighted_sum preconditioned adam_preconditioner
    eigenpairs trace trace_by_leaf diagonal frobenius_norm spectral_density spectral_density_by_leaf spectrum
    solve inverse_fisher landscape check influence self_influence report
    prune prune_once mask_of summary sensitivity compact to_sparse save_npz load_npz load_recipe distillation
    run memory_estimate relative progress_bar checkpoint
"""
NAMESPACES = {
    "estimators": """Estimator lanczos power_iteration hutchinson hutchinson_by_leaf hutchpp xtrace
        hutchinson_diagonal hutchinson_frobenius slq conjugate_gradient minres""",
    "layers": "coverage capture moments kfac ekfac quality reconstruct",
    "probes": "rademacher gaussian",
    "likelihoods": "Likelihood categorical gaussian",
    "directions": "random line",
    "dynamics": """noise_scale noise_scale_from_norms critical_batch_size directional_sharpness
        critical_sharpness heterogeneity""",
    "saliencies": """Saliency magnitude random gradient movement soft_movement hard_concrete obd obs
        wood_taylor static sparse_evolution rigl compensated from_magnitudes wanda obc sparsegpt""",
    "patterns": "Pattern unstructured n_of_m blocks channels filters rows heads",
    "allocations": "Allocation global_threshold uniform erdos_renyi explicit by_curvature threshold",
}
FOLDERS = {**{name: getattr(hj, name) for name in NAMESPACES}, "flax": flax, "plot": plot}


def shown(namespace):
    """What tab completion offers, namespaces within it apart."""
    names = {name: getattr(namespace, name) for name in dir(namespace) if not name.startswith("_")}
    return {name: value for name, value in names.items() if not isinstance(value, ModuleType)}


EVERYTHING = {
    **{f"hj.{name}": value for name, value in shown(hj).items()},
    **{f"hj.{folder}.{name}": x for folder, module in FOLDERS.items() for name, x in shown(module).items()},
}
NOUNS = [name for name in EVERYTHING if name.split(".")[-1][0].isupper()]
CALLED = {name: x for name, x in EVERYTHING.items() if callable(x) and name not in NOUNS}


def test_verbs_and_results_stand_on_top():
    names = shown(hj)
    assert {name for name in names if name[0].islower()} == set(VERBS.split())
    assert all(inspect.isclass(value) for name, value in names.items() if not name[0].islower())
    assert re.fullmatch(r"\d+\.\d+\.\d+", hj.__version__)


def test_optional_namespaces_come_when_asked_for():
    code = """if True:
        import sys, hessjax as hj
        assert {"flax", "plot"} <= {*dir(hj)}
        assert not {"matplotlib", "flax"} & {*sys.modules}
        assert hj.plot.density and hj.flax.linen_loss
        hj.nothing
    """
    root = pathlib.Path(hj.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stderr.strip().endswith("AttributeError: module 'hessjax' has no attribute 'nothing'")


@pytest.mark.parametrize("name", NAMESPACES)
def test_families_stand_in_namespaces(name):
    names, wanted = set(shown(getattr(hj, name))), set(NAMESPACES[name].split())
    assert wanted <= names
    assert all(extra[0].isupper() for extra in names - wanted)  # types of a contract, such as its context


def test_no_package_that_holds_the_code_is_shown():
    modules = {name for name in dir(hj) if isinstance(getattr(hj, name), ModuleType)}
    where_imported = {"flax", "plot", "cli"}
    assert modules - where_imported == set(NAMESPACES)


def test_a_name_is_public_in_one_place():
    places = {}
    for name, value in EVERYTHING.items():
        places.setdefault(id(value), []).append(name)
    assert not [names for names in places.values() if len(names) > 1]


def test_no_module_has_the_name_of_a_function_beside_it():
    root = pathlib.Path(hj.__file__).parent
    for folder, module in {".": hj, **FOLDERS}.items():
        inside = pathlib.Path(module.__file__).parent if hasattr(module, "__path__") else root / "none"
        modules = {path.stem for path in inside.glob("*") if path.is_dir() or path.suffix == ".py"}
        assert not modules & {name for name, x in shown(module).items() if callable(x)}, folder


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_says_what_it_takes_gives_and_costs(name):
    value = CALLED[name]
    text, parameters = inspect.getdoc(value) or "", inspect.signature(value).parameters
    assert re.match(r".{10,110}[.:](\n\n|$)", text) or "\n\n" in text, "one plain line first"
    short_for = re.search(r"`\w+(\(.*?\))?`", text.split("\n\n")[0])  # `filters()` is `channels(-1)`
    assert ("Example:" in text and ">>> " in text) or short_for
    assert "Args:" in text or not any(p.default is p.empty for p in parameters.values()) or short_for
    assert "Returns:" in text or inspect.isclass(value)
    if {"matvec", "params", "grads"} & set(parameters):
        assert "Cost:" in text


def says_what_it_holds(value):
    """Results list their attributes; a class to inherit from says what each of its methods is."""
    text, members = inspect.getdoc(value) or "", {k: x for k, x in vars(value).items() if k[0] != "_"}
    by_method = "of your own" in text and all(inspect.getdoc(member) for member in members.values())
    return "Attributes:" in text or by_method


def test_types_say_what_they_hold():
    classes = {name: EVERYTHING[name] for name in NOUNS if inspect.isclass(EVERYTHING[name])}
    assert not [name for name, value in classes.items() if not says_what_it_holds(value)]


@pytest.mark.parametrize("name", CALLED)
def test_defaults_can_be_read(name):
    defaults = [p.default for p in inspect.signature(CALLED[name]).parameters.values()]
    settings = [repr(x) for x in defaults if not (inspect.isclass(x) or inspect.isfunction(x))]
    assert not [text for text in settings if re.search(r" at 0x|\bobject\b", text) or len(text) > 60]


def test_help_shows_defaults_by_name():
    shown = {name: pydoc.plain(pydoc.render_doc(thing)) for name, thing in callables().items()}
    assert [name for name, text in shown.items() if " at 0x" in text.split("\n |  Methods")[0]] == []
    assert "probe: " in shown["trace"]
    assert "= rademacher" in shown["trace"]
    # What reads signatures still gets the functions themselves.
    assert inspect.signature(hj.trace).parameters["probe"].default is hj.probes.rademacher


def callables():
    """Everything public that can be called, by name."""
    # The command's own package is there too once another test has imported it.
    spaces = {"": hj, **{f"{k}.": x for k, x in vars(hj).items() if inspect.ismodule(x) and k != "cli"}}
    return {
        prefix + name: thing
        for prefix, space in spaces.items()
        for name, thing in vars(space).items()
        if not name.startswith("_") and callable(thing)
    }
