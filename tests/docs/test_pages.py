"""Every Python block of every page runs, in the page's order, in an empty folder."""

import re

import page_code
import pytest

PAGES = [page for page in page_code.pages() if page_code.blocks(page.read_text())]


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(page_code.DOCS).with_suffix("").as_posix()
)
def test_the_blocks_of_a_page_run(page, tmp_path):
    text = page.read_text()
    if absent := page_code.missing(text):
        pytest.skip(f"needs {', '.join(absent)}")
    try:
        for _ in page_code.run(page.relative_to(page_code.DOCS).as_posix(), text, tmp_path):
            page_code.close_figures()
    finally:
        page_code.close_figures()


def test_a_block_that_fails_is_named(tmp_path):
    text = "# Page\n\n```python\nx = 1\n```\n\n```python\nx = 2\n\nx / 0\n```\n"
    message = r"some-page, block 2, line 10 of the page: ZeroDivisionError: division by zero"
    with pytest.raises(page_code.PageError, match=f"^{re.escape(message)}$"):
        list(page_code.run("some-page", text, tmp_path))


def test_files_are_written_and_names_are_kept(tmp_path):
    text = "```{code-block} yaml\n:caption: a.yaml\n\nx: 1\n```\n\n```python\ny = 2\n```\n\n" \
           "```python\nimport pathlib\nprint(pathlib.Path('a.yaml').read_text(), y)\n```\n"  # fmt: skip
    assert [out for _, out in page_code.run("page", text, tmp_path)] == ["", "x: 1\n 2\n"]


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in page_code.pages():
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in tree.split("\n") if line and not line.startswith(":")]
            listed |= {
                (page.parent / name).resolve().relative_to(page_code.DOCS).as_posix() for name in names
            }
    names = {page.relative_to(page_code.DOCS).with_suffix("").as_posix() for page in page_code.pages()}
    assert names - listed == {"index"}
