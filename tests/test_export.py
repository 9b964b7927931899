"Exports of real trainings on a tiny model: what is merged, what is left after a failure, and that a certificate fails for each way in which exports go wrong"
import json
import shutil

import pytest
import torch
from conftest import CHATML, chat_rows, make_llama, make_tokenizer, save_model, train_here, write_rows

from finetune_nb import export
from finetune_nb.certificate import Certificate, certify
from finetune_nb.core import UserError, read_json, write_json
from finetune_nb.data import read, save
from finetune_nb.models import identity, load_adapter, load_model, load_tokenizer
from finetune_nb.recipe import make, to_yaml

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = lambda line: None


def finished(folder, model, rows, **values):
    "A run folder after a real training of 60 steps"
    recipe = make(model=model, data=rows, eval_fraction=0.3, max_steps=60, batch_size=8, accumulation=1, dtype="float32", packing=False, max_length=256, threads=1, tracker="none", rehearse=False,
                  **dict(gradient_checkpointing=False, lora_r=8, lora_alpha=16, lora_dropout=0.0, learning_rate=1e-2, eval_steps=0, save_steps=0, best_at_end=False, max_new_tokens=40) | values)
    train_here(recipe, folder)
    from finetune_nb import job
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    save(job.rows(recipe)[1].rows, folder / "data" / "eval.jsonl")
    write_json(folder / "run.json", dict(status="done", model=identity(model, None, load_tokenizer(model))))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def run(place, tiny_model, tiny_rows, frozen): return finished(place / "run", tiny_model, tiny_rows)


@pytest.fixture(scope="module")
def merged(place, run):
    export.merge(run, place / "merged", say=quiet)
    return place / "merged"


@pytest.fixture
def copy(merged, tmp_path): return shutil.copytree(merged, tmp_path / "damaged")


def failed(folder, run): return {c.check for c in certify(folder, run, say=quiet).checks if c.verdict == "fail"}


# ---- what is right passes

def test_a_right_merge_passes(run, merged):
    found = certify(merged, run, say=quiet)
    assert found.verdict == "pass" and {c.verdict for c in found.checks} == {"pass"} and found.rows == 8
    assert found.facts["likeness"]["kl"] < export.SAME and found.facts["base"]["kl"] > 1, "the control: training did change the answers"
    assert Certificate.from_json(read_json(merged / "certificate.json")) == found == Certificate.from_json(read_json(run / "exports" / "certificate-merged.json"))
    config = read_json(merged / "config.json")
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config and read_json(merged / "generation_config.json")["eos_token_id"] == 2
    assert {p.name for p in merged.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "export.json", "certificate.json"}


@pytest.mark.parametrize("values", [dict(use_dora=True), dict(use_rslora=True), dict(modules_to_save="lm_head"), dict(lora_init="pissa"), dict(lora_bias="all"), dict(method="full", learning_rate=3e-3)], ids=lambda v: "-".join(map(str, v.values())))
def test_every_way_of_training_is_merged(values, tiny_model, tiny_rows, tmp_path):
    run = finished(tmp_path / "run", tiny_model, tiny_rows, **values)
    export.merge(run, tmp_path / "merged", say=quiet)
    found = certify(tmp_path / "merged", run, say=quiet)
    assert found.verdict == "pass" and found.facts["base"]["kl"] > 0.5, str(found)


def test_tied_embeddings_of_which_one_was_trained(tiny_rows, tmp_path):
    "The trained one must not be overwritten by the other when the model is loaded"
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    for saved, together in (("", True), ("lm_head", False), ("embed_tokens", False)):
        run = finished(tmp_path / f"run{saved}", str(tmp_path / "base"), tiny_rows, modules_to_save=saved)
        export.merge(run, tmp_path / f"m{saved}", say=quiet)
        back = load_model(str(tmp_path / f"m{saved}"))
        assert (back.lm_head.weight is back.model.embed_tokens.weight) == back.config.tie_word_embeddings == together, saved
        assert certify(tmp_path / f"m{saved}", run, say=quiet).verdict == "pass"


def test_a_quantized_run_is_merged_into_the_unquantized_base(place, run, tmp_path):
    "The same adapter as if it had been trained on 4 bits"
    shutil.copytree(run, tmp_path / "run")
    recipe = export.load(run / "recipe.yaml").model_copy(update=dict(method="qlora"))
    (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(recipe))
    export.merge(tmp_path / "run", tmp_path / "merged", say=quiet)
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json")
    assert certify(tmp_path / "merged", run, say=quiet).verdict == "pass"


def test_the_adapter_alone(run, tmp_path):
    export.export_adapter(run, tmp_path / "alone", say=quiet)
    found = certify(tmp_path / "alone", run, say=quiet)
    assert found.verdict == "pass" and found.facts["likeness"]["kl"] == 0
    assert not str(tmp_path) in "".join(p.read_text() for p in (tmp_path / "alone").glob("*.json") if p.name != "tokenizer.json")
    (tmp_path / "alone" / "adapter_config.json").write_text((tmp_path / "alone" / "adapter_config.json").read_text().replace('"lora_alpha": 16', '"lora_alpha": 2'))
    assert {"KL to the trained model"} <= failed(tmp_path / "alone", run), "an adapter at an eighth of its strength"


def test_shards(run, tmp_path):
    export.merge(run, tmp_path / "m", shard="100KB", say=quiet)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2 and certify(tmp_path / "m", run, say=quiet).verdict == "pass"


# ---- what is damaged fails

TEMPLATES = {"another role": CHATML.replace("assistant\n", "model\n"), "no newline": CHATML.replace("<|im_end|>\n", "<|im_end|>"), "no end": CHATML.replace("<|im_end|>", ""), "no prompt for the answer": CHATML.partition("{% if add")[0],
             "start twice": "{{ bos_token }}" + CHATML, "refuses": "{{ raise_exception('no') }}", "broken": "{% for"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_damaged_chat_template_fails(name, run, copy):
    (copy / "chat_template.jinja").write_text(TEMPLATES[name])
    checks = failed(copy, run)
    assert checks & {"prompt tokens", "loads"} and ("start token twice" in checks) == (name == "start twice"), checks


def test_no_chat_template_fails(run, copy):
    (copy / "chat_template.jinja").unlink()
    assert "prompt tokens" in failed(copy, run)


def test_a_doubled_start_token_fails(run, copy):
    "The template writes it, and the tokenizer was changed to add it too"
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    raw = Tokenizer.from_file(str(copy / "tokenizer.json"))
    raw.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    raw.save(str(copy / "tokenizer.json"))
    assert {"start token twice", "prompt tokens"} <= failed(copy, run)


@pytest.mark.parametrize("stored", ["4 bits", "16 bits"])
def test_a_merge_into_4_bits_fails(stored, run, merged, tmp_path):
    from transformers import BitsAndBytesConfig
    at = export.open_run(run)
    base = load_model(at.recipe.model, "float32", quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    model = load_adapter(base, at.trained, at.recipe.model)
    with pytest.raises(UserError, match="quantized base"): export.fold(model)
    bad = model.merge_and_unload()  # what must not be done
    if stored == "16 bits": bad = bad.dequantize().to(torch.bfloat16)
    shutil.copytree(merged, tmp_path / "bad", ignore=shutil.ignore_patterns("model*", "config.json", "certificate.json"))
    bad.save_pretrained(tmp_path / "bad")
    assert failed(tmp_path / "bad", run)


def test_a_swapped_tokenizer_fails(run, copy):
    raw = json.loads((copy / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    letters = [t for t in vocab if len(t) == 1 and t.isalpha()]
    raw["model"]["vocab"] = vocab | dict(zip(letters, [vocab[t] for t in letters[1:] + letters[:1]]))
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    assert {"prompt tokens", "row tokens", "same answers"} <= failed(copy, run)


def test_a_lost_end_token_fails(run, copy):
    for name in ("generation_config.json", "tokenizer_config.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace('"eos_token_id": 2', '"eos_token_id": 0').replace('"eos_token": "<|im_end|>"', '"eos_token": "<|end|>"'))
    assert "ends by itself" in failed(copy, run)


def test_the_base_instead_of_the_merge_fails(run, copy, tiny_model):
    shutil.copy(f"{tiny_model}/model.safetensors", copy)
    assert {"KL to the trained model", "kept of the fine-tune"} <= failed(copy, run)


def test_weights_that_are_not_numbers_fail(run, copy):
    model = load_model(str(copy))
    model.lm_head.weight.data[5] = float("nan")
    model.save_pretrained(copy)
    assert {"KL to the trained model"} <= failed(copy, run)


def test_settings_that_run_code_fail(run, copy):
    write_json(copy / "config.json", read_json(copy / "config.json") | dict(auto_map={"AutoModelForCausalLM": "evil.Model"}))
    assert failed(copy, run) == {"loads"}


# ---- mistakes and accidents

def test_another_base_is_refused(run, tmp_path):
    "The same folder name, other weights"
    other = tmp_path / "model"
    make_llama(seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(export.load(run / "recipe.yaml").model_copy(update=dict(model=str(other)))))
    for way in (export.merge, export.export_adapter):
        with pytest.raises(UserError, match="other weights"): way(tmp_path / "run", tmp_path / "out", say=quiet)
    save_model(other, CHATML.replace("assistant", "model"))
    with pytest.raises(UserError, match="other chat template"): export.merge(tmp_path / "run", tmp_path / "out", say=quiet)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "run"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")], ids=["full", "Ctrl-C", "other"])
def test_an_accident_leaves_nothing(error, run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / export.MARK).write_text("{}")
    def breaks(model, folder, **settings):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", breaks)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)): export.merge(run, tmp_path / "out", replace=True, say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / export.MARK).read_text() == "{}", "the earlier export is as it was"


def test_runs_from_somebody_else(run, tmp_path):
    theirs = shutil.copytree(run, tmp_path / "run")
    recipe = export.load(run / "recipe.yaml").model_copy(update=dict(trust_remote_code=True))
    (theirs / "recipe.yaml").write_text(to_yaml(recipe))
    (theirs / "data" / "link").symlink_to("/etc/passwd")
    (theirs / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError) as e: export.open_run(theirs)
    assert len(e.value.problems) == 3 and all(w in str(e.value) for w in ("leads out of the run folder", "somebody else", "holds no trained adapter"))


def test_a_run_without_an_adapter_has_none_to_export(tiny_model, run, tmp_path):
    theirs = shutil.copytree(run, tmp_path / "run")
    (theirs / "recipe.yaml").write_text(to_yaml(export.load(run / "recipe.yaml").model_copy(update=dict(method="full"))))
    with pytest.raises(UserError, match="trained every weight"): export.export_adapter(theirs, tmp_path / "out", say=quiet)


@pytest.mark.parametrize("name, says", [("..", "may hold letters"), ("a b", "may hold letters"), ("-x", "may hold letters")])
def test_names(name, says, run, tmp_path):
    with pytest.raises(UserError, match=says): export.export_adapter(run, f"{tmp_path}/{name}", say=quiet)


def test_no_room(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda at: type("", (), dict(free=1000)))
    with pytest.raises(UserError, match="free and the run needs"): export.merge(run, tmp_path / "out", say=quiet)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_missing(run, tmp_path):
    theirs = shutil.copytree(run, tmp_path / "run")
    (theirs / "data" / "eval.jsonl").unlink()
    with pytest.raises(UserError, match="holds no held-out rows"): export.merge(theirs, tmp_path / "out", say=quiet)
    export.export_adapter(theirs, tmp_path / "out", say=quiet)
    with pytest.raises(UserError, match="holds no held-out rows"): certify(tmp_path / "out", theirs, say=quiet)
    rows = read(str(write_rows(tmp_path / "rows.jsonl", chat_rows()[:8]))).rows
    assert certify(tmp_path / "out", theirs, rows, say=quiet).verdict == "pass"
