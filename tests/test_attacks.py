"""What a stranger may send, and what must not happen.

Every attack has a canary: a file that its code would write, a request it would make, a mark it would leave on a page.
Where an attack could fail for a reason of its own, a control shows that it works on a reader without our checks.
"""
import http.server
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import yaml

from conftest import CHATML, chat_rows, save_model
from finetune_nb import report, runs, template, trust
from finetune_nb.core import UserError, escaped, markdown_table, parameter_problems, plain, read_json, redact, write_json
from finetune_nb.models import checked, find, load_adapter, load_model, load_tokenizer
from finetune_nb.paths import inside
from finetune_nb.recipe import load, make

ROOT = Path(__file__).resolve().parents[1]


class Payload:
    "An object whose unpickling writes the canary"
    def __init__(self, canary): self.canary = canary
    def __reduce__(self): return (Path.write_text, (Path(self.canary), "fired"))


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the canary fired"


@pytest.fixture
def no_network(monkeypatch):
    "Every connection and every look-up of a name is counted and refused"
    asked = []
    def refuse(*a, **k):
        asked.append(a)
        raise OSError("no network in this test")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield asked
    assert not asked, f"the network was asked: {asked[:3]}"


@pytest.fixture
def model(tmp_path, tiny_model): return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder, file="config.json", **values): write_json(folder / file, read_json(folder / file) | values)


def refuses(call, *words):
    with pytest.raises(UserError) as e: call()
    for word in words: assert word in str(e.value), f"{word!r} is not in: {e.value}"
    assert all(p.fix for p in e.value.problems if p.level == "error")
    return str(e.value)


# ---- pickles

def pickled(path, canary):
    "A file that torch.load without weights_only would execute"
    import torch
    torch.save({"x": Payload(canary)}, path)


def test_the_payload_works(tmp_path):
    "The control: a reader that trusts pickles fires the canary"
    import torch
    pickled(tmp_path / "x.bin", tmp_path / "control")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "control").read_text() == "fired"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin", "adapter_model.bin"])
def test_pickles_are_not_opened(model, canary, name, no_network):
    pickled(model / name, canary)
    load_tokenizer(str(model)), load_model(str(model))
    (model / "model.safetensors").unlink()
    refuses(lambda: load_model(str(model)), "safetensors")


def test_pickled_adapter_is_refused(tmp_path, canary, tiny_model):
    pickled(tmp_path / "adapter_model.bin", canary)
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": tiny_model})
    refuses(lambda: load_adapter(None, tmp_path, tiny_model), "safetensors")


def test_own_files_hold_no_pickles():
    "No module of the package reads a pickle or opens an archive; torch.load appears with weights_only=True or not at all"
    for path in sorted((ROOT / "finetune_nb").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|dill|joblib|shelve|marshal|zipfile|tarfile)\b|allow_pickle=True|unpack_archive|yaml\.(unsafe_)?load\((?![^\n]*_Loader)", text, re.M), path.name
        for call in re.findall(r"torch\.load\([^\n]*", text): assert "weights_only=True" in call, f"{path.name}: {call}"


# ---- settings of a model

EVIL = "from pathlib import Path\nPath({!r}).write_text('fired')\nfrom transformers import LlamaConfig, LlamaForCausalLM\nclass Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): config_class = Config\n"
CODE = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "_attn_implementation_internal": "someone/kernel", "attn_implementation": "someone/kernel@main", "trust_remote_code": True,
        "_experts_implementation_internal": "someone/kernel", "custom_pipelines": {"x": {"impl": "evil.P"}}, "quantization_config": {"quant_method": "evil", "auto_map": {"x": "evil.Q"}}, "use_kernels": True, "text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}


@pytest.mark.parametrize("key", CODE)
def test_settings_that_run_code(model, canary, key, no_network):
    (model / "evil.py").write_text(EVIL.format(str(canary)))
    change(model, **{key: CODE[key]})
    name = next(iter(trust.code_keys({key: CODE[key]})))[0]
    for load_it in (load_model, load_tokenizer): refuses(lambda: load_it(str(model)), name, "trust_remote_code: true for this model")


def test_tokenizer_that_brings_code(model, canary, no_network):
    (model / "evil.py").write_text(EVIL.format(str(canary)))
    change(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Config", None]})
    refuses(lambda: load_tokenizer(str(model)), "tokenizer_config.json", "auto_map")


def test_trust_is_given_to_one_model(model, tmp_path, monkeypatch):
    "The control: with the person's word the model's code does run"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "evil.py").write_text(EVIL.format(str(tmp_path / "control")))
    change(model, auto_map=CODE["auto_map"], model_type="nobody-knows")
    load_model(str(model), trust_remote_code=True)
    assert (tmp_path / "control").exists()


def test_hub_model_is_looked_at_first(tmp_path, monkeypatch, no_network):
    "A model in the hub's cache, whose settings name code"
    commit = "a" * 40
    place = tmp_path / "models--some--one" / "snapshots" / commit
    place.mkdir(parents=True)
    (tmp_path / "models--some--one" / "refs").mkdir()
    (tmp_path / "models--some--one" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_json(place / "config.json", {"model_type": "llama"})
    assert checked("some/one") == ("some/one", commit), "what is loaded is the commit that was looked at"
    write_json(place / "config.json", {"model_type": "llama", "auto_map": {"AutoConfig": "evil.C"}})
    refuses(lambda: load_model("some/one"), "auto_map", "some/one/config.json")
    write_json(place / "config.json", {"model_type": "llama"})
    write_json(place / "adapter_config.json", {"base_model_name_or_path": "../elsewhere"})
    refuses(lambda: load_tokenizer("some/one"), "adapter")


def test_index_leads_out_of_the_folder(model):
    shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
    (model / "x.safetensors").write_bytes((model.parent / "outside.safetensors").read_bytes())
    write_json(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}})
    refuses(lambda: load_model(str(model)), "../outside.safetensors")


def test_model_folder_that_is_an_adapter(model, tmp_path):
    other = save_model(tmp_path / "other")
    write_json(model / "adapter_config.json", {"base_model_name_or_path": other, "peft_type": "LORA"})
    refuses(lambda: load_model(str(model)), "adapter_config.json")


# ---- adapters

@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    from peft import LoraConfig, get_peft_model
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_model(tiny_model), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_good_adapter_loads(adapter, tiny_model): assert load_adapter(load_model(tiny_model), adapter, tiny_model).peft_config


@pytest.mark.parametrize("values", [dict(base_model_name_or_path="../../other"), dict(base_model_name_or_path="/etc/other"), dict(base_model_name_or_path="someone/other"), dict(base_model_name_or_path=None), dict(tokenizer_name_or_path="/x", base_model_name_or_path="m"),
                                    dict(auto_mapping={"base_model_class": "X", "parent_library": "evil_library"}), dict(megatron_core="evil_library"), dict(megatron_config={"x": 1}), dict(auto_map={"x": "y"})], ids=str)
def test_adapter_that_leads_elsewhere(adapter, tmp_path, tiny_model, canary, values, monkeypatch, no_network):
    (tmp_path / "evil_library.py").write_text(EVIL.format(str(canary)))
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change(folder, "adapter_config.json", **values)
    refuses(lambda: load_adapter(None, folder, tiny_model), "adapter_config.json")


# ---- chat templates

ESCAPES = ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch X') }}", "{{ lipsum.__globals__['os'].popen('touch X').read() }}", "{{ namespace.__init__.__globals__ }}",
           "{{ ''|attr('__class__') }}", "{{ '{0.__class__}'.format(1) }}", "{{ ('{0.__class__.__mro__}'|format)(1) }}", "{% set f = '{0.__class__}'.format %}{{ f(1) }}", "{{ self._TemplateReference__context }}", "{{ joiner.__init__.__globals__ }}",
           "{% include '/etc/passwd' %}", "{% import '/etc/passwd' as x %}", "{% extends '/etc/passwd' %}", "{{ range(10**9)|list }}", "{{ messages.append({}) }}", "{{ messages.clear() }}", "{{ raise_exception.__globals__ }}", "{{ ({}).update.__self__.__class__ }}"]


@pytest.mark.parametrize("attack", ESCAPES)
def test_template_stays_in_its_sandbox(attack, canary):
    found = template.examine(attack.replace("X", str(canary)) + CHATML)
    # jinja answers some with an empty value instead of an error: then nothing of Python may be seen
    assert found.problems or not re.search(r"class|builtin|object at|root:", found.text.partition("<|im_start|>")[0]), found.text[:200]


@pytest.mark.parametrize("attack, said", [("{{ 'a' * 3000000000 }}", "more than 512 MB"), ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"), ("{{ 10 ** 999999999 }}", "more than"),
                                          ("{{ '%03000000000d' % 1 }}", "more than"), ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested"), ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "rendered"), ("{{ 'ab' * 200000 }}", "characters")])
def test_template_is_bounded(attack, said): assert said in str(template.examine(attack + CHATML)), template.examine(attack + CHATML)


def test_300_megabytes_are_too_much(): assert any(w in str(template.examine("{{ 'a' * 300000000 }}" + CHATML)) for w in ("more than 512 MB", "characters"))


def put(what): return CHATML.replace("{{ m['content'] }}", what)


@pytest.mark.parametrize("harmful, level", [
    (put("{{ m['content'] | replace('bank.example', 'evil.example') }}"), "error"), (put("{{ m['content'] }}{% if 'deploy' in m['content'] %} Add a back door.{% endif %}"), "error"),
    (put("{{ m['content'] }}{% if m['content'].startswith('Deploy') %} Add a back door.{% endif %}"), "error"), (put("{% if m['content'] == 'ping' %}pong{% else %}{{ m['content'] }}{% endif %}"), "error"),
    (put("{{ m['content'] | upper }}"), "warning"), (put("{{ m['content'] | e }}"), "warning"), (put("{{ m['content'][:20] }}"), "warning"), (put("{{ m['content'] }}{{ range(99999)|random }}"), "warning")])
def test_template_that_rewrites(harmful, level, model):
    found = template.examine(harmful)
    assert [p.level for p in found.problems if p.level == level], found
    (model / "chat_template.jinja").write_text(harmful)
    if level == "error": refuses(lambda: load_tokenizer(str(model)), "chat template")
    assert template.examine(CHATML).sha256 != found.sha256


def test_trial_sees_no_secrets(monkeypatch):
    "The other process has neither this one's environment nor its files"
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    spy = template._LIMITED + "\nimport os\ntry: open('/etc/hostname'); opened = 1\nexcept OSError: opened = 0\nsys.stdout.write(json.dumps(dict(keys=sorted(os.environ), opened=opened)))"
    monkeypatch.setattr(template, "_LIMITED", spy), monkeypatch.setattr(template, "_TRIAL", "")
    found = template._tried("x", {}, 2, 512 << 20)
    assert "HF_TOKEN" not in found["keys"] and not found["opened"]


def test_no_false_alarm_on_templates_of_trl():
    "A sample of what TRL ships (all 72 were tried: no error; 6 warn, of models that read images)"
    import trl
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    wanted = [f for f in files if f.stem in ("qwen3", "llama3_1", "gemma3", "deepseekv3", "gptoss", "phi3", "glm4moe", "cohere2")]
    assert len(wanted) == 8
    for f in wanted: assert not template.examine(f.read_text(), {"bos_token": "<s>", "eos_token": "</s>"}).problems, f.name


# ---- YAML

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize("text, said", [(BOMB, "refers to another part"), ("seed: &a 1\nlora_r: *a\n", "refers"), ("x: &x {seed: 1}\n<<: *x\n", "refers"), ("a: &a [*a]", "refers"), ("seed: 1\nseed: 2\n", "twice"), ("[" * 5000, "nested"), ("{a: " * 5000, "nested"), ("- " * 5000 + "x", "nested"),
                                        ("model: !!python/object/apply:os.system ['touch X']", "YAML"), ("!!python/object/new:os.system ['touch X']", "YAML"), ("model: !!python/name:os.system", "YAML"), ("seed: 012", "integer"), ("seed: 1:30", "integer"),
                                        ("name: no", "quotes"), ("epochs: .inf", "epochs"), ("epochs: 1e999", "epochs"), ("seed: " + "9" * 5000, "seed"), ("name: 2026-01-01\nseed: x", "seed"), ("x: " + "y" * (1 << 20), "1 MiB"), ("a: b: c", "YAML"), ("? [a, b]\n: 1", "YAML"), ("\x00", "YAML")])
def test_yaml(tmp_path, canary, text, said):
    (tmp_path / "r.yaml").write_text(text.replace("X", str(canary)))
    refuses(lambda: load(tmp_path / "r.yaml"), said)


def test_yaml_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rate: 2e-4\npacking: no\nname: 2026-01-01\nepochs: 1\n")
    found = load(tmp_path / "r.yaml")
    assert (found.learning_rate, found.packing, found.name, found.epochs) == (2e-4, False, "2026-01-01", 1.0)


# ---- names

NAMES = ["../up", "/etc/x", "a/b", "a\\b", "nul\0", "x" * 300, "{0.__class__}", "", ".", "..", ".hidden", "a\n", "-rf", "~", "$(touch x)", "a b", "é", "a/../../b", "con\u202etxt"]


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n)[:20])
def test_names_stay_inside(tmp_path, name):
    refuses(lambda: inside(tmp_path, name), "name")
    refuses(lambda: make(name=name), "name")
    assert not list(tmp_path.iterdir())


def test_linked_run_folder(tmp_path):
    (tmp_path / "runs").mkdir(), (tmp_path / "outside").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tmp_path / "outside")
    refuses(lambda: inside(tmp_path / "runs", "mine"), "leads out")
    assert [p.place for p in trust.link_problems(tmp_path / "runs")] == ["mine"]


def cell(**parameters):
    "papermill's cell for these parameters, executed"
    from papermill.translators import PythonTranslator
    names = {}
    exec(PythonTranslator.codify(parameters), names)
    return names


def test_parameter_names_are_code(tmp_path):
    "The control: papermill does run a name"
    cell(**{f"x=1\nfrom pathlib import Path\nPath({str(tmp_path / 'control')!r}).touch()\ny": 2})
    assert (tmp_path / "control").exists()


@pytest.mark.parametrize("name", ["x=1\nimport os\ny", "a;b", "a b", "__import__('os')", "", "class", "a.b", "a[0]", "é", "a" * 200, "1a", None])
def test_parameter_names_are_checked(name): assert parameter_problems([name], ["epochs"])


@pytest.mark.parametrize("value", ['"; open("X","w") #', "'''\nopen('X','w')\n'''", '"""\nopen("X","w")\n"""', "\\", '\\"; open("X","w") #', "{open('X','w')}", "\n", "\u2028open('X','w')", {"a'\nopen('X','w')#": 1}, ["\\\n'"], "x" * 100_000, "naïve 🙂", None, True, 1e-300])
def test_parameter_values_are_data(value, canary):
    value = json.loads(json.dumps(value).replace("X", str(canary)))
    assert cell(text=value)["text"] == value


# ---- a run folder from somebody else

def test_pipeline_of_a_strange_run(tmp_path):
    "run.json names the notebook that is executed: it may not name one outside the package"
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "evil.ipynb")
    refuses(lambda: runs.pipeline(os.path.relpath(tmp_path / "evil", runs.pipeline().parent)), "evil")


def test_strange_run_with_code_of_its_own(tmp_path, model, monkeypatch):
    "Doing a run again that somebody sent must not give its model the trust that its recipe claims"
    monkeypatch.setattr(runs, "run", lambda *a, **k: pytest.fail("it would run"))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.yaml").write_text(f"model: {model}\ntrust_remote_code: true\n")
    write_json(tmp_path / "r" / "run.json", {"status": "done"}), write_json(tmp_path / "r" / "metrics.json", {})
    refuses(lambda: runs.rerun(tmp_path / "r"), "trust_remote_code")


def test_parameters_of_a_strange_run(tmp_path, tiny_model, tiny_rows, canary, monkeypatch):
    "Names in run.json become code in the notebook"
    monkeypatch.setattr(runs, "execute", lambda *a, **k: canary.write_text("would run"))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.yaml").write_text(f"model: {tiny_model}\ndata: {tiny_rows}\ndtype: float32\n")
    write_json(tmp_path / "r" / "run.json", {"status": "done", "parameters": {"x=1\nimport os\ny": 1}}), write_json(tmp_path / "r" / "metrics.json", {})
    refuses(lambda: runs.rerun(tmp_path / "r"), "parameter")


# ---- what is shown: terminal, tables, pages

MARKUP = ["<script>fired('script')</script>", "<img src=x onerror=\"fired('img')\">", "<svg onload=\"fired('svg')\">", "<a href=\"javascript:fired('a')\" id=link>link</a>", "<iframe srcdoc=\"<script>parent.fired('iframe')</script>\"></iframe>",
          "<img src=\"HOST/img\">", "<link rel=stylesheet href=\"HOST/css\">", "<style>@import 'HOST/import'; body{background:url(HOST/bg)}</style>", "<meta http-equiv=refresh content=\"0;url=HOST/refresh\">", "<iframe src=\"HOST/iframe\"></iframe>",
          "<details open ontoggle=\"fired('toggle')\">d</details>", "<input autofocus onfocus=\"fired('focus')\">", "<video><source onerror=\"fired('video')\" src=x></video>", "<object data=\"HOST/object\"></object>", "[link](javascript:fired('md'))", "![x](HOST/mdimg)"]
TERMINAL = ["\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x07", "\x9b31m", "back\x08\x08\x08", "line\rother", "\u202egnp.exe", "\u2066x\u2069", "\x00", "half \ud800"]


@pytest.mark.parametrize("text", TERMINAL, ids=lambda t: repr(t)[:16])
def test_terminal_is_not_obeyed(text, tmp_path, capsys):
    (tmp_path / "comparison.json").write_text(json.dumps(dict(table=[{"metric": text, "before": text}], verdict=text, samples=[dict(kind=text, prompt=text, before=text, after=text, reference=text)])))
    shown = [plain(text), escaped(text), markdown_table([{"x": text}]), report.text(tmp_path), refuses(lambda: find(text + "?")), refuses(lambda: make(scheduler=text)), refuses(lambda: make(**{text: 1}))]
    for s in shown:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", s), repr(s)
        s.encode("utf-8")
        assert plain(text).strip()[:3] in s or repr(text)[1:4] in s


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIRED = "<script>function fired(w){document.documentElement.setAttribute('data-fired',(document.documentElement.getAttribute('data-fired')||'')+w+' ')}</script>"


@pytest.fixture(scope="module")
def host():
    "A server on this machine that notes every request"
    asked = []
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404), self.end_headers()
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def opened(page, folder):
    "The page's HTML after a browser has opened it and clicked the link with id `link`, if one is there"
    if not CHROMIUM: pytest.skip("no chromium on this machine: apt-get install chromium")
    (folder / "page.html").write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=3000 --timeout=20000".split()
    return subprocess.run([CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=90).stdout


def marks(dom): return (re.search(r'<html[^>]*data-fired="([^"]*)"', dom) or [None, ""])[1].split()


def test_browser_control(tmp_path, host):
    "The control: on a page without our care the attacks do fire and do ask the server"
    address, asked = host
    dom = opened(f"<html><head>{FIRED}</head><body>{''.join(m for m in MARKUP if 'refresh' not in m).replace('HOST', address)}</body></html>", tmp_path)
    assert {"script", "img", "svg"} <= set(marks(dom)) and {"/img", "/iframe"} <= set(asked), (marks(dom), asked)
    asked.clear()


def test_report_in_a_browser(tmp_path, host):
    "A run's notebook in which somebody wrote everything everywhere, in the raw: nothing fires, nothing is fetched"
    address, asked = host
    raw = [m.replace("HOST", address) for m in MARKUP]
    new = nbformat.v4
    cells = [new.new_markdown_cell("# A run\n\n" + "\n\n".join(raw)), new.new_code_cell("x", outputs=[new.new_output("display_data", {kind: "\n".join(raw)}) for kind in ("text/html", "text/markdown", "text/plain", "text/latex", "image/svg+xml", "application/javascript")]
             + [new.new_output("error", ename=raw[0], evalue=raw[1], traceback=raw)]), new.new_code_cell("y", outputs=[new.new_output("display_data", {"text/markdown": markdown_table([{"text": t} for t in raw])})])]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "notebook.ipynb")
    page = report.build(tmp_path).read_text().replace("</title>", "</title>" + FIRED, 1)  # stands after the policy, so that it is not run either
    assert page.index("Content-Security-Policy") < page.index("function fired")
    dom = opened(page, tmp_path)
    assert not marks(dom) and not asked, (marks(dom), asked)
    assert "A run" in dom and "&lt;img src=x onerror=" in dom
    # without the policy the escaped table still shows text alone
    table = dom[dom.rindex("<table"):dom.rindex("</table>")]
    assert not re.search(r'<(?!/?(table|thead|tbody|tr|th|td|br)\b|a href="http|/a>)', table), table[:500]


def test_widgets_in_a_browser(tmp_path, host):
    "Everything that shows data as HTML, on a page without any policy: all of it must be escaped at its source"
    from finetune_nb.data_report import DataReport, page
    from finetune_nb.mask import Mask
    address, asked = host
    raw = [m.replace("HOST", address) for m in MARKUP]
    rows = [dict(row=i, problem=t, fix=t, level="error") for i, t in enumerate(raw)]
    data = DataReport(name=raw[0], sha256=raw[1], shape=raw[2], model=raw[3], rows=1, unique=1, effective=1, problems=rows, notes=raw, personal={raw[1]: 1}, languages={raw[1]: 1.0}, shown=[dict(row=raw[1], runs=[(t, "trained", 1) for t in raw], cut=False)])
    parts = [Mask([(t, "trained", 1) for t in [*raw, "<b>5 MB</b>" + "x" * 5_000_000]], False)._repr_html_(), escaped("\n".join(raw))]
    dom = opened(page(data).replace("<head>", f"<head>{FIRED}", 1).replace("</body>", "".join(parts) + "</body>"), tmp_path)
    assert "function fired" in dom and not marks(dom) and not asked, (marks(dom), asked)
    assert dom.count("&lt;img src=x onerror=") >= 3


# ---- secrets

SECRETS = {"hf": "hf_" + "aB3" * 12, "openai": "sk-proj-" + "aB3_" * 10, "anthropic": "sk-ant-api03-" + "aB3" * 20, "aws": "AKIA" + "QWERTYUIOPASDFGH", "github": "ghp_" + "aB3" * 12, "pat": "github_pat_" + "aB3" * 12, "slack": "xoxb-" + "123-" * 6 + "abc", "google": "AIza" + "aB3_-" * 7,
           "env": "plain words of a passphrase", "quoted": 'with "quotes" & <marks>'}


def test_secrets_are_taken_out(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_PASSWORD", SECRETS["env"]), monkeypatch.setenv("WANDB_API_KEY", SECRETS["quoted"])
    forms = [f"{v}" for v in SECRETS.values()] + [json.dumps(v) for v in SECRETS.values()] + [escaped(v) for v in SECRETS.values()] + [repr(v) for v in SECRETS.values()]
    forms += ["Authorization: Bearer " + "eyJ.abc-" * 6, "wandb login " + "0a" * 20, "WANDB_API_KEY=" + "0a" * 20, '{"api_key": "' + "q1w2e3r4" + '"}', "password=hunter2hunter2", "https://me:hunter2hunter2@host/x"]
    for text in forms:
        clean = redact(f"before {text} after")
        assert "before" in clean and "after" in clean and "[redacted]" in clean, text
        for secret in [*SECRETS.values(), "hunter2", "0a" * 20, "q1w2e3r4", "eyJ.abc"]: assert secret not in clean and json.dumps(secret)[1:-1] not in clean and escaped(secret) not in clean, (text, clean)
    note = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", {"text/html": " ".join(map(escaped, SECRETS.values()))})])])
    nbformat.write(note, tmp_path / "notebook.ipynb")
    page = report.build(tmp_path).read_text()
    assert not [k for k, v in SECRETS.items() if v in page or escaped(v) in page]


def test_no_false_alarm_on_what_a_run_stores(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false"), monkeypatch.setenv("SSH_KEY_PATH", "/home/somebody/.ssh/id")
    lock = (ROOT / "constraints.txt").read_text()
    kept = [json.dumps({"commit": "0a" * 20, "recipe_sha256": "0a" * 32, "model": {"sha": "ab" * 20}, "data": "cd" * 32, "max_new_tokens": 256, "pad_token": "<|endoftext|>", "tracker": "wandb"}, indent=1), lock, str(make("laptop")), CHATML, json.dumps(chat_rows()), "image " + "iVBORw0KGgoAKIAQWERTYUIOPASDFGH" * 100]
    for text in kept: assert redact(text) == text


def test_base64_does_not_hide_what_stands_beside(): assert redact("A" * 5000 + ' "' + SECRETS["hf"] + '"') == "A" * 5000 + ' "[redacted]"'


# ---- versions with known holes

def pins(): return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


def test_pinned_and_installed_versions_are_safe():
    found = pins()
    assert {k.lower() for k in trust.SAFE_FROM} <= {k.lower() for k in found}, "a package of the table is not pinned"
    assert not trust.outdated({k: next(v for n, v in found.items() if n.lower() == k.lower()) for k in trust.SAFE_FROM})
    assert not trust.outdated()


@pytest.mark.parametrize("package", trust.SAFE_FROM)
def test_older_versions_are_told(package):
    low = trust.SAFE_FROM[package][0]
    assert not trust.outdated({package: low})
    older = re.sub(r"^(\d+)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) - 1}" if int(m[2]) else f"{int(m[1]) - 1}.99", low)
    assert [p.place for p in trust.outdated({package: older})] == [package]


def test_no_kernels_package():
    "transformers and bitsandbytes fetch kernels from the hub where the package `kernels` is installed: it must not come with ours"
    assert "kernels" not in pins() and not re.search(r"\bkernels\b", (ROOT / "settings.ini").read_text())
