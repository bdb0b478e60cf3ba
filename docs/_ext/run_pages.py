"""A Sphinx extension: the Python of each page runs as it is read; its output and figures follow the block."""

import os
import tempfile
from pathlib import Path

import jax
import page_code
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

FIGURES = "_generated"
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_force_host_platform_device_count=8 "
)
"""The flags of `tests/conftest.py`, to the letter: they are part of a program's key."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hook."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Networks are tiny: a page costs what compiling costs. Compiled as the tests of the same pages do, once
    # is enough for both.
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    jax.config.update(
        "jax_compilation_cache_dir",
        str(page_code.DOCS.parent / ".pytest_cache" / "programs"),
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    app.connect("source-read", _run)
    return {"parallel_read_safe": True}


def _run(app: Sphinx, docname: str, source: list[str]) -> None:
    text = source[0]
    if Path(app.env.doc2path(docname)).suffix != ".md" or not page_code.blocks(text):
        return
    if os.environ.get("DOCS_EXECUTE") == "0":
        return
    if absent := page_code.missing(text):
        raise ExtensionError(f"{docname} requires {', '.join(absent)}: pip install '.[docs]'.")
    pieces, at = [], 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            for block, printed in page_code.run(docname, text, Path(folder)):
                pieces += [text[at : block.end], _output(printed), *_pictures(docname, block.line)]
                at = block.end
        except page_code.PageError as error:
            raise ExtensionError(str(error)) from error
        finally:
            page_code.close_figures()
    source[0] = "".join([*pieces, text[at:]])


def _output(printed: str) -> str:
    body = "\n".join(line.rstrip() for line in printed.rstrip().splitlines())
    return f"\n\n````{{code-block}} text\n:class: output\n{body}\n````\n" if body else ""


def _pictures(docname: str, line: int) -> list[str]:
    """The figures drawn by the block, saved, as Markdown."""
    folder = page_code.DOCS / FIGURES
    folder.mkdir(exist_ok=True)
    found = []
    for number, figure in enumerate(page_code.figures()):
        name = f"{docname.replace('/', '-')}-{line}-{number}.png"
        figure.savefig(folder / name, dpi=144, bbox_inches="tight")
        title = (
            next((ax.get_title() for ax in figure.axes if ax.get_title()), "")
            or "The figure that this code draws"
        )
        found.append(f"\n\n![{title}](/{FIGURES}/{name})\n")
    page_code.close_figures()
    return found
