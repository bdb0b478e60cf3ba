"""The reference has one entry for each public name, made from its docstring."""

import inspect

import pytest
import reference
import rst

import hessjax

ENTRIES = [entry for _, pages in reference.plan() for page in pages for entry in page.entries]
FAMILIES = [name for name in reference.FAMILIES if name not in ("flax", "plot")]


def test_each_public_name_has_exactly_one_entry():
    names = [f"hessjax.{name}" for name in reference.public(hessjax)]
    for family in reference.FAMILIES:
        names += [f"hessjax.{family}.{name}" for name in reference.public(reference.family(family))]
    assert sorted(entry.path for entry in ENTRIES) == sorted(names)


def test_each_namespace_of_the_face_is_a_family():
    folders = {"analysis", "cli", "compaction", "curvature", "fisher", "program", "pruning", "recipes"}
    folders |= {"solvers", "flax", "plot"}
    modules = {name for name, value in vars(hessjax).items() if inspect.ismodule(value) and name[0] != "_"}
    modules.discard("jaxtyping")  # put there by the run-time checker
    assert modules - folders == set(FAMILIES)


def test_entries_are_written_from_docstrings(tmp_path):
    reference.write(tmp_path)
    text = "\n".join(path.read_text() for path in tmp_path.iterdir())
    for entry in ENTRIES:
        heads = [line for line in text.splitlines() if line.startswith(".. py:")]
        found = [line for line in heads if line.split(":: ")[1].split("(")[0] == entry.path]
        assert len(found) == 1, entry.path
    assert " at 0x" not in text


def test_a_stale_page_goes(tmp_path):
    reference.write(tmp_path)
    (tmp_path / "gone.rst").write_text("old")
    reference.write(tmp_path)
    assert not (tmp_path / "gone.rst").exists()


NAMES = "trace", "saliencies.obs", "probes.gaussian", "likelihoods.gaussian"
LINKS = rst.Links(f"hessjax.{name}" for name in NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see `trace`", "see :py:obj:`trace <hessjax.trace>`"),
        ("`hj.saliencies.obs(damping)` and `x`",
         ":py:obj:`hj.saliencies.obs(damping) <hessjax.saliencies.obs>` and ``x``"),
        ("`obs`s", ":py:obj:`obs <hessjax.saliencies.obs>`\\ s"),
        ("`gaussian`", "``gaussian``"),  # two of them: no guess
        ("|w| and F_q, *all* of 2 * 3", "\\|w\\| and F_q, *all* of 2 \\* 3"),
    ],
)  # fmt: skip
def test_prose_becomes_restructured_text(text, expected):
    assert LINKS.inline(text, "hessjax") == expected


def test_a_docstring_becomes_fields():
    source = "One line.\n\nArgs:\n    a: first,\n        of two lines.\n    *b: rest.\n\nCost:\n    None.\n"
    words = "One line. :Arguments: ``a`` first, of two lines. ``*b`` rest. :Cost: None."
    assert " ".join(LINKS.document(source, "").split()) == words
