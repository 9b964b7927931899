"Targets agree with the installed libraries, reach a real run, and tell a person what cannot be (about 30 seconds)"
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import make_tokenizer, saved_weights, train_here
from finetune_nb import job
from finetune_nb.core import UserError, write_json
from finetune_nb.recipe import make
from finetune_nb.targets import PAST, answer, lora_parameters, peft_default, taken_for_experts, targets
from finetune_nb.translate import lora_kwargs, target_problems
from finetune_nb.tree import of, read, shapes_of

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(vocab_size=332, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MIXTURE = SIZES | dict(num_local_experts=4, num_experts_per_tok=2)
SHARED = SIZES | dict(num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"])


def build(kind, sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)


def adapted(model): return {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if "lora_" in n}


# ---- the installed libraries

def test_weights_that_kernels_read_past_their_layer():
    "PAST is what the sources of the causal language models say"
    found = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for file in Path(transformers.__file__).parent.glob(f"models/{kind}/modeling_{kind}.py"):
            for name in re.findall(r"self\.(out_proj|x_proj|dt_proj|in_proj)\.weight(?!\.|\[|_)", file.read_text(encoding="utf-8")): found.setdefault(name, set()).add(kind)
    assert {k: set(v) for k, v in PAST.items()} == found


def test_the_tables_read_from_sources_are_those_of_the_libraries():
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ())
        assert peft_default(kind) == (default if isinstance(default, str) else tuple(default))
        assert set(taken_for_experts(kind)) == set(_MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(kind), ()))
    assert taken_for_experts("deepseek_v3") and peft_default("llama")


@pytest.mark.parametrize("changes", [dict(lora_dropout=0.1), dict(use_dora=True), dict(lora_init="pissa")], ids=str)
def test_what_fused_weights_refuse(changes):
    "peft refuses it, and we say so before"
    model, recipe = build("mixtral", MIXTURE), make("stock", **dict(lora_dropout=0.0) | changes)
    found = targets(of(model))
    assert [p.place for p in target_problems(recipe, job.layer_sizes(model), found)] == list(changes)
    with pytest.raises(Exception): get_peft_model(model, LoraConfig(**lora_kwargs(recipe, found)))


# ---- the last blocks, explicit names

@pytest.mark.parametrize("kind, sizes", [("mixtral", MIXTURE), ("qwen3_next", SHARED), ("llama", SIZES)])
def test_the_last_blocks_only(kind, sizes):
    model = build(kind, sizes)
    shapes = of(model)
    found = targets(shapes)
    names = adapted(get_peft_model(model, LoraConfig(**lora_kwargs(make("stock", lora_dropout=0.0, lora_layers=1), found))))
    assert names and all(n.startswith("model.layers.2.") for n in names)
    assert len({n.split(".lora_")[0] for n in names}) == len({n.split(".lora_")[0] for n in adapted(get_peft_model(build(kind, sizes), LoraConfig(**lora_kwargs(make("stock", lora_dropout=0.0), found)))) if n.startswith("model.layers.2.")})


def test_a_name_that_peft_would_take_for_the_experts():
    "The plain name would leave the shared expert alone without a word"
    model = build("qwen3_next", SHARED)
    recipe = make("stock", lora_dropout=0.0, lora_targets="up_proj, q_proj")
    kwargs = lora_kwargs(recipe, targets(of(model)))
    assert kwargs["target_modules"] == ["q_proj"] and kwargs["target_parameters"] == ["mlp.shared_expert.up_proj.weight"]
    assert target_problems(recipe, job.layer_sizes(model), targets(of(model))) == []
    assert any("shared_expert.up_proj" in n for n in adapted(get_peft_model(model, LoraConfig(**kwargs))))


# ---- a real run

@pytest.fixture(scope="module", params=[("mixtral", MIXTURE), ("qwen3_next", SHARED)], ids=["mixtral", "qwen3_next"])
def mixture(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    build(*request.param).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_trains_the_experts(mixture, method, tiny_rows, tmp_path):
    recipe = make("stock", model=mixture, data=tiny_rows, tracker="none", max_steps=3, batch_size=4, accumulation=1, lora_r=4, lora_alpha=8, lora_dropout=0.0, learning_rate=1e-3, dtype="float32", threads=1, gradient_checkpointing=False, packing=False, eval_steps=0,
                  save_steps=0, best_at_end=False, compare=False, eval_fraction=0.2, method=method)
    trainer, before, _ = train_here(recipe, tmp_path)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(".experts." in n for n in trained) and all(torch.isfinite(p).all() for p in trained.values())
    assert not [n for n in trained if torch.equal(trained[n], before[n])]
    assert not [n for n, p in trainer.model.named_parameters() if n not in trained and not torch.equal(p, before[n])]
    found = targets(of(job.model(recipe, job.check(recipe, say=lambda t: None)[1])), method == "qlora")
    assert sum(p.numel() for p in trained.values()) == lora_parameters(shapes_of(mixture, say=lambda t: None), 4, found.target_modules, found.target_parameters)
    assert len(saved_weights(tmp_path / "adapter")) == len(trained)


# ---- by name, and what goes wrong

def test_asked_twice_without_torch(tmp_path):
    write_json(tmp_path / "config.json", dict(model_type="mixtral") | MIXTURE)
    ask = "import sys, json; from finetune_nb.targets import answer; a = answer(sys.argv[1], say=lambda t: None); print(json.dumps([a['target_parameters'], a['trainable'], a['total'], 'torch' in sys.modules]))"
    env = dict(FINETUNE_NB_CACHE=str(tmp_path / "cache"), PATH="")
    first, second = (json.loads(subprocess.run([sys.executable, "-c", ask, str(tmp_path)], env=env, capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert first[:3] == second[:3] and first[0] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert (first[3], second[3]) == (True, False)


def test_a_damaged_cache_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    write_json(tmp_path / "config.json", dict(model_type="mixtral") | MIXTURE)
    good = shapes_of(tmp_path, say=lambda t: None)
    for damage in ("", "{}", "[]", '{"weights": [[1]]}', "null"):
        for f in (tmp_path / "cache" / "shapes").iterdir(): f.write_text(damage)
        assert shapes_of(tmp_path, say=lambda t: None) == good


def test_own_code_is_not_run(tmp_path):
    (tmp_path / "modeling_x.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass XForCausalLM: pass\n")
    for kind in ("llama", "made-up"):
        write_json(tmp_path / "config.json", {"model_type": kind, "auto_map": {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}})
        with pytest.raises(UserError, match="code of its own"): answer(str(tmp_path), say=lambda t: None)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("config, says", [("[]", "model_type"), ("{}", "model_type"), ("not json", "JSON"), ('{"model_type": "qwen33"}', "Did you mean"), ('{"model_type": "vit"}', "causal"), ('{"model_type": 5}', "model_type"), ('{"model_type": "llama", "hidden_size": -1}', "cannot build"),
                                          ('{"model_type": "llama", "num_hidden_layers": 0}', "decoder blocks"), ('{"model_type": ["llama"]}', "model_type"), ('{"model_type": "llama", "auto_map": 5}', "auto_map")], ids=lambda v: v[:40])
def test_bad_configurations(config, says, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=says): answer(str(tmp_path), say=lambda t: None)


def test_nothing_there(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "config.json"), "no-such-model", str(tmp_path / "x.gguf")):
        with pytest.raises(UserError): answer(name, say=lambda t: None)
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError): answer(str(tmp_path / "x.gguf"), say=lambda t: None)


def test_remote_code_that_transformers_has_by_now(tmp_path):
    "Phi-3's configuration still names its old code; transformers has the class of that name"
    own = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert answer(read({"model_type": "phi3", "auto_map": own}))["target_modules"] == answer(read({"model_type": "phi3"}))["target_modules"]
