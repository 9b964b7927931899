"The plain script does the same run, and what is saved is what was trained, for every way of training"
import json
import subprocess
import sys
import typing

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import losses, saved_weights, train_here
from finetune_nb import job
from finetune_nb.core import UserError
from finetune_nb.data import save
from finetune_nb.recipe import FIELDS, make
from finetune_nb.targets import targets
from finetune_nb.translate import as_script
from finetune_nb.tree import of

INITS = typing.get_args(FIELDS["lora_init"].annotation)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def recipe(tiny_model, tiny_rows):
    "A recipe of 4 steps on the tiny model, with changes"
    base = dict(model=tiny_model, data=tiny_rows, max_steps=4, batch_size=4, accumulation=1, learning_rate=1e-3, dtype="float32", threads=1, log_steps=1, eval_steps=2, save_steps=0, best_at_end=False,
                lora_r=4, lora_alpha=8, lora_dropout=0.0, gradient_checkpointing=False, packing=False, compare=False, warmup=0.25, eval_fraction=0.2)
    return lambda **changes: make("stock", **{"tracker": "none"} | base | changes)


# ---- the plain script

GUARD = '''
import json, sys
assert not [m for m in sys.modules if m.split(".")[0] == "finetune_nb" and sys.modules[m]], "the plain script uses finetune_nb"
json.dump([l[k] for l in trainer.state.log_history for k in ("loss", "eval_loss") if k in l], open({losses!r}, "w"))
'''
RUNNER = '''
import runpy, sys, traceback
sys.modules["finetune_nb"] = None  # an import of it fails
for script in sys.argv[1:]:
    try: runpy.run_path(script, run_name="__main__")
    except BaseException: open(script + ".error", "w").write(traceback.format_exc())
'''
SAME_RUN = {
    "random order": dict(),
    "random order, dropout": dict(lora_dropout=0.05),
    "by length": dict(group_by_length=True),
    "by length, dropout, two threads": dict(group_by_length=True, lora_dropout=0.05, threads=2),
    "accumulation, checkpointing": dict(accumulation=2, gradient_checkpointing=True, max_steps=3, scheduler="linear", weight_decay=0.1),
    "last layers, every token": dict(lora_layers=2, train_on="all", system="Answer in JSON.", seed=7),
    "all kinds of adapters": dict(use_rslora=True, use_dora=True, lora_bias="all", modules_to_save="lm_head", lora_targets="q_proj, down_proj"),
    "every weight": dict(method="full", learning_rate=2e-4),
    "quantized": dict(method="qlora"),
    "start eva": dict(lora_init="eva"),
    "start pissa": dict(lora_init="pissa"),
}
CHANGES_BASE = ("olora", "pissa", "pissa_niter_16")


@pytest.fixture(scope="module")
def scripted(recipe, tmp_path_factory):
    "{name: (folder with losses.json and run/adapter)} of every plain script, run one after the other by a Python that cannot import finetune_nb"
    folders, torch_threads = {}, torch.get_num_threads()
    for name, changes in SAME_RUN.items():
        folder, r = tmp_path_factory.mktemp("script"), recipe(**changes)
        _, choices = job.check(r, say=lambda line: None)
        files = {side: save(d.rows, folder / f"{side}.jsonl") for side, d in zip(("train", "eval"), job.rows(r))}
        model = job.model(r, choices)
        text = as_script(r, choices, r.model, None if r.method == "full" else targets(of(model), r.method == "qlora"), files, out=folder / "run")
        assert "finetune_nb" not in text.partition('"""\n')[2], "the plain script names finetune_nb outside its first line"
        (folder / "plain.py").write_text(text + GUARD.format(losses=str(folder / "losses.json")))
        folders[name] = folder
    torch.set_num_threads(torch_threads)
    done = subprocess.run([sys.executable, "-c", RUNNER, *(str(f / "plain.py") for f in folders.values())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


def differ(a, b):
    "The largest relative difference of two lists of losses"
    assert len(a) == len(b) > 4, (a, b)
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "shortcuts"])
@pytest.mark.parametrize("name", SAME_RUN)
def test_the_plain_script_does_the_same_run(name, fast, recipe, scripted, tmp_path):
    folder, said, r = scripted[name], [], recipe(fast_path=fast, **SAME_RUN[name])
    torch.manual_seed(1234)  # what was drawn before a run must not matter
    trainer, *_ = train_here(r, tmp_path, say=said.append)
    assert not (folder / "plain.py.error").exists(), (folder / "plain.py.error").read_text()
    assert any("same loss as TRL" in s for s in said) == fast, said
    ours, theirs = losses(trainer), json.loads((folder / "losses.json").read_text())
    assert differ(ours, theirs) < (1e-4 if fast else 1e-6), f"ours {ours}\nplain script {theirs}"
    assert len(set(ours)) > 4, "the losses do not move, so they show nothing"
    if fast or r.lora_init in CHANGES_BASE: return  # the package converts these starts, so that they fit the unchanged base
    mine, plain = saved_weights(tmp_path / "adapter"), saved_weights(folder / "run" / "adapter")
    assert mine.keys() == plain.keys() and all(torch.equal(mine[k], plain[k]) for k in mine), "the same losses, but other weights at the end"


# ---- every way of training: it moves what it should, keeps the rest, and is saved whole

WAYS = {
    **{f"start {i}": dict(lora_init=i) for i in INITS},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "dora, rslora": dict(use_dora=True, use_rslora=True),
    "bias of the adapted": dict(lora_bias="lora_only"),
    "every bias": dict(lora_bias="all"),
    "head trained whole": dict(modules_to_save="lm_head"),
    "head and embedding trained whole": dict(modules_to_save="lm_head, embed_tokens"),
    "last two layers": dict(lora_layers=2),
    "two kinds of layers": dict(lora_targets="q_proj,up_proj"),
    "nf4": dict(method="qlora"), "fp4, simple scales": dict(method="qlora", quantization="fp4", double_quantization=False), "int8": dict(method="qlora", quantization="int8"),
    "nf4, gaussian": dict(method="qlora", lora_init="gaussian"), "nf4, dora": dict(method="qlora", use_dora=True),
    "every weight": dict(method="full"),
    **{f"start {i}, {what}": dict(lora_init=i) | more for i in ("olora", "pissa") for what, more in {"rslora": dict(use_rslora=True), "last layers": dict(lora_layers=2)}.items()},
}


@torch.no_grad()
def logits(model, encoded):
    model.eval()
    return [model(input_ids=torch.tensor([e["input_ids"]])).logits for e in encoded[:4]]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_is_what_was_trained(way, recipe, tmp_path):
    saved_as_trained(recipe(max_steps=3, learning_rate=5e-3, **WAYS[way]), tmp_path)


def saved_as_trained(r, tmp_path):
    trainer, before, encoded = train_here(r, tmp_path)
    after, fresh = dict(trainer.model.named_parameters()), fresh_base(r)
    trained = {n for n, p in after.items() if p.requires_grad}
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert trained and moved <= trained, f"changed though not trained: {sorted(moved - trained)[:5]}"
    still = {n for n in trained - moved if not n.endswith("k_proj.bias")}  # attention does not see a constant added to every key
    assert not still, f"trained, but not moved: {sorted(still)[:5]}"
    if r.method != "full" and r.lora_init not in CHANGES_BASE: same_base(trainer.model, fresh, trained)
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files if r.method != "full" else {"model.safetensors", "config.json"} <= files
    assert "tokenizer.json" in files and not [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl"))]
    wanted, base = logits(trainer.model, encoded), logits(fresh, encoded)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32) if r.method == "full" else PeftModel.from_pretrained(fresh, tmp_path / "adapter", autocast_adapter_dtype=False)
    for n, p in loaded.named_parameters():
        if "lora_" in n: p.data = p.data.to(after[n].dtype)  # TRL trains adapters of a quantized base in bfloat16
    again = logits(loaded, encoded)
    assert min((w - b).abs().max() for w, b in zip(wanted, base)) > 1e-2, "training changed nothing that shows"
    assert max((w - a).abs().max() for w, a in zip(wanted, again)) < 1e-4, "the saved adapter is not the trained one"


def fresh_base(r):
    _, choices = job.check(r, say=lambda line: None)
    return job.model(r, choices)


def same_base(model, fresh, trained):
    "The adapted model's own weights are bit for bit those of a fresh one"
    own = {n.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): p for n, p in model.named_parameters() if n not in trained and "lora_" not in n}
    theirs = dict(fresh.named_parameters())
    assert len(own) > 20 and own.keys() <= theirs.keys()
    different = [n for n in own if not torch.equal(own[n].data, theirs[n].data)]
    assert not different, f"the frozen base changed: {different[:5]}"


IMPOSSIBLE = {
    "orthogonal with an odd rank": dict(lora_init="orthogonal", lora_r=3),
    "orthogonal on a quantized base": dict(method="qlora", lora_init="orthogonal"),
    "a misspelt target": dict(lora_targets="q_prj"),
    "a norm as target": dict(lora_targets="norm"),
    "target and trained whole": dict(lora_targets="q_proj", modules_to_save="q_proj"),
    **{f"{i}, {what}": dict(lora_init=i) | more for i in ("olora", "pissa") for what, more in {
        "head trained whole": dict(modules_to_save="lm_head"), "bias": dict(lora_bias="all"), "dora": dict(use_dora=True), "rank above the layers' size": dict(lora_r=100)}.items()},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_done_is_told_before_training(name, recipe, tmp_path):
    "Or it is done: then what is saved must be what was trained. Never a failure after the training"
    try: saved_as_trained(recipe(max_steps=2, learning_rate=5e-3, **IMPOSSIBLE[name]), tmp_path)
    except UserError as e: assert not (tmp_path / "metrics.jsonl").exists() and any(s in str(e) for s in IMPOSSIBLE[name])


@pytest.mark.parametrize("start", ["eva", "pissa"])
def test_a_start_of_adapters_means_nothing_when_every_weight_is_trained(start, recipe, tmp_path):
    trainer, *_ = train_here(recipe(method="full", lora_init=start, max_steps=2), tmp_path)
    assert trainer.state.global_step == 2 and not (tmp_path / "initial-adapter").exists()


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("fast", [True, False], ids=["shortcuts", "stock"])
def test_measuring_between_does_not_change_the_training(fast, method, recipe, tmp_path):
    "On processors with bfloat16 bitsandbytes repacks a 4-bit weight when it is used without gradients, and loses the gradient from then on"
    found = []
    for every in (1, 0):
        trainer, *_ = train_here(recipe(fast_path=fast, method=method, eval_steps=every, learning_rate=5e-3), tmp_path / str(every))
        found.append([l["loss"] for l in trainer.state.log_history if "loss" in l])
    assert len(found[0]) == 4 and found[0] == found[1]
