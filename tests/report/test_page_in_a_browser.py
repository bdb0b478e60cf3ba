"""The page in a real browser: charts are drawn, at both widths, in both colours; nothing is fetched."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from hessjax._report import _page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def browse(page, *words):
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [BROWSER, *flags, *words, page.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def page(whole, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(whole.html)
    return file


def test_every_chart_is_drawn_and_has_words(page):
    text = browse(page, "--dump-dom", "--window-size=1280,900")
    assert 'data-drawn="yes"' in text
    charts = text.split('class="chart"')[1:]
    assert len(charts) == 5
    assert all("<svg" in chart.split("figcaption")[0] for chart in charts)
    assert "data:image/png" not in charts[0].split("figcaption")[0]  # drawn in the picture's place


@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_it_follows_the_colours_of_the_reader(page, tmp_path, scheme, dark):
    picture = tmp_path / "page.png"
    browse(page, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1280,900",
           f"--screenshot={picture}")  # fmt: skip
    with Image.open(picture) as image:
        background = np.asarray(image.convert("L"))[5, 5]
    assert (background < 60) == dark


def test_the_charts_of_a_pruning_are_drawn_too(whole, tmp_path):
    def stage(**result):
        return {"result": result, "products": 1.0, "seconds": 1.0}

    metrics = {"a <b>": 0.5}
    history = [{"step": 4 * i, "zeros": 0.1 * i, "metrics": {"a <b>": 0.5 + 0.01 * i}} for i in range(1, 6)]
    trials = [{"sparsity": s, "predicted": s**2, "rise": "inf" if s > 0.8 else s} for s in (0.5, 0.9, 0.7)]
    zeros = [{"path": "a/kernel", "number": 12, "zeros": 6, "pruned": True}]
    stages = {
        "before": stage(loss=1.0, metrics=metrics),
        "training": stage(steps=20, history=history),
        "search": stage(sparsity=0.7, trials=trials),
        "network": stage(loss=1.1, metrics=metrics, how="20 steps", predicted_rise=0.1, zeros=zeros,
                         compacted={"why_not": "no whole channel went"}, files=["checkpoint"]),
    }  # fmt: skip
    record = {**whole.record, "stages": stages, "complete": True}
    for name, text, count in (
        ("pruned", _page.pruned_page(record), 3),
        ("both", _page.page({**whole.record, "pruned": {"folder": "x", "stages": stages}}, tmp_path), 8),
    ):
        file = tmp_path / f"{name}.html"
        file.write_text(text)
        shown = browse(file, "--dump-dom", "--window-size=1280,900")
        charts = shown.split('class="chart"')[1:]
        assert len(charts) == count
        assert all("<svg" in chart.split("figcaption")[0] for chart in charts)


PROBE = """<iframe id="f" src="report.html" style="width:390px;height:900px;border:0"></iframe><script>
f.onload = () => setTimeout(() => { const d = f.contentDocument.documentElement;
  document.title = d.scrollWidth <= 390 ? "fits" : "wide " + d.scrollWidth; }, 800);</script>"""


def test_on_a_phone_only_tables_scroll_sideways(page):
    frame = pathlib.Path(page).with_name("frame.html")
    frame.write_text(PROBE)
    text = browse(frame, "--dump-dom", "--allow-file-access-from-files", "--window-size=600,900")
    assert "<title>fits</title>" in text
