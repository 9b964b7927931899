"The script that measures on a GPU, as far as it can be tested without one"
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_nb.core import read_json
from finetune_nb.known import known
from finetune_nb.stack import LOSSES

FOLDER = Path(__file__).resolve().parents[1] / "bench" / "gpu"
sys.path.insert(0, str(FOLDER))
import measure  # noqa: E402

GB = 10**9
GPU = dict(device="cuda", name="NVIDIA A100-SXM4-80GB", bf16=True, gpus=1, vram=round(79.15 * 2**30), ram=10**12, cores=16, capability="8.0")


def test_cases_are_of_known_models_and_all_different():
    for quick in (True, False):
        cases = measure.grid(quick)
        assert len({measure.name(c) for c in cases}) == len(cases) > 15
        assert all(known(c["model"]).total > 10**9 and c["loss"] in LOSSES for c in cases)
        models = [c["model"] for c in cases]
        assert sum(a != b for a, b in zip(models, models[1:])) == len(set(models)) - 1, "a model's weights would be written twice"
    assert len(measure.grid(True)) <= 24
    listed = subprocess.run([sys.executable, FOLDER / "measure.py", "--list", "--only", "qwen3-14b method=full"], capture_output=True, text=True, check=True).stdout
    assert listed.strip() == ""


def test_the_tiny_model_is_measured_on_the_cpu(tmp_path, capsys, one_thread):
    def here(arguments, timeout):
        sys.argv = ["measure.py", *arguments]
        measure.main()
        return 0, capsys.readouterr().out, ""
    argv, file = sys.argv, tmp_path / "result.json"
    try: measure.measure(measure.grid(cpu=True), file, call=here, say=lambda line: None)
    finally: sys.argv = argv
    result = read_json(file)
    assert [c["status"] for c in result["cases"].values()] == ["done", "done"] and result["machine"]["device"] == "cpu" and result["versions"]["torch"] and result["commit"]
    lora, full = result["cases"].values()
    assert lora["trained"] < full["trained"] == full["total"] and len(lora["seconds"]) == 5 and lora["tokens_per_second"] > 0
    assert set(lora["peaks"]) == {"load", "train", "evaluation", "save"} and full["recipe"]["gradient_checkpointing"]


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    cases, file, calls = measure.grid(cpu=True) + [measure.grid(cpu=True)[0] | dict(length=16)], tmp_path / "result.json", []
    def fake(arguments, timeout):
        calls.append(arguments[0])
        if arguments[0] == "--weights": return 0, "", ""
        number = sum(c == "--case" for c in calls)
        return [(None, "", ""), (-9, "", "Killed"), (0, "noise\n" + json.dumps(dict(status="out of memory", machine=GPU)), "")][min(number, 3) - 1]
    measure.measure(cases, file, call=fake, say=lambda line: None)
    slow, killed, full = read_json(file)["cases"].values()
    assert "longer than" in slow["why"] and "signal 9" in killed["why"] and full["status"] == "out of memory"
    assert read_json(file)["machine"] == GPU
    done = len(calls)
    measure.measure(cases, file, call=fake, say=lambda line: None)
    assert len(calls) == done, "what is there was measured again"
    measure.measure(cases, file, again=True, call=fake, say=lambda line: None)
    assert [c["status"] for c in read_json(file)["cases"].values()] == ["out of memory"] * 3


def test_a_case_that_hangs_is_ended():
    code, out, err = measure.start(["--list"], timeout=0.05)
    assert code is None


def test_prediction_against_measurement(monkeypatch):
    case = measure.grid(True)[0]
    recipe = measure.settings(case, "x").model_dump() | {}
    recipe.pop("model")
    one = dict(case=case, recipe=recipe, status="done", peaks=dict(train=dict(allocated=10 * GB, reserved=12 * GB, process=13 * GB)))
    result = dict(machine=GPU, cases=dict(a=one, b=one | dict(status="out of memory"), c=one | dict(status="failed")))
    span = SimpleNamespace(low=9 * GB, expected=11 * GB, high=11.5 * GB)
    asked = []
    planner = SimpleNamespace(setup=lambda recipe, machine, shapes, **changes: asked.append((recipe.batch_size, changes)), plan=lambda shapes, setup, card: SimpleNamespace(allocated=span, reserved=span, process=span, fits=True))
    monkeypatch.setitem(sys.modules, "finetune_nb.memory", planner)
    rows = measure.compare(result)
    assert [(r["number"], r["right"]) for r in rows] == [("allocated", True), ("reserved", False), ("process", False), ("fits", False)]
    assert rows[0]["error"] == pytest.approx(0.1) and asked[0] == (4, {"loss": "trl-1.16"})


def test_the_planner_answers_for_every_case():
    "The page asks the real planner; whatever it says, it must take every case of the grid"
    cases = measure.grid(True)
    def one(case):
        recipe = measure.settings(case, "x").model_dump()
        recipe.pop("model")
        return dict(case=case, recipe=recipe, status="done", peaks=dict(train=dict(allocated=10 * GB, reserved=12 * GB, process=13 * GB)))
    rows = measure.compare(dict(machine=GPU, cases={measure.name(c): one(c) for c in cases}))
    assert len(rows) == 3 * len(cases) and all(0 < r["predicted"][0] <= r["predicted"][1] <= r["predicted"][2] < 300 * GB for r in rows)
