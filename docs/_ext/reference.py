"""The reference, from the docstrings: one entry for each public name, on pages grouped like the face.

Our objects are public under a name that need not be their own (`hj.estimators.lanczos` is the class
`Lanczos`), which autodoc documents as "alias of"; so the entries are written here, as directives of Sphinx's
Python domain.
"""

import ast
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rst

# Verbs of `hj.`, a page for each first name; the types of results stand on the page of their verb.
GROUPS: dict[str, list[str]] = {
    "Curvature of a loss": [
        "hessian", "hvp", "ggn", "fisher", "empirical_fisher", "per_example_grads",
        "empirical_fisher_roots", "ggn_roots", "sampled_grads", "over_batches", "batches Batches",
        "select Selection",
        "weighted_sum", "preconditioned", "adam_preconditioner", "check Check",
    ],
    "Spectrum": [
        "eigenpairs Eigenpairs", "trace Estimate", "trace_by_leaf TraceByLeaf", "diagonal", "frobenius_norm",
        "spectral_density SpectralDensity", "spectral_density_by_leaf", "spectrum Spectrum",
    ],
    "Solutions": ["solve Solution", "inverse_fisher InverseFisher"],
    "Landscape": ["landscape Landscape"],
    "Training data": ["influence Influence", "self_influence"],
    "Report": ["report Report Problem"],
    "Running": [
        "run Progress NonFiniteProductError",
        "memory_estimate MemoryEstimate MemoryLimitWarning",
        "relative",
        "progress_bar",
        "checkpoint",
    ],
    "Pruning": ["prune", "prune_once Pruned", "mask_of", "load_recipe Recipe", "distillation"],
    "What can go, and what is left": [
        "summary", "sensitivity Sensitivity", "compact Compacted Obstacle", "to_sparse", "save_npz Saved",
        "load_npz",
    ],
}  # fmt: skip

# Families of choices, a page for each namespace.
FAMILIES = {
    "estimators": "Estimators", "probes": "Probes", "likelihoods": "Likelihoods", "directions": "Directions",
    "dynamics": "Dynamics of training",
    "saliencies": "Saliencies", "patterns": "Patterns", "allocations": "Allocations", "layers": "Layers",
    "flax": "Flax adapters", "plot": "Figures",
}  # fmt: skip


class Entry(NamedTuple):
    """One public name: `hessjax.saliencies`, `obs`, and the object."""

    module: str
    name: str
    object: Any

    @property
    def path(self) -> str:
        """The name in full."""
        return f"{self.module}.{self.name}"


class Page(NamedTuple):
    """A page of the reference."""

    name: str
    title: str
    intro: str
    entries: list[Entry]


def public(module: Any) -> dict[str, Any]:
    """What a module offers, in the order of its source: neither private names nor modules."""
    names = {n: o for n, o in vars(module).items() if not n.startswith("_") and not inspect.ismodule(o)}
    if module.__name__.rpartition(".")[2] in FAMILIES and not hasattr(module, "__path__"):
        # A family that is one file also holds what it imports: its own are those defined there.
        imported = _imported(inspect.getsource(module))
        names = {n: o for n, o in names.items() if n not in imported and not n.isupper()}
    return names


def _imported(source: str) -> set[str]:
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    aliases = [alias for node in nodes for alias in node.names]
    return {alias.asname or alias.name for alias in aliases if alias.asname != alias.name}  # not `x as x`


def family(name: str) -> Any:
    """The module of a family: attribute of `hessjax`, or a module that is imported on its own."""
    import hessjax

    return getattr(hessjax, name, None) or importlib.import_module(f"hessjax.{name}")


def family_path(module: str) -> str:
    """Where a family's file is: `hessjax.probes` is `hessjax.estimators.probes`."""
    name = module.rpartition(".")[2]
    return family(name).__name__ if name in FAMILIES else module


def plan() -> list[tuple[str, list[Page]]]:
    """All pages, by group."""
    import hessjax

    verbs = []
    for group, names in GROUPS.items():
        of_group = [[Entry("hessjax", n, getattr(hessjax, n)) for n in each.split()] for each in names]
        verbs.append((group, [Page(e[0].name, f"{e[0].name}", "", e) for e in of_group]))
    families = [_family_page(name, title) for name, title in FAMILIES.items()]
    return [*verbs, ("Families of choices", families)]


def _family_page(name: str, title: str) -> Page:
    module = family(name)
    entries = [Entry(f"hessjax.{name}", n, o) for n, o in public(module).items()]
    return Page(f"{name}-family", f"{title}: hj.{name}", inspect.getdoc(module) or "", entries)


def write(folder: Path) -> None:
    """Every page of the reference, and its index."""
    folder.mkdir(exist_ok=True)
    groups = plan()
    links = rst.Links(entry.path for _, pages in groups for page in pages for entry in page.entries)
    wanted = {"index.rst": _index(groups, links)}
    for _, pages in groups:
        wanted |= {f"{page.name}.rst": _page(page, links) for page in pages}
    for stale in {path.name for path in folder.iterdir()} - wanted.keys():
        (folder / stale).unlink()
    for name, text in wanted.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:  # Sphinx reads what is newer
            (folder / name).write_text(text)


def _index(groups: list[tuple[str, list[Page]]], links: rst.Links) -> str:
    parts = [_heading("Reference", "="), _WELCOME]
    for group, pages in groups:
        parts += [_heading(group, "-"), _table(pages, links)]
        parts.append(".. toctree::\n   :hidden:\n\n" + "".join(f"   {page.name}\n" for page in pages))
    return "\n".join(parts)


_WELCOME = """
Every public name has one entry, made from its docstring. Verbs are called as ``hj.eigenpairs(...)`` after
``import hessjax as hj``; choices sit in namespaces, ``hj.saliencies.obs()``. Costs are counted in products
with the curvature matrix, each about two gradients. Tolerances and damping values are absolute unless
built by :py:obj:`hj.relative <hessjax.relative>`.
"""


def _table(pages: list[Page], links: rst.Links) -> str:
    rows = []
    for page in pages:
        first = _first_line(page.entries[0]) if not page.intro else page.intro.splitlines()[0]
        rows.append(f"   * - :doc:`{page.title} <{page.name}>`\n     - {links.inline(first, 'hessjax')}\n")
    return ".. list-table::\n   :widths: 30 70\n   :class: names\n\n" + "".join(rows)


def _page(page: Page, links: rst.Links) -> str:
    parts = [_heading(page.title, "=")]
    if page.intro:
        parts.append(links.document(page.intro, page.entries[0].module))
    for number, entry in enumerate(page.entries):
        if number and not page.intro:
            parts.append(_heading(entry.name, "-"))
        parts.append(_entry(entry, links))
    return "\n".join(parts) + "\n"


def _entry(entry: Entry, links: rst.Links) -> str:
    thing = entry.object
    kind = "class" if inspect.isclass(thing) else "data" if _is_data(thing) else "function"
    if inspect.isclass(thing) and issubclass(thing, Exception):
        kind = "exception"
    is_setting = kind == "class" and entry.name != thing.__name__  # public under its lower-case name
    signature = "" if kind == "data" else _signature(thing)
    head = f".. py:{'function' if is_setting else kind}:: {entry.path}{signature}\n\n"
    members = [] if is_setting or kind not in ("class", "exception") else list(_members(thing, entry, links))
    body = [links.document(_doc(entry), entry.module), *members]
    return head + textwrap.indent("\n".join(body), "   ")


def _members(cls: type, entry: Entry, links: rst.Links) -> Iterator[str]:
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not inspect.isfunction(inspect.unwrap(function)) or not function.__doc__:
            continue
        if isinstance(member, property):
            head = f".. py:property:: {entry.path}.{name}\n\n"
        else:
            head = f".. py:method:: {entry.path}.{name}{_signature(function, bound=True)}\n\n"
        yield head + textwrap.indent(links.document(inspect.getdoc(function) or "", entry.module), "   ")


def _signature(thing: Any, *, bound: bool = False) -> str:
    """Names and defaults: the types are told by the text."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError):
        return "()"
    shown = [p.replace(annotation=p.empty, default=_Default.of(p)) for p in parameters[1 if bound else 0 :]]
    return str(inspect.Signature(shown))


class _Default(str):
    """A default as readers write it."""

    __slots__ = ()

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> Any:
        value = parameter.default
        if value is parameter.empty:
            return value
        name = getattr(value, "__qualname__", "")
        if name:  # a function, or one that a factory made
            return cls(name.split(".")[0] + ("()" if ".<locals>" in name else "").lstrip("_"))
        text = getattr(value, "name", None) if isinstance(value, tuple) else None
        text = text if isinstance(text, str) else repr(value).replace("Relative(factor=", "relative(")
        return cls(text if len(text) <= 30 and " at 0x" not in text else "...")

    def __repr__(self) -> str:
        return str(self)


def _is_data(thing: Any) -> bool:
    return not inspect.isclass(thing) and not inspect.isfunction(inspect.unwrap(thing))


def _doc(entry: Entry) -> str:
    """The docstring; for data, the string below the assignment, or else what the name stands for."""
    if not _is_data(entry.object):
        return inspect.getdoc(entry.object) or ""
    source = inspect.getsource(importlib.import_module(_home(entry)))
    below = [text for name, text in _documented(source) if name == entry.name]
    return (
        below[0]
        if below
        else f"Stands for `{re.sub(r'(typing|collections[.]abc)[.]', '', str(entry.object))}`."
    )


def _documented(source: str) -> Iterator[tuple[str, str]]:
    body = ast.parse(source).body
    for statement, after in itertools.pairwise(body):
        targets = (
            [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
        )
        if (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            yield from ((target.id, after.value.value) for target in targets if isinstance(target, ast.Name))


def _home(entry: Entry) -> str:
    """The module whose source assigns the name: the family's own, or where it is imported from."""
    tree = ast.parse(inspect.getsource(importlib.import_module(family_path(entry.module))))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = [
        node.module for node in imports for alias in node.names if (alias.asname or alias.name) == entry.name
    ]
    return (found[0] or "") if found else family_path(entry.module)


def _first_line(entry: Entry) -> str:
    return _doc(entry).strip().split("\n\n")[0].replace("\n", " ")


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"
