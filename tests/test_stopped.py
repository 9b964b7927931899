"A run that is killed, or stopped with Ctrl-C, tells the truth and goes on to the same bits"
import json
import os
import re
import signal
import time

import pytest

from conftest import COMMAND, chat_rows, ended, settings, start, until, write_rows
from finetune_nb import runs
from finetune_nb.core import read_json, sha256_file

STEPS = 80


@pytest.fixture(scope="module")
def values(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    return dict(model=tiny_model, data=str(write_rows(folder / "rows.jsonl", chat_rows())), max_steps=STEPS, batch_size=2, log_steps=1, eval_steps=0, save_steps=4, threads=1, dtype="float32", lora_layers=2, lora_r=4, lora_alpha=8,
                lora_dropout=0.1, fast_path="false", rehearse="false", eval_fraction=0.2, max_eval_rows=4, compare="false", name="tiny")


def go(values, place): return start(*COMMAND, "run", "--preset", "laptop", *settings(**values), "--out", place, "--json", cwd=place)


def weights(folder): return sha256_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder): return [(l["step"], l["loss"]) for l in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in l]


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    "A run that nobody stopped"
    place = tmp_path_factory.mktemp("whole")
    code, out, err = ended(go(values, place))
    assert code == 0, err[-3000:]
    return place / json.loads(out)["run"]


def wait_for(process, place, steps):
    "The run folder, once so many steps are logged"
    for _ in range(6000):
        found = [p for p in place.iterdir() if (p / "metrics.jsonl").exists()]
        if found and len(losses(found[0])) >= steps: return found[0]
        if process.poll() is not None: raise AssertionError(process.communicate()[1][-3000:])
        time.sleep(0.02)
    raise AssertionError("nothing was trained in time")


@pytest.mark.parametrize("how", ["ctrl-c", "kernel killed", "all killed"])
def test_goes_on_to_the_same_bits(values, whole, tmp_path, how):
    process = go(values, tmp_path)
    folder = wait_for(process, tmp_path, 5)
    kernel = read_json(folder / "run.json")["pid"]
    if how == "ctrl-c": process.send_signal(signal.SIGINT)
    if how == "all killed": os.kill(process.pid, signal.SIGKILL)
    if how != "ctrl-c": os.kill(kernel, signal.SIGKILL)
    code, out, err = ended(process)
    if how == "ctrl-c": assert code == 130 and runs.status(folder) == "stopped" and "stopping after this step" in err and "finetune-nb resume" in err
    else:
        until(lambda: runs.status(folder) == "died", "the end of the kernel's process", 20)
        assert how == "all killed" or code == 1
    if how == "kernel killed": assert "This run died" in "".join(read_json(folder / "notebook.ipynb")["cells"][0]["source"])
    assert not (folder / "adapter").exists() and not (folder / "metrics.json").exists()
    code, out, err = ended(start(*COMMAND, "resume", folder, "--json", cwd=tmp_path))
    assert code == 0, err[-3000:]
    assert re.search(r"going on from checkpoint-\d+", err) and runs.status(folder) == "done"
    assert weights(folder) == weights(whole) and losses(folder) == losses(whole)
    assert (folder / "notebook-1.ipynb").exists() == (how != "all killed" or (folder / "notebook-1.ipynb").exists()) and len(read_json(folder / "run.json")["resumed"]) == 1


def test_other_rows_are_refused(values, tmp_path):
    own = tmp_path / "rows.jsonl"
    own.write_bytes(open(values["data"], "rb").read())
    process = go(values | dict(data=str(own)), tmp_path)
    folder = wait_for(process, tmp_path, 5)
    process.send_signal(signal.SIGINT)
    ended(process)
    own.write_text("".join(own.read_text().splitlines(True)[:-2]))
    code, out, err = ended(start(*COMMAND, "resume", folder, "--json", cwd=tmp_path))
    assert code == 2 and "Traceback" not in err and "rows" in err.lower() and runs.status(folder) == "failed"


def test_stop_asks_from_another_process(values, tmp_path):
    process = go(values, tmp_path)
    folder = wait_for(process, tmp_path, 5)
    code, out, err = ended(start(*COMMAND, "stop", folder, "--json", cwd=tmp_path))
    assert code == 0 and json.loads(out)["run"] == str(folder), err
    code, out, err = ended(process)
    assert code == 130 and runs.status(folder) == "stopped" and list((folder / "checkpoints").glob("checkpoint-*"))
