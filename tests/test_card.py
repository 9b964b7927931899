"Model cards of made-up runs, and pushes to a server on this machine that speaks the part of the Hub's protocol that is needed"
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import chat_rows, write_rows
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from finetune_nb.card import FREE, LICENCES, UNKNOWN, base_licence, data_facts, write_card
from finetune_nb.core import UserError, read_json, sha256_file, write_json
from finetune_nb.push import file_problems, push
from finetune_nb.recipe import make, to_yaml

quiet = lambda line: None
KEY = "hf_" + "Q7x9" * 9


def base_at(folder, head="license: apache-2.0"):
    folder.mkdir(parents=True)
    write_json(folder / "config.json", dict(model_type="llama"))
    save_file({"w": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    if head: (folder / "README.md").write_text(f"---\n{head}\n---\n# Base\n")
    return folder


def run_at(folder, base, data="rows.jsonl", **values):
    (folder / "adapter").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(make(model=str(base), data=str(data), **values)))
    save_file({"a": np.zeros((2, 4), np.float32)}, folder / "adapter" / ("model.safetensors" if values.get("method") == "full" else "adapter_model.safetensors"))
    write_json(folder / "adapter" / "adapter_config.json", dict(target_modules=["q_proj"]))
    metric = dict(value=0.9, low=0.8, high=0.95, n=60)
    samples = [dict(kind="best", prompt="a | `b` <script>alert(1)</script>\n---\nlicense: mit", reference="```", before=None, after=f"key {KEY}")]
    write_json(folder / "comparison.json", dict(verdict="Better <b>after</b>.", table=[dict(metric="exact", before="1 %", after="90 %", change="+89", p="< 0.001")], changes=dict(exact=metric), samples=samples, after=dict(metrics=dict(exact=metric, loss=metric))))
    write_json(folder / "run.json", dict(status="done", data={f"{data} (training)": dict(rows=26, sha256="a" * 64)}, model=dict(kind="folder", name=base.name, sha="b" * 64)))
    write_rows(folder / "data.jsonl", chat_rows())
    (folder / "data").mkdir()
    shutil.move(folder / "data.jsonl", folder / "data" / "train.jsonl")
    return folder


def export_at(folder, kind="merged", **more):
    folder.mkdir(parents=True)
    save_file({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / "model.safetensors")
    write_json(folder / "config.json", dict(model_type="llama"))
    for name, content in more.items(): (folder / name.replace("__", ".")).write_bytes(content)
    files = {f.name: [f.stat().st_size, sha256_file(f)] for f in folder.iterdir()}
    write_json(folder / "export.json", dict(kind=kind, files=files, versions=dict(torch="2")))
    write_json(folder / "certificate.json", dict(verdict="pass", export=folder.name, kind=kind, run="run", checks=[dict(check="same answers", found="100%", verdict="pass", limit="95 %", why="x")], rows=8, facts=dict(files={n: sha for n, (_, sha) in files.items()})))
    return folder


@pytest.fixture
def made(tmp_path):
    "(run folder, exported folder)"
    return run_at(tmp_path / "run", base_at(tmp_path / "base")), export_at(tmp_path / "bot")


def written(made, **values):
    "(the Hub's reading of the head, the text) of a card"
    from huggingface_hub import ModelCard
    write_card(made[1], made[0], say=quiet, **values)
    text = (made[1] / "README.md").read_text(encoding="utf-8")
    return ModelCard(text).data, text


# ---- the card

def test_the_hub_reads_what_the_run_says(made):
    data, text = written(made, repo="me/bot", language="en,de")
    assert (data.license, data.language, getattr(data, "library_name"), data.pipeline_tag, data.model_name) == ("apache-2.0", ["en", "de"], "transformers", "text-generation", "bot")
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("exact_match", 0.9), ("loss", 0.9)] and "0.800 to 0.950" in data.eval_results[0].metric_name
    assert "from_pretrained('me/bot'" in text and "same answers" in text and "**pass** on 8 held-out rows" in text
    assert "26 training rows" in text, "the rows are counted from the run's own file"


def test_figures_of_another_model_are_not_in_the_head(tmp_path):
    made = run_at(tmp_path / "run", base_at(tmp_path / "base")), export_at(tmp_path / "bot", "gguf", bot__gguf=b"GGUF....")
    data, text = written(made)
    assert data.eval_results is None and getattr(data, "library_name") == "gguf" and "gguf" in data.tags and "llama-server -m bot.gguf" in text and "before it was exported" in text


def test_an_adapter_is_started_with_its_base(tmp_path):
    made = run_at(tmp_path / "run", base_at(tmp_path / "base")), export_at(tmp_path / "bot", "gguf-lora", adapter__gguf=b"GGUF....", **{"base-f16__gguf": b"GGUF...."})
    data, text = written(made)
    assert "llama-server -m base-f16.gguf --lora adapter.gguf" in text and data.get("base_model_relation") is None


def test_only_what_is_there_is_told(made):
    data, text = written(made)
    assert "Ollama" not in text and "vLLM" not in text and "llama-server" not in text
    (made[1] / "Modelfile").write_text("FROM ./")
    assert "ollama create" in written(made)[1]
    (made[1] / "adapter_config.json").write_text("{}")
    assert "PeftModel.from_pretrained" in written(made)[1]


def test_nothing_of_the_machine_no_key_and_no_markup(tmp_path):
    odd = "<img src=x onerror=alert(1)>|`x`\n---\n# Title"
    run = run_at(tmp_path / "run", base_at(tmp_path / "base"), tmp_path / f"{odd.splitlines()[0]}.jsonl", system=f"Say ``` {KEY} {tmp_path}")
    rows = [dict(r, prompt=[dict(role="system", content=f"```\n# out {KEY} {odd} {tmp_path}/x")] + r["prompt"]) for r in chat_rows()]
    write_rows(run / "data" / "train.jsonl", rows)
    data, text = written((run, export_at(tmp_path / "bot")), samples=3, formats=[dict(format=odd, bits=4.5)])
    body = text.split("\n---\n", 1)[1]
    assert KEY not in text and str(tmp_path) not in text and "hf_" not in text
    tokens = MarkdownIt("commonmark").enable("table").parse(body)  # which obeys HTML, as the Hub's page does
    flat = [t for token in tokens for t in (token, *(token.children or []))]
    assert not [t.content for t in flat if t.type.startswith("html") and t.content != "<br>"] and sum(t.type == "heading_open" and t.tag == "h1" for t in flat) == 1
    assert sum(t.type == "table_open" for t in flat) == 7 and "onerror" in text, "the control: it is there, as text"
    assert data.license == "apache-2.0", "a row that looks like a head is text"


@pytest.mark.parametrize("repr_of", ["null", "[]", "{}", "2024-01-01", "&a [*a, *a]"])
def test_a_strange_head_of_the_base_is_unknown_and_not_an_error(repr_of, tmp_path):
    base = base_at(tmp_path / "base", f"license: {repr_of}")
    assert base_licence(str(base)).id in ("", "other")


def test_unknown_licences_are_marked_and_told(tmp_path):
    made = run_at(tmp_path / "run", base_at(tmp_path / "base", "")), export_at(tmp_path / "bot")
    told = []
    found = write_card(made[1], made[0], say=told.append)
    text = (made[1] / "README.md").read_text()
    assert "license: unknown" in text and text.count(UNKNOWN) == 3 and len(told) == len(found["unknown"]) == 2
    write_card(made[1], made[0], licence="mit", data_licence="cc-by-4.0", say=quiet)
    assert "license: mit" in (made[1] / "README.md").read_text() and UNKNOWN + " |" in (made[1] / "README.md").read_text(), "the base's own stays unknown"


@pytest.mark.parametrize("licence", [l for l in LICENCES if l not in FREE and l != "other"])
def test_a_licence_that_restricts_stays(licence, tmp_path):
    made = run_at(tmp_path / "run", base_at(tmp_path / "base", f"license: {licence}")), export_at(tmp_path / "bot")
    assert written(made)[0].license == licence
    with pytest.raises(UserError, match="stays with what is made from the base"): write_card(made[1], made[0], licence="mit" if licence != "mit" else "apache-2.0", say=quiet)
    assert (made[1] / "NOTICE").is_file() == licence.startswith(("llama", "gemma"))


def test_a_licence_of_its_own_keeps_name_and_link(tmp_path):
    made = run_at(tmp_path / "run", base_at(tmp_path / "base", "license: other\nlicense_name: Tongyi Qianwen\nlicense_link: https://x.org/LICENSE")), export_at(tmp_path / "bot")
    data = written(made)[0]
    assert (data.license, data.license_name, data.license_link) == ("other", "tongyi-qianwen", "https://x.org/LICENSE")


def test_data_that_says_its_licence(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("---\nlicense: cc-by-sa-4.0\nlanguage:\n- fr\n---\n")
    assert data_facts(str(tmp_path / "set"))[0]["license"] == "cc-by-sa-4.0"
    made = run_at(tmp_path / "run", base_at(tmp_path / "base"), tmp_path / "set"), export_at(tmp_path / "bot")
    data, text = written(made)
    assert data.language == ["fr"] and data.license == "apache-2.0" and "cc-by-sa-4.0" in text


def test_a_hub_base_is_named_and_a_folder_is_not(made, monkeypatch):
    assert written(made)[0].base_model is None
    (made[0] / "recipe.yaml").write_text(to_yaml(make(model="owner/base", data="owner/rows")))
    data, text = written(made)
    assert (data.base_model, data.datasets, data.base_model_relation, data.license) == ("owner/base", ["owner/rows"], "finetune", "unknown"), "offline and not in the cache: unknown, not invented"


def test_a_run_that_measured_nothing(made):
    (made[0] / "comparison.json").unlink()
    data, text = written(made)
    assert data.eval_results is None and "Not measured" in text


# ---- a hub on this machine

class Hub(BaseHTTPRequestHandler):
    "Enough of the Hub: create, look at, check the head, ask how to send, send large files, commit"
    def log_message(self, *args): pass

    def answer(self, value=None, code=200):
        body = json.dumps({} if value is None else value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.seen.append((self.command, self.path, self.headers.get("Authorization")))
        for part, code in hub.refuses.items():
            if part in self.path and (self.command, part) != ("GET", "repos/create"): return self.answer(dict(error=f"no: {code}"), code)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if hub.exists: return self.answer(dict(error="You already created this model repo", url=hub.at("me/bot")), 409)
            hub.private = asked.get("private", asked.get("visibility") == "private")
            return self.answer(dict(url=hub.at("me/bot")))
        if self.command == "GET": return self.answer(dict(id="me/bot", sha="c" * 40, private=hub.private, siblings=[dict(rfilename=n) for n in hub.there]))
        if self.path == "/api/validate-yaml": return self.answer({})
        if "/preupload/" in self.path: return self.answer(dict(files=[dict(path=f["path"], uploadMode="lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular", shouldIgnore=False) for f in json.loads(body)["files"]]))
        if self.path.endswith("/objects/batch"): return self.answer(dict(objects=[dict(oid=o["oid"], size=o["size"], actions=dict(upload=dict(href=hub.at(f"lfs/{o['oid']}")))) for o in json.loads(body)["objects"]]))
        if self.path.startswith("/lfs/"):
            hub.large[self.path[5:]] = body
            return self.answer()
        if "/commit/" in self.path:
            hub.commit = [json.loads(line) for line in body.splitlines()]
            return self.answer(dict(commitUrl=hub.at("me/bot/commit/1"), commitOid="1" * 40))
        self.answer(dict(error="not found"), 404)

    do_GET = do_POST = do_PUT = handle_any


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.large, server.commit, server.private, server.exists, server.there, server.refuses = [], {}, None, True, False, [".gitattributes"], {}
    server.address, server.at = address, lambda path: f"{address}/{path}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the other way of sending large files goes to servers of its own
    monkeypatch.setenv("HF_TOKEN", KEY)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ready(made):
    write_card(made[1], made[0], data_licence="mit", say=quiet)
    return made[1]


def test_a_push_sends_every_byte(ready, hub):
    told = []
    sent = push(ready, "me/bot", dry_run=False, endpoint=hub.address, say=told.append)
    assert sent.url == hub.at("me/bot/commit/1") and hub.private is True and {a for _, _, a in hub.seen} <= {f"Bearer {KEY}", None}
    head, *files = hub.commit
    assert head["value"]["parentCommit"] == "c" * 40 and "bot (merged)" in head["value"]["summary"]
    assert {f["value"]["path"] for f in files} == {p.name for p in ready.iterdir()} == {"README.md", "config.json", "model.safetensors", "export.json", "certificate.json"}
    weights = (ready / "model.safetensors").read_bytes()
    assert hub.large == {hashlib.sha256(weights).hexdigest(): weights}
    assert KEY not in " ".join([*told, str(sent), json.dumps(sent.to_json())])


def test_a_dry_run_asks_nobody(ready, hub):
    plan = push(ready, "me/bot", endpoint=hub.address, say=quiet)
    assert not hub.seen and not plan.problems and not plan.url and {n for n, _ in plan.files} == {p.name for p in ready.iterdir()}
    assert "Would send" in str(plan) and "private" in str(plan) and KEY not in str(plan)


def test_public_is_said(ready, hub):
    assert push(ready, "me/bot", dry_run=False, private=False, endpoint=hub.address, say=quiet).url and hub.private is False


def test_a_public_repository_gets_nothing_private(ready, hub):
    hub.exists, hub.private = True, False
    with pytest.raises(UserError, match="exists and is public"): push(ready, "me/bot", dry_run=False, endpoint=hub.address, say=quiet)
    assert hub.commit is None and not hub.large


def test_a_repository_that_exists(ready, hub):
    hub.exists, hub.there, told = True, [".gitattributes", "old.gguf"], []
    assert push(ready, "me/bot", dry_run=False, endpoint=hub.address, say=told.append).url
    assert "old.gguf" in " ".join(told)


@pytest.mark.parametrize("part, code, means", [("repos/create", 401, "does not know your token"), ("repos/create", 403, "does not let this token write"), ("/commit/", 409, "changed the repository at the same time"), ("/commit/", 412, "changed the repository at the same time"),
                                               ("/commit/", 403, "does not let this token write"), ("/preupload/", 401, "does not know your token"), ("/objects/batch", 413, "too large"), ("/commit/", 500, "error 500"), ("/api/models", 404, "knows no such owner")])
def test_refusals_are_explained(part, code, means, ready, hub):
    hub.refuses = {part: code} | ({"/api/models": code} if part == "repos/create" else {})  # else the library looks whether the repository exists
    with pytest.raises(UserError, match=means) as e: push(ready, "me/bot", dry_run=False, endpoint=hub.address, say=quiet)
    assert KEY not in str(e.value) and hub.commit is None


def test_no_network_and_offline(ready, hub, monkeypatch):
    from huggingface_hub import constants
    with pytest.raises(UserError, match="could not be reached"): push(ready, "me/bot", dry_run=False, endpoint="http://127.0.0.1:9", say=quiet)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be reached.*OfflineMode"): push(ready, "me/bot", dry_run=False, endpoint=hub.address, say=quiet)


# ---- what is refused before the network is asked

def spoil_card(f): (f / "README.md").unlink()
def spoil_licence(f): (f / "README.md").write_text((f / "README.md").read_text().replace("license: apache-2.0", "license: unknown"))
def spoil_head(f): (f / "README.md").write_text("---\nlicense: mit\nmodel-index: 3\n---\n")
def spoil_proof(f): write_json(f / "certificate.json", read_json(f / "certificate.json") | dict(verdict="fail"))
def spoil_pickle(f): (f / "training_args.bin").write_bytes(b"\x80\x04.")
def spoil_code(f): (f / "modeling_bot.py").write_text("import os")
def spoil_setting(f): (f / "config.json").write_text(json.dumps(dict(model_type="llama", auto_map=dict(AutoModel="x.Y"))))
def spoil_weights(f): (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1] + b"\x01")
def spoil_stray(f): (f / "notes.txt").write_text("draft")
def spoil_key(f): (f / "NOTICE").write_text(f"token {KEY}")
def spoil_link(f): (f / "weights.safetensors").symlink_to("/etc/hostname")
def spoil_folder(f): (f / "checkpoint-1").mkdir()
def spoil_missing(f): (f / "model.safetensors").unlink()
def spoil_disguise(f): (f / "LICENSE").write_bytes(b"PK\x03\x04\xff\xfe")


SPOILS = dict(card=(spoil_card, "no model card"), licence=(spoil_licence, "leaves a licence unknown"), head=(spoil_head, "head that the Hub would not read"), proof=(spoil_proof, "failed"), pickle=(spoil_pickle, "can run code"), code=(spoil_code, "can run code"),
              setting=(spoil_setting, "run or fetch code"), weights=(spoil_weights, "was changed"), stray=(spoil_stray, "not one of the export's files"), key=(spoil_key, "looks like a key"), link=(spoil_link, "a link or a folder"), folder=(spoil_folder, "a link or a folder"),
              missing=(spoil_missing, "is missing"), disguise=(spoil_disguise, "not what its name says"))


@pytest.mark.parametrize("name", SPOILS)
def test_refused(name, ready, hub):
    spoil, says = SPOILS[name]
    spoil(ready)
    assert any(says in str(p) for p in push(ready, "me/bot", endpoint=hub.address, say=quiet).refused)
    with pytest.raises(UserError, match=says): push(ready, "me/bot", dry_run=False, endpoint=hub.address, say=quiet)
    assert not hub.seen


def test_all_at_once(ready, monkeypatch, hub):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name in ("card", "pickle", "stray", "key", "proof"): SPOILS[name][0](ready)
    with pytest.raises(UserError) as e: push(ready, "no name", dry_run=False, endpoint=hub.address, say=quiet)
    assert {p.place for p in e.value.problems} == {"README.md", "training_args.bin", "notes.txt", "NOTICE", "certificate.json", "repo", "token"} and not hub.seen


def test_a_licence_may_stay_unknown_on_purpose(ready, hub):
    spoil_licence(ready)
    assert push(ready, "me/bot", dry_run=False, unknown_license=True, endpoint=hub.address, say=quiet).url


def test_too_large(ready, monkeypatch):
    monkeypatch.setattr("finetune_nb.push.LARGEST_FILE", 40)
    assert any("more than the Hub takes" in str(p) for p in file_problems(ready))
