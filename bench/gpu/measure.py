"""Peak memory and speed of fine-tuning on this GPU, for a grid of models, methods, lengths and kernels.

usage: python bench/gpu/measure.py [--quick | --cpu] [--out FILE] [--timeout S] [--only TEXT] [--again] [--list]

The models have random weights and the dimensions of finetune_nb.known, so nothing is downloaded. Every case runs in a
process of its own through the package's own way (recipe, model, trainer, trial steps), so one that runs out of memory
or hangs loses nothing but itself. The result file is written after each case; started again with the same file, the
script goes on with what is missing, and with --again it also repeats what failed.

--quick takes about 20 cases (under 8 minutes on an H100), --cpu a tiny model on the CPU, to test the script itself.
--only keeps the cases whose name holds TEXT; --list shows the cases and runs none.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from finetune_nb.core import read_json, write_json
from finetune_nb.hardware import versions

HERE = Path(__file__).resolve().parent
BASE = dict(method="lora", length=2048, batch=4, checkpointing=True, attention="sdpa", loss="trl-1.16", rank=16)  # loss: a key of finetune_nb.stack.LOSSES, "finetune_nb" is our shortcut
TINY = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=1024, max_position_embeddings=256)
VARIATIONS = (dict(length=512, batch=16), dict(length=8192, batch=1), dict(batch=1), dict(checkpointing=False), dict(attention="eager"), dict(loss="finetune_nb"), dict(loss="transformers-5"), dict(loss="liger"))
FULL = {"llama-3.2-1b", "llama-3.2-3b"}  # 16 bytes a parameter, as this package trains everything: 8B takes 128 GB


def name(case): return " ".join(f"{k}={v}" for k, v in case.items())


def grid(quick=False, cpu=False):
    "The cases in the order they run: the cases of a model follow each other, so that its weights are written once"
    if cpu:
        tiny = dict(model="tiny") | BASE | dict(length=32, batch=2, checkpointing=False)
        return [tiny, tiny | dict(method="full", checkpointing=True)]
    cases = []
    for model in ("llama-3.2-1b", "llama-3.1-8b") if quick else ("llama-3.2-1b", "llama-3.2-3b", "qwen3-8b", "llama-3.1-8b", "qwen3-14b"):
        first = dict(model=model) | BASE
        for method in ("lora", "qlora", "full"):
            if method == "full" and model not in FULL: continue
            some = VARIATIONS if not quick else VARIATIONS[:2] + VARIATIONS[3:] if method == "lora" else VARIATIONS[3:4]
            cases += [first | dict(method=method) | change for change in ({}, *some)]
        if not quick: cases += [first | dict(rank=r) for r in (64, 256)] + [first | dict(length=4096, batch=4), first | dict(length=1024, batch=8, checkpointing=False)]
    return [c for c in cases if c["loss"] != "liger" or find_spec("liger_kernel")]


# ---- in a process of its own: one case

def rows_of(case, seed):
    "Rows of exactly `length` tokens: words of the tokenizer below, and the end token that TRL adds"
    import random
    r = random.Random(seed)
    return [{"text": " ".join(f"w{r.randrange(1000)}" for _ in range(case["length"] - 1))} for _ in range(max(case["batch"], 2))]


def write_weights(model, folder):
    "A model with random weights in bfloat16, and a tokenizer of a thousand words"
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from finetune_nb.known import row
    values = TINY if model == "tiny" else row(model).config | {"model_type": row(model).model_type}
    config = AutoConfig.for_model(**values)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"): AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, **{f"w{i}": i + 2 for i in range(1000)}}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


def plain_loss(trainer):
    "Transformers' own loss instead of TRL's or ours"
    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("number", None)
        return model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss
    trainer.compute_loss = compute_loss


def settings(case, folder):
    "The recipe of a case"
    from finetune_nb.recipe import make
    cpu = case["model"] == "tiny"
    return make("stock", model=str(folder), method=case["method"], lora_r=case["rank"], lora_alpha=2 * case["rank"], lora_dropout=0.0, batch_size=case["batch"], accumulation=1, max_length=case["length"], packing=False,
                gradient_checkpointing=case["checkpointing"], attention=case["attention"], eval_batch_size=case["batch"], fast_path=case["loss"] == "finetune_nb", tracker="none", compare=False,
                dtype="float32" if cpu else "auto", threads=1 if cpu else 0, learning_rate=2e-5 if case["method"] == "full" else 2e-4)


def run(case, folder):
    "Measure one case: a dict for the result file"
    import torch
    from finetune_nb import job, train
    from finetune_nb.models import load_tokenizer
    from finetune_nb.lengths import row_lengths
    from finetune_nb.trial import Peak, Trial, is_out_of_memory, trial
    if case["loss"] == "liger":
        import liger_kernel.transformers as liger
        getattr(liger, f"apply_liger_kernel_to_{case['model'].split('-')[0].rstrip('.0123456789') if 'qwen3' not in case['model'] else 'qwen3'}")()
    recipe, out, found = settings(case, folder), tempfile.mkdtemp(dir=folder), Trial(phase="load")
    machine, choices = job.check(recipe, say=lambda line: None)
    facts = dict(status="done", machine=vars(machine), choices={c.setting: c.value for c in choices}, recipe={k: v for k, v in recipe.model_dump().items() if k != "model"})
    peak = Peak(machine.device == "cuda")
    try:
        trainer = train.build(recipe, choices, job.model(recipe, choices), load_tokenizer(recipe.model), rows_of(case, 1), rows_of(case, 2), out, say=lambda line: None)
        lengths = row_lengths(trainer.train_dataset)[0]
        assert set(lengths) == {case["length"]}, f"rows have {sorted(set(lengths))} tokens, not {case['length']}"
        found.peaks["load"], found.phase = peak.read(), "train"
        if case["loss"] in ("transformers-5", "liger"): plain_loss(trainer)
        trial(trainer, [list(range(case["batch"]))] * 5, found=found)
        facts["trained"], facts["total"] = (sum(p.numel() for p in trainer.model.parameters() if p.requires_grad or every) for every in (False, True))
        seconds = sorted(found.seconds[1:])[1:3]
        facts |= dict(tokens_per_second=round(case["batch"] * case["length"] * 2 / sum(seconds), 1)) | speed(case, facts, recipe)
    except Exception as e:
        if not is_out_of_memory(e): raise
        facts["status"] = "out of memory"
    return facts | {k: v for k, v in vars(found).items() if k != "seconds"} | dict(seconds=[round(s, 4) for s in found.seconds])


def speed(case, facts, recipe):
    "Share of the card's 16-bit speed: what the mathematics needs (MFU), and with what is recomputed"
    from types import SimpleNamespace
    from finetune_nb.cards import from_machine
    from finetune_nb.known import known
    from finetune_nb.time_cost import flops
    card = from_machine(SimpleNamespace(**facts["machine"]))
    if not (card and card.tflops): return {}
    setup = SimpleNamespace(method=case["method"], rank=case["rank"], target_modules=(), adapted_layers=0, checkpointing="nonreentrant" if case["checkpointing"] else "none")
    done = flops(known(case["model"]), setup, [case["length"]], head_again=case["loss"] == "trl-1.16")
    per_second = facts["tokens_per_second"] / case["length"] / card.tflops / 1e12
    return dict(mfu=round(done.model * per_second, 4), hardware_use=round(done.total * per_second, 4))


# ---- the process that starts them

def start(arguments, timeout):
    "(exit code or None if it took too long, stdout, stderr) of this script in a new process"
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    try: out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return (None, *process.communicate())
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def one(case, folder, timeout, call=start):
    "The measured case, or how it failed"
    began = time.monotonic()
    code, out, err = call(["--case", json.dumps(case), str(folder)], timeout)
    took = dict(took=round(time.monotonic() - began, 1))
    try: return json.loads(out.strip().splitlines()[-1]) | took
    except (IndexError, ValueError): pass
    why = f"took longer than {timeout} s" if code is None else f"ended by signal {-code}, as when memory runs out" if code < 0 else f"exit code {code}"
    return dict(status="failed", why=why, stderr=err[-1500:]) | took


def kernels():
    "Versions of the packages that bring kernels of their own"
    return {d.name: d.version for d in distributions() if d.name in ("triton", "flash-attn", "liger-kernel", "kernels", "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu12")}


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty=+changes", "--abbrev=12", "--match="], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


def scratch(needed):
    "A folder for weights: in memory if there is plenty of it, because they are read for every case"
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > 2 * needed
    return Path(tempfile.mkdtemp(prefix="finetune_nb-", dir=shm if roomy else None))


def measure(cases, file, timeout=300, again=False, call=start, say=print):
    "Run the cases that the file lacks, one after another, and write the file after each"
    result = read_json(file) if file.exists() else dict(question="peak memory and speed of fine-tuning on this GPU", cases={})
    result |= dict(versions=versions() | kernels(), commit=commit(), date=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    wanted = [c for c in cases if (old := result["cases"].get(name(c))) is None or again and old["status"] == "failed"]
    model, folder = None, None
    try:
        for number, case in enumerate(wanted, 1):
            if case["model"] != model:
                if folder: shutil.rmtree(folder, ignore_errors=True)
                model, folder = case["model"], scratch(32 * 2**30)
                code, _, err = call(["--weights", model, str(folder)], 600)
                if code != 0:
                    say(f"the weights of {model} could not be written: {err[-300:]}")
                    continue
            found = one(case, folder, timeout, call)
            result["cases"][name(case)] = dict(case=case) | found
            result["machine"] = result["cases"][name(case)].pop("machine", None) or result.get("machine")
            write_json(file, result)
            peak = found.get("peaks", {}).get("train", {})
            say(f"{number}/{len(wanted)} {name(case)}: {found['status']}, {', '.join(f'{k} {v / 2**30:.2f} GiB' for k, v in peak.items())}, {found.get('tokens_per_second', '–')} tokens/s, {found['took']} s")
    finally:
        if folder: shutil.rmtree(folder, ignore_errors=True)
    return result


# ---- prediction against measurement

def compare(result):
    "One row for each number of each measured case: predicted (low, expected, high), measured, error, inside the range"
    from types import SimpleNamespace
    from finetune_nb.cards import from_machine
    from finetune_nb.known import known
    from finetune_nb.memory import plan, setup
    from finetune_nb.recipe import make
    machine, rows = SimpleNamespace(**result["machine"]), []
    for measured in result["cases"].values():
        case = measured["case"]
        if measured["status"] == "failed" or case["model"] == "tiny": continue
        shapes, recipe = known(case["model"]), make("stock", model=case["model"], **measured["recipe"])
        p = plan(shapes, setup(recipe, machine, shapes, loss="trl-1.16" if case["loss"] == "finetune_nb" else case["loss"]), from_machine(machine))  # on a GPU our shortcut uses TRL's kernel
        if measured["status"] == "out of memory": rows.append(dict(case=case, number="fits", predicted=p.fits, measured=False, right=p.fits is False))
        for number in ("allocated", "reserved", "process"):
            if not (seen := measured.get("peaks", {}).get("train", {}).get(number)) or measured["status"] != "done": continue
            r = getattr(p, number)
            rows.append(dict(case=case, number=number, predicted=(r.low, r.expected, r.high), measured=seen, error=r.expected / seen - 1, right=r.low <= seen <= r.high))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--case", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.weights: return write_weights(*args.weights)
    if args.case: return print("\n" + json.dumps(run(json.loads(args.case[0]), args.case[1])))
    cases = [c for c in grid(args.quick, args.cpu) if args.only in name(c)]
    if args.list: return print("\n".join(map(name, cases)))
    return measure(cases, args.out or HERE / "results" / f"{datetime.now(timezone.utc):%Y-%m-%d}-{'cpu' if args.cpu else 'gpu'}.json", args.timeout, args.again)


if __name__ == "__main__":
    main()
