"""Two processes over gloo, without a GPU: every way of sharing trains what one process trains, resumes, and leaves one ordinary adapter.

One launch a way trains with LoRA, resumes from the second of three checkpoints, trains every weight, and a mixture of experts with LoRA. About 25 s a launch on an idle core.
"""
import json
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from conftest import chat_rows, ended, losses, make_tokenizer, saved_weights, start, train_here, write_rows
from exact import curve
from finetune_nb import launch
from finetune_nb.checkpoint import damage
from finetune_nb.core import UserError, read_json, write_atomic, write_json
from finetune_nb.distribute import STAGE, WAYS, choose, files, write
from finetune_nb.known import known
from finetune_nb.recipe import from_values, make, to_yaml

HERE = Path(__file__).resolve().parent
deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8")
EACH = [pytest.param(w, marks=deepspeed if w in STAGE else ()) for w in WAYS]


# ---- the files are read by the libraries themselves

@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_accelerate_knows_every_key(way, nodes, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    path = write(files(way, "bfloat16", 4096, 10**8, 2, nodes, folder=tmp_path), tmp_path)[0]
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines, config.distributed_type.value) == (2 * nodes, nodes, dict(none="MULTI_GPU", fsdp="FSDP").get(way, "DEEPSPEED"))
    options = {a.dest for a in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options


@deepspeed
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("way", STAGE)
def test_deepspeed_knows_every_key(way, dtype):
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    written = files(way, dtype, 4096, 10**8, 2)["deepspeed.json"]
    config = {k: 1 if v == "auto" else v for k, v in written.items()}
    read = DeepSpeedConfig(config)  # refuses unknown keys under zero_optimization
    assert (read.zero_config.stage, read.zero_force_ds_cpu_optimizer) == (STAGE[way], False)
    assert (bool(read.zero_config.offload_param), bool(read.zero_config.offload_optimizer)) == (way == "zero3_offload",) * 2
    names = {v for v in vars(constants).values() if isinstance(v, str)}
    assert set(config) <= names | {"bf16", "fp16", "zero_optimization"}


# ---- the choice, where a notebook would be too long

def test_a_card_too_small_says_what_would_do():
    with pytest.raises(UserError) as e: choose(known("llama-3.1-70b"), make("stock", method="full", learning_rate=2e-5), 1, 12)
    assert "too small" in str(e.value) and "would do" in str(e.value)


def test_every_choice_is_legal_and_fits():
    for name in ("smollm2-135m", "llama-3.1-8b", "mixtral-8x7b", "llama-3.1-70b"):
        for method in ("lora", "qlora", "full"):
            for gpus in (1, 2, 8):
                try: found = choose(known(name), make("stock", method=method, learning_rate=2e-5), gpus, 80)
                except UserError: continue
                best = next(o for o in found.options if o.way == found.choice)
                assert (best.fits or best.tight) and not best.against and best.expected == found.per_gpu_bytes
                assert json.dumps(found.to_json()) and found.files["accelerate.yaml"]["num_processes"] == gpus


# ---- two processes

RECIPE = dict(dtype="float32", batch_size=2, accumulation=4, epochs=1.0, packing=False, max_length=0, log_steps=1, eval_steps=1, save_steps=1, threads=1, gradient_checkpointing=True, lora_dropout=0.0,
              warmup=0.0, fast_path=False, optimizer="adamw_torch_fused", keep_checkpoints=5, scheduler="constant")
KINDS = dict(lora=dict(learning_rate=3e-3), experts=dict(learning_rate=3e-3), full=dict(method="full", learning_rate=0.05))  # this rate overshoots: the best checkpoint is not the last


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    write_rows(place / "train.jsonl", chat_rows()[:24]), write_rows(place / "eval.jsonl", chat_rows()[24:])
    return place


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    "{kind: model folder}; the experts are fused parameters, which adapters find by their shape"
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    folder = tmp_path_factory.mktemp("experts") / "model"
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(vocab_size=332, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
                                     num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return dict.fromkeys(KINDS, tiny_model) | dict(experts=str(folder))


def recipe(kind, model, rows, **more): return from_values(RECIPE | KINDS[kind] | dict(model=model, data=str(rows / "train.jsonl"), eval_data=str(rows / "eval.jsonl")) | more)


@pytest.fixture(scope="module")
def one(tiny, rows, tmp_path_factory, frozen):
    "{kind: (losses, saved weights)} of one process"
    out = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        trainer, _, _ = train_here(recipe(kind, tiny[kind], rows), folder)
        out[kind] = losses(trainer), saved_weights(folder / "adapter")
    return out


def run_folder(folder, r, rows, way, resume=False, processes=2):
    write_atomic(folder / "recipe.yaml", to_yaml(r))
    (folder / "data").mkdir(parents=True)
    for side in ("train", "eval"): shutil.copy(rows / f"{side}.jsonl", folder / "data")
    write_json(folder / "parallel" / "job.json", dict(way=way, processes=processes, resume=resume))
    return folder


@pytest.fixture(scope="module", params=EACH)
def two(request, tiny, rows, tmp_path_factory):
    "(way, {name: run folder}) after one launch with two processes"
    way, place = request.param, tmp_path_factory.mktemp(request.param)
    made = {name: run_folder(place / name, recipe(kind, tiny[kind], rows), rows, way, resume=name == "resumed") for name, kind in dict(lora="lora", resumed="lora", full="full", experts="experts").items()}
    config = write(files(way, "float32", 64, 100_000, 2, device="cpu", folder=place), place)[0]
    work = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, HERE / "distribute_worker.py", made["lora"], f"{made['lora']}>{made['resumed']}", made["full"], made["experts"]]
    code, out, err = ended(start(*work, cwd=HERE.parent, PYTHONPATH=str(HERE.parent)), timeout=600)
    assert code == 0, f"{out[-3000:]}\n{err[-5000:]}"
    return way, made


def history(folder): return [l[k] for l in read_json(folder / "parallel" / "done.json")["history"] for k in ("loss", "eval_loss") if k in l]


def close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for k in theirs: assert ours[k].shape == theirs[k].shape and float((ours[k] - theirs[k]).abs().max()) < tolerance, k


@pytest.mark.parametrize("kind", KINDS)
def test_two_train_what_one_trains(two, one, kind):
    way, made = two
    assert len(one[kind][0]) == 6 and history(made[kind]) == pytest.approx(one[kind][0], rel=1e-4)
    close(saved_weights(made[kind] / "adapter"), one[kind][1], 2e-3 if kind == "full" else 1e-4)
    if kind == "experts": assert any(".experts." in n for n in one[kind][1])


def test_the_best_checkpoint_is_what_is_saved(two, one):
    "the held-out loss of the run with every weight is lowest before its end"
    held = one["full"][0][1::2]
    assert min(held) < held[-1], "the rate no longer overshoots, so this shows nothing"
    assert two[0] and read_json(two[1]["full"] / "parallel" / "done.json")["steps"] == 3  # that the weights are the best ones is in test_two_train_what_one_trains


def test_resumed_is_as_if_never_stopped(two):
    way, made = two
    resumed, straight = saved_weights(made["resumed"] / "adapter"), saved_weights(made["lora"] / "adapter")
    plain = lambda name: [{k: v for k, v in l.items() if k != "total_flos"} for l in curve(made[name])]  # transformers' count depends on which weights ZeRO-3 holds when it is asked
    assert history(made["resumed"]) == history(made["lora"]) and plain("resumed") == plain("lora")
    assert resumed.keys() == straight.keys() and all((resumed[k] == straight[k]).all() for k in straight), "not bit for bit"


def test_the_adapter_is_an_ordinary_one(two, one, tiny_model):
    import torch
    from peft import PeftModel, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM
    way, made = two
    base = lambda: AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain, ids = base(), torch.arange(3, 40)[None]
    with torch.no_grad(): before = plain(ids).logits
    model = PeftModel.from_pretrained(plain, made["lora"] / "adapter").eval()
    with torch.no_grad():
        ours = model(ids).logits
        set_peft_model_state_dict(model, one["lora"][1])
        theirs = model(ids).logits
    assert float((ours - theirs).abs().max()) < 1e-3 and float((ours - before).abs().max()) > 0.1
    assert {p.name for p in (made["lora"] / "adapter").iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_one_curve(two):
    lines = [json.loads(l) for l in (two[1]["lora"] / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in l for l in lines) == 3 and sum("eval_loss" in l for l in lines) == 3


# ---- as the notebook starts it

START = """
import sys
from finetune_nb import job, launch
from finetune_nb.known import known
from finetune_nb.recipe import load
folder, resume = sys.argv[1], sys.argv[2] == "resume"
_, choices = job.check(load(folder + "/recipe.yaml"), say=lambda line: None)
try: print("done", launch.train(folder, known("smollm2-135m"), "none", 2, choices, say=lambda line: print(line, flush=True), resume=resume).steps)
except KeyboardInterrupt: print("interrupted")
"""


def test_ctrl_c_ends_after_a_step_and_the_run_can_be_resumed(tiny_model, rows, tmp_path):
    folder = run_folder(tmp_path / "run", recipe("lora", tiny_model, rows, epochs=20.0, eval_steps=100, save_steps=100, best_at_end=False), rows, "none")
    process = start(sys.executable, "-c", START, folder, "new", cwd=HERE.parent)
    for line in process.stdout:
        if line.startswith("train "): break
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process, timeout=120)
    assert code == 0 and "stopping after this step" in out and out.rstrip().endswith("interrupted"), err[-3000:]
    stopped = [p.name for p in (folder / "checkpoints").glob("checkpoint-*")]
    assert len(stopped) == 1 and 0 < int(stopped[0].split("-")[1]) < 60 and not damage(folder / "checkpoints" / stopped[0]) and not (folder / "adapter").exists()
    code, out, err = ended(start(sys.executable, "-c", START, folder, "resume", cwd=HERE.parent), timeout=120)
    assert code == 0 and out.rstrip().endswith("done 60"), err[-3000:]
    assert saved_weights(folder / "adapter")


def test_two_machines(tiny_model, rows, one, tmp_path):
    "one process on each of two machines, which are both this one; the rows come from the recipe"
    from finetune_nb import job
    r = recipe("lora", tiny_model, rows)
    write_atomic(tmp_path / "recipe.yaml", to_yaml(r))
    _, choices = job.check(r, say=lambda line: None)
    lines = launch.prepare(tmp_path, known("smollm2-135m"), "none", 1, choices, nodes=2, address="127.0.0.1")
    started = [start(sys.executable, "-m", "accelerate.commands.launch", *line.split()[2:], cwd=HERE.parent, PYTHONPATH=str(HERE.parent)) for line in lines]
    assert len(lines) == 2
    for process in started:
        code, out, err = ended(process, timeout=240)
        assert code == 0, err[-3000:]
    assert history(tmp_path) == pytest.approx(one["lora"][0], rel=1e-4)


def test_a_mistake_in_a_process_is_told_as_one(tiny_model, rows, tmp_path):
    folder = run_folder(tmp_path / "run", recipe("lora", tiny_model, rows), rows, "none")
    write_atomic(folder / "recipe.yaml", (folder / "recipe.yaml").read_text().replace("lora_targets: all-linear", "lora_targets: q_prog"))
    from finetune_nb import job
    _, choices = job.check(recipe("lora", tiny_model, rows), say=lambda line: None)
    with pytest.raises(UserError, match="q_prog"): launch.train(folder, known("smollm2-135m"), "none", 2, choices, say=lambda line: None)
    assert not (folder / "adapter").exists()
