"A person compares a run before and after, asks it, looks at its formats and exports, in JupyterLab; about 45 s on a free processor"
import re
import time
from urllib.parse import urlparse

import pytest

from finetune_nb.core import write_json
from test_views import compared, finished, small_model

pytestmark = pytest.mark.slow


@pytest.fixture
def run(lab, tmp_path):
    "A finished run with recorded formats and an export that was made up"
    folder = compared(finished(lab[2] / "rooms", small_model(tmp_path)))
    export = folder / "exports" / "gguf-q4_k_m"
    export.mkdir(parents=True)
    for name, text in (("rooms-q4_k_m.log", "x"), ("Modelfile", "FROM x\n"), ("README.md", "---\nlicense: mit\n---\n\n# rooms\n")): (export / name).write_text(text)
    write_json(export / "export.json", dict(kind="gguf", bytes=105453920, files={}))
    checks = [dict(check="prompt tokens", found="40 of 40 rows", verdict="pass", limit="all rows", why="another template asks another question"), dict(check="KL to the trained model", found="0.0083", verdict="warn", limit="at most 0.002; fails from 0.25", why="below 0.002 is as alike as two ways of computing the same weights")]
    write_json(export / "certificate.json", dict(verdict="warn", export="gguf-q4_k_m", kind="gguf", run="rooms", rows=40, checks=checks, facts=dict(bytes=105453920)))
    yield folder


def fits(book, n):
    "The view is as wide as its place, and nothing sticks out to the right"
    box = book.output(n).locator(".widget-vbox").first
    assert box.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), f"cell {n} is wider than its place"
    at = box.bounding_box()
    assert 0 < at["x"] and at["x"] + at["width"] <= book.page.viewport_size["width"]


def test_views(notebook, run, shot):
    from playwright.sync_api import expect
    book = notebook("views.ipynb", "from finetune_nb.compare_view import CompareView\nfrom finetune_nb.runs_view import RunsView\nfrom finetune_nb.format_view import QuantView\nfrom finetune_nb.export_view import ExportView",
                    "view = CompareView('rooms', threads=1)\nview", "RunsView(['rooms'])", "QuantView('rooms')", "ExportView('rooms')", "6 * 7")
    began = time.monotonic()
    book.run(0, 1)
    compare, quant, export = (book.output(n) for n in (1, 3, 4))
    expect(compare).to_contain_text("Better after than before")
    expect(compare).to_contain_text("1 to 6 of 24 rows")
    seen = time.monotonic() - began
    book.run(2, 3, 4)
    expect(export).to_contain_text("gguf-q4_k_m")

    compare.get_by_role("button", name=re.compile("changed")).click()
    expect(compare.get_by_role("group", name=re.compile("^row")).first).to_contain_text("row 4")  # right before, and no longer
    compare.get_by_role("button", name="Next page").focus()
    book.page.keyboard.press("Enter")
    expect(compare).to_contain_text(re.compile(r"7 to \d+ of"))
    expect(compare.locator("ins, del").first).to_be_visible()
    compare.get_by_label("your prompt").fill("light in the hall?")
    compare.get_by_label("longest").fill("24")
    compare.get_by_role("button", name="Ask", exact=True).click()
    expect(compare).to_contain_text("loading or answering", timeout=5000)
    book.run(5)  # the kernel is free
    expect(book.output(5)).to_contain_text("42", timeout=5000)

    expect(quant.locator("svg").first).to_contain_text("on the task")
    quant.get_by_role("button", name="on general text").click()
    expect(quant.locator("svg").first).to_contain_text("on general text")
    quant.get_by_label("rows").fill("many")
    book.page.keyboard.press("Tab")
    expect(quant).to_contain_text("is no number that makes sense here")
    shot(book.page, "views-1-formats")

    export.get_by_label("repository").fill("somebody/rooms")
    book.page.keyboard.press("Tab")
    expect(export.get_by_role("button", name="Send to the Hub")).to_be_disabled()
    export.get_by_role("button", name="Dry run").click()
    expect(export).to_contain_text("Would be refused", timeout=30_000)
    expect(export.get_by_role("button", name="Send to the Hub")).to_be_disabled()
    shot(book.page, "views-2-export")
    expect(compare).to_contain_text(re.compile(r"tokens in [\d.]+ s: [\d.]+ tokens/s.*tokens in", re.S), timeout=60_000)
    compare.scroll_into_view_if_needed()
    shot(book.page, "views-3-compare")
    for n in range(1, 5): fits(book, n)

    book.command("apputils:change-theme", theme="JupyterLab Dark")
    book.page.set_viewport_size(dict(width=400, height=900))
    until = time.monotonic() + 20
    while compare.locator("svg").first.bounding_box()["width"] > 400 and time.monotonic() < until: time.sleep(0.2)
    for n in range(1, 5):
        book.output(n).scroll_into_view_if_needed()
        fits(book, n)
        shot(book.page, f"views-4-dark-and-narrow-{n}")
    ink = re.findall(r"[\d.]+", compare.locator("svg").first.evaluate("e => getComputedStyle(e).color"))
    assert min(map(float, ink[:3])) > 150, f"the pictures are written in {ink} on a dark page"
    book.page.set_viewport_size(dict(width=1000, height=1000))
    book.command("apputils:change-theme", theme="JupyterLab Light")
    hosts = {urlparse(url).hostname for url in book.asked} - {None}
    assert hosts == {"127.0.0.1"}, f"asked elsewhere: {hosts}"
    print(f"on screen {seen:.1f} s after the cell was run")
