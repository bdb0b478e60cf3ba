"""Sphinx's settings: the site is built offline and asks no other host."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import hessjax

project, author, copyright = (
    "hessjax",
    "the hessjax maintainers",
    "the hessjax maintainers",
)
version = release = hessjax.__version__

extensions = [
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "generated",
    "run_pages",
]
exclude_patterns = ["_build", "_ext", "_generated", "**/.ipynb_checkpoints"]

nitpicky = True
toc_object_entries_show_parents = "hide"
suppress_warnings = ["myst.header"]  # notebooks begin at any level
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = (
    "off"  # notebooks are shown as committed; the pages' code runs in `run_pages`
)
nb_ipywidgets_js: dict = {}  # no widgets, and no script from another host
nb_merge_streams = True
html_math_renderer = "mathml"

html_theme = "sphinx_book_theme"
html_title = "hessjax"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"


def _mathml(as_block):
    """Formulas by docutils' own MathML: browsers read it without a script."""

    def visit(translator, node):
        translator.body.append(
            tex2mathml(
                re.sub(r"frac(\d)(\d)", r"frac{\1}{\2}", node.astext()),
                as_block=as_block,
            )
        )
        raise SkipNode

    return visit, None


def setup(app):
    """No MathJax from anywhere."""
    app.add_html_math_renderer("mathml", _mathml(False), _mathml(True))
