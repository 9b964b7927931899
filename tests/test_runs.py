"A whole run on a tiny model: what its folder holds, that it can be done again to the last bit, and that plain papermill does it too"
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from conftest import COMMAND, chat_rows, ended, settings, start, write_rows
from finetune_nb import cli, runs
from finetune_nb.core import read_json, sha256_file
from finetune_nb.recipe import FIELDS, load, parameters_cell

ROOT = Path(__file__).resolve().parents[1]
ATTACK = "<script>alert(1)</script>"
SECRETS = dict(SECRET_TOKEN="hunter2-8c1f0e", HF_TOKEN="hf_hunter2Xq7", WANDB_API_KEY="hunter2-wandb-77")
RATE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def values(tiny_model, folder):
    "Settings of a run of 6 steps; every row carries an attack on the page it is shown in"
    rows = chat_rows()
    for r in rows: r["prompt"][0]["content"] += f" {ATTACK}"
    return dict(model=tiny_model, data=str(write_rows(folder / "rows.jsonl", rows)), max_steps=6, batch_size=4, log_steps=1, eval_steps=3, save_steps=3, max_new_tokens=8, threads=1, dtype="float32",
                lora_layers=2, lora_r=4, lora_alpha=8, learning_rate=RATE, eval_fraction=0.2, max_eval_rows=4, compare=True, name="tiny")


@pytest.fixture(scope="module")
def whole(folder, values):
    "{what: (exit code, stdout, stderr, working folder)}: a run, the same by papermill with another rate, then its repetition, and papermill with a misspelt parameter"
    places = {name: folder / name for name in ("run", "papermill", "rerun", "misspelt")}
    for p in places.values(): p.mkdir()
    (places["papermill"] / "params.yaml").write_text(yaml.safe_dump(values).replace(f"learning_rate: {RATE}", "learning_rate: 5e-5"))
    notebook = [sys.executable, "-m", "papermill", ROOT / "nbs" / "pipelines" / "finetune.ipynb", "out.ipynb", "-k", "python3", "--no-progress-bar", "--log-output"]
    begin = {
        "run": lambda: start(*COMMAND, "run", "--preset", "laptop", *settings(**{k: json.dumps(v) if isinstance(v, bool) else v for k, v in values.items()}), "--out", "../runs", "--json", cwd=places["run"], **SECRETS),
        "papermill": lambda: start(*notebook, "-f", "params.yaml", cwd=places["papermill"], **SECRETS),
        "rerun": lambda: start(*COMMAND, "rerun", next((folder / "runs").iterdir()), "--out", "../again", "--json", cwd=places["rerun"], **SECRETS),
        "misspelt": lambda: start(*notebook, "-p", "learnin_rate", "1e-3", "-p", "lora_R", "4", cwd=places["misspelt"]),
    }
    found = {}
    for pair in (("run", "papermill"), ("rerun", "misspelt")):  # two at a time
        started = {name: begin[name]() for name in pair}
        for name, process in started.items(): found[name] = (*ended(process), places[name])
    return found


def run_folder(whole, what):
    code, out, err, place = whole[what]
    assert code == 0, err[-3000:]
    return next((place / "runs").iterdir()) if what == "papermill" else (place / json.loads(out)["run"]).resolve()


def documented():
    "Names in the README's picture of a run folder"
    tree = (ROOT / "README.md").read_text().partition("## What a run leaves behind")[2].split("```")[1]
    return set(re.findall(r"^[├└]── (\S+?)/?\s", tree, re.M))


def test_the_command_answers_with_one_object(whole):
    code, out, err, place = whole["run"]
    answer = json.loads(out)
    assert code == 0 and answer.keys() == {"run", "status", "metrics", "verdict", "report"} and answer["status"] == "done" and answer["verdict"]
    assert "Traceback" not in err and [f"{n}/5" in err for n in range(1, 6)] == [True] * 5
    assert not list(place.iterdir()), "the run left something in the working folder"


def test_the_folder_holds_what_is_documented(whole):
    run = run_folder(whole, "run")
    assert {p.name for p in run.iterdir()} == documented() and len(documented()) == 14
    assert {p.name for p in (run / "data").iterdir()} == {"train.jsonl", "eval.jsonl"}
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-6", "README.md"}
    assert {p.name for p in (run / "adapter").iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}


def test_papermill_leaves_the_same_without_what_the_command_adds(whole):
    run = run_folder(whole, "papermill")
    assert {p.name for p in run.iterdir()} == documented() - {"notebook.ipynb", "report.html", "log.txt"}
    assert {p.name for p in whole["papermill"][3].iterdir()} == {"runs", "out.ipynb", "params.yaml"}


def test_the_numbers_are_those_of_the_run(whole, values):
    run, answer = run_folder(whole, "run"), json.loads(whole["run"][1])
    metrics, facts = read_json(run / "metrics.json"), read_json(run / "run.json")
    assert answer["metrics"] == metrics and metrics["steps"] == 6 and facts["status"] == runs.status(run) == "done"
    assert metrics["weights"] == {"adapter_model.safetensors": sha256_file(run / "adapter" / "adapter_model.safetensors")}
    assert [p["step"] for p in metrics["curve"] if "loss" in p] == [1, 2, 3, 4, 5, 6] and [p["step"] for p in metrics["curve"] if "eval_loss" in p] == [3, 6]
    logged = [json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()]
    assert [l["loss"] for l in logged if "loss" in l] == [p["loss"] for p in metrics["curve"] if "loss" in p]
    assert metrics["after"]["loss"]["value"] < metrics["before"]["loss"]["value"]
    scores = read_json(run / "scores.json")
    assert len(scores["before"]["rows"]) == len(scores["after"]["rows"]) == 4 == len((run / "data" / "eval.jsonl").read_text().splitlines())
    assert scores["after"]["metrics"] == metrics["after"] and read_json(run / "comparison.json")["verdict"] == answer["verdict"]
    recipe = load(run / "recipe.yaml")
    assert all(getattr(recipe, k) == v for k, v in values.items())
    assert facts["seconds"].keys() == {"rows", "model", "before", "prepare", "rehearse", "train", "after"} and set(facts["versions"]) <= {l.split("==")[0] for l in (run / "environment.txt").read_text().splitlines()}
    assert facts["plan"]["fits"] and facts["plan"]["setup"]["length"] < 400 and "rehearsal" not in facts  # too short a run to be rehearsed
    assert "finetune_nb" not in (run / "plain.py").read_text().partition('"""\n')[2]


def test_nothing_is_pickled_but_what_the_trainer_needs_to_resume(whole):
    for what in ("run", "papermill"):
        run = run_folder(whole, what)
        files = [p for p in run.rglob("*") if p.is_file() and run / "checkpoints" not in p.parents]
        pickled = [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt") or p.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")]
        assert len(files) > 15 and not pickled
        weights = {p.suffix for p in (run / "checkpoints").rglob("*model*") if p.is_file() and p.stat().st_size > 5000}
        assert weights == {".safetensors"}


def test_no_secret_is_written(whole):
    for what in ("run", "papermill", "rerun"):
        run, (_, out, err, place) = run_folder(whole, what), whole[what]
        files = [p for base in (run, place) for p in base.rglob("*") if p.is_file()]
        assert len(files) > 20
        for secret in SECRETS.values(): assert not [p for p in files if secret.encode() in p.read_bytes()] and secret not in out + err


def test_doing_it_again_gives_the_same_to_the_last_bit(whole):
    answer, first, again = json.loads(whole["rerun"][1]), run_folder(whole, "run"), run_folder(whole, "rerun")
    assert answer["identical"] is True and answer["differences"]["result"] == answer["differences"]["recipe"] == answer["differences"]["data"] == {}
    assert first != again and (first / "metrics.json").read_bytes() == (again / "metrics.json").read_bytes()
    assert (first / "adapter" / "adapter_model.safetensors").read_bytes() == (again / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (first / "scores.json").read_bytes() == (again / "scores.json").read_bytes()


def test_compare_names_what_differs(whole, capsys):
    a, b = run_folder(whole, "run"), run_folder(whole, "papermill")
    assert cli.main(["compare", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == {"learning_rate": [RATE, 5e-5]} and found["environment"] == found["data"] == {}
    assert "train_loss" in found["result"] and "weights.adapter_model.safetensors" in found["result"] and not [k for k in found["result"] if k.startswith("before")]
    assert cli.main(["compare", str(a), str(b)]) == 0
    assert "learning_rate" in capsys.readouterr().out.replace("\\", "")


def test_runs_lists_them(whole, capsys):
    run = run_folder(whole, "run")
    assert cli.main(["runs", "--out", str(run.parent), "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)["runs"]
    assert (row["run"], row["status"], row["method"]) == (run.name, "done", "lora") and row["loss"] == round(read_json(run / "metrics.json")["after"]["loss"]["value"], 4) and row["time"]
    assert cli.main(["runs", "--out", str(run.parent)]) == 0
    assert run.name in capsys.readouterr().out.replace("\\", "")


def test_papermill_reads_numbers_written_as_text(whole):
    assert "learning_rate: 5e-5" in (whole["papermill"][3] / "params.yaml").read_text()
    assert load(run_folder(whole, "papermill") / "recipe.yaml").learning_rate == 5e-5


def test_papermill_refuses_a_misspelt_parameter(whole):
    code, out, err, place = whole["misspelt"]
    assert code != 0 and {p.name for p in place.iterdir()} == {"out.ipynb"}, "a run was begun"
    cells = [c for c in read_json(place / "out.ipynb")["cells"] if c["cell_type"] == "code"]
    error, = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert error["ename"] == "UserError" and "learnin_rate" in error["evalue"] and "'learning_rate'" in error["evalue"] and "lora_R" in error["evalue"] and "'lora_r'" in error["evalue"]
    assert "Traceback" not in "".join(error["traceback"])
    assert "runs.from_notebook" in "".join([c for c in cells if c["execution_count"]][-1]["source"]), "more was done before the error"


def test_the_parameters_are_those_of_the_recipe():
    cell, = [c for c in read_json(ROOT / "nbs" / "pipelines" / "finetune.ipynb")["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert "".join(cell["source"]) == parameters_cell()
    assert [l.split(":")[0] for l in parameters_cell().splitlines()] == ["preset", "recipe", "run", "resume", "override", *FIELDS]


# ---- the report

class Page(HTMLParser):
    "Collects what a page loads, its scripts and its text"
    def __init__(self, page):
        super().__init__()
        self.loads, self.scripts, self.text, self.inside, self.handlers, self.drawn = [], [], [], None, [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.inside = tag if tag in ("script", "style") else None
        if tag in ("script", "img", "iframe", "link", "object", "embed", "source", "video"): self.loads += [v for k, v in given.items() if k in ("src", "href", "data", "srcset") and v]
        self.handlers += [k for k in given if k.startswith("on")]
        if "mermaid" in (given.get("class") or "").lower() or "widget" in (given.get("type") or ""): self.drawn.append(tag)

    def handle_endtag(self, tag): self.inside = None
    def handle_data(self, data): (self.scripts if self.inside == "script" else self.text if self.inside is None else []).append(data)


def test_the_report_opens_offline_and_runs_nothing_from_the_rows(whole):
    run = run_folder(whole, "run")
    page = Page((run / "report.html").read_text())
    assert not [l for l in page.loads if not l.startswith("data:")], "the report needs other files"
    fetched = {u for s in page.scripts for u in re.findall(r"https?://[^'\"\s]+\.m?js\b", s)}
    assert all("/mermaid" in u for u in fetched) and not page.drawn, f"opening the report runs scripts from the network: {fetched}"  # mermaid's is fetched for diagrams only, and there are none
    assert not page.handlers and not [s for s in page.scripts if "alert(1)" in s]
    assert ATTACK not in (run / "report.html").read_text() and "".join(page.text).count(ATTACK) > 1, "the attack should be shown, as text"
    text = "".join(page.text)
    assert read_json(run / "comparison.json")["verdict"].split(".")[0] in text and "exact" in text and "tiny" in (run / "report.html").read_text()[:2000]
    outputs = [o["data"] for c in read_json(run / "notebook.ipynb")["cells"] for o in c.get("outputs", []) if "data" in o]
    assert not [o for o in outputs if ATTACK in "".join(o.get("text/html", "")) + "".join(o.get("text/markdown", ""))] and any("&lt;script" in str(o.get("text/html")) for o in outputs)


def test_two_processes_train_one_adapter(folder, values):
    (place := folder / "two").mkdir()
    several = values | dict(compare=False, max_steps=2, eval_steps=0, save_steps=0, best_at_end=False, lora_dropout=0.0)
    code, out, err = ended(start(*COMMAND, "run", "--preset", "laptop", *settings(**{k: json.dumps(v) if isinstance(v, bool) else v for k, v in several.items()}), "--processes", "2", "--json", cwd=place))
    assert code == 0, err[-3000:]
    answer = json.loads(out)
    run = place / answer["run"]
    assert answer["metrics"]["steps"] == 2 and [f.name for f in (run / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert "2 processes" in (run / "log.txt").read_text() and load(run / "recipe.yaml").processes == 2


def test_rows_that_were_trained_on_are_told(tmp_path):
    from finetune_nb import job
    from finetune_nb.recipe import make
    rows = [dict(prompt=f"how many {n} does the {a} shop in {b} sell", completion=str(i)) for i, (n, a, b) in enumerate((n, a, b) for n in ("pears", "nails", "books") for a in ("green", "old") for b in ("Rome", "Oslo"))]
    held = [dict(prompt="Where has the postman gone to with our long letter", completion="home"), rows[3] | dict(prompt=rows[3]["prompt"].upper() + "?")]
    train, found = job.rows(make("laptop", data=str(write_rows(tmp_path / "train.jsonl", rows)), eval_data=str(write_rows(tmp_path / "eval.jsonl", held))))
    assert found.leaked == [1] and "1 of 2 rows that were trained on" in str(found.problems[0]) and not train.leaked


def test_a_second_signal_while_the_first_is_written_down(tmp_path, monkeypatch):
    "IPython gives up a traceback that is interrupted, so that the cell has failed and holds no error"
    import nbformat
    source = "def interrupted(*args, **kwargs): raise KeyboardInterrupt\nget_ipython().InteractiveTB.structured_traceback = interrupted\n1 / 0"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="Python"))), tmp_path / "short.ipynb")
    monkeypatch.setattr(runs, "pipeline", lambda name: tmp_path / "short.ipynb")
    (place := tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt): runs.execute(place)
    assert read_json(place / "run.json")["status"] == "stopped"
