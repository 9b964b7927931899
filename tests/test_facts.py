"The tables of facts hold up: sourced, JSON-safe, and true of the libraries they speak about."
import dataclasses
import inspect
import json

import pytest

from finetune_nb.facts import TABLES, Table, table
from finetune_nb.recipe import FIELDS

MODEL_TYPES = [(r["family"], t) for r in table("targets").rows for t in r["model_types"]]


@pytest.mark.parametrize("name", TABLES)
def test_sourced_and_json(name):
    found = table(name)
    assert len(found) and found.name == name and found.title
    assert all(str(r["source"]).strip() for r in found.rows)
    back = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Table(**back | {"rows": tuple(back["rows"])}) == found
    assert found._repr_markdown_().count("\n| ") == len(found) + 2


def linear_names(model_type):
    "Last names of the layers that hold a 2-D weight, in a tiny model of that type on the meta device, without the head"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    tiny = dict(hidden_size=32, n_embd=32, d_model=32, num_hidden_layers=1, n_layer=1, n_layers=1, num_attention_heads=2, n_head=2, n_heads=2,
                num_key_value_heads=2, intermediate_size=64, head_dim=16, vocab_size=64, num_local_experts=2, num_experts=2, num_experts_per_tok=1,
                pad_token_id=0, layer_types=None)
    known = AutoConfig.for_model(model_type).to_dict()
    config = AutoConfig.for_model(model_type, **{k: v for k, v in tiny.items() if k in known})
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return {name.rsplit(".", 1)[-1] for name, m in model.named_modules()
            if m is not head and (isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")}


@pytest.mark.parametrize("family,model_type", MODEL_TYPES)
def test_targets_are_the_linear_layers(family, model_type):
    assert linear_names(model_type) == set(table("targets").row(family)["target_modules"])


def test_peft_reaches_the_targets():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    settings = {s: table("lora").row(s)["value"] for s in ("lora_r", "lora_alpha", "lora_dropout", "lora_bias")}
    config = AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(
            r=settings["lora_r"], lora_alpha=settings["lora_alpha"], lora_dropout=settings["lora_dropout"], bias=settings["lora_bias"],
            target_modules=table("targets").row("llama")["target_modules"]))
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == 2 * 7


@pytest.mark.parametrize("name", ["hyperparameters", "training", "lora"])
def test_settings_are_fields_of_the_recipe(name):
    assert not {r["setting"] for r in table(name).rows} - set(FIELDS)


def test_trl_names_are_accepted_by_the_installed_trl():
    from trl import SFTConfig
    assert not {r["trl_name"] for r in table("training").rows} - {f.name for f in dataclasses.fields(SFTConfig)}


@pytest.mark.parametrize("row", [r for r in table("renames").rows if r["library"] in ("trl", "transformers") and r["old"].islower()], ids=lambda r: r["old"])
def test_renames_are_true_of_the_installed_libraries(row):
    from transformers import PreTrainedConfig
    from trl import SFTConfig, SFTTrainer
    accepted = {f.name for f in dataclasses.fields(SFTConfig)} | set(inspect.signature(SFTTrainer).parameters) | set(inspect.signature(PreTrainedConfig).parameters)
    assert row["new"] in accepted and row["old"] not in accepted


def test_training_agrees_with_the_ranges():
    ranges = {r["setting"]: r for r in table("hyperparameters").rows}
    for r in table("training").rows:
        if r["setting"] in ranges: assert r["value"] == ranges[r["setting"]]["recommended"]
