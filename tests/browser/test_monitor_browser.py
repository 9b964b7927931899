"A person starts a training in JupyterLab, closes the tab, comes back, pauses, goes on, stops; about a minute on two free cores"
import os
import re
import signal
import time
from urllib.parse import urlparse

import pytest

from conftest import chat_rows, write_rows, until
from finetune_nb import runs
from finetune_nb.core import read_json
from finetune_nb.events import look

pytestmark = pytest.mark.slow
STEPS = 3000  # more than are trained while the test looks


def points(book, n):
    "Points of the loss curve that the person sees in the output of a cell"
    line = book.output(n).locator("svg polyline").first
    return len(line.get_attribute("points").split()) if line.count() else 0


@pytest.fixture
def cells(lab, tiny_model):
    data = write_rows(lab[2] / "rows.jsonl", chat_rows())
    values = dict(model=tiny_model, data=str(data), max_steps=STEPS, batch_size=2, log_steps=1, eval_steps=0, save_steps=2000, threads=1, dtype="float32", lora_layers=2, lora_r=4, lora_alpha=8,
                  fast_path=False, rehearse=False, eval_fraction=0.2, max_eval_rows=4, compare=False, name="seen")
    yield ("from finetune_nb.monitor import TrainMonitor, attach\nfrom finetune_nb.recipe import make",
           f"monitor = TrainMonitor(make('laptop', **{values!r}))\nmonitor", "6 * 7")
    for folder in lab[2].glob("runs/seen-*"):
        facts = read_json(folder / "run.json")
        if runs.status(folder) in ("running", "starting"): os.kill(facts["pid"], signal.SIGKILL)


def test_a_run_outlives_its_tab_and_its_kernel(notebook, lab, shot, cells):
    from playwright.sync_api import expect
    book = notebook("monitor.ipynb", *cells)
    began = time.monotonic()
    book.run(0, 1)
    button = lambda book, name: book.output(1).get_by_role("button", name=name, exact=True)
    expect(button(book, "Start")).to_be_enabled()
    seen = time.monotonic() - began
    expect(button(book, "Pause")).to_be_disabled()
    expect(book.output(1)).to_contain_text("Ready. Start trains")
    shot(book.page, "monitor-1-ready")

    button(book, "Start").click()
    expect(button(book, "Stop")).to_be_enabled()
    expect(button(book, "Start")).to_be_disabled()
    book.run(2)  # the kernel is free
    expect(book.output(2)).to_contain_text("42", timeout=5000)
    until(lambda: points(book, 1) > 5, "a curve")
    few = points(book, 1)
    until(lambda: points(book, 1) > few + 5, "a curve that grows")
    [folder] = lab[2].glob("runs/seen-*")
    shot(book.page, "monitor-2-training")

    book.command("docmanager:save")
    book.close()
    at = look(folder).step
    until(lambda: look(folder).step > at and runs.status(folder) == "running", "a run that goes on without its tab", 20)
    book = notebook("monitor.ipynb")
    until(lambda: points(book, 1) > 5, "the picture of a tab that was closed")  # drawn again from the kernel, nothing was run
    same = points(book, 1)
    until(lambda: points(book, 1) > same, "a picture that is live again")
    pid = read_json(folder / "run.json")["pid"]
    book.restart()
    book.run(0, 1)
    expect(book.output(1)).to_contain_text(folder.name)
    expect(book.output(1)).to_contain_text(re.compile(r"running · 4/5 training · step \d+ of 3000"))
    assert list(lab[2].glob("runs/seen-*")) == [folder] and read_json(folder / "run.json")["pid"] == pid
    until(lambda: points(book, 1) > same, "a curve after the kernel was restarted")
    shot(book.page, "monitor-3-attached-again")

    button(book, "Pause").focus()
    book.page.keyboard.press("Enter")
    expect(button(book, "Resume")).to_be_enabled(timeout=30_000)
    expect(book.output(1)).to_contain_text(re.compile(r"stopped · step \d+ of 3000; Resume goes on from checkpoint-\d+"))
    shot(book.page, "monitor-4-paused")
    paused = look(folder)
    button(book, "Resume").click()
    expect(button(book, "Pause")).to_be_enabled(timeout=60_000)
    until(lambda: look(folder).step > paused.step + 5, "steps after going on")
    assert look(folder).checkpoint == f"checkpoint-{paused.step}"

    button(book, "Stop").click()
    expect(book.output(1)).to_contain_text(re.compile(rf"Stop at once\? \d+ steps since checkpoint {paused.step} would be lost"))
    assert runs.status(folder) == "running"
    button(book, "Stop").click()
    expect(book.output(1)).to_contain_text("stopped · step", timeout=30_000)
    assert runs.status(folder) == "stopped"

    book.command("apputils:change-theme", theme="JupyterLab Dark")
    book.page.set_viewport_size(dict(width=400, height=900))
    until(lambda: book.output(1).locator("svg").first.bounding_box()["width"] < 400, "a narrow picture")
    book.output(1).scroll_into_view_if_needed()
    time.sleep(1)
    shot(book.page, "monitor-5-dark-and-narrow")
    box = book.output(1).locator(".widget-vbox").first
    assert box.evaluate("e => e.scrollWidth <= e.clientWidth") and 0 < box.bounding_box()["x"] and box.bounding_box()["x"] + box.bounding_box()["width"] <= 400
    ground, ink = (re.findall(r"[\d.]+", box.locator("svg").first.evaluate(f"e => getComputedStyle(e).{what}")) for what in ("backgroundColor", "color"))
    assert max(map(float, ground[:3])) < 60 and min(map(float, ink[:3])) > 150, (ground, ink)

    hosts = {urlparse(url).hostname for url in book.asked} - {None}
    assert hosts == {"127.0.0.1"}, f"asked elsewhere: {hosts}"
    print(f"on screen {seen:.1f} s after the cells were run")
