"Trackers: each is really run, on this machine and without an account, and what it kept is compared with the run's own curve"
import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import COMMAND, ended, settings, start

from finetune_nb import job
from finetune_nb.core import UserError
from finetune_nb.recipe import FIELDS, make
from finetune_nb.translate import TRACKERS, tracker_problems

KEY = "0123456789abcdef0123456789abcdef01234567"  # as keys of wandb look
CURVE = ("loss", "grad_norm", "learning_rate")
AWAY = "http://127.0.0.1:9"  # nobody listens at the discard port


def run(tracker, model, rows, at, **environment):
    "A run of four steps with a tracker: (exit code, its folder, what was said)"
    places = dict(HOME=at / "home", TRACKIO_DIR=at / "trackio", WANDB_API_KEY=KEY, WANDB_MODE="offline", MLFLOW_DISABLE_TELEMETRY="true")
    (at / "home").mkdir(parents=True, exist_ok=True)
    given = settings(model=model, data=rows, max_steps="4", log_steps="1", eval_steps="2", save_steps="0", rehearse="false", compare="false", threads="1", max_length="256", lora_layers="0", tracker=tracker, name="tracked")
    code, out, err = ended(start(*COMMAND, "run", *given, cwd=at, **{k: str(v) for k, v in (places | environment).items()}), 400)
    found = list((at / "runs").glob("tracked-*"))
    return code, found[0] if found else None, out + err


def curve(folder):
    "{(name, step): number} of metrics.jsonl"
    lines = [json.loads(l) for l in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(k, l["step"]): l[k] for l in lines for k in (*CURVE, "eval_loss") if k in l}


def told(name): return {f"train/{k}": k for k in CURVE}.get(name) or {"eval/loss": "eval_loss"}.get(name) or name


def in_tensorboard(at, folder):
    "(run's name, numbers, recipe) as TensorBoard reads them"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    numbers = {(told(tag), e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    return folder.name, numbers, json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])["recipe"]


def in_trackio(at, folder):
    "The same, of the SQLite file that trackio's page reads"
    with sqlite3.connect(at / "trackio/huggingface.db") as db:
        [(name, config)] = db.execute("select run_name, config from configs")
        logged = [json.loads(m) for (m,) in db.execute("select metrics from metrics order by id")]
    return name, {(told(k), l["train/global_step"]): v for l in logged for k, v in l.items()}, json.loads(config)["recipe"]


def in_mlflow(at, folder):
    "The same, of MLflow's SQLite store"
    with sqlite3.connect(at / "mlflow.db") as db:
        [(name, state)] = db.execute("select name, status from runs")
        assert state == "FINISHED"
        [(recipe,)] = db.execute("select value from params where key = 'recipe'")
        return name, {(k, step): v for k, step, v in db.execute("select key, step, value from metrics")}, recipe


def records(path):
    "The records of a .wandb file: after a head of 7 bytes, blocks of 32 KiB with pieces, each with a checksum, a length and a kind"
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7: at += left; continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def in_wandb(at, folder):
    "The same, of the file that `wandb sync` would send"
    [path] = at.glob("wandb/offline-run-*/run-*.wandb")
    name, numbers, recipe = None, {}, None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run": name = record.run.display_name
        if kind == "history":
            line = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            numbers |= {(told(k), line.get("train/global_step")): v for k, v in line.items()}
        for item in record.config.update if kind == "config" else record.run.config.update if kind == "run" else ():
            if item.key == "recipe": recipe = json.loads(item.value_json)
    return name, numbers, recipe


READERS = dict(tensorboard=in_tensorboard, trackio=in_trackio, mlflow=in_mlflow, wandb=in_wandb)


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_keeps_what_the_run_keeps(tracker, tiny_model, tiny_rows, tmp_path):
    if missing := tracker_problems(tracker): pytest.skip(str(missing[0]))
    code, folder, said = run(tracker, tiny_model, tiny_rows, tmp_path)
    assert code == 0 and "failed" not in said, said[-3000:]
    name, numbers, recipe = READERS[tracker](tmp_path, folder)
    ours = curve(folder)
    assert len(ours) == 3 * 4 + 2 and ours.keys() <= numbers.keys(), ours.keys() - numbers.keys()
    assert {k: numbers[k] for k in ours} == pytest.approx(ours, rel=1e-6), "TensorBoard keeps float32, the others all of it"
    assert name == folder.name and yaml.safe_load(recipe) == yaml.safe_load((folder / "recipe.yaml").read_text())
    hiding = [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert not hiding and KEY not in said, f"the planted key is in {hiding}"


def test_every_tracker_is_read_here(): assert READERS.keys() == TRACKERS.keys() == {*FIELDS["tracker"].annotation.__args__} - {"none"}


def test_the_ones_of_the_extra_are_installed():
    assert not [t for t in ("tensorboard", "trackio") if tracker_problems(t)], "make install brings them"


ENDED = "failed, and the training goes on without it"


@pytest.mark.parametrize("tracker, away, outcome", [
    ("trackio", dict(TRACKIO_SERVER_URL=f"{AWAY}/?write_token=x"), "saved locally"), ("mlflow", dict(MLFLOW_TRACKING_URI=AWAY, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"), ENDED),
    ("wandb", dict(WANDB_MODE="online", WANDB_API_KEY="", WANDB_BASE_URL=AWAY), ENDED)])
def test_a_server_that_is_away_does_not_end_a_training(tracker, away, outcome, tiny_model, tiny_rows, tmp_path):
    if missing := tracker_problems(tracker): pytest.skip(str(missing[0]))
    code, folder, said = run(tracker, tiny_model, tiny_rows, tmp_path, **away)
    assert code == 0, said[-3000:]
    assert outcome in (folder / "log.txt").read_text()
    assert len(curve(folder)) == 14


def test_a_tracker_that_breaks_in_the_middle(tiny_model, tiny_rows, tmp_path, monkeypatch, one_thread):
    "trackio's run is ended behind its back after the second step, so the library itself refuses the third"
    from transformers import TrainerCallback
    from finetune_nb import train
    from finetune_nb.models import load_tokenizer
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2: trackio.finish()

    recipe, said = make(model=tiny_model, data=tiny_rows, tracker="trackio", max_steps=4, log_steps=1, eval_steps=0, save_steps=0, best_at_end=False, dtype="float32", batch_size=4, accumulation=1, packing=False, threads=1, max_length=256, rehearse=False, fast_path=False), []
    _, choices = job.check(recipe)
    rows, held = job.rows(recipe)
    trainer = train.build(recipe, choices, job.model(recipe, choices), load_tokenizer(tiny_model), rows.rows, held.rows, tmp_path / "run", said.append)
    trainer.add_callback(Ends())
    train.fit(trainer, recipe, tmp_path / "run", said.append)
    assert trainer.state.global_step == 4 and (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    [warning] = [s for s in said if "failed" in s]
    assert warning.startswith("warning: trackio failed, and the training goes on without it; its curve is in metrics.jsonl. RuntimeError")
    assert {step for name, step in curve(tmp_path / "run") if name == "loss"} == {1, 2, 3, 4}


# ---- not installed

HIDE = "import sys\nfrom importlib.machinery import PathFinder\nfind = PathFinder.find_spec\nPathFinder.find_spec = classmethod(lambda cls, name, *a: None if name in {names!r} else find(name, *a))\n"


def without(at, *names):
    "PYTHONPATH of a Python that finds none of these modules"
    (at / "sitecustomize.py").write_text(HIDE.format(names=names))
    return dict(PYTHONPATH=str(at))


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_tracker_is_told_before_anything_is_loaded(tracker, tiny_rows, tmp_path):
    hidden = without(tmp_path, tracker)
    code, out, err = ended(start(*COMMAND, "run", *settings(model="no-such-model", data=tiny_rows, tracker=tracker), cwd=tmp_path, **hidden))
    assert code == 2 and f"tracker: is not installed (got '{tracker}'). Run: pip install {TRACKERS[tracker]}; or set tracker: none" in err
    assert "no-such-model" in err, "all problems are told at once"
    assert not (tmp_path / "runs").exists()
    doctor = json.loads(subprocess.run([*COMMAND, "doctor", "--json"], cwd=tmp_path, env=os.environ | hidden, capture_output=True, text=True).stdout)
    assert dict(package=tracker, needed_for=f"run with tracker {tracker}", install=f"pip install {TRACKERS[tracker]}") in doctor["missing"]


def test_the_stores_of_mlflow_are_asked_for_too(tmp_path):
    "Its small package alone fails when training begins"
    code = "from finetune_nb.translate import tracker_problems; print(tracker_problems('mlflow'))"
    for name in ("sqlalchemy", "alembic"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | without(tmp_path, name), capture_output=True, text=True)
        assert "pip install mlflow-skinny sqlalchemy alembic" in done.stdout, done.stderr


def test_a_folder_of_wandbs_is_not_wandb(tmp_path, monkeypatch):
    if not tracker_problems("wandb"): pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("wandb") and tracker_problems("wandb")


def test_no_tracker_is_no_problem(): assert tracker_problems("none") == []


def test_it_is_one_problem_among_all(tiny_model, tiny_rows):
    gone = next((t for t in TRACKERS if tracker_problems(t)), None)
    if not gone: pytest.skip("every tracker is installed")
    with pytest.raises(UserError, match="pip install"): job.check(make(model=tiny_model, data=tiny_rows, tracker=gone))
