"GGUF files of small models: what llama.cpp says and what is read back agree, nothing is left half-written, and scale and importance have the effect they should"
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ended, start

from finetune_nb import converter as conversion
from finetune_nb.core import UserError, sha256_file
from finetune_nb.gguf_files import LEVELS, convert, convert_lora, gguf_head, importance, quantize_gguf, tensor_mix
from finetune_nb.models import local

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = lambda line: None
SMALL = dict(vocab_size=49152, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, initializer_range=0.1)


def save(model, folder):
    "The model with the embedded model's tokenizer, which the converter knows"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"): shutil.copy(Path(local("smollm2-135m")) / name, folder / name)
    return folder


def llama(folder, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | dict(hidden_size=96, intermediate_size=256) | settings))
    with torch.no_grad():
        for layer in model.model.layers:  # as in trained models, a few inputs are much larger than the others
            for norm in (layer.input_layernorm, layer.post_attention_layernorm): norm.weight[::16] *= 8
    return save(model, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def model(place, frozen): return llama(place / "model")


@pytest.fixture(scope="module")
def f16(place, model): return convert(model, place / "f16.gguf", say=quiet)


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(1)
    return [dict(input_ids=(ids := torch.randint(100, 5000, (40,)).tolist()), labels=ids) for _ in range(6)]


@pytest.fixture(scope="module")
def vectors(model, rows): return importance(loaded(model), rows, say=quiet)


@pytest.fixture(scope="module")
def exact(f16, rows): return llama_logits(f16, rows).log_softmax(-1)


def loaded(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@cache
def tensors(path):
    "{tensor: its numbers in float32}"
    from gguf import GGUFReader
    from gguf.quants import dequantize
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def llama_logits(gguf, rows, lora=None):
    "Logits of llama.cpp for each position of each row"
    import llama_cpp
    model = llama_cpp.Llama(str(gguf), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, lora_path=lora and str(lora))
    try:
        found = []
        for row in rows:
            model.reset()
            model.eval(row["input_ids"])
            found.append(np.array(model.scores[:len(row["input_ids"])]))
        return torch.from_numpy(np.stack(found))
    finally: model.close()


# ---- what is in a file

@pytest.mark.parametrize("level", LEVELS)
def test_levels_say_what_llama_cpp_says(level, f16, tmp_path):
    "At every level, the tensors that fell back are those of llama.cpp's own warnings, and its bits per weight are ours"
    mix = quantize_gguf(f16, tmp_path / "x.gguf", level, log=tmp_path / "log", say=quiet)
    said = (tmp_path / "log").read_text()
    warned = set(re.findall(r"warning: (\S+)\s+- ncols", said))
    own = set(LEVELS[level][1].split())
    silent = {name for name, _, kind in gguf_head(tmp_path / "x.gguf")[1] if name == "token_embd.weight" and kind not in own}  # of the embedding it says nothing
    assert set(mix.fell_back) == warned | silent
    assert bool(warned) == (level not in ("f16", "q8_0"))
    assert mix.bits_per_weight == pytest.approx(float(re.search(r"quant size.*\((\S+) BPW\)", said)[1]), abs=0.006)
    assert mix.bytes == (tmp_path / "x.gguf").stat().st_size and sum(mix.types.values()) == pytest.approx(1)
    assert mix == tensor_mix(tmp_path / "x.gguf")


def test_converted_numbers_are_the_models(model, f16):
    found, theirs = tensors(f16), loaded(model).state_dict()
    assert np.allclose(found["blk.1.ffn_down.weight"], theirs["model.layers.1.mlp.down_proj.weight"], atol=1e-3)
    assert np.allclose(found["token_embd.weight"], theirs["model.embed_tokens.weight"], atol=1e-3)


# ---- importance

def weighted_errors(source, made, vectors):
    exact, rounded = tensors(source), tensors(made)
    return {n: float((v * (exact[n] - rounded[n]) ** 2).sum()) for n, v in vectors.items() if n in exact}


@pytest.mark.parametrize("level", ["q2_k", "q4_0", "q4_k_m"])
def test_importance_lowers_the_error_that_counts(level, vectors, exact, f16, rows, tmp_path):
    "With it, the error times the mean square of the inputs falls in every matrix, and so does the divergence from the 16-bit file on the rows it was taken from"
    told, log = [], tmp_path / "log"
    for name, given in (("with", vectors), ("without", None)): mix = quantize_gguf(f16, tmp_path / f"{name}.gguf", level, given, log=log, say=told.append)
    with_it, without = (weighted_errors(f16, tmp_path / f"{n}.gguf", vectors) for n in ("with", "without"))
    assert sum(with_it.values()) < 0.9 * sum(without.values()), (sum(with_it.values()), sum(without.values()))
    assert [n for n in vectors if with_it[n] > 1.02 * without[n]] == []
    kl = {}
    for name in ("with", "without"): kl[name] = float((exact.exp() * (exact - llama_logits(tmp_path / f"{name}.gguf", rows).log_softmax(-1))).sum(-1).mean())
    assert kl["with"] < kl["without"]
    assert mix.fell_back and set(re.findall("did not find weights for (\\S+)", log.read_text())) == {"token_embd.weight"} and not any("rounded without it" in line for line in told)


def test_experts_have_vectors_of_their_own(rows, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    torch.manual_seed(0)
    config = SMALL | dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2, head_dim=64, decoder_sparse_step=1)
    folder = save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)), tmp_path / "moe")
    vectors = importance(loaded(folder), rows, say=quiet)
    source = convert(folder, tmp_path / "moe.gguf", say=quiet)
    quantize_gguf(source, tmp_path / "q.gguf", "q2_k", vectors, log=tmp_path / "log", say=quiet)
    assert set(re.findall("did not find weights for (\\S+)", (tmp_path / "log").read_text())) == {"token_embd.weight"}
    shapes = {n: s for n, s, _ in gguf_head(source)[1]}
    assert {n: [v.shape[-1], *v.shape[:-1]] for n, v in vectors.items()} == {n: [shapes[n][0], *shapes[n][2:]] for n in vectors}
    quantize_gguf(source, tmp_path / "plain.gguf", "q2_k", say=quiet)
    name = "blk.0.ffn_down_exps.weight"
    exact, with_it, without = (tensors(p)[name] for p in (source, tmp_path / "q.gguf", tmp_path / "plain.gguf"))
    weight = vectors[name][:, None, :]
    assert (weight * (exact - with_it) ** 2).sum() < 0.97 * (weight * (exact - without) ** 2).sum()


def test_a_vector_of_the_wrong_size_is_refused(f16, tmp_path):
    with pytest.raises(UserError, match="imatrix size 5 is different"): quantize_gguf(f16, tmp_path / "x.gguf", "q4_0", {"blk.0.ffn_up.weight": np.ones(5, np.float32)}, say=quiet)
    assert list(tmp_path.iterdir()) == []


# ---- adapters

def adapter(model, folder, **settings):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    made = get_peft_model(loaded(model), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **dict(r=16, lora_alpha=8, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]) | settings))
    made.save_pretrained(folder)
    return folder, made


@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
def test_an_adapter_has_the_effect_that_was_trained(rs, model, f16, rows, place, tmp_path):
    "llama.cpp with base and adapter says what transformers says; the converter alone would lose rsLoRA's scale"
    folder, made = adapter(model, tmp_path / "adapter", use_rslora=rs)
    made_of = convert_lora(folder, model, tmp_path / "lora.gguf", say=quiet)
    assert gguf_head(made_of)[0]["adapter.lora.alpha"] == 8 * (4 if rs else 1)
    with torch.inference_mode(): wanted = torch.stack([made(input_ids=torch.tensor([r["input_ids"]])).logits[0] for r in rows])
    far = lambda logits: float((logits - wanted).square().mean().sqrt() / wanted.std())
    assert far(llama_logits(f16, rows, made_of)) < 0.01  # 0.003 were measured, 0.6 to 1.2 for the two controls
    assert far(llama_logits(f16, rows)) > 0.5, "the control: the adapter does change the answers"
    if not rs: return
    conversion.run_logged([sys.executable, "-B", conversion.converter() / "convert_lora_to_gguf.py", folder, "--base", model, "--outfile", tmp_path / "naive.gguf"])
    assert far(llama_logits(f16, rows, tmp_path / "naive.gguf")) > 0.2, "the control: without care the scale is lost"


@pytest.mark.parametrize("settings, words", [
    (dict(use_dora=True), "DoRA"), (dict(modules_to_save=["lm_head"]), "trained whole"), (dict(rank_pattern={"q_proj": 4}), "ranks of its own"), (dict(alpha_pattern={"q_proj": 4}), "alphas of its own"),
    (dict(bias="all"), "trained biases"), (dict(lora_bias=True), "trained biases"), (dict(init_lora_weights="pissa"), "a start that changes its base (pissa)"), (dict(trainable_token_indices=[5]), "trained tokens")], ids=lambda v: "" if isinstance(v, str) else next(iter(v)))
def test_what_no_adapter_file_can_express_is_refused(settings, words, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    get_peft_model(loaded(tiny_model), LoraConfig(task_type="CAUSAL_LM", **dict(target_modules=["q_proj"]) | settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="Export it merged") as e: convert_lora(tmp_path / "adapter", tiny_model, tmp_path / "x.gguf", say=quiet)
    assert words in str(e.value) and len(e.value.problems) == 1 and not (tmp_path / "x.gguf").exists()


# ---- nothing half-written

SLOW = """
import sys, time
out = sys.argv[sys.argv.index("--outfile") + 1]
with open(out, "wb") as f:
    f.write(bytes(1 << 20)), f.flush()
    open(sys.argv[0] + ".started", "w").close()
    time.sleep(120)
"""


def test_ctrl_c_leaves_nothing(tiny_model, tmp_path):
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(SLOW)
    (tmp_path / "out").mkdir()
    code = f"from finetune_nb.gguf_files import convert; convert({tiny_model!r}, {str(tmp_path / 'out' / 'x.gguf')!r})"
    process, began = start(sys.executable, "-c", code, cwd=tmp_path, LLAMA_CPP_DIR=str(tmp_path / "llama.cpp")), time.monotonic()
    while not (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py.started").exists():
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.1)
    assert [p.name for p in (tmp_path / "out").iterdir()] != []
    os.kill(process.pid, signal.SIGINT)  # as Jupyter does: the kernel alone is told, not its children
    assert ended(process)[0] != 0
    assert list((tmp_path / "out").iterdir()) == []
    alive = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "llama.cpp").encode() in _read(p)]
    assert alive == []


def _read(path):
    try: return path.read_bytes()
    except OSError: return b""


def test_a_full_disk_is_told_before(model, f16, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1 << 20))
    for step in (lambda: convert(model, tmp_path / "x.gguf", say=quiet), lambda: quantize_gguf(f16, tmp_path / "x.gguf", "q4_0", say=quiet)):
        with pytest.raises(UserError, match="has 1.0 MiB free and the run needs about"): step()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_when_a_new_one_fails(f16, tmp_path):
    (tmp_path / "x.gguf").write_text("earlier")
    quantize_gguf(f16, tmp_path / "q.gguf", "q8_0", say=quiet)
    with pytest.raises(UserError, match="is quantized already"): quantize_gguf(tmp_path / "q.gguf", tmp_path / "x.gguf", "q4_0", say=quiet)
    assert (tmp_path / "x.gguf").read_text() == "earlier"


def test_a_model_that_brings_code_is_not_converted(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="auto_map"): convert(folder, tmp_path / "x.gguf", say=quiet)
    assert any("auto_map" in str(p) for p in conversion.architecture_problems(folder)) and not (tmp_path / "ran").exists()


# ---- the converter's cache

@pytest.fixture
def package(tmp_path, monkeypatch):
    "A source package of two files, put where a person without a network would put it"
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    path = tmp_path / "cache" / "llama.cpp" / conversion.SDIST
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        for name in ("convert_hf_to_gguf.py", "conversion/base.py", "other.py"):
            member = tarfile.TarInfo(f"p/vendor/llama.cpp/{name}")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"pass"))
    conversion._unpack(path, tmp_path / "once")
    monkeypatch.setattr(conversion, "SDIST_SHA256", sha256_file(path))
    monkeypatch.setattr(conversion, "TREE_SHA256", conversion._tree(tmp_path / "once"))
    return path


def test_a_damaged_cache_is_made_again(package):
    home = conversion.converter(say=quiet)
    assert sorted(p.relative_to(home).as_posix() for p in home.rglob("*.py")) == ["conversion/base.py", "convert_hf_to_gguf.py"]
    for damage in (lambda: (home / "conversion" / "base.py").write_text("evil"), lambda: (home / "conversion" / "more.py").write_text("evil"), lambda: (home / "convert_hf_to_gguf.py").unlink()):
        damage()
        assert conversion._tree(conversion.converter(say=quiet)) == conversion.TREE_SHA256
    assert [p.name for p in home.parent.iterdir() if p.name.startswith(".")] == []


def test_another_package_is_not_taken(package, monkeypatch, tmp_path):
    package.write_bytes(package.read_bytes() + b"x")
    for name, value in dict(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)).items(): monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="another SHA-256") as e: conversion.converter(say=quiet)
    assert all(way in str(e.value) for way in ("LLAMA_CPP_DIR", "put it into", "global.index-url"))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(conversion, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [p.place for p in conversion.gguf_problems()] == ["llama-cpp-python", "sentencepiece", "compiler"]
    assert "finetune_nb[gguf]" in conversion.gguf_problems()[0].fix
