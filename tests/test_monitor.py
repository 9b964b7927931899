"""Runs that are processes of their own, and what is shown of them: kernels that die, damage, papermill, Colab.

About 90 s; the real browser is in tests/browser.
"""
import base64
import json
import os
import re
import signal
import sys
import threading
import types

import nbformat
import pytest
from hypothesis import example, given, settings as budget, strategies as st

from conftest import chat_rows, write_rows, until
from finetune_nb import detached, monitor, runs
from finetune_nb.core import read_json, write_json
from finetune_nb.curves import bundle, picture
from finetune_nb.events import CURVES, Events, follow, look, sentence
from finetune_nb.folder import note, owner
from finetune_nb.recipe import make, to_yaml

STEPS = 400


@pytest.fixture(scope="module")
def values(tiny_model, tmp_path_factory):
    return dict(model=tiny_model, data=str(write_rows(tmp_path_factory.mktemp("watched") / "rows.jsonl", chat_rows())), max_steps=STEPS, batch_size=2, log_steps=1, eval_steps=40, save_steps=40, threads=1, dtype="float32",
                lora_layers=2, lora_r=4, lora_alpha=8, fast_path=False, rehearse=False, eval_fraction=0.2, max_eval_rows=4, compare=False, name="watched")


def trained(folder, steps): return lambda: len(look(folder).curves.get("loss", ())) > steps


def in_a_kernel(code, cwd):
    "Run code in a kernel of its own, kill that with all its group, as a restart that cannot wait does, and return what it printed"
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(cwd), extra_arguments=["--log-level=CRITICAL"])
    printed = []
    try:
        reply = client.execute_interactive(code, timeout=60, output_hook=lambda m: printed.append(m["content"].get("text", "")))
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return "".join(printed).strip()


@pytest.mark.slow
def test_a_run_outlives_its_kernel_and_every_end(values, tmp_path):
    code = f"from finetune_nb.monitor import TrainMonitor\nfrom finetune_nb.recipe import make\nm = TrainMonitor(make('laptop', **{values!r}))\nm.press('start')\nprint(m.value)"
    folder = tmp_path / in_a_kernel(code, tmp_path)
    assert runs.status(folder) == "starting", read_json(folder / "run.json")
    until(trained(folder, 5), "steps after the kernel was killed")
    assert runs.status(folder) == "running" and monitor.going_on(make("laptop", **values), tmp_path / "runs") == folder
    monitor.attach(folder).stop()
    until(lambda: look(folder).status not in ("running", "ending"), "the end", 30)
    assert runs.status(folder) == "stopped" and "Traceback" not in (folder / "log.txt").read_text()

    before = look(folder).step
    detached.go_on(folder)
    until(lambda: runs.status(folder) == "running" and look(folder).step > before + 5, "steps after going on")
    process = read_json(folder / "run.json")["pid"]
    os.kill(process, signal.SIGKILL)
    until(lambda: look(folder).status == "died", "a run that was killed, and the process that looked after it has said so")
    assert sentence(look(folder)).startswith("died · step")
    shown = monitor.attach(folder)
    assert not shown.parts["resume"].disabled and shown.parts["pause"].disabled
    assert "process was killed" in (folder / "log.txt").read_text()

    shown.press("resume")
    told, following = [], threading.Thread(target=lambda: follow(folder, told.append, 0.2), daemon=True)
    following.start()
    assert shown.watch().status == "done", sentence(shown.state)
    following.join(20)
    assert shown.state.step == STEPS and set(shown.state.curves) == set(CURVES) and all(v > 0 for k in ("speed", "memory") for _, v in shown.state.curves[k])
    assert [s for s, _ in shown.state.curves["loss"]] == list(range(1, STEPS + 1))
    assert (folder / "adapter/adapter_model.safetensors").exists() and len(read_json(folder / "run.json")["resumed"]) == 2
    until(lambda: (folder / "report.html").exists(), "the report, which is made after the run is done", 30)
    assert any(t.startswith("4/5 training") for t in told) and "done" in told[-1]


def executed(tmp_path, source):
    import papermill
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("import sys; 'torch' in sys.modules")], metadata=dict(kernelspec=dict(name="python3", display_name="python3"))), tmp_path / "in.ipynb")
    try: papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False, cwd=str(tmp_path), kernel_name="python3", extra_arguments=["--log-level=CRITICAL"])
    finally: book = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    return book


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_papermill_keeps_the_picture_and_the_words(values, tmp_path):
    "Executed by a program, the monitor stays in the foreground and leaves a picture in SVG and PNG; the page made of it shows it"
    from nbconvert import HTMLExporter
    book = executed(tmp_path, f"from finetune_nb.monitor import TrainMonitor\nfrom finetune_nb.recipe import make\nm = TrainMonitor(make('laptop', **{values | dict(max_steps=6, eval_steps=3, save_steps=0)!r}), every=0.2)\nm.run().status")
    outputs = book.cells[0].outputs
    kept = [o.data for o in outputs if "image/svg+xml" in o.get("data", {})]
    assert len(kept) == 1 and outputs[-1].data["text/plain"] == "'done'" and book.cells[1].outputs[0].data["text/plain"] == "False"
    assert "polyline" in kept[0]["image/svg+xml"] and kept[0]["text/plain"].startswith("watched-") and "loss" in kept[0]["text/plain"] and base64.b64decode(kept[0]["image/png"]).startswith(b"\x89PNG")
    page, _ = HTMLExporter().from_notebook_node(book)
    assert "<svg" in page and "polyline" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_papermill_fails_when_the_run_does(tmp_path):
    from papermill.exceptions import PapermillExecutionError
    with pytest.raises(PapermillExecutionError, match="RunFailed.*no-such-model"):
        executed(tmp_path, "from finetune_nb.monitor import TrainMonitor\nfrom finetune_nb.recipe import make\nTrainMonitor(make('laptop', model='./no-such-model'), every=0.2).run()")


# ---- the same without a training

GARBAGE = [b"", b"{", b"[]", b"null\n", b"\xff\xfe\x00", b'{"step": 1}\n', b'{"step": "1", "loss": 2}\n', b'{"step": 1, "loss": NaN, "seconds": Infinity, "max_steps": -3}\n', b'{"step": 1, "loss": 1e400}\n', b'{"step": 3, "alarm": null, "samples": [1, {}]}\n' * 3,
           b'{"step": 1, "samples": "x", "seconds": "y", "num_tokens": []}\n', b"[" * 100_000, b'{"status": 3}', b'{"status": "running", "host": null, "pid": "x"}', b'{"status": "running", "pid": -1}']


def made_up(folder, **facts):
    "A run folder with as little as it can have; begun by this process, so it is alive"
    folder.mkdir()
    write_json(folder / "run.json", dict(status="running", **owner()) | facts)
    (folder / "recipe.yaml").write_text(to_yaml(make("laptop")))
    return folder


def shown(folder):
    "Everything that is made of a run folder"
    state = look(folder)
    face = monitor.Face(folder)
    return state, picture(state), bundle(state), sentence(state), *(face.parts[n].value for n in ("said", "notes", "picture"))


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "log.txt", "comparison.json"])
@pytest.mark.parametrize("damage", GARBAGE, ids=range(len(GARBAGE)))
def test_damage_is_told_and_hides_nothing_else(tmp_path, name, damage):
    folder = made_up(tmp_path / "run", status="done")
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0, "loss": 2.0}\n')
    (folder / name).write_bytes(damage)
    assert shown(folder)[0].status in ("done", "unreadable", "died", "running") or name == "run.json"


@budget(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["step", "seconds", "loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "memory_bytes", "max_steps", "eval_runtime", "alarm", "text", "samples"]),
                                st.one_of(st.none(), st.integers(-10**20, 10**20), st.floats(), st.text(max_size=5), st.booleans(), st.lists(st.integers(), max_size=2))), max_size=12))
@example([dict(step=0, loss=1.2e306), dict(step=1, loss=-1.7e308), dict(step=2, loss=1.7e308)])
@example([dict(step=0, loss=5e-324)])
def test_any_log_can_be_drawn(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    (folder / "run.json").write_text('{"status": "done"}')
    drawn = shown(folder)[1]
    own = re.sub(r'(fill="#d63a3a">)[^<]*', r"\1", drawn.partition(">")[2]).lower()  # an alarm of a damaged log may be called anything
    assert drawn.startswith("<svg") and "nan" not in own and "inf" not in own.replace("info", "")


def test_markup_from_rows_and_models_is_text(tmp_path):
    evil = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    folder = made_up(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(json.dumps(dict(step=1, alarm=evil, text=evil)) + "\n" + json.dumps(dict(step=1, loss=1.0, samples=[dict(prompt=evil, answer=evil, reference=evil)])) + "\n")
    (folder / "log.txt").write_text(f"4/5 {evil}\n{evil}\n")
    note(folder, status="failed", error=evil)
    state, face = look(folder), monitor.Face(folder)
    for text in (picture(state, str(state)), bundle(state)["image/svg+xml"], *(face.parts[n].value for n in ("said", "notes", "picture"))): assert "&lt;img" in text and "<img" not in text and "<script" not in text


def test_a_log_is_read_on_and_read_again_after_going_on(tmp_path):
    log = tmp_path / "metrics.jsonl"
    line = lambda s, t: json.dumps(dict(step=s, seconds=t)) + "\n"
    log.write_text("".join(line(s, s) for s in range(1, 9)))
    events = Events(tmp_path)
    assert len(events.read()) == 8
    with open(log, "a") as f: f.write(line(9, 9)[:-4])
    assert len(events.read()) == 8
    kept = tmp_path / "kept"  # the log of checkpoint 4, put back, and two steps more than before
    kept.write_text("".join(line(s, s) for s in range(1, 5)) + "".join(line(s, s + 50) for s in range(5, 12)))
    os.replace(kept, log)
    assert [(e["step"], e["seconds"]) for e in events.read()][-1] == (11, 61)


@pytest.fixture
def displayed(monkeypatch):
    "What a monitor shows, in a front end that draws widgets"
    seen = []
    monkeypatch.setattr(monitor, "display", lambda *a, **k: seen.append((a, k)))
    kernel = types.SimpleNamespace(get_parent=lambda: dict(metadata=dict(cellId="a")))
    monkeypatch.setattr(monitor, "get_ipython", lambda: types.SimpleNamespace(kernel=kernel))
    return seen


def test_a_thread_looks_on_until_it_is_closed(tmp_path, displayed):
    folder = made_up(tmp_path / "run")
    face = monitor.attach(folder, every=0.02)
    face._ipython_display_()
    assert len(displayed) == 1 and displayed[0][0][0] is face.parts["box"]
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0, "loss": 2.0}\n{"step": 2, "seconds": 2.0, "loss": 1.5}\n')
    until(lambda: "polyline" in face.parts["picture"].value, "a curve", 10)
    note(folder, status="stopped")
    until(lambda: not face.parts["resume"].disabled, "the end", 10)
    note(folder, status="running")  # gone on with from elsewhere
    until(lambda: not face.parts["pause"].disabled, "that it goes on", 10)
    face.close()
    face._thread.join(10)
    assert not face._thread.is_alive()


def test_colab_has_no_thread(tmp_path, displayed, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    face = monitor.attach(made_up(tmp_path / "run"), every=0.02)
    face._ipython_display_()
    assert face._thread is None and len(displayed) == 1 and "watch()" in face.parts["message"].value
    threading.Timer(0.3, lambda: note(tmp_path / "run", status="stopped")).start()
    assert face.watch().status == "stopped" and not face.parts["resume"].disabled


def test_every_control_has_a_name_and_a_tip():
    face = monitor.Face()
    for name, (words, *_) in monitor.BUTTONS.items(): assert face.parts[name].description == words and len(face.parts[name].tooltip) > 10
    assert face.parts["bar"].description


def test_answers_on_the_way_change_nothing(one_thread, tiny_model, tiny_rows, tmp_path):
    "The same weights and the same curve, to the last bit, with and without answers in the log"
    import exact
    from finetune_nb.job import answer_along
    values = exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(lora_dropout=0.1)
    exact.run(values, tiny_model, tiny_rows, tmp_path / "silent")
    exact.run(values, tiny_model, tiny_rows, tmp_path / "answering", change=lambda trainer: answer_along(trainer, trainer.rows[1], 2, 8))
    exact.run(values, tiny_model, tiny_rows, tmp_path / "stopped", stop=5, change=lambda trainer: answer_along(trainer, trainer.rows[1], 2, 8))
    exact.run(values, tiny_model, tiny_rows, tmp_path / "stopped", resume=True, change=lambda trainer: answer_along(trainer, trainer.rows[1], 2, 8))
    lines = exact.curve(tmp_path / "answering")
    assert exact.weights(tmp_path / "silent") == exact.weights(tmp_path / "answering") == exact.weights(tmp_path / "stopped")
    assert [l for l in lines if "samples" not in l] == exact.curve(tmp_path / "silent") and lines == exact.curve(tmp_path / "stopped")
    shown = [l for l in lines if "samples" in l]
    assert [l["step"] for l in shown] == [l["step"] for l in lines if "eval_loss" in l] and all(len(l["samples"]) == 2 and l["samples"][0]["reference"].startswith("{") for l in shown)
