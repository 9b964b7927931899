"Runs that die, run elsewhere, begin together or are killed while their notebook is written; a gradient scaler through a stop; about 30 s"
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import exact
from conftest import until
from finetune_nb import folder as run_folders, runs
from finetune_nb.checkpoint import about
from finetune_nb.core import UserError, read_json, write_json
from finetune_nb.recipe import make

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import torture  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
HARD = dict(sigkill=lambda: os.kill(os.getpid(), signal.SIGKILL), exit=lambda: os._exit(1), paused=lambda: os.kill(os.getpid(), signal.SIGSTOP))


def renewed(folder): return (folder / "run.json").stat().st_mtime


def begun(place, end, monkeypatch):
    "(pid, folder) of a process that began a run, lives for a moment and then ends hard"
    monkeypatch.setattr(run_folders.beat, "__defaults__", (0.02,))
    folder = place / "run"
    def work():
        run_folders.begin(folder, make("laptop"))
        while not (place / "end").exists(): time.sleep(0.01)
        end()
        time.sleep(60)
    pid = torture.apart(work)
    until(lambda: (folder / "run.json").exists(), "the beginning", 20)
    return pid, folder


def elsewhere(folder, silent=0.0):
    "Make a run one of another machine, silent for some seconds"
    run_folders.note(folder, host="elsewhere")
    os.utime(folder / "run.json", (time.time() - silent,) * 2)


@pytest.mark.parametrize("how", HARD)
def test_the_heart_stops_with_the_process(how, tmp_path, monkeypatch):
    pid, folder = begun(tmp_path, HARD[how], monkeypatch)
    before = renewed(folder)
    until(lambda: renewed(folder) > before, "a sign of life", 20)
    assert runs.status(folder) == "running"
    (tmp_path / "end").touch()
    time.sleep(0.2)
    after = renewed(folder)
    time.sleep(0.2)
    assert renewed(folder) == after, "it goes on after its process"
    assert runs.status(folder) == ("running" if how == "paused" else "died")
    os.kill(pid, signal.SIGKILL)
    torture.ended(pid)
    assert runs.status(folder) == "died"
    elsewhere(folder, 299)
    assert runs.status(folder) == "running", "five minutes have not passed"
    elsewhere(folder, 301)
    assert runs.status(folder) == "stale" and [r["status"] for r in runs.runs(tmp_path)] == ["stale"]
    with pytest.raises(UserError, match="is stale"): runs.stop(folder)


def test_the_clock_is_the_file_systems(tmp_path, monkeypatch):
    "this machine's clock is an hour before or behind, and a live run elsewhere is still no stale one"
    folder = run_folders.begin(tmp_path / "run", make("laptop"))
    elsewhere(folder)
    now = time.time()
    for off in (-3600, 3600):
        monkeypatch.setattr(time, "time", lambda: now + off)
        assert runs.status(folder) == "running"
    assert sorted(p.name for p in folder.iterdir()) == ["environment.txt", "recipe.yaml", "run.json"], "asking leaves something"


def test_a_beat_makes_no_run_of_somebody_else_live(tmp_path):
    "another process took the folder over: the first one's heart stops"
    run_folders.note(tmp_path, status="running", **run_folders.owner())
    heart = run_folders.beat(tmp_path, every=0.01)
    assert heart.is_alive()
    run_folders.note(tmp_path, pid=1)
    heart.join(5)
    assert not heart.is_alive()


def test_a_stale_run_may_be_gone_on_with_and_a_live_one_not(tmp_path):
    folder = run_folders.begin(tmp_path / "run", make("laptop"))
    elsewhere(folder)
    with pytest.raises(UserError, match="in use"): runs._unused(folder)
    elsewhere(folder, 400)
    runs._unused(folder)


def test_kills_while_the_notebook_is_written(tmp_path):
    found = torture.notebooks(6, tmp_path, time.monotonic() + 60)
    assert (found["done"], found["invalid"], found["failed"], found["written_later"]) == (6, 0, [], 6) and found["in_the_middle_of_writing"]


def test_a_writer_that_is_not_atomic_is_found_out(tmp_path, monkeypatch):
    "a writer into the file itself, killed when half is written"
    here = os.getpid()
    def half(path, text):
        Path(path).write_text(text[:len(text) // 2])
        if os.getpid() != here: time.sleep(60)
    monkeypatch.setattr(runs, "write_atomic", half)
    monkeypatch.setattr(torture, "leftovers", lambda folder: list(Path(folder).iterdir()))
    monkeypatch.setattr(torture, "big_notebook", lambda *a, make=torture.big_notebook: make(4, 10_000))
    assert torture.notebooks(4, tmp_path, time.monotonic() + 60)["invalid"] >= 3  # the first one may be killed before it writes


def test_runs_begun_at_once(tiny_model, tiny_rows, tmp_path):
    found = torture.at_once(2, tmp_path, tiny_model, tiny_rows, time.monotonic() + 120, many=4)
    assert (found["done"], found["same"], found["failed"]) == (2, 2, [])


@pytest.mark.parametrize("harm", ["folder", "result", "leftover"])
def test_a_collision_is_found_out(harm, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", dict(status="done")), write_json(tmp_path / name / "metrics.json", 1)
    seen = lambda: torture.wrong_together(tmp_path, [0, 0], lambda p: read_json(p / "metrics.json"))
    assert seen() == []
    if harm == "folder": os.rename(tmp_path / "a", tmp_path / "b" / "a")
    if harm == "result": write_json(tmp_path / "a" / "metrics.json", 2)
    if harm == "leftover": (tmp_path / "a" / ".run.json.x").touch()
    assert seen()


@pytest.mark.parametrize("restored", [True, False])
def test_a_real_gradient_scaler_goes_through_a_stop(restored, tiny_model, tiny_rows, tmp_path):
    "PyTorch's own scaler for the CPU; without its state the scale would begin again"
    values = exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(lora_dropout=0.1)
    def scaled(trainer, restore=True):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        if not restore: trainer._load_scaler = lambda path: None
    run = lambda name, change=scaled, **more: exact.run(values, tiny_model, tiny_rows, tmp_path / name, change=change, **more)
    whole = run("whole")
    run("broken", stop=3)
    path = tmp_path / "broken" / "checkpoints" / "checkpoint-3"
    kept = torch.load(path / "scaler.pt", weights_only=True)
    assert (kept["scale"], kept["_growth_tracker"]) == (2.0**11, 1) and "scaler.pt" in about(path)["files"]
    resumed = run("broken", change=lambda t: scaled(t, restored), resume=True)
    same = resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert same == restored and whole.accelerator.scaler.get_scale() > 2.0**11
    if restored: assert exact.same(tmp_path / "whole", tmp_path / "broken") == []
