"The whole way in one notebook in a real browser: decide, see the memory move, train the embedded model, leave, come back, pause, go on, compare; and the same page as an app behind a token. About 4 minutes."
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from conftest import until
from finetune_nb import runs
from finetune_nb.core import read_json

from .conftest import free_port

pytestmark = pytest.mark.slow
STUDIO = Path(__file__).resolve().parents[2] / "nbs/tutorials/studio.ipynb"
SMALL = dict(max_steps=24, batch_size=2, accumulation=1, max_rows=80, max_eval_rows=6, eval_steps=8, save_steps=8, log_steps=1, rehearse=False, max_new_tokens=20, threads=1, lora_layers=4)


@pytest.fixture
def studio(lab):
    "The notebook in the server's folder, with a cell after the form that makes the run short; {first word of a cell: its number}"
    book = json.loads(STUDIO.read_text())
    at = next(i for i, c in enumerate(book["cells"]) if "form = RecipeForm" in "".join(c["source"]))
    book["cells"].insert(at + 1, dict(cell_type="code", id="short", metadata={}, execution_count=None, outputs=[], source=f"form.change(**{SMALL!r})"))
    (lab[2] / "studio.ipynb").write_text(json.dumps(book))
    yield {re.match(r"\W*(\w+)", "".join(c["source"]))[1]: i for i, c in reversed(list(enumerate(book["cells"]))) if c["cell_type"] == "code"}
    for folder in lab[2].glob("runs/studio-*"):
        facts = read_json(folder / "run.json")
        if runs.status(folder) in ("running", "starting"): os.kill(facts["pid"], signal.SIGKILL)


def points(output):
    line = output.locator("svg polyline").first
    return len(line.get_attribute("points").split()) if line.count() else 0


def test_the_whole_way(notebook, lab, studio, shot):
    from playwright.sync_api import expect
    book = notebook("studio.ipynb")
    book.run()
    of = lambda name: book.output(studio[name])
    expect(of("exports").get_by_role("combobox").first).to_be_visible()  # the last cell is done
    told = of("decision").text_content()
    of("decision").get_by_label("fails").select_option("facts")
    until(lambda: of("decision").text_content() != told, "another answer, another advice", 20)
    shot(book.page, "studio-1-decision")

    form = of("form").first
    book.page.evaluate("n => { const c = jupyterapp.shell.currentWidget.content; c.activeCellIndex = n; c.scrollToItem ? c.scrollToItem(n) : null }", studio["form"])
    shot(book.page, "studio-2-recipe")
    expect(form.locator("svg").first).to_be_visible()
    form.get_by_role("button", name="method", exact=True).click()
    before, rank = form.locator("svg").first.inner_html(), form.get_by_label("lora_r", exact=True)
    rank.fill("256")
    rank.press("Enter")
    until(lambda: form.locator("svg").first.inner_html() != before, "the memory bar moves", 20)
    rank.fill("8")
    rank.press("Enter")
    shot(book.page, "studio-2-recipe")

    button = lambda name: of("monitor").get_by_role("button", name=name, exact=True)
    expect(button("Start")).to_be_enabled()
    button("Start").click()
    until(lambda: points(of("monitor")) > 3, "a curve of the embedded model's training", 180)
    few = points(of("monitor"))
    until(lambda: points(of("monitor")) > few, "a curve that grows", 60)
    shot(book.page, "studio-3-training")
    folder, = lab[2].glob("runs/studio-*")
    book.close()
    assert runs.status(folder) == "running", "closing the tab loses nothing"

    book = notebook("studio.ipynb")
    book.run()
    until(lambda: points(of("monitor")) > few, "the same run again, in a page that was opened anew", 60)
    button("Pause").click()
    until(lambda: runs.status(folder) == "stopped", "a pause", 60)
    expect(button("Resume")).to_be_enabled(timeout=15_000)
    button("Resume").click()
    until(lambda: runs.status(folder) == "done", "the end of the training and its comparison", 240)

    compared = of("compared")
    compared.get_by_role("button", name="Look again").click()
    compared.get_by_label("run", exact=True).select_option(folder.name)
    until(lambda: "before" in compared.text_content().lower() and "after" in compared.text_content().lower(), "answers before and after", 30)
    shot(book.page, "studio-4-compared")


def opened(url):
    try: return urllib.request.urlopen(url, timeout=60).status
    except urllib.error.HTTPError as e: return e.code


def test_as_an_app_behind_a_token(browser, tmp_path, shot):
    from playwright.sync_api import expect
    pytest.importorskip("voila", reason="voila is not installed: pip install 'finetune_nb[app]'")
    shutil.copyfile(STUDIO, tmp_path / "studio.ipynb")
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "voila", "studio.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", f"--Voila.token={token}"]
    with open(tmp_path / "log", "w") as log: server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1", JUPYTER_CONFIG_DIR=str(tmp_path / "config")))
    try:
        address = f"http://127.0.0.1:{port}/"
        def answers():
            try: return opened(f"{address}voila/static/nothing")
            except OSError: assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
        until(answers, "the app", 60)
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_label("fails")).to_have_count(0, timeout=5_000)
        page.goto(f"{address}?token={token}")
        expect(page.get_by_label("fails")).to_be_visible(timeout=90_000)
        expect(page.get_by_role("button", name="Start", exact=True)).to_be_visible()
        assert page.locator(".jp-CodeCell .jp-InputArea").count() == 0 and "RecipeForm(" not in page.inner_text("body"), "code is not shown"
        shot(page, "studio-5-app")
        page.close()
    finally:
        server.terminate()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill(), server.wait()
