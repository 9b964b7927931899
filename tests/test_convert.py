"""Other tools' files become recipes: each way of writing a setting, nothing lost, nothing run, and nothing that hangs.

The real files that `tests/cases/convert.yaml` refers to are not here; `bench/convert.py` reads them. Each way of writing
that was met in them has a small case of its own below.
"""
import ast
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from finetune_nb.carry import DEFAULTS, NO_DATA, NO_MODEL
from finetune_nb.convert import convert, write_recipe
from finetune_nb.core import UserError
from finetune_nb.receipt import as_json, as_markdown, as_text
from finetune_nb.recipe import FIELDS, load
from finetune_nb.tool_meanings import TABLES, meaning

CASES = yaml.safe_load((Path(__file__).parent / "cases" / "convert.yaml").read_text(encoding="utf-8"))
SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def converted(tmp_path, name, text):
    "The receipt of a file with this text"
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return convert(file)


def book(*cells): return json.dumps({"cells": [{"cell_type": "code", "source": c, "metadata": {}, "outputs": []} for c in cells], "nbformat": 4})


def verdict(receipt, name): return [line.verdict for line in receipt.lines if line.setting.endswith(name)]


# ---- the reference

def test_reference_is_what_it_says():
    "Enough real files of enough tools, each with its commit and bytes, none with its text; only settings that a Recipe has"
    assert len(CASES) >= 40 and len({c["tool"] for c in CASES}) >= 4 and len({c["repository"] for c in CASES}) >= 30
    for c in CASES:
        assert set(c) <= {"tool", "repository", "path", "commit", "sha256", "blind", "expected", "refused"}, c
        assert len(c["commit"]) == 40 and len(c["sha256"]) == 64 and ("expected" in c) != ("refused" in c), c
        assert set(c.get("expected", {})) <= set(FIELDS), c


def test_bench_sees_a_difference(tmp_path, monkeypatch):
    "The comparison with the reference can fail"
    spec = importlib.util.spec_from_file_location("bench_convert", Path(__file__).parents[1] / "bench" / "convert.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    file = tmp_path / "o" / "n" / "x.yml"
    file.parent.mkdir(parents=True)
    file.write_text("base_model: m\nadapter: lora\nlora_r: 8\nlearning_rate: 2e-4\ndatasets: [{path: d}]\n")
    case = dict(tool="axolotl", repository="o/n", path="x.yml", commit="", sha256=bench.hashlib.sha256(file.read_bytes()).hexdigest(), expected=dict(lora_r=8, learning_rate=2e-4))
    assert bench.one(case, tmp_path)["agreed"] == 2
    assert bench.one(case | dict(expected=dict(lora_r=9, learning_rate=2e-4)), tmp_path)["differences"] == ["lora_r: 8, not 9"]
    assert bench.one(case | dict(sha256="0"), tmp_path)["status"] == "other bytes"


# ---- ways of writing

TRL = 'from trl import SFTTrainer\nrows = load_dataset("a/b", split="train")\nmodel = AutoModelForCausalLM.from_pretrained("m")\n'
END = "\nt = SFTTrainer(model=model, train_dataset=rows, args=args, peft_config=lora)\nt.train()\n"
WAYS = {
    "constants": ("x.py", TRL + "LR, R = 3e-4, 4\nlora = LoraConfig(r=R)\nargs = SFTConfig(learning_rate=LR)" + END, dict(learning_rate=3e-4, lora_r=4, data="a/b", model="m")),
    "dict": ("x.py", TRL + "CFG = {'lr': 1e-5, 'lora': {'r': 32}}\nlora = LoraConfig(r=CFG['lora']['r'])\nargs = SFTConfig(learning_rate=CFG.get('lr', 1))" + END, dict(learning_rate=1e-5, lora_r=32)),
    "keyword dict": ("x.py", TRL + "L = dict(r=64, lora_alpha=16)\nlora = LoraConfig(**L)\nargs = SFTConfig(**{'max_length': 300})" + END, dict(lora_r=64, lora_alpha=16, max_length=300)),
    "entries added later": ("x.py", TRL + "lora = LoraConfig(r=2)\nkw = {'model': model, 'train_dataset': rows, 'args': TrainingArguments(seed=7), 'peft_config': lora}\nif old:\n    kw['max_seq_length'] = 99\nt = SFTTrainer(**kw)\nt.train()\n", dict(max_length=99, seed=7, lora_r=2)),
    "dataclass": ("x.py", "@dataclass\nclass Cfg:\n    lr: float = 7e-5\n    r: int = field(default=12)\n    targets: list = field(default_factory=lambda: ['a', 'b'])\ncfg = Cfg()\n" + TRL + "lora = LoraConfig(r=cfg.r, target_modules=cfg.targets)\nargs = SFTConfig(learning_rate=cfg.lr)" + END, dict(learning_rate=7e-5, lora_r=12, lora_targets="a,b")),
    "dataclass made with other values": ("x.py", "@dataclass\nclass Cfg:\n    lr: float = 7e-5\ncfg = Cfg(lr=1e-6)\n" + TRL + "lora = LoraConfig()\nargs = SFTConfig(learning_rate=cfg.lr)" + END, dict(learning_rate=1e-6)),
    "argparse": ("x.py", "p = argparse.ArgumentParser()\np.add_argument('--lora-rank', type=int, default=24)\np.add_argument('-e', '--epochs', default=2)\na = p.parse_args()\n" + TRL + "lora = LoraConfig(r=a.lora_rank)\nargs = SFTConfig(num_train_epochs=a.epochs)" + END, dict(lora_r=24, epochs=2.0)),
    "HfArgumentParser": ("x.py", "@dataclass\nclass A:\n    rank: int = field(default=5, metadata={'help': 'h'})\n(script_args,) = HfArgumentParser(A).parse_args_into_dataclasses()\n" + TRL + "lora = LoraConfig(r=script_args.rank)\nargs = SFTConfig()" + END, dict(lora_r=5)),
    "fields of a subclass": ("x.py", "@dataclass\nclass T(transformers.TrainingArguments):\n    learning_rate: float = field(default=2e-4)\n    optim: str = field(default='paged_adamw_32bit')\n", dict(learning_rate=2e-4, optimizer="paged_adamw_32bit")),
    "fire": ("x.py", "def train(base: str = 'm7', batch: int = 128, micro: int = 4):\n    acc = batch // micro\n    model = LlamaForCausalLM.from_pretrained(base, load_in_8bit=True)\n    model = get_peft_model(model, LoraConfig(r=8))\n    t = Trainer(model=model, args=TrainingArguments(gradient_accumulation_steps=acc, per_device_train_batch_size=micro))\n    t.train()\nfire.Fire(train)\n", dict(model="m7", accumulation=32, batch_size=4, method="qlora", quantization="int8")),
    "functions and parameters": ("x.py", "def load(name):\n    m = AutoModelForCausalLM.from_pretrained(name)\n    return m\ndef go(lr, data):\n    rows = load_dataset(data)\n    t = SFTTrainer(load('m9'), args=SFTConfig(learning_rate=lr), train_dataset=rows['train'])\n    t.train()\ngo(4e-5, data='c/d')\n", dict(model="m9", learning_rate=4e-5, data="c/d", method="full")),
    "a class": ("x.py", "class T:\n    def __init__(self, name):\n        self.name, self.n = name, 77\n        self.model = AutoModelForCausalLM.from_pretrained(name)\n    def run(self):\n        self.args = SFTConfig(max_length=self.n)\n        self.t = SFTTrainer(model=self.model, args=self.args)\n        self.t.train()\nT('m3').run()\n", dict(model="m3", max_length=77)),
    "a choice": ("x.py", TRL + "flash = False\nlora = LoraConfig(r=8)\nargs = SFTConfig(per_device_train_batch_size=6 if flash else 3, packing=not flash)" + END, dict(batch_size=3, packing=True)),
    "a branch that is off": ("x.py", TRL + "USE_4BIT = False\nif USE_4BIT:\n    q = BitsAndBytesConfig(load_in_4bit=True)\nlora = LoraConfig(r=8)\nargs = SFTConfig()" + END, dict(method="lora")),
    "f-string and path": ("x.py", "N = 'tiny'\nD = Path('data')\nmodel = AutoModelForCausalLM.from_pretrained(f'me/{N}')\nrows = load_dataset('json', data_files=str(D / 'a.jsonl'))['train']\nlora, args = LoraConfig(r=1), SFTConfig()" + END, dict(model="me/tiny", data="data/a.jsonl")),
    "the environment's default": ("x.py", TRL + "lora = LoraConfig(r=int(os.environ.get('R', '11')))\nargs = SFTConfig()" + END, dict(lora_r=11)),
    "attributes set later": ("x.py", TRL + "lora = LoraConfig(r=8)\nargs = SFTConfig(learning_rate=1e-3)\nargs.learning_rate = 1e-4" + END, dict(learning_rate=1e-4)),
    "asks the machine": ("x.py", TRL + "lora = LoraConfig(r=8)\nargs = SFTConfig(bf16=torch.cuda.is_bf16_supported(), fp16=not torch.cuda.is_bf16_supported())" + END, dict(dtype="auto")),
    "training and evaluation files": ("x.py", "d = load_dataset('json', data_files={'train': 't.jsonl', 'test': 'e.jsonl'})\nt = SFTTrainer('m', train_dataset=d['train'], eval_dataset=d['test'], args=SFTConfig(eval_strategy='steps', eval_steps=9))\nt.train()\n", dict(model="m", data="t.jsonl", eval_data="e.jsonl", eval_steps=9)),
    "rows read by hand": ("x.py", "def rows_of(p):\n    with open(p) as f: return [json.loads(l) for l in f]\nrows = Dataset.from_list(rows_of('own.jsonl'))\nt = SFTTrainer('m', train_dataset=rows, args=SFTConfig(max_steps=5))\nt.train()\n", dict(data="own.jsonl", max_steps=5)),
    "answers only": ("x.py", TRL + "lora, args = LoraConfig(r=8), SFTConfig()\nt = SFTTrainer(model=model, train_dataset=rows, args=args, data_collator=DataCollatorForCompletionOnlyLM(response_template=R, tokenizer=tok))\nt.train()\n", dict(train_on="completion")),
    "Unsloth": ("x.py", "m, tok = FastLanguageModel.from_pretrained(model_name='u/m', max_seq_length=1000, load_in_4bit=True)\nm = FastLanguageModel.get_peft_model(m, r=16, lora_alpha=16, target_modules=['q_proj', 'lm_head', 'embed_tokens'], use_gradient_checkpointing='unsloth', random_state=3407, use_rslora=True)\nt = SFTTrainer(model=m, args=UnslothTrainingArguments(learning_rate=5e-5, embedding_learning_rate=1e-5, optim='adamw_8bit'))\nt = train_on_responses_only(t)\nt.train()\n",
        dict(model="u/m", method="qlora", quantization="nf4", double_quantization=True, max_length=1000, lora_targets="q_proj", modules_to_save="lm_head,embed_tokens", gradient_checkpointing=True, seed=3407, use_rslora=True, train_on="completion")),
    "peft's own targets": ("x.py", TRL.replace('"m"', '"meta-llama/Llama-2-7b-hf"') + "lora, args = LoraConfig(), SFTConfig()" + END, dict(lora_targets="q_proj,v_proj", lora_r=8, lora_alpha=8, lora_dropout=0.0)),
    "the other model is loaded to try it": ("x.ipynb", book("model = AutoModelForCausalLM.from_pretrained('m')\nlora, args = LoraConfig(r=8), SFTConfig()" + END, "model = AutoModelForCausalLM.from_pretrained('merged')\nif False:\n    lora = LoraConfig(r=99)"), dict(model="m", lora_r=8)),
    "cells in order": ("x.ipynb", book("!pip install trl\n%env X=1\nR = 4", "R = R * 2\nlora = LoraConfig(r=R)\nmodel = AutoModelForCausalLM.from_pretrained('m')", "args = SFTConfig(max_length=64)\nrows = load_dataset('a/b')" + END), dict(lora_r=8, max_length=64)),
    "a command in a notebook": ("x.ipynb", book("!accelerate launch --num_processes 2 train.py \\\n  --model_name m4 --learning_rate 2e-4 \\\n  --lora_r 8 --dataset_name a/b --use_peft"), dict(model="m4", learning_rate=2e-4, lora_r=8, processes=2, method="lora")),
    "a bash cell": ("x.ipynb", book("%%bash\nLR=3e-5\npython train.py --model m --lr $LR --epochs 2 --data d.jsonl\n"), dict(learning_rate=3e-5, epochs=2.0, data="d.jsonl")),
    "a file written by a cell": ("x.ipynb", book("%%writefile c.yml\nbase_model: m5\nadapter: qlora\nlora_r: 6\ndatasets:\n  - path: a\n", "!axolotl train c.yml"), dict(model="m5", method="qlora", lora_r=6)),
    "anchors": ("x.yml", "base_model: m\nadapter: lora\nsome: &s\n  lora_r: 9\n<<: *s\ndatasets: [{path: a}]\n", dict(lora_r=9)),
    "Axolotl": ("x.yml", "base_model: m\nload_in_8bit: true\nadapter: lora\nlora_r: 8\nlora_target_linear: true\ndatasets:\n  - path: a\n    type: completion\nval_set_size: 0.02\nsequence_len: 4096\nsample_packing: true\nlearning_rate: 2e-5\noptimizer: paged_adamw_32bit\nflash_attention: true\nbf16: auto\nwandb_project: w\nwarmup_steps: 10\n",
        dict(method="qlora", quantization="int8", lora_targets="all-linear", data="a", train_on="all", eval_fraction=0.02, max_length=4096, packing=True, learning_rate=2e-5, attention="flash_attention_2", dtype="auto", tracker="wandb", warmup=10.0)),
    "Axolotl, raw text": ("x.yml", "base_model: m\npretraining_dataset:\n  - path: json\n    data_files: [t.jsonl]\n    type: completion\nmax_steps: 9\nnum_epochs: 1\n", dict(data="t.jsonl", train_on="all", method="full")),
    "LLaMA-Factory": ("x.yaml", "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\nquantization_bit: 4\ndataset: one,two\ntemplate: qwen\ncutoff_len: 1024\nmax_samples: 100\nflash_attn: fa2\ndeepspeed: configs/ds_z3_offload_config.json\nbf16: true\n",
        dict(method="qlora", quantization="nf4", double_quantization=True, lora_alpha=16, lora_targets="all-linear", data="one", max_length=1024, max_rows=100, attention="flash_attention_2", parallel="zero3_offload", dtype="bfloat16", gradient_checkpointing=True, train_on="completion")),
    "LLaMA-Factory, JSON": ("x.json", json.dumps({"stage": "sft", "model_name_or_path": "m", "finetuning_type": "full", "dataset": "a", "learning_rate": 5e-5, "val_size": 0.1, "deepspeed": {"zero_optimization": {"stage": 2}}}, indent=1), dict(method="full", learning_rate=5e-5, eval_fraction=0.1, parallel="zero2")),
    "LLaMA-Factory, command": ("x.sh", "#!/bin/bash\nexport M=me/base # which\nCUDA_VISIBLE_DEVICES=0 python src/train_bash.py \\\n  --stage sft --do_train True \\\n  --model_name_or_path ${M} \\\n  --finetuning_type lora --lora_rank=4 \\\n  --dataset a --bf16\n", dict(model="me/base", lora_r=4, dtype="bfloat16")),
    "the QLoRA paper's script": ("x.sh", "python qlora.py --model_name_or_path m --bits 4 --double_quant --quant_type nf4 --lora_modules all --lora_r 64 --source_max_len 16 --target_max_len 512 --dataset d --learning_rate 0.0002 --group_by_length\n", dict(method="qlora", double_quantization=True, lora_targets="all-linear", max_length=528, group_by_length=True)),
    "trl's command line": ("x.yaml", "model_name_or_path: m\ndataset_name: a/b\nuse_peft: true\nlora_r: 8\nlearning_rate: 1.0e-4\nmax_seq_length: 700\n", dict(method="lora", data="a/b", max_length=700)),
    "torchrun": ("x.sh", "torchrun --nproc_per_node 4 train.py --model m --data d --lr 1e-4 --deepspeed zero2.json\n", dict(processes=4, parallel="zero2")),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_writing(way, tmp_path):
    name, text, expected = WAYS[way]
    receipt = converted(tmp_path, name, text)
    assert {k: receipt.values.get(k) for k in expected} == expected, as_text(receipt)


@pytest.mark.parametrize("way", WAYS)
def test_every_setting_once(way, tmp_path):
    "No setting stands in the receipt twice, each has its place, and only what is kept has no reason"
    name, text, _ = WAYS[way]
    receipt = converted(tmp_path, name, text)
    assert receipt.lines
    twice = [k for k, n in Counter((line.setting, line.place) for line in receipt.lines).items() if n > 1]
    assert not twice, twice
    for line in receipt.lines:
        assert "line" in line.place, line
        assert line.note if line.verdict in ("dropped", "unknown") else line.field in FIELDS, line


# ---- an invented setting is found in every form

INVENTED = {
    "SFTConfig": ("x.py", TRL + "lora, args = LoraConfig(), SFTConfig(zorblat=3)" + END), "TrainingArguments": ("x.py", TRL + "lora, args = LoraConfig(), TrainingArguments('o', zorblat=3)" + END),
    "LoraConfig": ("x.py", TRL + "lora, args = LoraConfig(zorblat=3), SFTConfig()" + END), "BitsAndBytesConfig": ("x.py", TRL + "b = BitsAndBytesConfig(zorblat=3)\nlora, args = LoraConfig(), SFTConfig()" + END),
    "the trainer": ("x.py", TRL + "SFTTrainer(model=model, zorblat=3)"), "from_pretrained": ("x.py", "m = AutoModelForCausalLM.from_pretrained('m', zorblat=3)\nSFTTrainer(model=m)"),
    "the tokenizer": ("x.py", "k = AutoTokenizer.from_pretrained('m', zorblat=3)\nSFTTrainer(model='m', tokenizer=k)"), "load_dataset": ("x.py", "d = load_dataset('a', zorblat=3)\nSFTTrainer(model='m', train_dataset=d)"),
    "Unsloth": ("x.py", "m, t = FastModel.from_pretrained('m')\nm = FastModel.get_peft_model(m, zorblat=3)\nSFTTrainer(model=m)"), "a keyword dict": ("x.py", "SFTTrainer('m', args=SFTConfig(**dict(zorblat=3)))"),
    "an option": ("x.py", "p = ArgumentParser()\np.add_argument('--zorblat', default=3)\nSFTTrainer('m')"), "a required option": ("x.py", "p = ArgumentParser()\np.add_argument('--zorblat', required=True)\nSFTTrainer('m')"),
    "a field": ("x.py", "@dataclass\nclass C:\n    zorblat: int = 3\nSFTTrainer('m')"), "a field of a subclass": ("x.py", "@dataclass\nclass C(TrainingArguments):\n    zorblat: int = 3\n"),
    "an attribute": ("x.py", "args = SFTConfig()\nargs.zorblat = 3\nSFTTrainer('m', args=args)"), "the environment": ("x.py", "os.environ['zorblat'] = '3'\nSFTTrainer('m')"), "fire": ("x.py", "def f(zorblat=3):\n    SFTTrainer('m')\nfire.Fire(f)"),
    "a cell": ("x.ipynb", book("a = 1", "SFTTrainer('m', args=SFTConfig(zorblat=3))")), "a command in a notebook": ("x.ipynb", book("!python t.py --learning_rate 1e-4 --zorblat 3")),
    "a bash cell": ("x.ipynb", book("%%bash\npython t.py --lr 1e-4 --zorblat 3")), "a written file": ("x.ipynb", book("%%writefile a.yml\nbase_model: m\nadapter: lora\nzorblat: 3")),
    "Axolotl": ("x.yml", "base_model: m\nadapter: lora\nzorblat: 3\n"), "Axolotl, nested": ("x.yml", "base_model: m\nadapter: lora\nother:\n  zorblat: 3\n"), "Axolotl, empty": ("x.yml", "base_model: m\nadapter: lora\nzorblat:\n"),
    "LLaMA-Factory": ("x.yaml", "stage: sft\nfinetuning_type: lora\nzorblat: 3\n"), "LLaMA-Factory, JSON": ("x.json", '{"stage": "sft", "finetuning_type": "lora", "zorblat": 3}'),
    "LLaMA-Factory, command": ("x.sh", "llamafactory-cli train --stage sft --zorblat 3"), "a script's command": ("x.sh", "python a.py --lr 1e-4 \\\n  --zorblat=3"), "trl's YAML": ("x.yaml", "model_name_or_path: m\nlearning_rate: 1e-4\nzorblat: 3\n"),
    "a call that does not count": ("x.ipynb", book("t = SFTTrainer('m', peft_config=LoraConfig())\nt.train()", "LoraConfig(zorblat=3)")), "a dead branch": ("x.py", "SFTTrainer('m')\nif False:\n    LoraConfig(zorblat=3)"),
}


@pytest.mark.parametrize("form", INVENTED)
def test_nothing_is_ignored_silently(form, tmp_path):
    receipt = converted(tmp_path, *INVENTED[form])
    found = [line for line in receipt.lines if "zorblat" in line.setting]
    assert len(found) == 1, as_text(receipt)
    if form not in ("the environment", "a call that does not count", "a dead branch"):
        assert found[0].verdict == "unknown" and any("zorblat" in str(p) for p in receipt.problems), as_text(receipt)
    assert found[0].note and "line" in found[0].place


def test_unreadable_keywords_are_told(tmp_path):
    receipt = converted(tmp_path, "x.py", "SFTTrainer('m', args=SFTConfig(**read_config()))")
    assert [line.verdict for line in receipt.lines if "**" in line.setting] == ["unknown"]


# ---- what is said

def test_old_names_say_since_when(tmp_path):
    receipt = converted(tmp_path, "x.py", 'm = AutoModelForCausalLM.from_pretrained("m", torch_dtype=torch.bfloat16)\na = TrainingArguments(evaluation_strategy="no", warmup_ratio=0.03, group_by_length=True)\nt = SFTTrainer(model=m, args=a, tokenizer=k, max_seq_length=2048)\n')
    said = {line.setting.rsplit(".", 1)[-1]: line.note for line in receipt.lines}
    assert "0.16" in said["max_seq_length"] and "0.12" in said["tokenizer"] and "4.56" in said["torch_dtype"] and "5.0" in said["warmup_ratio"] and "4.41" in said["evaluation_strategy"] and "5.5" in said["group_by_length"]
    assert verdict(receipt, "max_seq_length") == ["renamed"] and verdict(receipt, "warmup_ratio") == ["renamed"]


def test_defaults_of_the_tool_are_written_out(tmp_path):
    receipt = converted(tmp_path, "x.py", 'SFTTrainer("m", args=SFTConfig())')
    assert receipt.values["learning_rate"] == 2e-5 and "learning_rate" in {line.field for line in receipt.defaults}
    assert converted(tmp_path, "y.py", 'SFTTrainer("m", args=TrainingArguments())').values["learning_rate"] == 5e-5


def test_what_cannot_be_carried_over(tmp_path):
    "Other kinds of training are refused, and what has no place is a warning"
    for name, text in [("a.py", "DPOTrainer(model=m)"), ("b.yml", "base_model: m\nadapter: lora\nrl: dpo\n"), ("c.yaml", "stage: dpo\nfinetuning_type: lora\ntemplate: x\n")]:
        with pytest.raises(UserError, match="preference"): write_recipe(converted(tmp_path, name, text), tmp_path / "r.yaml")
    lost = converted(tmp_path, "d.yaml", "stage: sft\nfinetuning_type: lora\nmodel_name_or_path: m\ndataset: a\nloraplus_lr_ratio: 16.0\n")
    assert any("loraplus_lr_ratio" in str(p) for p in lost.problems)
    assert any("formatting" in str(p) or "turns rows" in str(p) for p in converted(tmp_path, "e.py", "SFTTrainer('m', formatting_func=f)").problems)


def test_no_model_and_no_data_can_be_found_by_a_run(tmp_path):
    receipt = converted(tmp_path, "x.py", "SFTTrainer(model=m, args=SFTConfig())")
    assert (receipt.values["model"], receipt.values["data"]) == (NO_MODEL, NO_DATA)
    assert {p.place for p in receipt.problems if "not named" in p.problem} == {"model", "data"}


def test_out_of_range_is_a_problem(tmp_path):
    receipt = converted(tmp_path, "x.yml", "base_model: m\nadapter: lora\nlearning_rate: 5\nlora_r: 0\nnum_epochs: many\n")
    assert receipt.recipe is None and {p.place for p in receipt.problems if p.level != "warning"} == {"learning_rate", "lora_r", "epochs"}
    with pytest.raises(UserError): write_recipe(receipt, tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()


def test_three_ways_to_read_it(tmp_path):
    receipt = converted(tmp_path, "x.yml", "base_model: m\nadapter: lora\nhub_token: hf_secret\nspecial_tokens: {pad_token: '<p>'}\nnote: 'a | b\\n<b>'\n")
    told = json.loads(json.dumps(as_json(receipt), allow_nan=False))
    assert told["settings"][2]["value"] == "(hidden)" and sum(told["counts"].values()) == len(receipt.lines)
    assert all("hf_secret" not in shown(receipt) for shown in (as_text, as_markdown)) and "<b>" not in as_markdown(receipt)


def test_written_atomically_and_not_over_another(tmp_path):
    receipt = converted(tmp_path, "x.yml", "base_model: m\nadapter: lora\nlearning_rate: 1e-4\ndatasets: [{path: d.jsonl}]\n")
    out = tmp_path / "recipe.yaml"
    write_recipe(receipt, out)
    assert load(out) == receipt.recipe and sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "x.yml"]
    out.write_text("mine")
    with pytest.raises(UserError, match="there already"): write_recipe(receipt, out)
    assert out.read_text() == "mine"
    assert load(write_recipe(receipt, out, replace=True)) == receipt.recipe


def test_deepspeed_file_is_read(tmp_path):
    (tmp_path / "cfg").mkdir()
    (tmp_path / "cfg" / "mine.json").write_text('{"zero_optimization": {"stage": 3,\t"offload_param": {"device": "cpu"}}}')
    assert converted(tmp_path, "x.yml", "base_model: m\nadapter: lora\ndeepspeed: cfg/mine.json\n").values["parallel"] == "zero3_offload"
    assert "parallel" not in converted(tmp_path, "y.yml", "base_model: m\nadapter: lora\ndeepspeed: ../../etc/passwd.json\n").values


# ---- agreement with the installed libraries, read and not imported

def class_fields(package, file, name):
    "{field: default as text} of a class in an installed package's source"
    path = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / file
    cls = next(n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ClassDef) and n.name == name)
    out = {}
    for s in cls.body:
        if isinstance(s, ast.AnnAssign) and s.value is not None:
            inner = {k.arg: k.value for k in s.value.keywords} if isinstance(s.value, ast.Call) else {}
            out[s.target.id] = ast.unparse(inner["default"] if "default" in inner else inner.get("default_factory", s.value))
    return out, cls


def test_installed_arguments_have_a_meaning():
    "Whatever the installed trl, peft and transformers take is known here, so that none of it is unknown in a receipt"
    sft = class_fields("trl", "trainer/base_config.py", "_BaseConfig")[0] | class_fields("trl", "trainer/sft_config.py", "SFTConfig")[0]
    training = class_fields("transformers", "training_args.py", "TrainingArguments")[0]
    lora = class_fields("peft", "tuners/lora/config.py", "LoraConfig")[0]
    init = next(n for n in class_fields("trl", "trainer/sft_trainer.py", "SFTTrainer")[1].body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    trainer = [a.arg for a in init.args.args if a.arg != "self"]
    assert len(training) > 80 and len(lora) > 20 and len(trainer) > 10
    missing = {owner: [n for n in names if meaning(owner, n) is None] for owner, names in dict(training=[*sft, *training], lora=lora, trainer=trainer).items()}
    missing["training"] = [n for n in missing["training"] if not n.startswith("_") and n not in ("model_init_kwargs", "framework")]
    assert not any(missing.values()), missing


def test_installed_defaults_are_those_here():
    sft = class_fields("trl", "trainer/base_config.py", "_BaseConfig")[0] | class_fields("trl", "trainer/sft_config.py", "SFTConfig")[0]
    training, lora = class_fields("transformers", "training_args.py", "TrainingArguments")[0], class_fields("peft", "tuners/lora/config.py", "LoraConfig")[0]
    new, old = DEFAULTS["trl"], DEFAULTS["transformers"]
    for name, field in dict(learning_rate="learning_rate", logging_steps="log_steps", max_length="max_length", packing="packing", gradient_checkpointing="gradient_checkpointing").items(): assert ast.literal_eval(sft[name]) == new[field], name
    for name, field in dict(num_train_epochs="epochs", per_device_train_batch_size="batch_size", gradient_accumulation_steps="accumulation", learning_rate="learning_rate", weight_decay="weight_decay", max_grad_norm="max_grad_norm", logging_steps="log_steps", save_steps="save_steps", seed="seed").items(): assert ast.literal_eval(training[name]) == old[field], name
    for name, field in dict(r="lora_r", lora_alpha="lora_alpha", lora_dropout="lora_dropout", bias="lora_bias").items(): assert ast.literal_eval(lora[name]) == old[field], name


# ---- files from anywhere

def deep(n): return "x = " + "(" * n + "1" + ")" * n
def doubling(n): return "\n".join(["a0 = 'x' * 99"] + [f"a{i} = a{i - 1} + a{i - 1}" for i in range(1, n)]) + f"\nSFTTrainer('m', args=SFTConfig(max_length=a{n - 1}))"


HOSTILE = {
    "python 2": ("x.py", "import trl\nprint 'training'\n", "2to3"), "a syntax error": ("x.py", "a = 1\nb = (\nSFTTrainer(]\n", "line 3"), "brackets": ("x.py", deep(5000), ""), "minus signs": ("x.py", "x = " + "-" * 100_000 + "1\nSFTTrainer('m')", ""),
    "a long sum": ("x.py", "x = " + "+".join(["1"] * 20_000) + "\nSFTTrainer('m', args=SFTConfig(seed=x))", ""), "doubling text": ("x.py", doubling(60), ""), "a circle": ("x.py", "def f(a): return g(a)\ndef g(a): return f(a)\nx = f(x)\nSFTTrainer(model=f(x), args=f(SFTConfig(seed=x)))", ""),
    "a big power": ("x.py", "SFTTrainer('m', args=SFTConfig(seed=9**9**9, max_steps=10**400, warmup_steps=1 << 999999))", ""), "a big number": ("x.py", "SFTTrainer('m', args=SFTConfig(seed=" + "9" * 5000 + "))", ""), "nul": ("x.py", "a\0b", "not text"), "no training": ("x.py", "print(1)", "sets up no training"),
    "empty script": ("x.py", "", "sets up no training"), "empty YAML": ("x.yml", "", "does not hold settings"), "empty notebook": ("x.ipynb", "{}", "not a notebook"), "cells of nonsense": ("x.ipynb", '{"cells": [1, null, {"cell_type": "code", "source": [1, {}]}, {"cell_type": "code"}]}', ""), "cells that are none": ("x.ipynb", '{"cells": 7}', "sets up no training"),
    "deep notebook": ("x.ipynb", "[" * 100_000, "not a notebook"), "deep YAML": ("x.yml", "base_model: " + "[" * 5000 + "]" * 5000, ""), "deep mapping": ("x.yml", "\n".join("  " * i + f"k{i}:" for i in range(60)), "nested more than"), "deep JSON": ("x.json", '{"a":' * 3000 + "1" + "}" * 3000, ""),
    "a YAML bomb": ("x.yml", "base_model: m\nadapter: lora\na0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)), "multiplies itself"), "merged with itself": ("x.yml", "a: &a\n  <<: *a\n  b: 1\nbase_model: m\n", ""),
    "a merge bomb": ("x.yml", "base_model: m\nadapter: lora\nm0: &m0 {a: 1}\n" + "\n".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 30)), ""), "a tag": ("x.yml", "base_model: !!python/object/apply:os.system ['touch hacked']\nadapter: lora\n", "has the tag"), "a local tag": ("x.yml", "base_model: !x m\nadapter: lora\n", "has the tag"),
    "twice": ("x.yml", "base_model: m\nadapter: lora\nadapter: qlora\n", "twice"), "a list": ("x.yml", "- a\n- b\n", "does not hold settings"), "not YAML": ("x.yml", "a: [1\nb: }", "not readable"), "other YAML": ("x.yml", "services:\n  web: {image: nginx}\n", "no settings of a training"),
    "no command": ("x.sh", "echo hello\n", "starts no training"), "quotes": ("x.sh", "python a.py --lr 1e-4 --x 'unfinished \\\n", ""), "many variables": ("x.sh", "A=aaaaaaaaaa\n" + "\n".join("A=$A$A" for _ in range(60)) + "\npython a.py --lr $A --x 1\n", ""), "regular expression trap": ("x.sh", "python a.py --lr 1e-4 " + "-" * 50_000 + " --x " + "a=" * 20_000, ""),
    "two documents": ("x.yml", "base_model: m\nadapter: lora\n---\nbase_model: n\n", ""), "control characters": ("x.py", "SFTTrainer('m\\x1b[2J\u202e', args=SFTConfig(zorblat='\\x07'))", ""), "names of Python": ("x.py", "__import__('os').system('touch hacked')\nopen('hacked', 'w').write('x')\nSFTTrainer('m')", ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(kind, tmp_path, monkeypatch):
    "A sentence or a receipt, soon, and nothing of the file is run"
    monkeypatch.chdir(tmp_path)
    name, text, said = HOSTILE[kind]
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    start = time.process_time()
    try: shown = as_text(convert(tmp_path / name))
    except UserError as e: shown = str(e)
    assert time.process_time() - start < 10, "took longer than 10 seconds of processor time"
    assert said in shown, shown[:2000]
    assert not (tmp_path / "hacked").exists() and "\x1b" not in shown and "\u202e" not in shown and "Traceback" not in shown


def test_files_that_are_none(tmp_path):
    (tmp_path / "big.py").write_bytes(b"#" * (3 << 20))
    (tmp_path / "latin.py").write_bytes("SFTTrainer('m')  # \xe9".encode("latin-1"))
    for name, said in [("big.py", "larger than"), ("latin.py", "UTF-8"), ("missing.py", "not a file"), (".", "not a file")]:
        with pytest.raises(UserError, match=said): convert(tmp_path / name)
    with pytest.raises(UserError): convert(tmp_path / ("x" * 5000))
    (tmp_path / "dos.yml").write_bytes(b"\xef\xbb\xbfbase_model: m\r\nadapter: lora\r\n")
    assert convert(tmp_path / "dos.yml").values["model"] == "m"


def test_a_broken_cell_does_not_hide_the_others(tmp_path):
    receipt = converted(tmp_path, "x.ipynb", book("x = = 1", "for i in range(2):\n    !echo $i\nt = SFTTrainer('m', args=SFTConfig(seed=5))"))
    assert receipt.values["seed"] == 5 and any("cell 1, line 1" in str(p) for p in receipt.problems)


def test_damaged_files(tmp_path):
    "Cut, doubled and scrambled text gives a receipt or a sentence, whatever is in it"
    rng, texts = random.Random(8), [(n, t) for n, t, _ in WAYS.values()]
    for i in range(250):
        name, text = texts[i % len(texts)]
        a, b = sorted(rng.randrange(len(text)) for _ in range(2))
        text = rng.choice([text[:a], text[a:], text[:a] + text[b:], text[:b] + text[a:], text[:a] + rng.choice("()[]{}:,'\"\\\n\t #*&!%@`=-") + text[a:]])
        (tmp_path / name).write_text(text, encoding="utf-8")
        try: as_json(convert(tmp_path / name))
        except UserError: pass


def test_no_torch():
    done = subprocess.run([sys.executable, "-c", "import sys, finetune_nb.convert; print(*sorted({'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy'} & sys.modules.keys()))"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout.strip()) == (0, ""), done


def test_masks_of_its_own_are_told(tmp_path):
    "A script that decides by code what is trained on says so in the problems"
    assert any("-100" in str(p) for p in converted(tmp_path, "x.py", "labels = [-100 for t in p]\nSFTTrainer('m')").problems)


def test_tables_name_settings_that_exist():
    from finetune_nb.settle import DECIDES
    known = set(FIELDS) | set(DECIDES) | {"-", "special"}
    assert set(DECIDES.values()) <= set(FIELDS)
    assert not [(o, n, w) for o, names in TABLES.items() for n, (w, _) in names.items() if w not in known]
