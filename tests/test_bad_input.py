"""Damaged recipes, data, models, adapters and run folders: each ends in a sentence with a fix, or works. Never a traceback, a hang, or half a file.

The corpus is made here from a few good ones, so that it can be read. `test_corpus_is_large` counts it.
"""
import json
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import CHATML, COMMAND, chat_rows, ended, start
from finetune_nb import cli, report, runs, trust
from finetune_nb.core import UserError, read_json, write_json
from finetune_nb.data import read
from finetune_nb.models import find, load_adapter, load_model, load_tokenizer
from finetune_nb.recipe import FIELDS, load, make, to_yaml

GOOD = to_yaml(make("laptop"))
SOON = 20  # seconds that reading anything here may take on a busy machine; each takes well under one


def files(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def told(call):
    "The person's message, or None if it worked; anything else fails the test"
    start = time.monotonic()
    try: call(), (said := None)
    except UserError as e:
        assert e.problems and all(p.place and p.problem for p in e.problems)
        said = str(e)
        said.encode("utf-8")
        assert said.strip() and "Traceback" not in said and len(said) < 20_000
    assert time.monotonic() - start < SOON
    return said


def bent(text, seed, times=3):
    "The text with a few characters exchanged, dropped or doubled"
    r, out = random.Random(seed), list(text)
    for _ in range(times):
        i = r.randrange(len(out))
        out[i] = r.choice(["", out[i] * 2, r.choice("{}[]:,\"'\n\t\0-&*!|>%@`#\\\x1b\u202e0é")])
    return "".join(out)


# ---- recipes

VALUES = ["null", "[]", "{}", "''", "-1", "0", "true", "1.5", "nan", ".nan", "1e400", "99999999999999999999", "[1, 2]", "{a: 1}", "x" * 5000, "'\\0'", "!!binary aGk=", "2026-01-01", "1:30", "0x10", "'${HOME}'", "'../..'", "'{0.__class__}'"]
RECIPES = {f"{name}: {value[:20]}": f"{name}: {value}\n".encode() for i, name in enumerate(FIELDS) for value in random.Random(i).sample(VALUES, 3)}
RECIPES |= {f"bent {n}": bent(GOOD, n).encode() for n in range(40)}
RECIPES |= {f"cut at {n}": GOOD.encode()[:n] for n in range(1, len(GOOD), len(GOOD) // 15)}
RECIPES |= {"empty": b"", "spaces": b"  \n\n ", "number": b"3", "text": b"hello", "null": b"null", "binary": bytes(range(256)), "utf-16": GOOD.encode("utf-16"), "latin-1": "system: Größe".encode("latin-1"), "nul": b"seed: 1\0", "tabs": b"\tseed: 1", "two documents": b"seed: 1\n---\nseed: 2\n", "json": b'{"seed": 1}', "bom": b"\xef\xbb\xbfseed: 1\n",
            "deep": b"[" * 10_000, "deep map": b"{a: " * 10_000, "alias": b"a: &a [1]\nb: *a", "unknown tag": b"seed: !x 1", "directive": b"%YAML 9.9\n---\nseed: 1", "list key": b"? [a]\n: 1", "map key": b"? {a: 1}\n: 1", "int key": b"1: 2", "null key": b"~: 1", "crlf": b"seed: 1\r\nlora_r: 8\r\n", "many": b"".join(b"k%d: 1\n" % i for i in range(3000)), "preset list": b"preset: [fast]", "preset map": b"preset: {a: 1}", "preset number": b"preset: 7"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(tmp_path, name):
    (tmp_path / "r.yaml").write_bytes(RECIPES[name])
    told(lambda: load(tmp_path / "r.yaml"))
    assert list(files(tmp_path)) == [Path("r.yaml")]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")), st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=8), st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda x: st.lists(x, max_size=3), max_leaves=3), max_size=6).map(lambda d: json.dumps(d).encode())))
def test_any_recipe(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    told(lambda: load(path))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS) + ["preset", "path", "self", "values"]), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.lists(st.integers(), max_size=2), max_size=8))
def test_any_settings(values): told(lambda: make(**values))


@pytest.mark.parametrize("path", ["", ".", "/", "x" * 300, "a\0b", "~nobody-here/x", "/dev/null", "no/such.yaml", "/proc/self/mem", "a/" * 3000], ids=lambda p: repr(p)[:16])
def test_paths(path):
    assert told(lambda: load(path)) and (told(lambda: find(path)) or path == "no/such.yaml")  # which may be a name on the hub


# ---- data

ROWS = "".join(json.dumps(r) + "\n" for r in chat_rows()[:6])
ROW = '{"prompt": "a", "completion": %s}\n'
DATA = {f"bent {n}.jsonl": bent(ROWS, n).encode("utf-8", "replace") for n in range(40)} | {f"cut {n}.jsonl": ROWS.encode()[:n] for n in range(1, len(ROWS), len(ROWS) // 15)}
DATA |= {f"value {i}.jsonl": (ROW % v).encode() for i, v in enumerate(['null', '3', '[]', '{}', '""', 'NaN', 'Infinity', '-Infinity', '1e999', 'true', '"\\u0000"', '"\\ud800"', '[[[[1]]]]', '[{"role": "assistant"}]', '[{"role": 3, "content": "x"}]', '[{"role": "assistant", "content": null}]', '"' + "x" * 5_000_000 + '"', "[" * 10_000, "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "9" * 5000])}
DATA |= {"empty.jsonl": b"", "empty.json": b"", "empty.csv": b"", "empty.parquet": b"", "nul.jsonl": b"\0" * 100, "binary.jsonl": bytes(range(256)), "binary.csv": bytes(range(256)), "binary.parquet": bytes(range(256)), "magic.parquet": b"PAR1" + b"\0" * 50 + b"PAR1", "utf16.jsonl": ROWS.encode("utf-16"), "utf16.csv": "prompt,completion\na,b\n".encode("utf-16"),
         "numbers.jsonl": b"1\n2\n", "list.jsonl": b"[1]\n[2]\n", "deep.json": b"[" * 10_000, "deep ok.json": b"[" * 900 + b"]" * 900, "object.json": b"{}", "data.json": b'{"data": 3}', "nan.json": b'[{"prompt": NaN, "completion": "x"}]', "dup.json": b'[{"prompt": "a", "prompt": "b", "completion": "x"}]',
         "formula.csv": b'prompt,completion\n"=HYPERLINK(""http://evil.example"")",=1+1\n', "5 MB.csv": b"prompt,completion\na," + b"x" * 5_000_000 + b"\n", "open quote.csv": b'prompt,completion\n"a,b\n', "wide.csv": b"prompt,completion\n" + b"," * 10_000 + b"\n", "many columns.csv": b",".join(b"c%d" % i for i in range(10_000)) + b"\n", "header.csv": b"prompt,completion\n", "twice.csv": b"prompt,prompt,completion\na,b,c\n", "nul.csv": b"prompt,completion\n\0,b\n", "cr.csv": b"prompt,completion\ra,b\r",
         "script.py": b"raise SystemExit('ran')", "pickle.pkl": b"cos\nsystem\n(S'true'\ntR.", "zip.zip": b"PK\3\4" + b"\0" * 30, "rows.txt": b"hello", "escape.jsonl": (ROW % '"\\u001b[2J"').encode(), "rtl.jsonl": (ROW % '"\\u202e"').encode(), "keys.jsonl": b'{"\\u001b[2J": 1, "<img>": 2}\n', "extra.jsonl": b'{"prompt": "a", "completion": "b", "' + b"k" * 100_000 + b'": 1}\n'}


@pytest.mark.parametrize("name", DATA)
def test_data(tmp_path, name):
    (tmp_path / name).write_bytes(DATA[name])
    told(lambda: read(str(tmp_path / name)))
    assert list(files(tmp_path)) == [Path(name)]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "role", "content", "text", "conversations", "from", "value", "tools", "group"]), x, max_size=3), max_leaves=8), st.sampled_from([".jsonl", ".json", ".csv"]))
def test_any_data(tmp_path_factory, value, kind):
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    path.write_text(json.dumps(value) if kind == ".jsonl" else json.dumps([value]) if kind == ".json" else f"prompt,completion\n{value},{value}\n", encoding="utf-8", errors="replace")
    told(lambda: read(str(path)))


# ---- models

def settings_with(**values): return lambda d: write_json(d / "config.json", read_json(d / "config.json") | values)
def overwrite(file, data): return lambda d: (d / file).write_bytes(data)
def cut(file, share): return lambda d: (d / file).write_bytes((d / file).read_bytes()[:int((d / file).stat().st_size * share)])
def without(file): return lambda d: (d / file).unlink()
def zeroed(file): return lambda d: (d / file).write_bytes(bytes((d / file).stat().st_size))


def flipped(file, seed):
    def damage(d):
        data = bytearray((d / file).read_bytes())
        for i in random.Random(seed).sample(range(min(len(data), 4000)), 5): data[i] ^= 1 << random.Random(seed + i).randrange(8)
        (d / file).write_bytes(data)
    return damage


def head(change):
    "Change the head of the weights"
    def damage(d):
        path = d / "model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        new = json.dumps(change(json.loads(data[8:8 + length]))).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length:])
    return damage


def drop_one(h): return {k: v for k, v in h.items() if "layers.1.mlp.up_proj.weight" not in k}
def rename(h): return {k.replace("q_proj", "x_proj"): v for k, v in h.items()}
def odd_shape(h): return h | {"model.norm.weight": h["model.norm.weight"] | {"shape": [8, 8]}}
def odd_type(h): return h | {"model.norm.weight": h["model.norm.weight"] | {"dtype": "F99"}}
def far(h): return h | {"model.norm.weight": h["model.norm.weight"] | {"data_offsets": [0, 10**15]}}


MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
MODELS = {f"{what} {f}": how for f in MODEL_FILES for what, how in {"no": without(f), "empty": overwrite(f, b""), "half": cut(f, .5), "zeroed": zeroed(f), "list": overwrite(f, b"[1]"), "deep": overwrite(f, b"[" * 100_000), "binary": overwrite(f, bytes(range(256)) * 4)}.items()}
MODELS |= {f"flipped {f} {n}": flipped(f, n) for f in MODEL_FILES for n in range(3)}
MODELS |= {f"{k}={str(v)[:12]}": settings_with(**{k: v}) for k, v in [("hidden_size", 0), ("hidden_size", -1), ("hidden_size", 10**12), ("hidden_size", "x"), ("hidden_size", 32), ("num_hidden_layers", 10**9), ("num_hidden_layers", 5), ("num_attention_heads", 0), ("num_attention_heads", 7), ("num_attention_heads", None), ("num_key_value_heads", 3),
                                                               ("vocab_size", 10**12), ("vocab_size", 1), ("vocab_size", 331), ("model_type", "nobody"), ("model_type", None), ("model_type", ["llama"]), ("model_type", "../x"), ("model_type", "bert"), ("hidden_act", "evil"), ("rope_parameters", "x"), ("rope_scaling", {"type": "x"}), ("dtype", "x"), ("torch_dtype", "os.system"), ("architectures", "X"), ("architectures", [1]),
                                                               ("quantization_config", 3), ("quantization_config", {}), ("quantization_config", {"quant_method": "gptq"}), ("quantization_config", {"quant_method": "awq", "bits": "x"}), ("tie_word_embeddings", "x"), ("pad_token_id", 10**9), ("eos_token_id", "x"), ("max_position_embeddings", -1), ("text_config", 3)]}
MODELS |= {f.__name__: head(f) for f in (drop_one, rename, odd_shape, odd_type, far)}
MODELS |= {f"chat template {i}": (lambda t: lambda d: (d / "chat_template.jinja").write_text(t))(t) for i, t in enumerate(["{% for", "{{ x.y.z }}", "{{ raise_exception('no') }}", CHATML + "{% endfor %}", "{{ messages[99].content }}", "{{ 1/0 }}", "\0", "{% for m in messages %}{% break %}{% endfor %}"])}


@pytest.mark.parametrize("name", MODELS)
def test_model(tmp_path, tiny_model, name):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    MODELS[name](folder)
    before = files(tmp_path)
    told(lambda: load_tokenizer(str(folder)))
    said = told(lambda: load_model(str(folder)))
    assert files(tmp_path) == before, "loading wrote something"
    if name in ("drop_one", "rename", "half model.safetensors", "num_hidden_layers=5", "hidden_size=1000000000000"): assert said, "a model without its weights was loaded"


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + bytes(60), b"GGUF\3\0\0\0" + b"\xff" * 60, b"\0" * 1000, bytes(range(256)) * 20], ids=lambda d: repr(d)[:16])
def test_gguf(tmp_path, monkeypatch, data):
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(data)
    assert told(lambda: load_model(str(tmp_path / "x.gguf")))
    assert not [p for p in files(tmp_path) if p != Path("x.gguf")], "half an unpacked model was left"


# ---- adapters

@pytest.fixture(scope="module")
def base(tiny_model): return load_model(tiny_model)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    from peft import LoraConfig, get_peft_model
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_model(tiny_model), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


ADAPTERS = {f"{what} {f}": how for f in ("adapter_config.json", "adapter_model.safetensors") for what, how in {"no": without(f), "empty": overwrite(f, b""), "half": cut(f, .5), "zeroed": zeroed(f), "list": overwrite(f, b"[1]"), "flipped": flipped(f, 1), "flipped again": flipped(f, 2)}.items()}
ADAPTERS |= {f"{k}={str(v)[:14]}": (lambda k, v: lambda d: write_json(d / "adapter_config.json", read_json(d / "adapter_config.json") | {k: v}))(k, v) for k, v in [("r", 0), ("r", 99), ("r", "x"), ("r", -1), ("r", 10**12), ("peft_type", "NOBODY"), ("peft_type", None), ("target_modules", []), ("target_modules", ["nobody"]), ("target_modules", 3), ("task_type", "X"), ("lora_alpha", "x"), ("layers_to_transform", [99]), ("rank_pattern", 3), ("unknown_key", 1), ("base_model_name_or_path", 3), ("modules_to_save", ["nobody"])]}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(tmp_path, tiny_model, adapter, name):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    ADAPTERS[name](folder)
    before = files(tmp_path)
    told(lambda: trust.adapter_problems(folder, tiny_model))
    told(lambda: load_adapter(load_model(tiny_model), folder, tiny_model))
    assert files(tmp_path) == before


# ---- run folders

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    "What a small finished run leaves, without its weights"
    import nbformat
    folder = tmp_path_factory.mktemp("runs") / "run-1"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(GOOD)
    (folder / "environment.txt").write_text("torch==2.13.0\n")
    write_json(folder / "run.json", dict(status="done", started="2026-11-25T00:00:00+00:00", pid=1, host="x", pipeline="finetune", parameters={}, seconds={"train": 3.0}, model={"kind": "gguf"}, data={"sha256": "x"}))
    write_json(folder / "metrics.json", dict(after={"exact": {"value": 0.5}, "loss": {"value": 1.0}}))
    write_json(folder / "comparison.json", dict(table=[{"metric": "exact", "after": "1"}], samples=[], verdict="Better."))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A run")]), folder / "notebook.ipynb")
    return folder


RUN_FILES = ("recipe.yaml", "run.json", "metrics.json", "comparison.json", "metrics.jsonl", "notebook.ipynb", "environment.txt")
RUNS = {f"{what} {f}": how for f in RUN_FILES for what, how in {"no": without(f), "empty": overwrite(f, b""), "half": cut(f, .5), "zeroed": zeroed(f), "list": overwrite(f, b"[1]"), "null": overwrite(f, b"null"), "deep": overwrite(f, b"[" * 10_000), "binary": overwrite(f, bytes(range(256)))}.items()}


@pytest.mark.parametrize("name", RUNS)
def test_report_of_a_damaged_run(tmp_path, run_folder, name):
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    RUNS[name](folder)
    before = files(tmp_path)
    told(lambda: report.text(folder))
    report.curve(folder)
    said = told(lambda: report.build(folder))
    assert {p: d for p, d in files(tmp_path).items() if p.name != "report.html"} == before
    assert (folder / "report.html").exists() == (said is None), "half a report"


@pytest.mark.parametrize("name", RUNS)
def test_command_line_on_a_damaged_run(tmp_path, run_folder, name, capsys):
    "The verbs that read run folders, through the command itself"
    folder = Path(shutil.copytree(run_folder, tmp_path / "runs" / "run-1"))
    RUNS[name](folder)
    for argv in (["runs", "--out", str(tmp_path / "runs"), "--json"], ["compare", str(folder), str(run_folder), "--json"]):
        code = cli.main(argv)
        out = capsys.readouterr()
        assert code in (0, 2) and "Traceback" not in out.err, f"{argv[0]}: {out.err[-600:]}"
        json.loads(out.out)


def test_the_command_itself(tmp_path, model_with_code, run_folder):
    "The same as a person meets it: a process of its own, exit code 2, a sentence and no traceback"
    (tmp_path / "bomb.yaml").write_text("a: &a [1]\nb: *a\n")
    (tmp_path / "rows.jsonl").write_bytes(b"\0" * 100)
    broken = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (broken / "run.json").write_bytes(b"\0" * 100)
    before = files(tmp_path)
    for argv in (["run", "bomb.yaml"], ["run", "-p", "name", "../up"], ["run", "-p", "path", "x"], ["run", "-p", "data", "rows.jsonl"], ["compare", "run", "run"], ["targets", str(model_with_code)]):
        code, out, err = ended(start(*COMMAND, *argv, "--json", cwd=tmp_path))
        assert code == 2 and "Traceback" not in err, f"{argv}: {code} {err[-500:]}"
        assert json.loads(out)["error"]
        now = {p: d for p, d in files(tmp_path).items() if p.parts[0] != "runs"}
        assert now == before, f"{argv} wrote {now.keys() - before.keys()}"
    assert {read_json(f)["status"] for f in tmp_path.glob("runs/*/run.json")} == {"failed"}, "the record of a run that could not begin says so"


@pytest.fixture
def model_with_code(tmp_path_factory, tiny_model):
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("evil") / "model"))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    settings_with(model_type="nobody-knows", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    return folder


def test_corpus_is_large():
    sizes = {n: len(c) for n, c in dict(recipes=RECIPES, data=DATA, models=MODELS, adapters=ADAPTERS, runs=RUNS).items()}
    assert sum(sizes.values()) >= 200 and all(n >= 30 for n in sizes.values()), sizes
