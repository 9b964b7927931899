"A report in a real browser: wide and narrow, light and dark, and printed"
import re
from base64 import b64encode

import nbformat
import pytest

from finetune_nb import report
from finetune_nb.core import markdown_table
from finetune_nb.mask import Mask

WIDE = [{f"column {i}": "an answer of some length" if i % 2 else '{"intent": "HassTurnOn", "area": "kitchen"}' for i in range(9)}] * 60  # longer than a page
SHORT = [dict(metric="exact match", before="0.0% [0.0, 2.2]", after="71.8% [64.6, 78.0]")] * 4


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "A report of five sections with what reports hold: tables, a curve, a row with its mask, a long word"
    folder, new = tmp_path_factory.mktemp("report"), nbformat.v4
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": {3 / n}}}\n' for n in range(1, 50)))
    picture = report.png(report.curve(folder), "the curve")
    shown = [{"text/markdown": markdown_table(SHORT)}, {"text/markdown": markdown_table(WIDE)}, {"image/png": b64encode(picture.data).decode()},
             {"text/html": Mask([("user asks " * 30, "ignored", 9), ("the answer", "trained", 3)], False)._repr_html_()}, {"text/markdown": "x" * 400}]
    cells = [new.new_markdown_cell("# A run\n\n> In one sentence.")]
    for n, data in enumerate(shown): cells += [new.new_markdown_cell(f"## Section {n}\n\nWords."), new.new_code_cell("1", outputs=[new.new_output("display_data", data)])]
    nbformat.write(new.new_notebook(cells=cells), folder / "notebook.ipynb")
    return report.build(folder).as_uri()


@pytest.fixture
def opened(playwright, chromium, address):
    "Opens the report: (page, the addresses that it asked for)"
    from browser.conftest import FLAGS
    browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
    def open_report(width, **how):
        page, asked = browser.new_context(viewport=dict(width=width, height=900), **how).new_page(), []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(address)
        return page, asked
    yield open_report
    browser.close()


WIDTH = "document.documentElement.scrollWidth"
GROUND = "getComputedStyle(document.querySelector('th')).color"


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_runs_out_of_the_page(opened, shot, address, width):
    page, asked = opened(width)
    assert page.evaluate(WIDTH) == width, "the page itself has to be moved sideways"
    assert all(a == address or a.startswith("data:") for a in asked)
    scrolls = page.evaluate("[...document.querySelectorAll('.output_subarea')].filter(e => e.scrollWidth > e.clientWidth).every(e => getComputedStyle(e).overflowX == 'auto')")
    assert scrolls, "something wide can be neither seen nor moved"
    shot(page, f"report-{width}")


def test_light_and_dark(opened, shot):
    light, dark = (opened(1200, color_scheme=s)[0].evaluate(GROUND) for s in ("light", "dark"))
    number = lambda color: sum(map(int, re.findall(r"\d+", color)[:3]))
    assert number(light) < 100 < 600 < number(dark)


def test_printed(opened, tmp_path):
    "Each section begins a page; nothing is wider than the paper; what is short is on one page"
    page, _ = opened(690)  # A4 without its margins, in CSS pixels
    page.emulate_media(media="print")
    assert page.evaluate(WIDTH) <= 690
    assert page.evaluate("[...document.querySelectorAll('h2')].every(h => getComputedStyle(h).breakBefore == 'page')") and page.evaluate("[...document.querySelectorAll('img, tr')].every(e => getComputedStyle(e).breakInside == 'avoid')")
    data = page.pdf(format="A4", prefer_css_page_size=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 7 <= pages <= 12, pages  # a cover, five sections, and the long table's other pages
