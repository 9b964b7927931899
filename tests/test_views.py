"""The views on finished runs without a browser: real processes that quantize, export and answer; damage; texts of others; what papermill keeps; how much the browser is told.

About 50 s of computing, most of it one export and one comparison of formats by processes of their own.
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import ipywidgets as W
import nbformat
import pytest

from conftest import until
from finetune_nb.asking import Asker
from finetune_nb.compare_scores import Comparison
from finetune_nb.compare_view import FILTERS, CompareView, marked
from finetune_nb.core import UserError, read_json, write_json
from finetune_nb.data import save
from finetune_nb.evaluate import Scores
from finetune_nb.export_view import ExportView
from finetune_nb.folder import begin, finish
from finetune_nb.format_view import QuantView
from finetune_nb.recipe import make
from finetune_nb.runs_view import RunsView

ROOT = Path(__file__).resolve().parents[1]
RECORDED = read_json(ROOT / "bench/results/2026-11-25-quantize.json")["formats"]
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e"
ROOMS = ["hall", "bath", "shed", "attic"]


def scored(i, answer, loss, prompt):
    wanted = json.dumps(dict(intent="light", area=ROOMS[i % 4]))
    return dict(row=i + 1, prompt=prompt, reference=wanted, answer=answer, valid_json=answer.startswith("{"), right_label=answer == wanted, exact=answer == wanted, loss=loss, tokens=9)


def small_model(place):
    "(base, adapter): folders of a Llama of two layers with a tokenizer that llama.cpp knows, and of an adapter that changes what it says"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from finetune_nb.models import load_tokenizer
    tokenizer, _ = load_tokenizer("smollm2-135m"), torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.15))
    base.save_pretrained(place / "base"), tokenizer.save_pretrained(place / "base")
    get_peft_model(LlamaForCausalLM.from_pretrained(place / "base"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, lora_alpha=64, target_modules="all-linear")).save_pretrained(place / "adapter")
    return str(place / "base"), str(place / "adapter")


def finished(folder, model, rows=24, prompt="light in the {}", **settings):
    "A run folder as a run leaves it, with answers that were made up"
    folder = begin(folder, make("laptop", model=model[0], lora_r=4, **settings))
    shutil.copytree(model[1], folder / "adapter")
    wanted = lambda i: json.dumps(dict(intent="light", area=ROOMS[i % 4]))
    before = Scores([scored(i, wanted(i) if i == 3 else f"The {ROOMS[i % 4]} is lit.", 3.0 + i / 10, prompt.format(i)) for i in range(rows)])
    after = Scores([scored(i, wanted(i) if i % 3 else json.dumps(dict(intent="light", area="house")), 0.1 + i / 50, prompt.format(i)) for i in range(rows)])
    write_json(folder / "comparison.json", Comparison(before, after).to_json())
    write_json(folder / "scores.json", dict(before=before.to_json(), after=after.to_json()))
    save([dict(prompt=[dict(role="system", content="Answer in JSON."), dict(role="user", content=f"light in the {r} {n}")], completion=[dict(role="assistant", content=wanted(n))], row=n) for n, r in enumerate(ROOMS * 4)], folder / "data" / "eval.jsonl")
    shutil.copy(folder / "data" / "eval.jsonl", folder / "data" / "train.jsonl")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(dict(step=s, loss=3 / s) | (dict(eval_loss=3.2 / s) if s % 4 == 0 else {})) + "\n" for s in range(1, 13)))
    finish(folder, dict(before=before.metrics, after=after.metrics))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory): return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, model): return finished(tmp_path_factory.mktemp("views") / "rooms", model)


@pytest.fixture
def copy(run, tmp_path): return shutil.copytree(run, tmp_path / "rooms", ignore=shutil.ignore_patterns("exports", "quantize", "jobs"))


def compared(folder, rows=RECORDED["rows"]):
    "The recorded formats, as a comparison leaves them in a run"
    for r in rows: write_json(folder / "quantize" / "formats" / f"{r['format']}.json", dict(row=r))
    write_json(folder / "quantize" / "formats.json", RECORDED)
    return folder


def tree(widget):
    "A widget and all that it shows"
    yield widget
    for child in getattr(widget, "children", ()): yield from tree(child)


def texts(view): return "".join(w.value for w in tree(view.box) if isinstance(w, W.HTML))


def elsewhere(code): return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout


def answered_here(base, adapter, text, longest):
    "What the base and the trained model answer in this process"
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from finetune_nb.evaluate import generate
    from finetune_nb.models import load_tokenizer
    model, tokenizer, row = AutoModelForCausalLM.from_pretrained(base), load_tokenizer(base), [dict(prompt=[dict(role="user", content=text)])]
    before = generate(model, tokenizer, row, longest)[0]
    return [before, generate(PeftModel.from_pretrained(model, adapter), tokenizer, row, longest)[0]]


# ---- real processes

@pytest.mark.slow
def test_an_export_outlives_who_began_it_and_answers(run, model):
    "Begun in a process that ends at once, seen by another view, proven, asked, and held back by the dry run"
    elsewhere(f"from finetune_nb.export_view import ExportView\nview = ExportView({str(run)!r})\nview.levels.value = ['q8_0']\nview.rows.value = '4'\nview.make.click()\nassert view.jobs['export'].live or view.refresh(), view.made.value")
    view = ExportView(run)
    assert view.jobs["export"].live and view.make.disabled and not view.end.disabled, view.jobs
    with pytest.raises(UserError, match="has not ended"): view.export()
    assert view.watch().found, view.jobs["export"]
    [found] = view.value.found
    assert (found.name, found.verdict) == ("gguf-q8_0", found.certificate.verdict) and "loads" not in [c.check for c in found.certificate.checks], str(found.certificate)
    assert "llama-server -m" in found.commands["llama.cpp"] and "gguf-q8_0" in texts(view) and found.card.startswith("---")

    asker = Asker(run, threads=1)
    assert list(asker.who) == ["base", "trained", "gguf-q8_0"]
    asker.ask("light in the shed 2", longest=12)
    replies = asker.wait(90)
    asker.close()
    assert all("problem" not in r and 0 < r["tokens"] <= 12 and r["tokens_per_s"] > 0 for r in replies.values()), replies
    assert [replies[w]["text"] for w in ("base", "trained")] == answered_here(*model, "light in the shed 2", 12)
    assert replies["base"]["text"] != replies["trained"]["text"], "the adapter is never switched off, or never on"

    view.repo.value = "somebody/rooms"
    view.dry.click()
    view.watch()
    assert view.jobs["push"].answer["refused"] and view.send.disabled and "Would be refused" in view.sent.value


@pytest.mark.slow
def test_formats_are_measured_elsewhere_and_stopped(run):
    "Begun, seen from another process, stopped twice; what was measured stays and the view says so"
    view = QuantView(run)
    view.formats.value, view.rows.value, view.threads.value = ["bf16", "fp16", "int8", "nf4"], "4", "1"
    view.begin.click()
    assert view.mistakes == [] and view.refresh(), view.message.value
    other = "from finetune_nb.format_view import QuantView\nv = QuantView(%r)\nprint(v.begin.disabled, v.end.disabled)" % str(run)
    assert elsewhere(other).split() == ["True", "False"]
    until(lambda: not view.refresh() or view.value, "a format that is measured")
    assert view.command.live, view.command
    assert view.value.done[0]["format"] == "fp32" and view.bar.max == 5
    view.end.click()
    view.end.click()
    until(lambda: not view.refresh(), "the end", 60)
    assert view.command.status == "stopped" and view.value.done and not view.begin.disabled and "stopped" in view.said.value, (view.command, view.said.value)
    assert QuantView(run).rows.value == "4" and QuantView(run).formats.value == ("bf16", "fp16", "int8", "nf4")


def test_a_prompt_is_asked_from_the_view(copy):
    view = CompareView(copy, threads=1)
    assert view.system.value == "Answer in JSON." and list(view.whom) == ["base", "trained"]
    view.prompt.value = "  "
    view.send.click()
    assert "is empty" in view.replies.value
    view.prompt.value, view.longest.value, view.whom["trained"].value = EVIL, "6", False
    began = time.monotonic()
    view.send.click()
    assert time.monotonic() - began < 1 and "loading or answering" in view.replies.value, "the press waited for the answer"
    view.send.click()
    assert "is not answered yet" in view.replies.value
    worker = view.asker._process
    view.end.click()
    assert worker.poll() is not None, "the worker outlives its button"
    assert view.asker.replies == {"base": dict(problem="was closed before it answered")}
    view.close()


def test_a_worker_ends_with_who_asked(copy):
    pid = int(elsewhere(f"from finetune_nb.asking import Asker, _start\na = Asker({str(copy)!r}, threads=1)\n_start(a)\nprint(a._process.pid)"))
    from finetune_nb.folder import alive
    until(lambda: not alive(pid), "the end of the worker", 20)


# ---- what the browser is told

VIEWS = dict(compare="from finetune_nb.compare_view import CompareView\nview = CompareView({run!r})", runs="from finetune_nb.runs_view import RunsView\nview = RunsView([{run!r}])",
             quant="from finetune_nb.format_view import QuantView\nview = QuantView({run!r})", export="from finetune_nb.export_view import ExportView\nview = ExportView({run!r})")


def made(run): return dict(compare=CompareView(run), runs=RunsView([run]), quant=QuantView(run), export=ExportView(run))


def test_controls_are_labelled_and_share(copy):
    for name, view in made(compared(copy)).items():
        for w in tree(view.box):
            if isinstance(w, (W.Text, W.Textarea, W.Dropdown, W.Checkbox, W.SelectMultiple, W.Button, W.IntProgress)): assert w.description, (name, w)
            if isinstance(w, W.ToggleButtons): assert all(w._options_labels)
        told = len(view.kit.made) + len({id(w.layout) for w in view.kit.made}) + len({id(w.style) for w in view.kit.made if hasattr(w, "style")})
        assert told <= 65, f"the browser is told of {told} things by {name}"


def test_a_change_is_answered_at_once(copy):
    views = made(compared(copy))
    def cpu(change):
        start = time.process_time()
        change()
        return time.process_time() - start
    changes = [lambda: setattr(views["compare"].which, "value", "best"), views["compare"].next.click, lambda: setattr(views["compare"].against, "value", "each other"), lambda: setattr(views["quant"].part, "value", "on general text"), lambda: setattr(views["quant"].group, "value", "gguf"),
               lambda: setattr(views["export"].kinds, "value", ["merged", "adapter"]), lambda: setattr(views["export"].licence, "value", "mit")]
    spent = [cpu(c) for c in changes]
    assert max(spent) < 0.3, spent  # an alarm; the aim is a third of it


@pytest.fixture
def book(copy, tmp_path):
    cells = [f"{code.format(run=str(compared(copy)))}\nview" for code in VIEWS.values()] + ["import sys; print(*sorted({'torch', 'transformers'} & sys.modules.keys()), 'heavy')"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, tmp_path / "book.ipynb")
    return tmp_path / "book.ipynb"


def test_papermill_leaves_pictures_and_values(book, tmp_path):
    import papermill
    done = papermill.execute_notebook(str(book), str(tmp_path / "out.ipynb"), kernel_name="python3", progress_bar=False, cwd=str(ROOT))
    kinds = [[k for o in c.outputs for k in o.get("data", {})] for c in done.cells]
    text = ["".join(str(o.get("data", {}).get("text/plain", "")) + o.get("text", "") for o in c.outputs) for c in done.cells]
    assert not any("widget" in k for found in kinds for k in found) and "widgets" not in done.metadata
    for found in kinds[:3]: assert {"image/svg+xml", "image/png", "text/markdown"} <= set(found)
    assert "Better after than before" in text[0] and "rooms" in text[1] and "no quality loss seen | q5" in text[2] and "no exports" in text[3]
    assert text[4].strip() == "heavy"


def test_a_front_end_gets_widgets(book):
    "Asked by somebody who can answer, the views are widgets, few of them, and what is done to them is answered"
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT), env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        def ask(code):
            seen = []
            reply = client.execute_interactive(code, allow_stdin=True, output_hook=seen.append, timeout=60)
            assert reply["content"]["status"] == "ok", reply["content"]
            return seen
        for cell in nbformat.read(book, as_version=4).cells[:4]:
            seen = ask(cell.source)
            assert any("application/vnd.jupyter.widget-view+json" in m["content"]["data"] for m in seen if m["msg_type"] == "display_data")
            opened = sum(m["msg_type"] == "comm_open" for m in seen)
            assert 0 < opened <= 70, f"{opened} things for the browser to make"
        seen = ask("view.kinds.value = ['adapter', 'merged']")
        assert any("Makes merged, adapter" in str(m["content"]["data"].get("state")) or "no adapter" in str(m["content"]["data"].get("state")) for m in seen if m["msg_type"] == "comm_msg")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# ---- damage, and texts of others

DAMAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"rows": 3}', b'{"before": {}, "after": []}', b'{"checks": [1], "changes": {"exact": {}}}', b'{"pid": "x", "born": [], "host": 3, "arguments": 1, "began": "y"}', b"[" * 100_000]


@pytest.mark.parametrize("name", ["scores.json", "comparison.json", "metrics.json", "metrics.jsonl", "quantize/formats.json", "quantize/formats/q8_0.json", "quantize/run.json", "quantize/log.txt", "jobs/quantize/process.json", "jobs/export/process.json", "jobs/push/answer.json", "exports/x/export.json", "exports/x/certificate.json", "data/eval.jsonl"])
def test_damage_is_told_and_nothing_is_raised(copy, name):
    compared(copy)
    for damage in DAMAGE:
        for path, text in (("exports/x/export.json", '{"kind": "gguf", "bytes": 1}'), ("jobs/push/process.json", json.dumps(dict(pid=1, born=0.0, host="x", began=0, arguments=["push"]))), (name, damage)):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(text if isinstance(text, bytes) else text.encode())
        for view in made(copy).values():
            view.refresh()
            assert "Traceback" not in texts(view) and "failed</b>" not in texts(view)


def test_texts_of_others_are_only_text(tmp_path, model):
    run = compared(finished(tmp_path / "evil", model, prompt=EVIL + "{}", name="evil"))
    scores = read_json(run / "scores.json")
    for side in ("before", "after"):
        for r in scores[side]["rows"]: r["answer"] = r["reference"] = EVIL
    write_json(run / "scores.json", scores)
    (run / "quantize" / "log.txt").write_text(f"2 formats on 4 held-out rows\nformats 1/2 · {EVIL}: x\n{EVIL}\n")
    formats = read_json(run / "quantize" / "formats.json")
    for r in formats["rows"]: r |= dict(format=EVIL, why=EVIL)
    write_json(run / "quantize" / "formats.json", formats)
    folder = run / "exports" / "x"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(EVIL)
    write_json(folder / "export.json", dict(kind=EVIL, bytes=1))
    write_json(folder / "certificate.json", dict(verdict="pass", export=EVIL, kind=EVIL, run=EVIL, rows=1, facts={}, checks=[dict(check=EVIL, found=EVIL, verdict="pass", limit=EVIL, why=EVIL)]))
    for name in ("export", "push", "try"):
        write_json(run / "jobs" / name / "process.json", dict(pid=2**22, born=0.0, host=socket.gethostname(), began=0.0, arguments=[EVIL]))
        (run / "jobs" / name / "said.txt").write_text(EVIL)
        (run / "jobs" / name / "answer.json").write_text(json.dumps(dict(error=[dict(place=EVIL, problem=EVIL, fix=EVIL)])))
    views = made(run)
    for which in FILTERS: views["compare"].which.value = which
    views["compare"].against.value = "each other"
    for name, view in views.items():
        shown = texts(view)
        assert EVIL[:8] not in shown and "<script" not in shown and "\u202e" not in shown, name
        assert name == "runs" or "&lt;img" in shown, name


def test_marks_do_not_take_long():
    began = time.process_time()
    marked("a b c " * 5000, "c b a " * 5000), marked(" ".join(map(str, range(200))), " ".join(map(str, range(100, 300))))
    assert time.process_time() - began < 0.5
    assert re.sub("<[^>]+>", "", marked("x <y> z", "x <q> z")) == "x &lt;qy&gt; z"
