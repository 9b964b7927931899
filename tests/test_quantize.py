"Formats compared: really made and measured once; nothing held out calibrates; what is finished stays, what fails fails alone, what changed is measured again"
import json
import math

import pytest
import torch
from conftest import chat_rows, make_llama

from finetune_nb import compare_formats as room, format_job, measure_format
from finetune_nb.cli import main
from finetune_nb.compare_formats import compare_formats
from finetune_nb.core import Problem, UserError, read_json, write_json
from finetune_nb.data import save
from finetune_nb.export import open_run
from finetune_nb.formats import PURPOSES, Formats, front, high, unharmed
from finetune_nb.models import identity, load_tokenizer
from finetune_nb.quantize import FORMATS, general_passages
from finetune_nb.recipe import make, to_yaml
from finetune_nb.to_gguf import calibration_rows

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = dict(say=lambda line: None)
CANARY = "zyzzyva"


@pytest.fixture(scope="module")
def run(tmp_path_factory, frozen):
    "A run folder with an adapter that changes a small model; its tokenizer is one that llama.cpp knows"
    from peft import LoraConfig, get_peft_model
    place = tmp_path_factory.mktemp("quantize")
    tokenizer, model = load_tokenizer("smollm2-135m"), make_llama(vocab_size=49152, num_hidden_layers=2, attention_bias=False, mlp_bias=False, initializer_range=0.08)
    model.to(torch.bfloat16).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    adapted = get_peft_model(model.float(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for n, p in adapted.named_parameters():
        if "lora_B" in n: p.data.normal_(0, 0.1)
    adapted.save_pretrained(place / "run" / "adapter")
    settings = place / "run" / "adapter" / "adapter_config.json"
    write_json(settings, read_json(settings) | dict(base_model_name_or_path=str(place / "base")))
    rows = [r | dict(row=i) for i, r in enumerate(chat_rows())]
    for r in rows[16:]: r["prompt"][0]["content"] += f" {CANARY}"
    (place / "run" / "data").mkdir()
    save(rows[:16] + rows[20:], place / "run" / "data" / "train.jsonl")  # six held-out rows are in the training data too
    save(rows[16:], place / "run" / "data" / "eval.jsonl")
    (place / "run" / "recipe.yaml").write_text(to_yaml(make(model=str(place / "base"), data="home", max_new_tokens=6, max_length=400)))
    write_json(place / "run" / "run.json", dict(status="done", model=identity(str(place / "base"), None, load_tokenizer(str(place / "base")))))
    return place / "run"


# ---- the real thing, once

@pytest.fixture(scope="module")
def real(run, frozen):
    lines = []
    torch.set_num_threads(1)
    return compare_formats(run, "nf4,q8_0,q2_k-imatrix", rows=6, threads=1, say=lines.append), lines


def test_formats_are_really_made_and_measured(real, run):
    found, lines = real
    by = {r["format"]: r for r in found.done}
    assert list(by) == ["fp32", "nf4", "q8_0", "q2_k-imatrix"], found.rows
    assert by["fp32"]["kl"] == by["fp32"]["general_kl"] == 0 < by["q8_0"]["kl"] < by["nf4"]["kl"]
    for r in found.done:
        assert r["memory"] >= r["memory_running"] > 0 and r["load_seconds"] > 0 and r["tokens_per_s"] > 0 and r["prompt_per_s"] > 0 and r["task_score"] is not None and r["general_perplexity"] > 1
        assert {"prompt tokens", "row tokens", "start token twice", "KL to the trained model", "same top token", "kept of the fine-tune", "ends by itself", "task score"} <= {c["check"] for c in r["checks"]}
        assert [c["verdict"] for c in r["checks"][:3]] == ["pass"] * 3, "the format reads what the model read"
    assert by["q2_k-imatrix"]["fell_back"] and by["q8_0"]["bits_per_weight"] < 9 < by["fp32"]["bits_per_weight"] == 32
    assert by["nf4"]["types"].keys() == {"nf4", "16-bit"}
    told = next(l for l in lines if "disk needed" in l)
    assert "merged model" in told and "GGUF" in told
    assert not list((run / "quantize").rglob("*.gguf")) and not (run / "quantize" / "work" / "merged").exists(), "what was made is gone"


def test_the_result_is_written_and_can_be_read(real, run):
    kept = read_json(run / "quantize" / "formats.json", dict)
    assert Formats.from_json(kept) == Formats(json.loads(json.dumps(real[0].rows)), json.loads(json.dumps(real[0].facts)))
    assert {"format", "bits_per_weight", "bytes", "perplexity", "kl", "task_score", "tokens_per_s"} <= kept["rows"][0].keys() and set(kept["best"]) == set(PURPOSES)
    assert str(run.parent) not in (run / "quantize" / "formats.json").read_text()


def test_what_is_finished_is_not_done_again(real, run, monkeypatch):
    monkeypatch.setattr(room, "measure", lambda *a: pytest.fail("measured again"))
    monkeypatch.setattr(room, "merge", lambda *a, **k: pytest.fail("merged again"))
    again = compare_formats(run, "nf4,q8_0,q2_k-imatrix", rows=6, threads=1, **QUIET)
    assert again.rows == json.loads(json.dumps(real[0].rows))


def test_the_command_shows_all_of_it(real, run, capfd):
    "With nothing left to measure; the run's own data may be gone by then"
    formats = ["--formats", "nf4,q8_0,q2_k-imatrix", "--rows", "6", "--threads", "1"]
    assert main(["quantize", str(run), *formats, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert {"run", "rows", "best", "recommendations", "facts", "status", "report"} <= answer.keys() and answer["status"] == "done" and set(answer["best"]) == set(PURPOSES)
    page = (run / "quantize" / "report.html").read_text()
    assert answer["report"] == str(run / "quantize" / "report.html") and "image/png" in page and all(p in page for p in PURPOSES) and "q2_k-imatrix" in page
    assert set(read_json(run / "quantize" / "metrics.json")["formats"]) == {"fp32", "nf4", "q8_0", "q2_k-imatrix"}
    assert main(["quantize", str(run), *formats]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [l.split()[0] for l in lines[:5]] == ["format", "fp32", "nf4", "q8_0", "q2_k-imatrix"] and any(l.startswith("no quality loss seen: ") for l in lines) and lines[-1].startswith("report: ")


def test_a_format_whose_process_dies_is_told_by_its_signal(run, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    job = room.ask(open_run(run), tmp_path, 3, threads=1, calibrated=False).job
    monkeypatch.setattr(measure_format, "apart", lambda code, *rest: real_apart("import os; os.kill(os.getpid(), 11)", *rest))
    with pytest.raises(UserError, match="crashed .signal 11"): measure_format.measure(job | dict(model="x", format="nf4", reference=False), tmp_path / "log")


real_apart = measure_format.apart


# ---- the rest with invented figures: what is measured is not the question

KL = {"fp32": 0.0, "bf16": 1e-4, "q8_0": 1e-3, "nf4": 0.06, "q4_0": 0.08}


@pytest.fixture
def asked(run, tmp_path, monkeypatch):
    "The formats that were measured, in order; nothing is made and nothing really measured"
    seen, fail = [], {}

    def measure(job, log):
        name = job["format"]
        seen.append(name)
        if name in fail: raise fail[name]
        part = lambda rows: [[KL[name] * n * (1 + 0.1 * (i % 3)), n, 2.0 * n, n] for i, n in enumerate(len(measure_format.scored(r)) for r in rows)]
        if job["reference"]:
            for n in ("task.npy", "general.npy"): (room.Path(job["work"]) / n).write_bytes(b"x")
        said = [[[l for l in r["labels"] if l != -100][:-2], True] for r in job["task"]]
        size = int(1e6 * FORMATS[name].bits)
        return dict(load_seconds=1.0, memory=size, running=size, speed=dict(prompt=[9.0, 8.0, 10.0], generation=[9.0, 8.0, 10.0]), said=said, stops=[2], reads=None, device="cpu", compute="float32", threads=1, seconds=1.0, cpu_seconds=1.0,
                    stored=dict(bytes=size, bits_per_weight=float(FORMATS[name].bits), types={name: 1.0}, fell_back=[]), task=part(job["task"]), general=part(job["general"]))

    def make(asked, format, model, to, say):
        (to / f"{format.name}.gguf").write_text("made")
        return (to / f"{format.name}.gguf", {}) if format.engine == "llama.cpp" else (room.Path(model), {})
    monkeypatch.setattr(room, "measure", measure)
    monkeypatch.setattr(room, "make", make)
    go = lambda formats="bf16,nf4,q8_0,q4_0", **more: compare_formats(run, formats, tmp_path / "q", rows=more.pop("rows", 4), threads=1, **QUIET | more)
    return go, seen, fail, tmp_path / "q"


def status(found): return {r["format"]: r["status"] for r in found.rows}


def test_what_fails_fails_alone_and_is_tried_again(asked):
    go, seen, fail, folder = asked
    fail["nf4"] = UserError(Problem("process", "was ended by the system", "More memory"))
    found = go()
    assert status(found) == dict(fp32="done", bf16="done", nf4="failed", q8_0="done", q4_0="done") and "ended by the system" in next(r["why"] for r in found.rows if r["status"] == "failed")
    assert any("ended by the system" in t["size"] for t in found.table())
    fail.clear(), seen.clear()
    assert set(status(go()).values()) == {"done"} and seen == ["nf4"]


def test_an_interruption_keeps_what_is_finished(asked):
    go, seen, fail, folder = asked
    fail["q8_0"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt): go()
    assert {p.stem for p in (folder / "formats").iterdir()} == {"fp32", "bf16", "nf4"} and not list(folder.rglob("q8_0.gguf"))
    fail.clear(), seen.clear()
    go()
    assert seen == ["q8_0", "q4_0"]


def test_a_request_to_stop_is_heard_between_formats(asked):
    go, seen, _, folder = asked
    folder.mkdir()
    (folder / "stop").write_text("now")
    with pytest.raises(KeyboardInterrupt): go()
    assert seen == ["fp32"]


@pytest.mark.parametrize("change", ["rows", "model", "version", "reference", "damaged"])
def test_what_changed_is_measured_again(change, asked, monkeypatch, run):
    go, seen, _, folder = asked
    go(), seen.clear()
    more = {}
    if change == "rows": more = dict(rows=5)
    if change == "model": monkeypatch.setattr(format_job, "_model_key", lambda run: "another")
    if change == "version": monkeypatch.setattr(format_job, "_version", lambda package: "99")
    if change == "reference":  # is only needed for what is missing
        (folder / "work" / "task.npy").write_bytes(b"another")
        (folder / "formats" / "q4_0.json").unlink()
    if change == "damaged": (folder / "formats" / "q4_0.json").write_text('{"half')
    go(**more)
    assert seen == {"reference": ["fp32", "q4_0"], "damaged": ["q4_0"]}.get(change, ["fp32", "bf16", "nf4", "q8_0", "q4_0"])


def test_files_are_kept_if_asked(asked):
    go, _, _, folder = asked
    go(keep=True)
    assert {p.name for p in (folder / "files").glob("*.gguf")} >= {"q8_0.gguf", "q4_0.gguf"} and (folder / "work" / "merged" / "config.json").is_file()


def test_what_cannot_be_made_here_is_skipped_with_its_reason(asked, monkeypatch):
    monkeypatch.setattr(room, "missing", lambda f: Problem(f.name, "needs a program that is not there", "Run: pip install it") if f.engine == "bitsandbytes" else None)
    found = asked[0]()
    assert status(found)["nf4"] == "skipped" and "pip install it" in str(found.table())
    assert set(status(asked[0]()).values()) == {"done", "skipped"}


def test_too_little_disk_is_told_before_anything_is_written(asked, monkeypatch):
    from collections import namedtuple
    monkeypatch.setattr("finetune_nb.hardware.shutil.disk_usage", lambda path: namedtuple("usage", "total used free")(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="(?i)disk|free"): asked[0]()
    assert not asked[1] and not list(asked[3].rglob("*.json"))


# ---- no row that is measured calibrates

def test_no_held_out_row_calibrates(run):
    at = open_run(run)
    tokenizer = load_tokenizer(at.recipe.model)
    assert CANARY in (run / "data" / "train.jsonl").read_text(), "the control: held-out rows stand in the training data"
    texts = [tokenizer.decode(ids) for ids in calibration_rows(at, tokenizer, 1000)]
    assert len(texts) > 16 and not any(CANARY in t for t in texts)
    _, measured = general_passages()
    assert not any(m[:80] in t for m in measured for t in texts)


def test_calibrated_formats_need_training_rows(run, asked, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("quantize"))
    (tmp_path / "bare" / "data" / "train.jsonl").unlink()
    with pytest.raises(UserError, match="no training rows"): compare_formats(tmp_path / "bare", "q4_0-imatrix", rows=4, threads=1, **QUIET)
    assert status(compare_formats(tmp_path / "bare", "q4_0", rows=4, threads=1, **QUIET)) == dict(fp32="done", q4_0="done")


# ---- recommendations

def rows_of(**kls):
    return [dict(format=n, engine=FORMATS[n].engine, status="done", bytes=int(size * 1e6), bits_per_weight=8.0, kl=kl, kl_error=error, general_kl=2 * kl, general_kl_error=error, score=None, verdict="pass", tokens_per_s=speed, tokens_per_s_range=[speed, 0.9 * speed, 1.1 * speed]) for n, (size, kl, error, speed) in kls.items()]


def test_an_error_decides_not_a_figure():
    sure, unsure = rows_of(q5_k_m=(110, 0.006, 0.001, 50))[0], rows_of(q4_k_m=(100, 0.006, 0.003, 50))[0]
    assert unharmed(sure) and not unharmed(unsure) and Formats([sure, unsure]).recommend("no quality loss seen")["format"] == "q5_k_m"


def test_speeds_that_overlap_are_decided_by_likeness():
    rows = rows_of(q4_0=(90, 0.08, 0.001, 100), q8_0=(140, 0.001, 0.0001, 95), bf16=(270, 0.0, 0.0, 40))
    assert Formats(rows).recommend("fastest here")["format"] == "q8_0"
    assert Formats(rows_of(q4_0=(90, 0.08, 0.001, 200), q8_0=(140, 0.001, 0.0001, 95))).recommend("fastest here")["format"] == "q4_0"


def test_the_front_is_what_nothing_beats():
    rows = rows_of(q4_0=(90, 0.08, 0.001, 1), q4_k_m=(100, 0.02, 0.001, 1), nf4=(101, 0.06, 0.001, 1), q8_0=(140, 0.001, 0.0001, 1))
    assert [r["format"] for r in front(rows)] == ["q4_0", "q4_k_m", "q8_0"]
    for r in rows: assert (r not in front(rows)) == any(o["bytes"] <= r["bytes"] and o["kl"] <= r["kl"] and o is not r for o in rows)
    assert math.isinf(high(dict(kl=None)))


def test_a_lost_score_is_a_loss_whatever_the_divergence():
    row = rows_of(q8_0=(140, 0.001, 0.0001, 1))[0] | dict(score=dict(metric="exact", change=-0.2, change_low=-0.35, change_high=-0.05, allowed=0.1, n=40))
    assert not unharmed(row) and not unharmed(row | dict(score=None, verdict="fail"))
