"""Do two processes train what one trains? Tiny models, every way of sharing, many settings, on the CPU over gloo.

usage: python bench/distribute.py --out bench/results/DATE-distribute.json [--ways zero2,fsdp] [--settings lora,full]

Each way is one launch that trains all settings one after the other; `one` is the same launch with a single process.
A case records the losses, the seconds, and how far the saved weights are from those of one process, or the error.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests")]

BASE = dict(model="llama", dtype="float32", batch_size=2, accumulation=4, epochs=1.0, packing=False, max_length=0, log_steps=1, eval_steps=1, save_steps=1, keep_checkpoints=5, threads=1,
            gradient_checkpointing=False, lora_dropout=0.0, learning_rate=3e-3, warmup=0.0, fast_path=False, optimizer="adamw_torch_fused")
FULL, QLORA = dict(method="full", learning_rate=1e-3), dict(method="qlora")
SETTINGS = dict(
    lora={}, full=FULL, checkpointing=dict(gradient_checkpointing=True), full_checkpointing=FULL | dict(gradient_checkpointing=True), bf16=dict(dtype="bfloat16"), full_bf16=FULL | dict(dtype="bfloat16"),
    qlora=QLORA, qlora_bf16=QLORA | dict(dtype="bfloat16"), int8=QLORA | dict(quantization="int8"), dora=dict(use_dora=True), dora_qlora=QLORA | dict(use_dora=True), bias=dict(lora_bias="all"),
    save_head=dict(modules_to_save="lm_head"), save_embedding=dict(modules_to_save="embed_tokens"), pissa=dict(lora_init="pissa"), orthogonal=dict(lora_init="orthogonal"), eva=dict(lora_init="eva"), dropout=dict(lora_dropout=0.1),
    tied=dict(model="tied"), tied_full=FULL | dict(model="tied"), mixtral=dict(model="mixtral"), mixtral_full=FULL | dict(model="mixtral"), qwen3_moe_full=FULL | dict(model="qwen3_moe"),
    adamw_8bit=dict(optimizer="adamw_8bit"), adafactor=dict(optimizer="adafactor"), sgd=dict(optimizer="sgd"))


def models(folder):
    import torch
    from conftest import make_llama, make_tokenizer
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    size = dict(vocab_size=332, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    made = dict(llama=make_llama(), tied=make_llama(tie_word_embeddings=True))
    torch.manual_seed(0)
    made |= dict(mixtral=MixtralForCausalLM(MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2)),
                 qwen3_moe=Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=32)))
    for name, model in made.items(): model.save_pretrained(folder / name), make_tokenizer().save_pretrained(folder / name)


def prepare(root, way, names):
    from conftest import chat_rows, write_rows
    from finetune_nb.core import write_atomic, write_json
    from finetune_nb.recipe import from_values, to_yaml
    for name in names:
        folder = root / f"{name}-{way}"
        values = BASE | SETTINGS[name]
        write_atomic(folder / "recipe.yaml", to_yaml(from_values(values | dict(model=str(root / values["model"])))))
        (folder / "data").mkdir()
        write_rows(folder / "data" / "train.jsonl", chat_rows()[:24]), write_rows(folder / "data" / "eval.jsonl", chat_rows()[24:])
        write_json(folder / "parallel" / "job.json", dict(way="none" if way == "one" else way, processes=1 if way == "one" else 2, resume=False))


def work(root, way, names):
    "In each process: one setting after the other; one that fails does not end the others"
    import torch
    from finetune_nb import launch
    for name in names:
        start = time.monotonic()
        try: launch.work(root / f"{name}-{way}")
        except Exception as e: print(f"{name}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
        if os.environ.get("RANK", "0") == "0": (root / f"{name}-{way}" / "seconds").write_text(str(round(time.monotonic() - start, 1)))
        if torch.distributed.is_initialized(): torch.distributed.barrier()


def start(root, way, names):
    from finetune_nb.distribute import files, write
    place, real = root / f"files-{way}", "none" if way == "one" else way
    made = files(real, "float32", 64, 100_000, 1 if way == "one" else 2, device="cpu", folder=place)
    if "deepspeed.json" in made: made["deepspeed.json"] |= {k: dict(enabled="auto") for k in ("bf16", "fp16")}  # settings of both kinds in one launch
    write(made, place)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(place / "accelerate.yaml"), __file__, "--work", str(root), way, *names]
    with open(root / f"{way}.log", "w") as log: subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=1800)


def weights(folder):
    from safetensors.torch import load_file
    return {k: v.float() for f in sorted((folder / "adapter").glob("*.safetensors")) for k, v in load_file(f).items()}


def case(root, name, way):
    from finetune_nb.core import read_json
    folder = root / f"{name}-{way}"
    seconds = float((folder / "seconds").read_text()) if (folder / "seconds").exists() else None
    if not (folder / "parallel" / "done.json").exists():
        errors = sorted((folder / "parallel").glob("error-*.json"))
        return dict(error=read_json(errors[0])["text"][:300].replace(str(root), "") if errors else "did not end", seconds=seconds)
    done = read_json(folder / "parallel" / "done.json")
    out = dict(losses=[round(l.get("loss", l.get("eval_loss")), 6) for l in done["history"] if "loss" in l or "eval_loss" in l], trained=done["trained"], seconds=seconds)
    if way == "one": return out
    ours, one = weights(folder), weights(root / f"{name}-one")
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in one.items()}: return out | dict(weights="other names or shapes")
    return out | dict(largest_difference=max(float((ours[k] - one[k]).abs().max()) for k in one), largest_weight=max(float(v.abs().max()) for v in one.values()))


def main():
    from finetune_nb.core import write_json
    from finetune_nb.distribute import WAYS
    from finetune_nb.hardware import processor, versions
    from finetune_nb.runs import commit, now
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    args = parser.parse_args()
    from importlib.metadata import version
    names, root = args.settings.split(","), Path(tempfile.mkdtemp(prefix="distribute-"))
    models(root)
    result = dict(question="do two processes train what one trains", date=now(), commit=commit(), machine=processor()[0], versions=versions() | dict(deepspeed=version("deepspeed")), base=BASE | dict(model="a random Llama of 4 layers"), settings=SETTINGS, cases={n: {} for n in names})
    for way in ["one", *args.ways.split(",")]:
        prepare(root, way, names)
        start(root, way, names)
        for n in names: result["cases"][n][way] = case(root, n, way)
        write_json(args.out, result)
        print(way, {n: (c := result["cases"][n][way]).get("error", c.get("losses", [None])[-1]) for n in names}, flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]: work(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else: main()
