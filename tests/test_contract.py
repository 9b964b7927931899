"Every name and word that finetune_nb gives to peft, trl, transformers and bitsandbytes exists in the versions installed here"
import dataclasses
import inspect
import typing
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from finetune_nb.core import UserError
from finetune_nb.hardware import Machine, choose
from finetune_nb.recipe import FIELDS, PRESETS, make
from finetune_nb.targets import targets
from finetune_nb.translate import construct, load_dtype, lora_kwargs, quantization_kwargs, training_kwargs
from finetune_nb.tree import read

MACHINES = {"cpu": Machine("cpu", "a processor", False, 0, 0, 8 << 30, 4), "gpu": Machine("cuda", "a GPU", True, 1, 24 << 30, 64 << 30, 8, "8.0")}
TARGETS = dataclasses.replace(targets(read({"model_type": "mixtral"})), exclude="(model.vision_tower)(.*)?")  # with every kind of name
# every setting that adds a keyword, switched on; and off
ON = dict(lora_layers=2, modules_to_save="lm_head", use_rslora=True, use_dora=True, lora_bias="all", max_steps=9, gradient_checkpointing=True, packing=True, group_by_length=False, eval_steps=5,
          save_steps=5, best_at_end=True, tracker="tensorboard", train_on="completion", warmup=7.0, workers=2, threads=2)
OFF = dict(lora_layers=0, modules_to_save="", use_rslora=False, use_dora=False, lora_bias="none", max_steps=0, gradient_checkpointing=False, packing=False, group_by_length=True, eval_steps=0,
           save_steps=0, best_at_end=False, tracker="none", train_on="all", warmup=0.0, max_grad_norm=0.0, max_length=0, workers=0)
SETTINGS = {"as the preset has it": {}, "all on": ON, "all off": OFF}


def literals(setting): return typing.get_args(FIELDS[setting].annotation)


def chosen(recipe, machine):
    m = MACHINES[machine]
    return choose(m, recipe.dtype if machine == "gpu" else "float32", recipe.attention, recipe.optimizer, recipe.workers, recipe.threads, recipe.method)


def given(recipe, machine, has_eval):
    "[(the library's class, its keyword arguments)] of a recipe"
    choices = chosen(recipe, machine)
    out = [(SFTConfig, training_kwargs(recipe, choices, "out", has_eval))]
    if recipe.method != "full": out.append((LoraConfig, lora_kwargs(recipe, TARGETS)))
    if recipe.method == "qlora": out.append((BitsAndBytesConfig, quantization_kwargs(recipe, choices["dtype"])))
    return out


def unknown(cls, names):
    "Those of the names that a configuration class does not have (one that takes **kwargs would swallow them silently)"
    return sorted(f"{cls.__name__}.{n}" for n in set(names) - known(cls))


def known(cls): return {n for n, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}


RECIPES = {f"{preset}, {method}, {name}": make(preset, method=method, **{k: v for k, v in values.items() if not (method == "full" and k == "lora_layers")})
           for preset, method, (name, values) in product(PRESETS, literals("method"), SETTINGS.items())}
RECIPES |= {f"stock, qlora, {q}": make("stock", method="qlora", quantization=q) for q in literals("quantization")}
RECIPES |= {f"stock, start {i}": make("stock", lora_init=i) for i in literals("lora_init")}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_name_is_known_and_the_objects_build(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for machine, has_eval in product(MACHINES, (True, False)):
        for cls, kwargs in given(recipe, machine, has_eval):
            assert not unknown(cls, kwargs), f"the installed {cls.__module__.split('.')[0]} does not have {unknown(cls, kwargs)}"
            if machine == "gpu" and cls is SFTConfig: continue  # refuses bfloat16 where there is no GPU
            made = construct(cls, kwargs)
            numbers = {k: v for k, v in kwargs.items() if isinstance(v, (bool, int, float))}
            assert numbers and {k: getattr(made, k) for k in numbers} == numbers, "the library keeps other values than it was given"


def test_the_settings_above_reach_every_keyword():
    "A keyword that no recipe of this file sets would go unchecked"
    names = lambda c, r: {k for machine in MACHINES for cls, kw in given(r, machine, True) if cls is c for k in kw}
    seen = {cls: set().union(*(names(cls, r) for r in RECIPES.values())) for cls in (LoraConfig, SFTConfig, BitsAndBytesConfig)}
    written = {LoraConfig: lora_kwargs, SFTConfig: training_kwargs, BitsAndBytesConfig: quantization_kwargs}
    for cls, function in written.items():
        source = inspect.getsource(function)
        named = {n for n in known(cls) if f"{n}=" in source.replace(" ", "") or f'kw["{n}"]' in source}
        assert named <= seen[cls] and len(named) > 4, f"never tried: {named - seen[cls]}"


@pytest.mark.parametrize("name", LITERALS := ["scheduler", "optimizer", "lora_init", "lora_bias", "attention", "tracker", "quantization", "dtype"])
def test_every_word_is_accepted_by_the_library(name, tmp_path):
    words = [w for w in literals(name) if w not in ("auto", "none", "default")]
    assert len(words) > 1
    for word in words: ACCEPTED[name](word)
    with pytest.raises(Exception): ACCEPTED[name]("no such word")


def scheduler(word):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = get_scheduler(SchedulerType(word), optimizer, num_warmup_steps=2, num_training_steps=9)
    for _ in range(9): optimizer.step(), steps.step()


def start(word):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=word))


def bias(word):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=4, target_modules=["0"], bias=word))
    assert any(n.endswith("bias") and p.requires_grad for n, p in model.named_parameters())


def quantized(word):
    if word == "int8": return BitsAndBytesConfig(load_in_8bit=True)
    from bitsandbytes.functional import quantize_4bit
    quantize_4bit(torch.randn(64, 64), quant_type=word)


def attention(word): assert word == "eager" or word in ALL_ATTENTION_FUNCTIONS.valid_keys(), word


ACCEPTED = dict(scheduler=scheduler, optimizer=OptimizerNames, lora_init=start, lora_bias=bias, attention=attention, tracker=lambda w: INTEGRATION_TO_CALLBACK[w], quantization=quantized, dtype=lambda w: torch.finfo(getattr(torch, w)))


def test_every_choice_of_the_recipe_is_looked_at():
    "A new setting with a list of words must be added above, or here with the reason"
    ours = {"train_on", "method", "parallel"}  # words of this package, translated by it
    assert {n for n in FIELDS if literals(n) and typing.get_origin(FIELDS[n].annotation) is typing.Literal} - ours == {*LITERALS, "compute_dtype"}
    assert literals("compute_dtype") == literals("dtype")


def test_formats_are_torch_formats():
    for dtype in ("bfloat16", "float16", "float32"):
        for method in literals("method"): assert isinstance(getattr(torch, load_dtype(make("stock", method=method), dtype)), torch.dtype)


# ---- can it fail?

def test_a_renamed_keyword_is_caught(monkeypatch):
    wrong = lambda function, old, new: lambda *a: {new if k == old else k: v for k, v in function(*a).items()}
    for module_function, old, new in ((training_kwargs, "max_length", "max_seq_length"), (lora_kwargs, "use_rslora", "rslora"), (quantization_kwargs, "bnb_4bit_quant_type", "quant_type")):
        monkeypatch.setitem(globals(), module_function.__name__, wrong(module_function, old, new))
        found = [n for cls, kw in given(make("stock", method="qlora"), "cpu", True) for n in unknown(cls, kw)]
        assert [n.split(".")[1] for n in found] == [new]
        monkeypatch.undo()


def test_a_library_without_a_field_is_named():
    def without(cls, dropped):
        kept = [f for f in dataclasses.fields(cls) if f.init and f.name != dropped]
        return dataclasses.make_dataclass(cls.__name__, [(f.name, object, dataclasses.field(default=None)) for f in kept], namespace={"__module__": cls.__module__})
    recipe = make("stock", method="qlora")
    for cls, kwargs in given(recipe, "cpu", True)[:2]:
        for name in kwargs:
            old = without(cls, name)
            assert unknown(old, kwargs) == [f"{cls.__name__}.{name}"]
            with pytest.raises(UserError) as e: construct(old, kwargs)
            assert repr(name) in str(e.value) and "constraints.txt" in str(e.value) and cls.__module__.split(".")[0] in str(e.value)


def test_a_value_the_library_refuses_is_told():
    with pytest.raises(UserError) as e: construct(SFTConfig, dict(output_dir="out", bf16=True, fp16=True, use_cpu=True))
    assert "bf16" in str(e.value) and "fp16" in str(e.value)
