"GPTQ and AWQ by llmcompressor itself, on tiny models: closer than rounding, loaded by plain transformers, nothing left after Ctrl-C; its environment whole or not there"
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import chat_rows, ended, make_llama, make_tokenizer, saved_weights, start

from finetune_nb import compressed, compressed_worker
from finetune_nb.core import UserError, read_json
from finetune_nb.export import divergence, log_probs
from finetune_nb.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = lambda line: None


@pytest.fixture(scope="module")
def ready():
    "The environment, made once on a machine (15 s of processor time)"
    return compressed.environment(say=quiet)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A Llama of two layers in which, as in real ones, a few channels are much larger than the others"
    folder = tmp_path_factory.mktemp("compressed") / "model"
    llama = make_llama(num_hidden_layers=2, hidden_size=64, intermediate_size=192, tie_word_embeddings=True)
    for layer in llama.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm): norm.weight.data *= torch.exp(torch.randn(64))
    llama.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    "Chats as token ids"
    tokenizer = make_tokenizer()
    return [tokenizer.apply_chat_template(r["prompt"] + r["completion"], return_dict=False) for r in chat_rows()]


@pytest.fixture(scope="module")
def likeness(model, rows):
    "Divergence of a model from the 16-bit one on rows that were not calibrated on"
    encoded = [dict(input_ids=r, labels=r) for r in rows[20:]]
    reference = log_probs(load_model(str(model)), encoded)
    return lambda other: divergence(reference, log_probs(other, encoded))["kl"]


@pytest.fixture(scope="module")
def rounded(model, likeness):
    "The divergence of plain rounding to a number of bits in groups of 64, symmetric as llmcompressor's"
    def kl(bits):
        other, most = load_model(str(model)), 2 ** (bits - 1)
        for name, m in other.named_modules():
            if isinstance(m, torch.nn.Linear) and name != "lm_head":
                groups = m.weight.data.unflatten(1, (-1, 64))
                scale = groups.abs().amax(-1, keepdim=True) / (most - 0.5)
                m.weight.data = ((groups / scale).round().clamp(-most, most - 1) * scale).flatten(1)
        return likeness(other)
    return kl


# ---- the result

@pytest.mark.parametrize("method", compressed_worker.METHODS)
def test_closer_than_rounding_and_loaded_by_plain_transformers(method, ready, model, rows, likeness, rounded, tmp_path):
    told, bits = [], compressed_worker.METHODS[method][1]
    done = compressed.quantize(model, tmp_path / "out", method, rows[:20], log=tmp_path / "log.txt", say=told.append)
    assert (done.method, done.group, done.ignored, done.tokens) == (method, 64, ["lm_head"], sum(map(len, rows[:20])))
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "out"], "something was left beside the model"

    kept = saved_weights(tmp_path / "out")
    assert "lm_head.weight" not in kept, "tied embeddings came apart"
    assert {n.rsplit(".", 1)[1]: v.dtype for n, v in kept.items()} == dict(weight=torch.bfloat16, bias=torch.bfloat16, weight_packed=torch.int32, weight_scale=torch.bfloat16, weight_shape=torch.int64)
    assert sum("weight_packed" in n for n in kept) == 14
    config = read_json(tmp_path / "out" / "config.json")
    wanted = dict(num_bits=bits, group_size=64, symmetric=True, strategy="group", type="int")
    assert wanted.items() <= config["quantization_config"]["config_groups"]["group_0"]["weights"].items() and config["quantization_config"]["format"] == "pack-quantized" and config["dtype"] == "bfloat16"
    assert not any(str(tmp_path) in f.read_text(errors="replace") for f in (tmp_path / "out").glob("*.json"))

    kl, plain = likeness(compressed.load(tmp_path / "out")), rounded(bits)
    assert 0 < kl < (0.3 if method != "awq-4" else 0.85) * plain, f"{method}: {kl:.4g}, rounding {plain:.4g}"
    assert any(l.startswith(f"{method} 2/3") for l in told) or any(l.startswith(f"{method} 0/3") for l in told), told
    assert "Calibrating" in (tmp_path / "log.txt").read_text()


def test_texts_and_a_layer_that_no_group_divides(ready, tmp_path):
    make_llama(num_hidden_layers=1, hidden_size=64, intermediate_size=80).to(torch.float16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    texts = [r["completion"][0]["content"] for r in chat_rows()]
    done = compressed.quantize(tmp_path / "model", tmp_path / "out", "gptq-4", texts, say=quiet)
    assert (done.group, done.ignored) == (32, ["lm_head", "model.layers.0.mlp.down_proj"])
    assert done.tokens == sum(len(make_tokenizer()(t).input_ids) for t in texts)
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "float16"
    assert torch.isfinite(compressed.load(tmp_path / "out")(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


# ---- what goes wrong

@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_goes_on_when_the_caller_is_stopped(how, ready, model, rows, tmp_path):
    "Ctrl-C leaves nothing; a caller that is killed cannot clean up, but what it started ends"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code = f"import json; from finetune_nb.compressed import quantize; quantize({str(model)!r}, {str(tmp_path / 'out')!r}, 'gptq-4', json.load(open({str(tmp_path / 'rows.json')!r})), say=lambda l: print(l, flush=True))"
    process = start(sys.executable, "-c", code, cwd=tmp_path)
    assert process.stdout.readline().startswith("gptq-4: 26 rows")
    until = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < until: time.sleep(0.05)
    time.sleep(1)  # it has begun to read its input
    process.send_signal(how)
    code, _, err = ended(process)
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert children and not alive and code == -how, err
    assert how == signal.SIGKILL or [p.name for p in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("does, error, says", [
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", UserError, "memory: ran out"),
    ("print('finetune_nb says: {\"problem\": [\"GPU\", \"is needed\", \"Get one\"]}')", UserError, "GPU: is needed. Get one"),
    ("print('odd'); raise SystemExit(3)", RuntimeError, "code 3: odd")], ids=["killed for memory", "told", "unknown"])
def test_failures_say_what_they_mean_and_leave_nothing(does, error, says, ready, model, rows, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(does)
    monkeypatch.setattr(compressed_worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(error, match=says): compressed.quantize(model, tmp_path / "out", "gptq-4", rows, say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["worker.py"]


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    "The sentence in which transformers says so is understood"
    from transformers import AutoModelForCausalLM
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="of_tomorrow")))
    with pytest.raises(ValueError) as e: AutoModelForCausalLM.from_pretrained(tmp_path)
    assert compressed_worker.meaning(e.value)[0] == "architecture"


def test_all_that_is_wrong_beforehand(model, rows, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    monkeypatch.setattr(compressed, "memory", lambda: 1000)
    with pytest.raises(UserError) as e: compressed.quantize(model, tmp_path / "out", "gptq-3", [], group=100)
    assert [p.place for p in e.value.problems] == ["method", "group", "calibration", "memory", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no weights"): compressed.quantize(tmp_path / "empty", tmp_path / "new", "gptq-4", rows)


# ---- the environment

def test_environment_uses_its_own_transformers_and_our_torch(ready):
    code = "import json, transformers, torch, compressed_tensors, tokenizers; print(json.dumps([[m.__name__, m.__version__, m.__file__] for m in (transformers, compressed_tensors, tokenizers, torch)]))"
    found = {n: (v, f) for n, v, f in json.loads(subprocess.run([ready, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1])}
    own = str(ready.parents[1])
    assert found["torch"] == (torch.__version__, torch.__file__)
    assert all(found[n][0] == compressed.PACKAGES[n.replace("_", "-")] and found[n][1].startswith(own) for n in ("transformers", "compressed_tensors", "tokenizers"))
    assert importlib.metadata.version("transformers") != compressed.PACKAGES["transformers"], "or no environment would be needed"


def test_without_a_network_it_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith("PIP_")]: monkeypatch.delenv(name)
    for name, value in dict(FINETUNE_NB_CACHE=str(tmp_path / "cache"), PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1").items(): monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="could not be downloaded"): compressed.environment(say=quiet)
    assert not list((tmp_path / "cache").iterdir())


def test_another_process_may_be_faster_and_all_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path))
    def make(folder):
        (folder / "ours").write_text("x")
        compressed._place().mkdir()
        (compressed._place() / "ready.json").write_text("{}")
    monkeypatch.setattr(compressed, "_make", make)
    assert compressed.environment(say=quiet) == compressed._place() / "bin" / "python"
    (tmp_path / ".compressed-left").mkdir()
    (tmp_path / "model").mkdir()
    assert compressed.remove_environment() == 2 and [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("what, change", [("torch", lambda m: m.setattr(compressed, "version", lambda name: "2.15.0+cu130")), ("venv", lambda m: m.setattr(compressed, "find_spec", lambda name: None)),
                                          ("compressed-tensors", lambda m: m.setattr(compressed, "find_spec", lambda name: name != "compressed_tensors"))], ids=["torch", "venv", "compressed-tensors"])
def test_what_is_missing_is_named(what, change, monkeypatch):
    change(monkeypatch)
    assert compressed.missing().place == what and compressed.missing().fix
