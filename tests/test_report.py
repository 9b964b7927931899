"The report of a whole run: every part is there, true to the folder, harmless, small, one file"
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from conftest import COMMAND, chat_rows, ended, settings, start, write_rows
from finetune_nb import cli, evidence, job, report
from finetune_nb.core import human_bytes, read_json, sha256_file
from finetune_nb.data import read
from finetune_nb.mask import encode_all
from finetune_nb.models import load_tokenizer
from finetune_nb.recipe import load, make

ROOT = Path(__file__).resolve().parents[1]
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ANSWERS = dict(task=f"switch lights {ATTACK}", fails="behaviour", prompting="examples", citations=False)


class Page(HTMLParser):
    "A page in parts: {heading: text}, tables as lists of dicts, tags with their attributes"
    def __init__(self, page):
        super().__init__()
        self.parts, self.tables, self.tags, self.head, self.cell = {"": ""}, [], [], "", None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "h2": self.parts[self.head] += " "; self.head = None
        if tag == "table": self.tables.append([])
        if tag == "tr" and self.tables: self.tables[-1].append([])
        if tag in ("td", "th") and self.tables: self.tables[-1][-1].append("")
        self.cell = tag if tag in ("td", "th") else None if tag in ("table", "tr") else self.cell

    def handle_endtag(self, tag):
        if tag in ("td", "th"): self.cell = None

    def handle_data(self, data):
        if self.head is None: self.head = data.strip(); self.parts[self.head] = ""
        self.parts[self.head] += data
        if self.cell and self.tables: self.tables[-1][-1][-1] += data

    def table(self, *headings):
        "The rows of the table with these headings"
        return next([dict(zip(t[0], row)) for row in t[1:]] for t in self.tables if t and set(headings) <= set(t[0]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model):
    "(its folder, its page): a run of 15 steps with answers and an export, rehearsed; then the file of answers is taken away"
    place = tmp_path_factory.mktemp("report")
    rows = chat_rows()
    for r in rows: r["prompt"][0]["content"] += f" {ATTACK}"
    write_rows(place / "rows.jsonl", rows + rows[:2])
    (place / "mine.yaml").write_text(yaml.safe_dump(ANSWERS))
    values = dict(model=tiny_model, data="rows.jsonl", answers="mine.yaml", max_steps=15, batch_size=4, accumulation=1, log_steps=1, eval_steps=8, save_steps=8, max_new_tokens=8, threads=1, dtype="float32", lora_layers=2, lora_r=4, lora_alpha=8, eval_fraction=0.2, max_eval_rows=8, export="merged", name="tiny", max_length=300)
    code, out, err = ended(start(*COMMAND, "run", "--preset", "laptop", *settings(**values), "--json", cwd=place), 600)
    assert code in (0, 2), err[-3000:]  # 2 if the export of a model that learnt nothing fails its certificate
    (place / "mine.yaml").unlink()
    folder = place / json.loads(out)["run"]
    return folder, Page((folder / "report.html").read_text(encoding="utf-8"))


def held(folder): return len((folder / "data" / "eval.jsonl").read_text().splitlines())


SECTIONS = ["What will be done", "The rows", "Is training the right thing?", "Will it fit?", "The model as it is", "Training", "Did it help?", "What is kept", "Where it ran"]


def test_every_section_is_there_and_in_the_contents(whole):
    folder, page = whole
    assert list(page.parts)[1:] == SECTIONS
    links = [a["href"] for t, a in page.tags if t == "a" and a.get("href", "").startswith("#")]
    ids = {a["id"] for t, a in page.tags if t == "h2"}
    assert {l[1:] for l in links} >= ids and len(ids) == len(SECTIONS)


def test_the_first_screen_has_the_answer(whole):
    folder, page = whole
    top, found, run = page.parts[""], read_json(folder / "comparison.json"), read_json(folder / "run.json")
    assert found["verdict"] in top and folder.name in top
    for line in found["table"]: assert f"{line['before'].partition(' [')[0]} → {line['after'].partition(' [')[0]}" in top and line["after"].partition(" [")[2] in top
    assert f"{len((folder / 'data/train.jsonl').read_text().splitlines())} trained" in top and f"{held(folder)} held out" in top and "export merged" in top and run["exports"]["merged"]["verdict"].upper() in top


def test_decision_evidence(whole):
    folder, page = whole
    said, run = page.parts["Is training the right thing?"], read_json(folder / "run.json")
    assert f"Advice of the rules: {run['decision']['approach']}" in said and run["decision"]["rules"]
    rules = page.table("points", "because", "what is known", "source")
    assert len(rules) == len(run["decision"]["rules"]) and all(all(r.values()) for r in rules)
    told = {r["question"]: (r["answer"], r["from"]) for r in page.table("question", "answer", "from")}
    assert told["What goes wrong with the best prompt so far?"] == ("behaviour", "the recipe") and told["What should the model do?"][0] == ANSWERS["task"] and told["How many rows are kept for evaluation?"] == (str(held(folder)), "counted in the rows")
    assert "Must answers name their source?" in told and "How much memory has the GPU at hand?" in said


def test_summary_of_the_rows(whole):
    folder, page = whole
    said = {r["In the rows"]: r[""] for r in page.table("In the rows")}
    recipe = load(folder / "recipe.yaml")
    rows = read(str(folder / "data" / "train.jsonl"))
    encoded, _ = encode_all(rows, load_tokenizer(recipe.model), recipe.max_length)
    assert said["evaluation"].startswith(f"{held(folder)} rows") and {"unique", "effective", "labels", "packing"} <= said.keys()
    assert f"of which {sum(l != -100 for e in encoded for l in e['labels']):,} are trained" in said["tokens in all"]
    assert "source" not in said and page.parts["The rows"].count("fingerprint") == 2  # of the two sides, each once


def test_the_recipe_is_a_difference_and_holds_the_answers(whole):
    folder, page = whole
    recipe = load(folder / "recipe.yaml")
    assert json.loads(recipe.answers) == ANSWERS, "the file of answers is gone, so the recipe must hold them"
    said = page.parts["What will be done"]
    assert "lora_r: 4" in said and "lora_bias" not in said and "weight_decay" not in said


def test_predicted_against_measured(whole):
    folder, page = whole
    run, logs = read_json(folder / "run.json"), [json.loads(l) for l in (folder / "metrics.jsonl").read_text().splitlines()]
    table = {r["what"]: r for r in page.table("expected", "measured", "prediction off by")}
    memory, clock = table["main memory in training"], table["time of training"]
    most = max(run["rehearsal"]["peak"]["ram"], *(l.get("memory_bytes", 0) for l in logs))
    assert memory["measured"] == human_bytes(most) and all(human_bytes(run["plan"][k]) in memory["expected"] for k in ("low", "high"))
    assert memory["prediction off by"] == f"{run['plan']['peak_bytes'] / most - 1:+.1%}" and re.fullmatch(r"[+-]\d+\.\d%", clock["prediction off by"])
    assert table["main memory, whole run"]["expected"] == "not predicted" and table["main memory, whole run"]["prediction off by"] == "–"


def test_exports_with_their_certificates(whole):
    folder, page = whole
    proof = read_json(folder / "exports" / "merged" / "certificate.json")
    found = {c["check"]: c["found"] for c in proof["checks"]}
    [line] = page.table("export", "verdict", "KL")
    assert line["verdict"] == proof["verdict"].upper() and line["KL"] == found["KL to the trained model"] and line["size"] == human_bytes(proof["facts"]["bytes"])
    assert {r["file"]: r["size"] for r in page.table("file", "size")}["merged/model.safetensors"] == human_bytes((folder / "exports/merged/model.safetensors").stat().st_size)
    bad = [c["check"] for c in proof["checks"] if c["verdict"] != "pass"]
    assert not bad or [r["check"] for r in page.table("export", "check", "found", "why")] == bad


def test_where_it_ran_and_how_to_do_it_again(whole):
    folder, page = whole
    run = read_json(folder / "run.json")
    said = {r["Where it ran"]: r[""] for r in page.table("Where it ran")}
    assert run["machine"]["name"] in said["machine"] and said["Python"] == run["python"] and said["seed"] == "42" and run["model"]["sha"] in said["model"]
    assert all(f"{k} {v}" in said["packages"] for k, v in run["versions"].items()) and len(run["versions"]) > 4
    assert sum(d["sha256"] in v for d in run["data"].values() for v in said.values()) == 2
    command = re.search(r"finetune-nb (rerun \S+)", page.parts["Where it ran"])[1].split()
    assert (folder.parent.parent / command[1]).samefile(folder) and cli.parser().parse_args(command).run


def test_it_is_one_small_file_without_scripts(whole):
    folder, page = whole
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    assert not [t for t, _ in page.tags if t in ("script", "link", "iframe", "object", "embed", "base", "form")] and "<style>" in text and "@media print" in text
    assert not [v for t, a in page.tags for k, v in a.items() if k in ("src", "srcset", "data") and not v.startswith("data:image/")] and "@import" not in text and not re.search(r"url\(", text)
    assert not [k for _, a in page.tags for k in a if k.startswith("on")]
    assert text.count(ATTACK) == 0 and "".join(page.parts.values()).count(ATTACK) > 3, "shown as text, in rows, answers and samples"
    assert sum(t == "img" for t, _ in page.tags) >= 3 and all(a.get("alt") for t, a in page.tags if t == "img")


def test_it_can_be_done_again_from_the_folder_alone(whole):
    folder, _ = whole
    told, recipe = job.told(load(folder / "recipe.yaml"))
    assert told.to_json() == ANSWERS and recipe == load(folder / "recipe.yaml") and not [p for p in job.early_problems(recipe) if p.level == "error" and "answers" in p.place]


# ---- mistakes

@pytest.mark.parametrize("name, text, place, fix", [("none.yaml", None, "none.yaml", "answers.yaml"), ("bad.yaml", "fails: tone\n", "fails", "Choose one of"), ("half.yaml", "fails: [", "half.yaml", "Mend the file"), ("other.yaml", "failz: facts", "failz", "fails"), ("list.yaml", "- a", "list.yaml", "fails: behaviour")])
def test_bad_answers_are_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys, tiny_rows, tiny_model, name, text, place, fix):
    monkeypatch.chdir(tmp_path)
    if text is not None: (tmp_path / name).write_text(text)
    assert cli.main(["run", "--preset", "laptop", "-p", "answers", name, "-p", "data", tiny_rows, "-p", "model", tiny_model, "-p", "lora_layers", "2", "--json"]) == 2
    [problem] = json.loads(capsys.readouterr().out)["error"]
    assert problem["place"] == place and fix in problem["fix"] and not (tmp_path / "runs").exists(), problem


def test_answers_may_stand_in_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("preset: laptop\nanswers: '{fails: facts, documents: yes}'\n")
    told, recipe = job.told(load(tmp_path / "recipe.yaml"))
    assert told.to_json() == {"fails": "facts", "documents": True} and recipe.answers == '{"fails": "facts", "documents": true}'
    assert job.told(make("laptop"))[1].answers == ""


def test_nothing_is_claimed_that_was_not_measured(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    [memory, clock] = evidence.forecasts(tmp_path)
    assert (memory["expected"], memory["measured"], clock["expected"], clock["measured"]) == ("not predicted", "not measured", "not predicted", "not measured")


def test_a_run_that_did_not_end_says_so(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(dict(status="stopped", error="<b>interrupted</b>", started="now")))
    (tmp_path / "recipe.yaml").write_text("preset: laptop\n")
    assert "This run is stopped. &lt;b&gt;interrupted" in report.summary(tmp_path)
