"""How long until a form is on screen in a fresh kernel, and until a change is answered, in JupyterLab and a real browser.

usage: python bench/forms.py [--times 5] [--out bench/results/NAME.json]

Needs chromium, playwright and jupyterlab. "shown" is from pressing Run on a cell that makes and shows the form, in a kernel whose imports
(a cell before it) are done, until the form's last part is in the page; "imported" is the time of the import itself, in the kernel, without torch;
"changed" is from the change in the browser until the picture that follows from it is in the page.
"""
import argparse
import os
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from finetune_nb.core import write_json
from finetune_nb.folder import commit
from finetune_nb.hardware import versions

FORMS = {  # name: (module, expression, words of its last part, {control: values to change it to})
    "RecipeForm": ("recipe_form", "RecipeForm()", "Load the recipe", dict(lora_r=["4", "64", "8", "128"])),
    "DecisionForm": ("decision_form", "DecisionForm()", "Next step", dict(fails=["facts", "form", "behaviour", "nothing"])),
    "DataView": ("data_view", "DataView('home')", "Next row", {}),
}
SEEN = """([n, words]) => new Promise(done => {
    const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[n], start = performance.now()
    jupyterapp.shell.currentWidget.content.activeCellIndex = n
    jupyterapp.commands.execute('notebook:run-cell')
    const look = () => { const area = cell.querySelector('.jp-Cell-outputArea'); area && area.textContent.includes(words) ? done(performance.now() - start) : requestAnimationFrame(look) }
    look()
})"""
CHANGED = """([n, label, value]) => new Promise(done => {
    const area = document.querySelectorAll('.jp-Notebook .jp-Cell')[n].querySelector('.jp-Cell-outputArea'), picture = () => [...area.querySelectorAll('svg')].map(s => s.innerHTML).join()
    const before = picture(), control = [...area.querySelectorAll('.widget-label')].find(l => l.textContent === label).parentElement.querySelector('input, select'), start = performance.now()
    control.value = value
    for (const kind of ['input', 'change']) control.dispatchEvent(new Event(kind, {bubbles: true}))
    const look = () => picture() !== before ? done(performance.now() - start) : requestAnimationFrame(look)
    look()
})"""


def middle(values): return [round(float(f(values)), 1) for f in (statistics.median, min, max)] if values else None


def once(notebook, name):
    "(milliseconds of the import, until it is shown, of each change) in a new notebook and kernel"
    module, expression, words, changes = FORMS[name]
    book = notebook(f"{name}-{time.time_ns()}.ipynb", f"import sys, time\nstart = time.perf_counter()\nfrom finetune_nb.{module} import {name}\nprint('took', time.perf_counter() - start, 'seconds', *(['with torch'] if 'torch' in sys.modules else []))", expression)
    book.page.evaluate(SEEN, [0, "seconds"])
    book.ready()
    said, changed = book.output(0).text_content(), []
    assert "with torch" not in said
    shown = book.page.evaluate(SEEN, [1, words])
    book.ready()
    if name == "RecipeForm": book.output(1).get_by_role("button", name="method", exact=True).click()
    for label, values in changes.items():
        for value in values:
            time.sleep(0.5)
            changed.append(book.page.evaluate(CHANGED, [1, label, value]))
    book.page.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")
    book.close()
    return 1000 * float(said.split("took ")[1].split()[0]), shown, changed


def test_times(notebook):
    "Run by pytest for the fixtures of tests/browser: the server, the browser, the notebooks"
    found, times, out = {}, int(os.environ["FORMS_TIMES"]), os.environ["FORMS_OUT"]
    before = os.getloadavg()
    for name in FORMS:
        imported, shown, changed = zip(*(once(notebook, name) for _ in range(times)))
        found[name] = dict(imported=middle(imported), shown=middle(shown), changed=middle(sum(changed, [])))
        print(name, found[name], flush=True)
    if out: write_json(out, dict(question="How long until a form is on screen, and until a change is answered?", unit="milliseconds: median, lowest, highest", times=times, date=datetime.now(timezone.utc).isoformat(timespec="seconds"), commit=commit(), load=dict(before=before, after=os.getloadavg()), forms=found, versions=versions()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", default="5")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    os.environ |= dict(FORMS_TIMES=args.times, FORMS_OUT=args.out)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    sys.exit(pytest.main(["-q", "-s", "-p", "browser.conftest", __file__]))
