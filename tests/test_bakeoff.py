"The bake-off: nothing leaks, what fails fails alone, what is finished stays, the budget is kept, and the page tells all of it"
import json
import re
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import chat_rows, write_rows
from finetune_nb import bakeoff as room, measured, prepared, report, rounds, runs
from finetune_nb.arms import ARMS, Arm, asked_by
from finetune_nb.bakeoff import ADDRESSES, OPTIONS, PRICES, Bakeoff, bakeoff
from finetune_nb.core import UserError, read_json
from finetune_nb.endpoint import Endpoint
from finetune_nb.measured import Budget
from finetune_nb.prepared import Plan, prepare
from finetune_nb.recipe import FIELDS, make

ROOT = Path(__file__).resolve().parents[1]
CANARY = "zyzzyva"
QUIET = dict(say=lambda line: None)
ALL = ("prompt", "rag", "few-shot-fixed", "few-shot", "few-shot+rag", "finetune", "finetune+rag")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch): monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Rows of a tiny task, and a document a room; every held-out answer carries a canary"
    place, rows = tmp_path_factory.mktemp("bakeoff"), chat_rows()
    for r in rows: r["prompt"].insert(0, {"role": "system", "content": "Answer in JSON."})
    for r in rows[14:]: r["completion"][0]["content"] = json.dumps(json.loads(r["completion"][0]["content"]) | {"word": CANARY})
    (place / "documents").mkdir()
    for name in ("kitchen", "hall", "attic"): (place / "documents" / f"{name}.txt").write_text(f"The {name} has a lamp, a heater and a radio.\n")
    return dict(data=str(write_rows(place / "train.jsonl", rows[:14])), eval_data=str(write_rows(place / "eval.jsonl", rows[14:]))), str(place / "documents")


@pytest.fixture(scope="module")
def recipe(files, tiny_model):
    return make("laptop", model=tiny_model, **files[0], max_steps=3, batch_size=4, lora_r=4, lora_alpha=8, lora_layers=2, threads=1, dtype="float32", max_new_tokens=6, max_length=400, rehearse=False, name="tiny")


@pytest.fixture
def plan(files): return dict(documents=files[1], timed=1, shots=2, room=200, curve=False)


def run(recipe, plan, folder, **more):
    lines = []
    found = bakeoff(recipe, folder, say=lines.append, **plan | more)
    return found, lines


def status(found): return {a["arm"]: a["status"] for a in found.arms}


def arm_file(folder, name): return Path(folder) / "arms" / f"{name.replace(':', '-')}.json"


def test_no_arm_sees_a_held_out_row(recipe, plan):
    setup = prepare(recipe, Plan(**plan), **QUIET)
    assert [a.name for a in setup.arms] == list(ALL) and all(CANARY in r["completion"][0]["content"] for r in setup.held.rows)
    for arm in setup.arms:
        for r in asked_by(arm, setup.parts, setup.held.rows): assert CANARY not in json.dumps(r["prompt"])
        for r in asked_by(arm, setup.parts, setup.train.rows): assert CANARY not in json.dumps(r)
    own = [(Arm("few-shot"), r, asked_by(Arm("few-shot"), setup.parts, [r])[0]["prompt"]) for r in setup.held.rows]
    assert all(r["prompt"][-1]["content"] not in [m["content"] for m in shown[:-1]] for _, r, shown in own)
    trained = asked_by(Arm("finetune+rag"), setup.parts, setup.train.rows)
    assert all(r["prompt"][-1]["content"].startswith("Known:\n- The ") for r in trained)


def test_all_arms_then_nothing_twice_then_only_what_is_stale(recipe, plan, files, tmp_path, one_thread):
    found, lines = run(recipe, plan, tmp_path, curve=True)
    assert status(found) == dict.fromkeys(ALL, "done") and found.more and [p["rows"] for p in found.more.points] == [4, 7, 14]
    assert all(a["latency"]["batch"] == 1 and a["prompt_tokens"] > 5 and a["memory"] > 1e7 and a["cost"]["per_1000"] > 0 for a in found.arms)
    assert [bool(a["train"]) for a in found.arms] == [ARMS[n][2] for n in ALL]
    assert "Known:" in found.shown["rag"] and "Known:" not in found.shown["prompt"] and found.shown["finetune"].endswith("<|im_start|>assistant\n")
    assert Bakeoff.from_json(read_json(tmp_path / "bakeoff.json")).to_json() == read_json(tmp_path / "bakeoff.json")
    assert any(f"arm {len(ALL)}/{len(ALL) + 2} finetune+rag" == l for l in lines)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "arms").iterdir()}
    again, lines = run(recipe, plan, tmp_path, curve=True)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "arms").iterdir()} == times and sum("done before" in l for l in lines) == len(ALL) + 2
    assert again.arms == found.arms and not any("looked at" in n for n in again.verdict.notes)
    other = Path(files[1]).parent / "other"
    other.mkdir(exist_ok=True)
    (other / "new.txt").write_text("The kitchen, the hall and the attic are dark.")
    _, lines = run(recipe, plan | dict(documents=str(other)), tmp_path)
    assert {l.split(":")[0] for l in lines if "done before" in l} == {"prompt", "few-shot-fixed", "few-shot", "finetune"}
    found, lines = run(recipe.model_copy(update=dict(learning_rate=1e-3, name="renamed", log_steps=2)), plan | dict(documents=str(other)), tmp_path)
    assert {l.split(":")[0] for l in lines if "done before" in l} == set(ALL) - {"finetune", "finetune+rag"}
    assert any("looked at 3 times" in n for n in found.verdict.notes)


def test_an_arm_that_fails_or_runs_out_of_memory_fails_alone(recipe, plan, tmp_path, monkeypatch, one_thread):
    import torch
    whole = rounds.run_arm
    def broken(setup, base, arm, *rest, **more):
        if arm.name == "rag": raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if arm.name == "few-shot": raise ZeroDivisionError("made to fail")
        return whole(setup, base, arm, *rest, **more)
    monkeypatch.setattr(rounds, "run_arm", broken)
    found, _ = run(recipe, plan, tmp_path, arms="prompt,rag,few-shot,finetune")
    assert status(found) == dict(prompt="done", rag="failed", **{"few-shot": "failed"}, finetune="done")
    assert any("rag failed: ran out of memory" in n for n in found.notes) and any("made to fail" in n for n in found.notes)
    assert set(found.verdict.arms) == {"prompt", "finetune"} and "made to fail" in read_json(arm_file(tmp_path, "few-shot"))["traceback"]
    monkeypatch.setattr(rounds, "run_arm", whole)
    found, lines = run(recipe, plan, tmp_path, arms="prompt,rag,few-shot,finetune")
    assert set(status(found).values()) == {"done"} and sum("done before" in l for l in lines) == 2


def test_all_arms_failing_is_told_as_such(recipe, plan, tmp_path, monkeypatch):
    def broken(*a, **k): raise MemoryError
    monkeypatch.setattr(rounds, "run_arm", broken)
    with pytest.raises(UserError, match="prompt: failed: ran out of memory"): run(recipe, plan, tmp_path, arms="prompt,few-shot")


def test_interrupted_it_keeps_what_is_finished(recipe, plan, tmp_path, monkeypatch, one_thread):
    whole, seen = rounds.trained, []
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(rounds, "trained", stop)
    with pytest.raises(KeyboardInterrupt): run(recipe, plan, tmp_path, arms="prompt,few-shot,finetune")
    assert {p.stem for p in (tmp_path / "arms").iterdir()} == {"prompt", "few-shot"}
    monkeypatch.setattr(rounds, "trained", whole)
    found, lines = run(recipe, plan, tmp_path, arms="prompt,few-shot,finetune")
    assert set(status(found).values()) == {"done"} and sum("done before" in l for l in lines) == 2


def test_a_half_written_result_is_done_again(recipe, plan, tmp_path):
    run(recipe, plan, tmp_path, arms="prompt,few-shot")
    path = arm_file(tmp_path, "prompt")
    path.write_text(path.read_text()[:200])
    _, lines = run(recipe, plan, tmp_path, arms="prompt,few-shot")
    assert [l.split(":")[0] for l in lines if "done before" in l] == ["few-shot"]


def test_the_budget_is_kept_and_what_it_left_out_is_named(recipe, plan, tmp_path, monkeypatch, one_thread):
    slow = measured.generate
    def generate(model, tokenizer, rows, *rest, **more):
        time.sleep(0.01 * len(rows) * (10 if any("Known:" in m["content"] for r in rows for m in r["prompt"]) else 1))
        return slow(model, tokenizer, rows, *rest, **more)
    monkeypatch.setattr(measured, "generate", generate)
    from finetune_nb import train
    fit = train.fit
    def slowly(trainer, *rest, **more):
        from transformers import TrainerCallback
        class Slow(TrainerCallback):
            def on_step_begin(self, *a, **k): time.sleep(0.3)
        trainer.callback_handler.callbacks.insert(0, Slow())
        return fit(trainer, *rest, **more)
    monkeypatch.setattr(train, "fit", slowly)
    start = time.monotonic()
    setup = prepare(recipe.model_copy(update=dict(max_steps=200)), Plan(**plan, arms="prompt,finetune", budget_minutes=0.2), **QUIET)
    results = rounds.run_arms(setup, tmp_path, Budget(0.2), **QUIET)
    assert time.monotonic() - start < 12 and results["prompt"]["status"] == "done" and results["finetune"]["status"] == "skipped" and "would take another" in results["finetune"]["why"]
    found = room.conclude(setup, results)
    assert status(found) == dict(prompt="done", finetune="skipped") and any("finetune was left out for time: training and answering would take another 5" in n or "finetune was left out for time: training and answering would take another 1m" in n for n in found.notes)
    base = rounds.Base(setup)
    late = rounds.attempt(setup, base, Arm("rag"), "rag", tmp_path, Budget(1 / 60), **QUIET)
    assert late["status"] == "skipped" and "answering 4 rows" in late["why"]


@pytest.mark.parametrize("change", [dict(), dict(method="full", lora_layers=0), dict(lora_init="pissa")], ids=["lora", "full", "pissa"])
def test_the_base_is_as_it_was_after_a_trained_arm(recipe, plan, tmp_path, change, one_thread):
    setup = prepare(recipe.model_copy(update=change), Plan(**plan), **QUIET)
    base = rounds.Base(setup)
    before = {n: p.detach().clone() for n, p in base.get().named_parameters()}
    result = rounds.attempt(setup, base, Arm("finetune"), "finetune", tmp_path, Budget(), **QUIET)
    after = dict(base.get().named_parameters())
    assert result["status"] == "done", result.get("traceback")
    assert after.keys() == before.keys() and all(after[n].equal(p) for n, p in before.items())


class Server(BaseHTTPRequestHandler):
    "An OpenAI-compatible server that repeats the question; it hangs on what the test says"
    hang = ""
    def log_message(self, *a): pass
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"]
        if self.hang and self.hang in asked[-1]["content"]: time.sleep(1.5)
        body = json.dumps(dict(choices=[dict(message=dict(content=asked[-1]["content"]))], usage=dict(prompt_tokens=len(asked), completion_tokens=3))).encode()
        try:
            self.send_response(200), self.send_header("content-length", str(len(body))), self.end_headers(), self.wfile.write(body)
        except OSError: pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield Endpoint(f"http://127.0.0.1:{httpd.server_port}/v1", "echo", timeout=0.5, retries=0, pause=0)
    Server.hang = ""
    httpd.shutdown()


def test_an_endpoint_is_an_arm(recipe, plan, tmp_path, server):
    found, _ = run(recipe, plan, tmp_path, endpoint=server, arms="prompt,endpoint:prompt,endpoint:few-shot+rag")
    far = {a["arm"]: a for a in found.arms}["endpoint:few-shot+rag"]
    assert set(status(found).values()) == {"done"} and far["output_tokens"] == 3 and far["cost"]["per_1000"] == pytest.approx((far["prompt_tokens"] * 3 + 3 * 15) / 1000)
    rows = read_json(arm_file(tmp_path, "endpoint:few-shot+rag"))["rows"]
    assert len(rows) == 12 and all(r["answer"].startswith("Known:") for r in rows) and found.verdict.arms["endpoint:few-shot+rag"]["kind"] == "rag"


def test_an_endpoint_that_times_out_is_reported_and_the_rest_goes_on(recipe, plan, tmp_path, server):
    Server.hang = "radio"
    found, _ = run(recipe, plan, tmp_path / "some", endpoint=server, arms="prompt,endpoint:prompt")
    arm = {a["arm"]: a for a in found.arms}["endpoint:prompt"]
    missing = [r for r in read_json(arm_file(tmp_path / "some", "endpoint:prompt"))["rows"] if r["answer"] is None]
    assert arm["status"] == "done" and missing and "did not answer within 0.5 s" in missing[0]["error"] and found.verdict.arms["endpoint:prompt"]["failed"] == len(missing)
    Server.hang = " "
    found, _ = run(recipe, plan, tmp_path / "all", endpoint=server, arms="prompt,few-shot,endpoint:prompt")
    assert status(found)["endpoint:prompt"] == "failed" and any("endpoint:prompt failed" in n and "did not answer within" in n for n in found.notes) and set(found.verdict.arms) == {"prompt", "few-shot"}


BAD = {
    "same file": (lambda f, d, t: dict(eval_data=f["data"]), {}, "is the file that is trained on"),
    "same rows": (lambda f, d, t: dict(eval_data=str(write_rows(t / "copy.jsonl", [json.loads(l) for l in Path(f["data"]).read_text().splitlines()]))), {}, "only rows that are in the training data"),
    "too few held out": (lambda f, d, t: dict(max_eval_rows=4), {}, "fewer than 10 can show no difference at all"),
    "no answers": (lambda f, d, t: dict(eval_data=str(write_rows(t / "none.jsonl", [dict(prompt="a", completion="")] * 3))), {}, "is empty"),
    "plain text": (lambda f, d, t: dict(data=str(write_rows(t / "a.jsonl", [dict(text=f"text {n}") for n in range(30)])), eval_data=str(write_rows(t / "b.jsonl", [dict(text=f"other {n}") for n in range(30)]))), dict(documents=""), "plain text without questions"),
    "empty documents": (lambda f, d, t: {}, dict(documents=lambda t: str(write_rows(t / "empty.txt", []))), "has no text in it"),
    "documents with the rows": (lambda f, d, t: {}, dict(documents=lambda t: str(t.parent)), None),
    "several processes": (lambda f, d, t: dict(processes=2), {}, "trains in one process"),
    "unknown arm and metric": (lambda f, d, t: {}, dict(arms="finetun"), "Did you mean 'finetune'"),
    "metric": (lambda f, d, t: {}, dict(metric="rouge"), "is unknown"),
    "judge without endpoint": (lambda f, d, t: {}, dict(metric="judge"), "needs a model to ask"),
    "model": (lambda f, d, t: dict(model="nowhere/at-all/x"), {}, "model"),
    "endpoint without an address": (lambda f, d, t: {}, dict(arms="endpoint:prompt,prompt"), "there is no endpoint"),
}


@pytest.mark.parametrize("what", [b for b in BAD if b != "documents with the rows"])
def test_bad_input_is_a_sentence_with_a_fix(what, recipe, plan, files, tmp_path):
    change, more, says = BAD[what]
    more = {k: v(tmp_path) if callable(v) else v for k, v in more.items()}
    with pytest.raises(UserError, match=re.escape(says)) as e: bakeoff(recipe.model_copy(update=change(files[0], files[1], tmp_path)), tmp_path / "out", **QUIET, **plan | more)
    assert all(p.fix for p in e.value.problems) and not (tmp_path / "out").exists()


def test_documents_that_hold_the_rows_are_refused(recipe, plan, files, tmp_path):
    with pytest.raises(UserError, match="would be looked up"): bakeoff(recipe, tmp_path / "out", **QUIET, **plan | dict(documents=str(Path(files[0]["data"]).parent)))
    (tmp_path / "told.md").write_text("\n\n".join(f"{r['prompt'][-1]['content']} {r['completion'][0]['content']}" for r in map(json.loads, Path(files[0]["eval_data"]).read_text().splitlines())))
    setup = prepare(recipe, Plan(**plan | dict(documents=str(tmp_path / "told.md"), passage_words=60)), **QUIET)
    assert any("word for word" in n for n in setup.notes)


def test_leaked_rows_do_not_judge(recipe, plan, files, tmp_path):
    rows = [json.loads(l) for f in files[0].values() for l in Path(f).read_text().splitlines()]
    leaky = recipe.model_copy(update=dict(eval_data=str(write_rows(tmp_path / "eval.jsonl", rows[10:]))))
    found, _ = run(leaky, plan, tmp_path / "out", arms="prompt,few-shot")
    assert found.rows["held_out"] == 16 and found.verdict.rows <= 12 and any("stand in the training data too" in n for n in found.notes)


# ---- the page

def test_the_pipeline_takes_exactly_the_settings_there_are():
    cells = read_json(ROOT / "nbs" / "pipelines" / "bakeoff.ipynb")["cells"]
    names = re.findall(r"^(\w+): \w+ = ", "".join(next(c for c in cells if "parameters" in c["metadata"].get("tags", []))["source"]), re.M)
    assert names == [*runs.OWN, *OPTIONS[:-len(PRICES) - len(ADDRESSES)], *PRICES, *ADDRESSES, *FIELDS]


@pytest.fixture(scope="module")
def page(recipe, files, tmp_path_factory):
    "A bake-off by papermill, and once more in the same folder with a document changed; an attack in a row and in a document"
    place = tmp_path_factory.mktemp("page")
    rows = [json.loads(l) for l in Path(files[0]["eval_data"]).read_text().splitlines()]
    for r in rows: r["prompt"][-1]["content"] += " <script>alert(1)</script>"
    (place / "inventory.md").write_text("The kitchen has <script>alert(2)</script> a lamp.\n\nThe hall has a radio.")
    r, lines = recipe.model_copy(update=dict(eval_data=str(write_rows(place / "eval.jsonl", rows)))), []
    settings = dict(documents=str(place / "inventory.md"), timed=1, shots=2, room=400, arms="prompt,rag,finetune", curve=False)
    for _ in range(2): runs.run(r, name="bakeoff", folder=str(place / "run"), say=lines.append, **settings)
    report.build(place / "run")
    return place / "run", lines


def test_the_page_and_the_files_tell_everything(page):
    folder, lines = page
    assert {"run.json", "recipe.yaml", "metrics.json", "bakeoff.json", "notebook.ipynb", "report.html", "arms", "training"} <= {p.name for p in folder.iterdir()}
    found, facts = read_json(folder / "bakeoff.json"), read_json(folder / "run.json")
    assert runs.status(folder) == "done" and facts["pipeline"] == "bakeoff" and facts["parameters"]["arms"] == "prompt,rag,finetune"
    assert {a["arm"] for a in found["arms"]} == {"prompt", "rag", "finetune"} and len(found["pairs"]) == 3 and found["verdict"]["text"] and found["advice"]["approach"]
    assert sum("done before" in l for l in lines) == 3 and any(l.startswith("arm 3/3") for l in lines)
    html = (folder / "report.html").read_text()
    class Text(HTMLParser):
        text, scripts = "", 0
        def handle_starttag(self, tag, attrs): self.scripts += tag == "script"
        def handle_data(self, data): self.text += data
    parser = Text()
    parser.feed(html)
    assert not parser.scripts and "alert(1)" in parser.text and html.count("data:image/png") >= 2
    for words in ("The verdict", "finetune", "What the rules say", "Rows to look at", "Assumptions behind the costs", found["verdict"]["text"][:60]): assert words in parser.text
    metrics = read_json(folder / "metrics.json")
    assert metrics["verdict"] == found["verdict"]["answer"] and metrics["arms"]["prompt"]["answers"]


def test_a_misspelt_setting_stops_it(recipe, tmp_path):
    with pytest.raises(UserError, match="budget_minute"): runs.run(recipe, name="bakeoff", folder=str(tmp_path / "run"), **QUIET, budget_minute=3)
    assert runs.status(tmp_path / "run") == "failed"
