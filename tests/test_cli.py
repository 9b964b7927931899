"The command line's contract: exit codes, one JSON object, a sentence with a fix instead of a traceback, and runs that end in the middle"
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import COMMAND, NO_ANSWER, ended, save_model, settings, start, until, write_rows
from finetune_nb import cli, runs
from finetune_nb.core import read_json
from finetune_nb.recipe import load, make, to_yaml

TINY = dict(preset="fast", max_steps=2, threads=1, dtype="float32", lora_layers=2, lora_r=4, lora_alpha=8, compare="false", save_steps=0, name="tiny")
tiny = lambda **changes: settings(**{k: v for k, v in (TINY | changes).items() if k != "preset"})


def call(capsys, *argv):
    "(exit code, stdout, stderr) of the command in this process"
    try: code = cli.main(list(map(str, argv)))
    except SystemExit as e: code = e.code
    return (code, *capsys.readouterr())


def only_object(out):
    "The one JSON object that is all of stdout"
    value = json.loads(out)
    assert isinstance(value, dict) and out.count("\n") <= 1
    return value


# ---- mistakes that can be told at once

@pytest.fixture
def here(tmp_path, tiny_model, tiny_rows, monkeypatch):
    "A folder with every broken thing"
    (tmp_path / "broken.yaml").write_text("method: [lora\nlora_r: 8\n")
    (tmp_path / "tab.yaml").write_text("method:\tlora\n\tlora_r: 8\n")
    (tmp_path / "twice.yaml").write_text("seed: 1\nlora_r: 8\nseed: 2\n")
    (tmp_path / "list.yaml").write_text("- lora\n- qlora\n")
    (tmp_path / "typo.yaml").write_text("learnin_rate: 1e-3\nlora_R: 8\n")
    (tmp_path / "value.yaml").write_text("method: lroa\nlora_r: 0\nepochs: many\n")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights" / "config.json").write_text("{}")
    (tmp_path / "pickled").mkdir()
    for name in ("config.json", "pytorch_model.bin"): (tmp_path / "pickled" / name).write_text("{}")
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "recipe.yaml").write_text(to_yaml(make("fast")))
    (tmp_path / "failed" / "run.json").write_text('{"status": "failed"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


GOOD = ["run", "--preset", "fast", "-p", "model", "{model}", "-p", "data", "{rows}"]
LONG = "turn on the light in the kitchen " * 10
# what is typed, and what the answer must name
MISTAKES = {
    "no verb": ([], ["VERB"]),
    "unknown verb": (["rnu"], ["rnu", "run"]),
    "unknown option": (["run", "--presett", "fast"], ["--presett"]),
    "unknown preset": (["run", "--preset", "fats"], ["fats", "fast"]),
    "setting without a value": (["run", "-p", "data"], ["-p"]),
    "nothing to do": (["run"], ["recipe", "--demo"]),
    "unknown setting": ([*GOOD, "-p", "learnin_rate", "1e-3"], ["learnin_rate", "Did you mean 'learning_rate'"]),
    "two unknown settings": ([*GOOD, "-p", "learnin_rate", "1e-3", "-p", "lora_rank", "8"], ["learnin_rate", "lora_rank"]),
    "misspelt word": ([*GOOD, "-p", "method", "lroa"], ["method", "lroa", "'lora'"]),
    "misspelt scheduler": ([*GOOD, "-p", "scheduler", "cosin"], ["scheduler", "'cosine'"]),
    "word for a number": ([*GOOD, "-p", "lora_r", "sixteen"], ["lora_r", "sixteen"]),
    "word for a fraction": ([*GOOD, "-p", "learning_rate", "fast"], ["learning_rate", "fast"]),
    "number for a switch": ([*GOOD, "-p", "compare", "2"], ["compare", "bool"]),
    "fraction for a whole number": ([*GOOD, "-p", "batch_size", "2.5"], ["batch_size"]),
    "not a number": ([*GOOD, "-p", "learning_rate", ".nan"], ["learning_rate"]),
    "out of range": ([*GOOD, "-p", "lora_r", "0", "-p", "lora_dropout", "1"], ["lora_r", "at least 1", "lora_dropout", "below 1"]),
    "a list": ([*GOOD, "-p", "lora_targets", "[q_proj, v_proj]"], ["lora_targets"]),
    "conflict": ([*GOOD, "-p", "packing", "true", "-p", "group_by_length", "true"], ["group_by_length", "packing"]),
    "no such recipe": (["run", "nothere.yaml"], ["nothere.yaml", "not a file"]),
    "a folder as recipe": (["run", "no-weights"], ["no-weights"]),
    "broken YAML": (["run", "broken.yaml"], ["broken.yaml", "YAML"]),
    "tabs in YAML": (["run", "tab.yaml"], ["tab.yaml", "YAML"]),
    "key given twice": (["run", "twice.yaml"], ["seed", "twice"]),
    "list as recipe": (["run", "list.yaml"], ["list.yaml"]),
    "misspelt keys in a recipe": (["run", "typo.yaml"], ["learnin_rate", "learning_rate", "lora_R", "lora_r"]),
    "wrong values in a recipe": (["run", "value.yaml"], ["method", "lora_r", "epochs"]),
    "not text": (["run", "binary.yaml"], ["binary.yaml"]),
    "no such data": ([*GOOD[:-1], "nothere.jsonl"], ["nothere.jsonl"]),
    "no such data folder": ([*GOOD[:-1], "./nothere/"], ["nothere"]),
    "no such held-out data": ([*GOOD, "-p", "eval_data", "nothere.jsonl"], ["nothere.jsonl"]),
    "unknown kind of file": ([*GOOD[:-1], "binary.yaml"], ["binary.yaml", "jsonl"]),
    "no such model": (["run", "-p", "model", "nothere", "-p", "data", "{rows}"], ["model", "nothere"]),
    "no such GGUF file": (["run", "-p", "model", "nothere.gguf", "-p", "data", "{rows}"], ["nothere.gguf"]),
    "model folder without weights": (["run", "-p", "model", "no-weights", "-p", "data", "{rows}"], ["no-weights", "safetensors"]),
    "pickled weights": (["run", "-p", "model", "pickled", "-p", "data", "{rows}"], ["pickled", "safetensors"]),
    "misspelt embedded model": (["run", "-p", "model", "smolm2-135m", "-p", "data", "{rows}"], ["smolm2-135m", "Did you mean 'smollm2-135m'"]),
    "everything at once": (["run", "-p", "model", "nothere", "-p", "data", "nothere.jsonl", "-p", "packing", "true", "-p", "group_by_length", "true"], ["model", "nothere.jsonl", "group_by_length"]),
    "a file where runs should go": ([*GOOD, "--out", "file"], ["file"]),
    "a file on the way there": ([*GOOD, "--out", "file/deeper/runs"], ["file"]),
    "impossible name": ([*GOOD, "-p", "name", "../../x"], ["name", "letters"]),
    "unknown table": (["facts", "lora_rank"], ["lora_rank"]),
    "not a run, to compare": (["compare", "nothere", "failed"], ["nothere", "run folder"]),
    "not a run, to repeat": (["rerun", "nothere"], ["nothere"]),
    "no such export": ([*GOOD, "-p", "export", "gguf:q9_k,olama"], ["q9_k", "'ollama'"]),
    "not a run, to quantize": (["quantize", "nothere"], ["nothere"]),
    "not a run, to export": (["export", "nothere", "--to", "merged"], ["nothere"]),
    "no such export of a run": (["export", "failed", "--to", "gguf:q9_k,olama"], ["q9_k", "'ollama'"]),
    "no export, for a card": (["card", "failed"], ["failed", "finetune-nb export"]),
    "no folder, to push": (["push", "nothere", "me/it"], ["nothere", "finetune-nb export"]),
    "nothing to convert": (["convert", "nothere.py"], ["nothere.py"]),
    "a failed run, to repeat": (["rerun", "failed"], ["failed", "metrics"]),
    "a preset of which a recipe leaves nothing": (["run", "failed/recipe.yaml", "--preset", "laptop"], ["--preset", "changes nothing", "recipe.yaml"]),
    "a recipe and the demo": (["run", "failed/recipe.yaml", "--demo"], ["--demo", "Leave out one"]),
    "the home of nobody": ([*GOOD[:-1], "~nobody-of-this-name/rows.jsonl"], ["data", "nobody-of-this-name"]),
    "rows where their file belongs": ([*GOOD[:-1], LONG], ["data", "too long"]),
    "a text for a model": (["run", "-p", "model", LONG, "-p", "data", LONG], ["model", "data", "too long"]),
    **{f"a text for a path: {' '.join(typed)}": ([*typed, LONG], ["too long"]) for typed in (["data"], ["resume"], ["attach"], ["stop"], ["rerun"], ["export"], ["quantize"], ["card"], ["convert"], ["compare", "failed"], ["runs", "--out"], ["plan", "--model"], ["decide", "--data"])},
}


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
@pytest.mark.parametrize("argv, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_at_once(argv, named, as_json, here, tiny_model, tiny_rows, capsys):
    before = sorted(here.rglob("*"))
    code, out, err = call(capsys, *(a.format(model=tiny_model, rows=tiny_rows) if isinstance(a, str) else a for a in argv), *["--json"] * as_json)
    assert code == 2, (out, err)
    assert "Traceback" not in out + err and all(n in err for n in named), err
    assert sorted(here.rglob("*")) == before, "a mistake left something behind"
    if not as_json: assert not out.strip()
    else:
        problems = only_object(out)["error"]
        assert problems and all({"place", "problem"} <= p.keys() for p in problems)
        assert all(n in " ".join(map(str, (v for p in problems for v in p.values()))) for n in named), problems


def test_too_little_disk(here, tiny_model, tiny_rows, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100 << 30, 99 << 30, 1 << 20))
    code, out, err = call(capsys, *(a.format(model=tiny_model, rows=tiny_rows) for a in GOOD), "--out", "new/runs", "--json")
    assert code == 2 and "1.0 MiB free" in only_object(out)["error"][0]["problem"] and not (here / "new").exists()


@pytest.mark.parametrize("name, text, wanted", [("name", "2024", "2024"), ("name", "2024-11-01", "2024-11-01"), ("revision", "1234567", "1234567"), ("revision", "1e5", "1e5"), ("label_field", "yes", "yes"), ("system", "Note: be short", "Note: be short"),
                                                ("system", "", ""), ("learning_rate", "5e-5", 5e-5), ("learning_rate", "1", 1.0), ("lora_r", "8", 8), ("compare", "false", False), ("data", "home", "home")])
def test_a_setting_is_read_as_what_it_is(name, text, wanted):
    "A text stays the text that was typed, though YAML would read a number, a date or a switch in it"
    assert getattr(cli.recipe_of(cli.parser().parse_args(["run", "--preset", "fast", "-p", name, text])), name) == wanted


@pytest.mark.parametrize("argv, keys", [(["doctor"], {"versions", "device", "choices", "missing", "outdated"}), (["facts"], {"tables"}), (["facts", "hyperparameters"], None), (["runs", "--out", "nothere"], {"runs"})], ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_what_needs_no_run_answers(argv, keys, here, capsys):
    code, out, err = call(capsys, *argv, "--json")
    value = only_object(out)
    assert code == 0 and "Traceback" not in err and (value.keys() == keys if keys else value)
    code, out, err = call(capsys, *argv)
    assert code == 0 and out.strip() and not out.startswith("{")


PLANNED = {
    "targets": (["pythia-1.4b"], {"model_type", "target_modules", "target_parameters", "blocks", "trainable", "total", "coverage", "reason"}),
    "plan": (["--model", "llama-3.1-8b", "--card", "4090", "-p", "method", "qlora"], {"peak_bytes", "low", "high", "phases", "breakdown", "fits", "suggestion"}),
    "parallel": (["--model", "llama-3.1-70b", "--gpus", "8", "--vram", "80"], {"choice", "per_gpu_bytes", "reason", "files"}),
}


@pytest.mark.parametrize("verb", PLANNED)
def test_what_is_asked_before_a_run_keeps_its_contract(verb, here, capsys):
    argv, keys = PLANNED[verb]
    code, out, err = call(capsys, verb, *argv, "--json")
    assert code == 0 and keys <= only_object(out).keys() and "Traceback" not in err
    code, out, err = call(capsys, verb, *argv)
    assert code == 0 and out.strip() and not out.startswith("{")


def test_parallel_writes_its_files(here, capsys):
    code, out, _ = call(capsys, "parallel", *PLANNED["parallel"][0], "--out", "several", "--json")
    written = only_object(out)["written"]
    assert code == 0 and written and all(Path(f).is_file() and Path(f).parent.name == "several" for f in written)


@pytest.mark.parametrize("argv, named", [(["plan", "--model", "lama-3.1-8b"], "llama-3.1-8b"), (["plan", "--model", "llama-3.1-8b", "--card", "409"], "4090"), (["targets", "no-weights"], "model_type"),
                                         (["parallel", "--model", "llama-3.1-405b", "--gpus", "1", "--vram", "12", "-p", "method", "full"], "would do")], ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_a_plan_that_cannot_be_made_says_what_would_do(argv, named, here, capsys):
    code, out, err = call(capsys, *argv)
    assert code == 2 and named in err and "Traceback" not in err and not out


# ---- mistakes that only the notebook finds: a folder is left that says what happened

def cases(folder, tiny_model, tiny_rows):
    "{mistake: (settings, what the answer must name)}"
    (empty := folder / "empty.jsonl").write_text("\n")
    columns = write_rows(folder / "columns.jsonl", [{"foo": "a", "bar": "b"}])
    return {
        "empty data": (dict(data=empty), ["empty.jsonl", "no rows"]),
        "wrong columns": (dict(data=columns), ["'bar'", "'foo'", "Rename"]),
        "template that drops the answer": (dict(model=save_model(folder / "drops", NO_ANSWER)), ["template", "answer"]),
        "no trained token left": (dict(max_length=8), ["max_length", "Raise max_length"]),
        "trained rows held out": (dict(eval_data=tiny_rows), ["training data too"]),
        "no such model on the hub": (dict(model="nobody/nothing"), ["nobody/nothing", "could not be loaded"]),
    }


@pytest.fixture(scope="module")
def late(tiny_model, tiny_rows, tmp_path_factory):
    "{mistake: (exit code, stdout, stderr, runs folder, what must be named)}, two at a time"
    folder = tmp_path_factory.mktemp("late")
    def one(item):
        n, (changes, named) = item
        out = folder / f"runs{n}"
        return (*ended(start(*COMMAND, "run", "--preset", "fast", *tiny(**dict(model=tiny_model, data=tiny_rows) | changes), "--out", out, "--json", cwd=folder)), out, named)
    found = cases(folder, tiny_model, tiny_rows)
    with ThreadPoolExecutor(2) as pool: return dict(zip(found, pool.map(one, enumerate(found.values()))))


@pytest.mark.parametrize("mistake", ["empty data", "wrong columns", "template that drops the answer", "no trained token left", "trained rows held out", "no such model on the hub"])
def test_a_mistake_the_notebook_finds_leaves_a_folder_that_says_so(mistake, late):
    code, out, err, folder, named = late[mistake]
    assert code == 2, err[-2000:]
    shown = json.dumps(only_object(out)["error"], ensure_ascii=False)
    assert "Traceback" not in out + err and all(n in shown and n in err for n in named), (shown, err)
    run, = folder.iterdir()
    facts = read_json(run / "run.json")
    assert facts["status"] == "failed" and all(n in facts["error"] for n in named) and facts["ended"] >= facts["started"]
    assert (run / "recipe.yaml").exists() and not (run / "adapter").exists() and not (run / "metrics.json").exists()
    assert runs.runs(folder)[0]["status"] == "failed"
    executed = read_json(run / "notebook.ipynb")["cells"]
    assert any("# Parameters" in "".join(c["source"]) for c in executed)
    errors = [o for c in executed for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert len(errors) == 1 and errors[0]["ename"] == "UserError" and all(n in errors[0]["evalue"] for n in named)
    assert "Traceback" not in json.dumps(executed) + (run / "log.txt").read_text()


# ---- runs that end in the middle

def gone(pid):
    "Has a process ended (one that nobody has asked about yet is a zombie)"
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError): return True


@pytest.fixture(scope="module")
def training(tiny_model, tiny_rows, tmp_path_factory):
    "Three long runs, each started by its own command and training: [(process, run folder)]"
    def one(n):
        folder = tmp_path_factory.mktemp(f"long{n}")
        process = start(*COMMAND, "run", "--preset", "fast", *tiny(model=tiny_model, data=tiny_rows, max_steps=100000, log_steps=1, eval_steps=0), "--out", "runs", "--json", cwd=folder)
        curve = lambda: [p for p in folder.glob("runs/*/metrics.jsonl") if p.read_text().count("\n") > 2]
        return process, until(lambda: process.poll() is None and curve() or process.poll() is not None and pytest.fail(process.communicate()[1]), "the training")[0].parent
    with ThreadPoolExecutor(3) as pool: found = list(pool.map(one, range(3)))
    yield dict(zip(("interrupted", "killed", "kernel killed"), found))
    for process, run in found:
        for pid in (process.pid, read_json(run / "run.json")["pid"]):
            if not gone(pid): os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_stops_the_run_and_keeps_what_there_was(training):
    process, run = training["interrupted"]
    kernel = read_json(run / "run.json")["pid"]
    assert kernel != process.pid and not gone(kernel) and runs.status(run) == "running"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, out, err = ended(process, 60)
    assert code == 130 and "Traceback" not in out + err and "stopped" in err, err[-3000:]
    facts = read_json(run / "run.json")
    assert facts["status"] == "stopped" and facts["ended"] >= facts["started"]
    until(lambda: gone(kernel), "the kernel's end", 10)
    with pytest.raises(ProcessLookupError): os.killpg(process.pid, 0)
    kept = [*run.glob("interrupted/adapter_model.safetensors"), *run.glob("checkpoints/checkpoint-*/adapter_model.safetensors")]
    assert kept, f"nothing of the training was kept: {sorted(p.name for p in run.iterdir())}"
    assert (run / "notebook.ipynb").exists() and not (run / "metrics.json").exists()


def test_a_killed_run_has_died(training, capsys):
    process, run = training["killed"]
    kernel = read_json(run / "run.json")["pid"]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: runs.status(run) == "died", "the kernel's end", 30)
    code, out, _ = call(capsys, "runs", "--out", run.parent, "--json")
    row, = only_object(out)["runs"]
    assert code == 0 and (row["run"], row["status"]) == (run.name, "died") and gone(kernel)
    assert {p.name for p in run.parent.parent.iterdir()} == {"runs"}, "the run left something in the working folder"


def test_a_process_that_ended_and_was_not_asked_about_has_died():
    "Where nobody collects ended processes, as in many containers, they keep their number"
    child = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: gone(child.pid), "the process's end", 20)
    assert not runs.alive(child.pid) and runs.alive(os.getpid())
    child.wait()


def test_a_killed_kernel_is_a_failure_of_its_own(training):
    "As when the system ends it for want of memory"
    process, run = training["kernel killed"]
    os.kill(read_json(run / "run.json")["pid"], signal.SIGKILL)
    code, out, err = ended(process, 60)
    assert code == 1 and read_json(run / "run.json")["status"] == "died"
    assert "Traceback" not in out + err and only_object(out)["error"], err[-3000:]


# ---- faster

def test_a_plan_says_what_would_be_faster(capsys):
    answer = json.loads(call(capsys, "plan", "--model", "llama-3.1-8b", "--card", "a100-80gb", "-p", "method", "qlora", "--faster", "--json")[1])
    assert {c["setting"]: c["value"] for c in answer["faster"]}["method"] == "lora" and all(c["reason"] for c in answer["faster"])
    assert "4-bit base is unpacked" in call(capsys, "plan", "--model", "llama-3.1-8b", "--card", "a100-80gb", "-p", "method", "qlora", "--faster")[1]


def test_a_run_takes_what_is_faster(tmp_path, tiny_model, tiny_rows, capsys):
    code, out, err = call(capsys, "run", "--preset", "stock", "--faster", "-p", "max_length", "256", "-p", "model", str(tiny_model), "-p", "data", str(tiny_rows), "-p", "max_steps", "2", "-p", "compare", "false", "-p", "best_at_end", "false", "-p", "eval_steps", "0", "-p", "save_steps", "0", "-p", "tracker", "none", "--out", str(tmp_path), "--json")
    assert code == 0, err
    recipe = load(Path(json.loads(out)["run"]) / "recipe.yaml")
    assert (recipe.packing, recipe.gradient_checkpointing, recipe.lora_dropout) == (False, False, 0.0) and "gradient_checkpointing: False, because" in err


def test_a_plan_needs_no_torch_where_there_is_no_gpu():
    code = "import sys; from finetune_nb.cli import main; main(['plan']); main(['doctor']); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    from finetune_nb.hardware import driven
    if driven(): pytest.skip("this machine may have a GPU, which torch is asked about")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"
