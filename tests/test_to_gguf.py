"Exports to GGUF of real trainings: what is right passes, and a certificate fails for each way in which a GGUF file goes wrong"
import shutil

import numpy as np
import pytest
from conftest import make_llama
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from test_export import finished

from finetune_nb import certificate, export, job
from finetune_nb.certificate import LORA, certify, gguf_file
from finetune_nb.core import UserError, read_json, write_json
from finetune_nb.data import save
from finetune_nb.gguf_files import convert
from finetune_nb.models import load_tokenizer
from finetune_nb.recipe import to_yaml
from finetune_nb.serve import write_serving
from finetune_nb.tensor_mix import tensor_mix
from finetune_nb.to_gguf import export_gguf, export_gguf_lora

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = lambda line: None
TRAINED, ASK = {}, certificate._trained
END = "<jupyter_script>"  # a control token of SmolLM2's that llama.cpp does not know as an end
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}" + END + "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def base(place):
    "A small Llama with a tokenizer that llama.cpp knows, and an end token that it has to be told"
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, END
    model = make_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=1)
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    return str(place / "base")


@pytest.fixture(scope="module")
def run(place, base, tiny_rows, frozen):
    folder = finished(place / "run", base, tiny_rows)
    save(job.rows(export.load(folder / "recipe.yaml"))[0].rows, folder / "data" / "train.jsonl")
    return folder


@pytest.fixture(autouse=True)
def trained_once(monkeypatch):
    "What the trained model says is the same in every test"
    def remembered(run, dtype, device, rows, *rest):
        key = run.folder, str(rows)
        if key not in TRAINED: TRAINED[key] = ASK(run, dtype, device, rows, *rest)
        return TRAINED[key]
    monkeypatch.setattr(certificate, "_trained", remembered)


@pytest.fixture(scope="module")
def sixteen(place, run):
    export_gguf(run, place / "sixteen", "f16", say=quiet)
    return place / "sixteen"


@pytest.fixture(scope="module")
def words(sixteen):
    "({setting: (value, its types)}, tensors) of the GGUF file"
    reader = GGUFReader(gguf_file(sixteen))
    return {n: (f.contents(), f.types) for n, f in reader.fields.items() if not n.startswith("GGUF.") and n != "general.architecture"}, reader.tensors


def rewrite(words, to, change=None, tensors=None):
    "The GGUF file again, some settings and tensors changed"
    change, writer = change or {}, GGUFWriter(to, "llama")
    for name, (value, types) in words[0].items(): writer.add_key_value(name, change.get(name, value), types[0], types[-1] if types[0] == GGUFValueType.ARRAY else None)
    for name in change.keys() - words[0].keys(): writer.add_key_value(name, change[name], GGUFValueType.BOOL)
    for t in words[1]: writer.add_tensor(t.name, np.array((tensors or {}).get(t.name, t.data)), raw_dtype=t.tensor_type)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close): write()


@pytest.fixture
def damaged(sixteen, words, tmp_path):
    "Makes an export of which something was changed"
    def make(change=None, tensors=None):
        folder = tmp_path / "damaged"
        folder.mkdir()
        shutil.copy(sixteen / "export.json", folder)
        rewrite(words, folder / gguf_file(sixteen).name, change, tensors)
        return folder
    return make


def failed(folder, run): return {c.check for c in certify(folder, run, say=quiet).checks if c.verdict == "fail"}


# ---- what is right passes

def test_sixteen_bits_pass(run, sixteen):
    found = certify(sixteen, run, say=quiet)
    assert {c.verdict for c in found.checks} == {"pass"} and found.kind == "gguf", str(found)
    assert found.facts["likeness"]["kl"] < 1e-5 and found.facts["base"]["kl"] > 1, "the control: training did change the answers"
    assert found.facts["speed"]["answer"] > 0 and found.facts["bytes"] == gguf_file(sixteen).stat().st_size == read_json(sixteen / "export.json")["bytes"]
    assert sorted(p.name for p in sixteen.iterdir()) == ["certificate.json", "export.json", "run-f16.gguf"]
    logs = {p.name: p.read_text() for p in (run / "exports").glob("*.log")}
    assert "hf-to-gguf" in logs["gguf-sixteen.log"] and "llama_model_loader" in logs["llama.cpp-sixteen.log"]


def test_a_copy_of_the_file_passes(run, damaged):
    "The control of every damage below"
    assert not failed(damaged(), run)


def test_a_level_with_an_importance_matrix(run, tmp_path):
    about, found = export_gguf(run, tmp_path / "out", "q5_k_m-imatrix", say=quiet), certify(tmp_path / "out", run, say=quiet)
    assert found.verdict != "fail" and found.facts["quantized"] and about["importance"], str(found)
    assert about["mix"]["types"] == tensor_mix(gguf_file(tmp_path / "out")).types and not [p for p in tmp_path.rglob("*") if p.suffix == ".safetensors"]


@pytest.fixture(scope="module")
def lora(place, run):
    export_gguf_lora(run, place / "lora", say=quiet)
    return place / "lora"


@pytest.mark.parametrize("values", [{}, dict(use_rslora=True)], ids=["plain", "rslora"])
def test_an_adapter_beside_its_base(values, run, base, tiny_rows, lora, tmp_path):
    "An rsLoRA's scale, which the converter alone would lose, is that of the training"
    if values:
        run, lora = finished(tmp_path / "run", base, tiny_rows, **values), tmp_path / "lora"
        export_gguf_lora(run, lora, say=quiet)
    found = certify(lora, run, say=quiet)
    assert {c.verdict for c in found.checks} == {"pass"} and found.kind == "gguf-lora" and found.facts["likeness"]["kl"] < 1e-5, str(found)


def test_the_base_without_its_adapter_fails(run, lora, tmp_path):
    copy = shutil.copytree(lora, tmp_path / "lora")
    (copy / LORA).unlink()
    assert failed(copy, run) == {"loads"}
    (copy / "export.json").unlink()
    assert {"KL to the trained model", "kept of the fine-tune"} <= failed(copy, run)


# ---- what is damaged fails

TEMPLATES = {"another role": TEMPLATE.replace("assistant\n", "model\n"), "no newline": TEMPLATE.replace(END + "\n", END), "no end": TEMPLATE.replace(END, ""), "no prompt for the answer": TEMPLATE.partition("{% if add")[0], "start twice": "{{ bos_token }}" + TEMPLATE,
             "refuses": "{{ raise_exception('no') }}", "broken": "{% for", "reaches out": "{{ messages.__class__.__mro__ }}" + TEMPLATE}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_damaged_chat_template_fails(name, run, damaged):
    checks = failed(damaged({"tokenizer.chat_template": TEMPLATES[name]}), run)
    assert checks & {"prompt tokens", "loads"} and ("start token twice" in checks) == (name == "start twice"), checks


def test_a_doubled_start_token_fails(run, damaged):
    "The file asks for a start token before every text, and the template writes one"
    assert failed(damaged({"tokenizer.ggml.add_bos_token": True}), run) >= {"start token twice", "row tokens"}


def test_a_swapped_tokenizer_fails(run, damaged, words):
    tokens, merges = list(words[0]["tokenizer.ggml.tokens"][0]), words[0]["tokenizer.ggml.merges"][0]
    letters = [i for i, t in enumerate(tokens) if len(t) == 1 and t.isalpha()]
    for a, b in zip(letters[::2], letters[1::2]): tokens[a], tokens[b] = tokens[b], tokens[a]
    assert {"prompt tokens", "row tokens"} <= failed(damaged({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}), run)


def test_another_way_of_cutting_text_fails(run, damaged):
    "The file names another pre-tokenizer, which cuts before every capital letter"
    rows = [dict(prompt=[dict(role="user", content=f"JavaScript on GitHub and YouTube, {n}")], completion=[dict(role="assistant", content="x")], row=n) for n in range(8)]
    folder = damaged({"tokenizer.ggml.pre": "tekken"})
    assert {"prompt tokens", "row tokens"} <= {c.check for c in certify(folder, run, rows, say=quiet).checks if c.verdict == "fail"}


def test_a_lost_end_token_fails(run, damaged): assert "ends by itself" in failed(damaged({"tokenizer.ggml.eos_token_id": 0}), run)


def test_the_base_instead_of_the_merge_fails(run, base, sixteen, tmp_path):
    (tmp_path / "wrong").mkdir()
    convert(base, tmp_path / "wrong" / "run-f16.gguf", say=quiet)
    checks = failed(tmp_path / "wrong", run)
    assert {"KL to the trained model", "kept of the fine-tune", "same answers"} <= checks, checks


def test_weights_that_are_not_numbers_fail(run, damaged, words):
    data = {t.name: t.data for t in words[1]}["blk.0.attn_q.weight"].copy()
    data[0, 0] = np.nan
    assert failed(damaged(tensors={"blk.0.attn_q.weight": data}), run) & {"KL to the trained model", "loads"}


@pytest.mark.parametrize("keep", [100, 5_000_000])
def test_a_file_that_is_cut_off_fails(keep, run, sixteen, tmp_path):
    copy = shutil.copytree(sixteen, tmp_path / "cut")
    gguf_file(copy).write_bytes(gguf_file(sixteen).read_bytes()[:keep])
    assert failed(copy, run) == {"loads"}


# ---- mistakes and accidents

def test_ollama_and_llama_server(run, sixteen, lora, tmp_path):
    served = write_serving(shutil.copytree(sixteen, tmp_path / "sixteen"), export.open_run(run))
    text = (tmp_path / "sixteen" / "Modelfile").read_text()
    assert text.startswith("FROM ./run-f16.gguf\nTEMPLATE") and f'PARAMETER stop "{END}"' in text and "ADAPTER" not in text
    assert served["commands"]["llama-server"].startswith("cd sixteen && llama-server -m run-f16.gguf --ctx-size") and not (tmp_path / "sixteen" / "vllm.yaml").exists()
    served = write_serving(shutil.copytree(lora, tmp_path / "lora"), export.open_run(run))
    assert (tmp_path / "lora" / "Modelfile").read_text().startswith("FROM ./base-f16.gguf\nADAPTER ./adapter.gguf\nTEMPLATE") and "--lora adapter.gguf" in served["commands"]["llama-server"]


def test_what_is_told_first(run, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("finetune_nb.to_gguf.architecture_problems", lambda *a: [])
    monkeypatch.setattr("shutil.disk_usage", lambda at: type("", (), dict(free=1000)))
    with pytest.raises(UserError, match="free and the run needs"): export_gguf(run, tmp_path / "out", say=said.append)
    assert "of disk while it is made" in said[-1] and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="Did you mean 'q4_k_m'"): export_gguf(run, tmp_path / "out", "q4_k", say=quiet)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_accident_leaves_nothing(error, run, tmp_path, monkeypatch):
    def breaks(*a, **k): raise error
    monkeypatch.setattr("finetune_nb.to_gguf.convert", breaks)
    monkeypatch.setattr("finetune_nb.to_gguf.architecture_problems", lambda *a: [])
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt): export_gguf(run, tmp_path / "out", say=quiet)
    assert not list(tmp_path.iterdir())


def changed(run, to, **values):
    "The run again, its recipe changed"
    shutil.copytree(run, to)
    (to / "recipe.yaml").write_text(to_yaml(export.load(run / "recipe.yaml").model_copy(update=values)))
    return to


def test_runs_that_have_no_adapter_for_llama_cpp(run, tmp_path):
    with pytest.raises(UserError, match="trained every weight"): export_gguf_lora(changed(run, tmp_path / "full", method="full"), tmp_path / "out", say=quiet)
    dora = changed(run, tmp_path / "dora")
    write_json(dora / "adapter" / "adapter_config.json", read_json(dora / "adapter" / "adapter_config.json") | dict(use_dora=True))
    with pytest.raises(UserError, match="DoRA"): export_gguf_lora(dora, tmp_path / "out", say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dora", "full"]


def test_a_tokenizer_that_llama_cpp_does_not_know(run, tiny_model, tmp_path):
    with pytest.raises(UserError, match="pre-tokenizer"): export_gguf(changed(run, tmp_path / "run", model=tiny_model), tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()
