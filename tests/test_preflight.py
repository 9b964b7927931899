"Exports rehearsed on twins of small models of several architectures, and that what would fail after training fails before (about 2.5 minutes of processor time)"
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import CHATML
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_nb import preflight
from finetune_nb.core import Problem, UserError, read_json, write_json
from finetune_nb.gguf_files import LEVELS
from finetune_nb.known import KNOWN
from finetune_nb.models import load_tokenizer
from finetune_nb.preflight import WITH_IMPORTANCE, export_targets, rehearse_export
from finetune_nb.quantize import FORMATS
from finetune_nb.recipe import make
from finetune_nb.tree import read
from finetune_nb.twin import _BLOCKS, narrow, shallow, twin_config

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = lambda line: None
SIZES = dict(vocab_size=49152, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=128, num_hidden_layers=3, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2)
MODELS = {"llama": {}, "qwen3": dict(head_dim=32), "gemma3_text": dict(head_dim=32, num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"], sliding_window=16, query_pre_attn_scalar=32),
          "mixtral": dict(num_local_experts=4, num_experts_per_tok=2), "gpt_neox": {}, "gpt2": {}, "falcon": dict(new_decoder_architecture=True, num_kv_heads=1), "opt": dict(ffn_dim=128, word_embed_proj_dim=64)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "base(kind): a folder with a small model of an architecture, and the embedded model's tokenizer"
    place, tokenizer = tmp_path_factory.mktemp("bases"), load_tokenizer("smollm2-135m")
    def at(kind):
        if not (place / kind).is_dir():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | MODELS[kind])).bfloat16().save_pretrained(place / kind)
            tokenizer.save_pretrained(place / kind)
        return str(place / kind)
    return at


def recipe(model, **values): return make(model=model, data="home", **dict(lora_r=4) | values)
def verdicts(found): return {c.check: c.verdict for c in found.checks}
def left_behind(): return list(Path(tempfile.gettempdir()).iterdir())


@pytest.fixture(autouse=True)
def own_temporary_files(tmp_path, monkeypatch):
    "Other processes try twins too"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


# ---- whole ways

def test_every_kind_of_target(base, tmp_path):
    found = rehearse_export(recipe(base("llama"), use_rslora=True), "merged, gguf:q4_k_m, gguf:q2_k-imatrix, gguf:f16, gguf-lora, ollama:q8_0", log=tmp_path / "log.txt", say=quiet)
    assert found.verdict == "pass" and not found.problems, str(found)
    assert {"merge", "convert", "same numbers in llama.cpp", "quantize q2_k-imatrix", "q2_k-imatrix loads and answers", "f16 loads and answers", "quantize q8_0", "adapter as GGUF", "Modelfile"} < set(verdicts(found))
    assert "llama" in (tmp_path / "log.txt").read_text() and not left_behind()


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mixtral", "falcon", "gpt_neox", "gpt2"])
def test_architectures(kind, base):
    "The last two have settings that the converter looks up under names which transformers 5 gave up"
    found = rehearse_export(recipe(base(kind)), "gguf:q8_0", say=quiet)
    assert found.verdict == "pass" and "q8_0 loads and answers" in verdicts(found), str(found)


def test_a_setting_that_transformers_overwrites(tmp_path):
    "Falcon 7B's kind of attention has one key and value head, and transformers 5 writes the number of all heads"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **SIZES | dict(multi_query=True))).bfloat16().save_pretrained(tmp_path / "model")
    load_tokenizer("smollm2-135m").save_pretrained(tmp_path / "model")
    found = rehearse_export(recipe(str(tmp_path / "model")), "gguf:q8_0", say=quiet)
    assert found.verdict == "pass" and verdicts(found)["same numbers in llama.cpp"] == "pass", str(found)


def test_only_the_whole_way_shows_it(base, tmp_path, monkeypatch):
    "An architecture that is known, and whose weights cannot be converted all the same: told by the step that fails, nothing left behind"
    monkeypatch.setattr(preflight, "convert", lambda *args, **how: (_ for _ in ()).throw(UserError(Problem("llama.cpp", "failed: shapes do not match", "Read the log"))))
    found = rehearse_export(recipe(base("llama")), "gguf:q8_0", say=quiet)
    assert (verdicts(found)["known to llama.cpp"], verdicts(found)["convert"]) == ("pass", "fail") and "shape" in str(found) and not left_behind(), str(found)


# ---- what cannot work

def test_an_architecture_that_the_converter_does_not_know(base):
    found = rehearse_export(recipe(base("opt")), "gguf:q8_0", say=quiet)
    assert verdicts(found)["known to llama.cpp"] == "fail" and "OPTForCausalLM" in str(found) and "twin" not in verdicts(found)
    assert rehearse_export(recipe(base("opt")), "merged", say=quiet).verdict == "pass", "merged goes without llama.cpp"


def test_what_an_adapter_file_cannot_hold(base):
    for values in (dict(use_dora=True), dict(modules_to_save="lm_head"), dict(lora_bias="all"), dict(method="full")):
        found = rehearse_export(recipe(base("llama"), **values), "gguf-lora", say=quiet)
        assert [c for c, v in verdicts(found).items() if v == "fail"] == ["asked for"] and found.seconds < 20


def test_no_disk_and_no_tools(base, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(100, 99, 1))
    monkeypatch.setattr(preflight, "gguf_problems", lambda: [Problem("llama-cpp-python", "is not installed", "pip install 'finetune_nb[gguf]'")])
    found = rehearse_export(recipe(base("llama")), "gguf:q4_k_m", say=quiet)
    assert [c for c, v in verdicts(found).items() if v == "fail"] == ["disk", "tools"] and "pip install" in str(found) and not left_behind()


def test_a_tokenizer_trained_anew(base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "model")
    words = read_json(tmp_path / "model" / "tokenizer.json")
    words["model"]["merges"] = words["model"]["merges"][:1000]
    write_json(tmp_path / "model" / "tokenizer.json", words)
    found = rehearse_export(recipe(str(tmp_path / "model")), "gguf:q8_0", say=quiet)
    assert verdicts(found)["known to llama.cpp"] == "fail" and "pre-tokenizer" in str(found)


def test_llama_cpp_that_computes_something_else(base, monkeypatch):
    "A setting that is lost on the way: the file loads and answers, and only the numbers say that it is another model"
    convert = preflight.convert
    def losing(folder, to, **how):
        config = read_json(Path(folder) / "config.json")
        write_json(Path(folder) / "config.json", config | dict(rms_norm_eps=0.5))
        return convert(folder, to, **how)
    monkeypatch.setattr(preflight, "convert", losing)
    found = rehearse_export(recipe(base("llama")), "gguf:q8_0", say=quiet)
    assert verdicts(found)["same numbers in llama.cpp"] == "fail" and verdicts(found)["q8_0 loads and answers"] == "pass", str(found)


def test_a_lost_scale_of_an_adapter(base, monkeypatch):
    convert_lora = preflight.convert_lora
    def losing(adapter, *more, **how):
        write_json(adapter / "adapter_config.json", read_json(adapter / "adapter_config.json") | dict(use_rslora=False))
        return convert_lora(adapter, *more, **how)
    monkeypatch.setattr(preflight, "convert_lora", losing)
    assert verdicts(rehearse_export(recipe(base("llama"), use_rslora=True), "gguf-lora", say=quiet))["adapter as GGUF"] == "fail"


def test_a_library_that_breaks_is_told_in_one_line(base, monkeypatch):
    def broken(*a, **k): raise RuntimeError("out of\nluck")
    monkeypatch.setattr(preflight, "write_model", broken)
    found = rehearse_export(recipe(base("llama")), "merged", say=quiet)
    assert verdicts(found)["merge"] == "fail" and "RuntimeError: out of luck" in str(found) and not left_behind()


def test_a_template_that_ollama_cannot_be_told(base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"))
    assert verdicts(rehearse_export(recipe(str(tmp_path / "model")), "ollama:f16", say=quiet))["Modelfile"] == "fail"


# ---- words and twins

def test_the_words_are_those_of_the_formats():
    levels = {n for n, f in FORMATS.items() if f.engine == "llama.cpp"}
    assert levels == set(LEVELS) | {f"{l}-imatrix" for l in WITH_IMPORTANCE}
    assert [str(t) for t in export_targets([f"gguf:{l}" for l in sorted(levels)])] == [f"gguf:{l}" for l in sorted(levels)]


@pytest.mark.parametrize("word", ["gguf:", "gguf:q4_k_m-imatrix-imatrix", "merged:q4_0", "gguf_lora", ":q4_0", "gguf:q6_k-imatrix", "gguf;q4_0", "../x", "gguf-lora:q4_0", "adapter merged"])
def test_words_that_mean_nothing(word):
    with pytest.raises(UserError) as e: export_targets([word, "nonsense"])
    assert len(e.value.problems) == 2


def test_known_models_have_small_twins():
    "Of each architecture that people fine-tune, one model with its real sizes"
    first, without = {}, []
    for k in KNOWN.values(): first.setdefault(k.model_type, k)
    for kind, k in first.items():
        config = AutoConfig.for_model(kind, **k.config).to_dict() | dict(model_type=kind)
        try: small, shapes = twin_config(config, k.name)
        except UserError: without.append(kind); continue
        kinds = lambda c: {x for n in _BLOCKS if isinstance(c.get(n), list) for x in c[n]}
        assert shapes.layers >= 2 and kinds(small) == kinds(config), k.name
        assert {w.kind for w in shapes.weights} == {w.kind for w in read(config, k.name).weights}, k.name
    assert len(without) <= 3 and len(first) > 40, without


def test_narrow_keeps_what_the_blocks_of_a_level_need():
    for k in (KNOWN["llama-3.1-8b"], KNOWN["qwen3-8b"], KNOWN["smollm2-135m"]):
        config = AutoConfig.for_model(k.model_type, **k.config).to_dict() | dict(model_type=k.model_type)
        small = narrow(shallow(config))
        assert (small["hidden_size"] % 256 == 0) == (config["hidden_size"] % 256 == 0), k.name
        assert (small["num_attention_heads"] % small["num_key_value_heads"]) == 0 and small.get("head_dim") == config.get("head_dim")
