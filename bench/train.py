"""Training speed on the same rows in the same order: stock TRL, stock TRL tuned, this package; on CUDA also Liger and Unsloth.

usage: python bench/train.py [--part same,loss] [--rounds 3] [--steps 12] [--model NAME] [--arms a,b] [--out bench/results/NAME.json]

Part "same": every arm does the same mathematics (all layers, no dropout, the same batches of the same rows, the same
number format, 16 rows a step) and must reach the same losses. Told are real tokens a second (padding is no token), the peak memory of the
process, and MFU: operations that the mathematics needs, as a share of the speed at which this machine multiplies large
matrices, measured in each process, the best of them counting. Arms take turns, forwards and backwards, each in a process of its own.

Part "loss": seconds of training until a held-out loss. `source` trains one pass with the settings of the source's
recipe; the others train until they reach its lowest held-out loss. Whatever an arm prepares counts (checking
shortcuts; frozen layers are stored in the first pass); held-out losses, computed by one function for all arms, do not.

On CUDA the first part uses a model with random weights and the dimensions of llama-3.1-8b (--model takes another), rows
of 64 to 2,048 tokens, and also runs qlora.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from finetune_nb.core import write_json
from record import taken
from finetune_nb.hardware import machine

SAME = dict(lora_layers=0, lora_dropout=0.0, batch_size=16, accumulation=1, learning_rate=1e-3, scheduler="constant", warmup=0.0, eval_steps=0, save_steps=0, log_steps=1, gradient_checkpointing=False)
SOURCE = dict(lora_dropout=0.05, learning_rate=2e-4, batch_size=4, accumulation=4, max_length=2048, gradient_checkpointing=True, epochs=1.0, eval_steps=0, save_steps=0, log_steps=1, dtype="auto")
ARMS = {  # name: (who trains, settings beyond those of the part, what it is)
    "stock": ("trl", dict(gradient_checkpointing=True, batch_size=4, accumulation=4), "TRL, 4 x 4 rows a step and activations computed twice, as the source has it"),
    "tuned": ("trl", {}, "TRL, 16 rows at once, without checkpointing"),
    "head": ("head", {}, "finetune_nb's head on answer tokens alone, rows padded"),
    "in place": ("in place", {}, "the same, and adapters added in place"),
    "end to end": ("end to end", {}, "the same, and rows laid end to end"),
    "ours": ("finetune_nb", {}, "finetune_nb: the same, and what all rows begin with computed once a batch"),
    "compiled": ("compiled", {}, "finetune_nb with torch.compile"),
    "liger": ("liger", {}, "TRL with Liger's kernels"),
    "unsloth": ("unsloth", {}, "Unsloth's model in TRL's trainer"),
}
PIECES = {"head": None, "in place": None, "end to end": 0}  # what these arms have of the shortcuts: the tokens of a shared beginning, None for padded rows
CURVES = {  # name: (who trains, preset, settings beyond the preset's, what it is)
    "source": ("trl", "stock", SOURCE | dict(packing=False), "TRL, the source's settings without packing, one pass"),
    "same settings": ("trl", "laptop", {}, "TRL with the settings that finetune_nb has for a machine without GPU"),
    "ours": ("finetune_nb", "laptop", {}, "finetune_nb with its settings for a machine without GPU"),
}


def available(cuda):
    "Arms that can run here, and why others cannot"
    lacks = {"compiled": not cuda and "is for GPUs", "liger": not find_spec("liger_kernel") and "liger-kernel is not installed", "unsloth": not find_spec("unsloth") and "unsloth is not installed"}
    return [a for a in ARMS if not lacks.get(a)], {a: why for a, why in lacks.items() if why}


# ---- in a process of its own: one arm

class Watch:
    "Times steps, keeps losses, and looks at the held-out loss with the clock stopped"
    def __init__(self, trainer, held, every=0, target=None):
        from transformers import TrainerCallback
        watch, self.steps, self.losses, self.curve, self.part = self, [], [], [], 0.0
        inner = trainer.compute_loss

        def compute_loss(*args, **kwargs):
            loss = inner(*args, **kwargs)
            if trainer.model.training: watch.part += float((loss[0] if isinstance(loss, tuple) else loss).detach())  # of all the step's tokens, so the parts add up
            return loss

        class Clock(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs): watch.mark = watch.now()
            def on_step_end(self, args, state, control, **kwargs):
                now = watch.now()
                watch.steps.append([a - b for a, b in zip(now, watch.mark)])
                watch.losses.append(watch.part)
                watch.part = 0.0
                if every and (state.global_step % every == 0 or state.global_step == state.max_steps): watch.look(trainer, held, state.global_step)
                if watch.curve and target is not None and watch.curve[-1][0] <= target: control.should_training_stop = True
                watch.mark = watch.now()
        trainer.compute_loss = compute_loss
        trainer.add_callback(Clock())

    def now(self):
        import torch
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def look(self, trainer, held, step):
        self.curve.append((held_loss(trainer.model, held), round(sum(s[0] for s in self.steps), 2), round(sum(s[1] for s in self.steps), 2), step))
        print(f"  step {step}: held-out loss {self.curve[-1][0]:.4f} after {self.curve[-1][1]:.0f} s", file=sys.stderr, flush=True)


def held_loss(model, held):
    "Mean negative log likelihood of the held-out answers' tokens, by the same function for every arm"
    from finetune_nb.evaluate import answer_losses
    sums, counts = zip(*answer_losses(model, held))
    return sum(sums) / sum(counts)


def ceiling(dtype, device):
    "Operations a second of large matrix products, the median of nine"
    import torch
    n, seconds = (8192 if device == "cuda" else 2048), []
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device == "cuda": torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[1:])


def rows_of_words(n=512, seed=0):
    "Rows of 64 to 2,048 tokens, as unevenly long as chats are, for the tokenizer of bench/gpu/measure.py"
    import random
    rng, rows = random.Random(seed), []
    for _ in range(n):
        length = int(min(2048, max(64, rng.lognormvariate(5.8, 0.8))))
        said = [f"w{rng.randrange(1000)}" for _ in range(length - 1)]
        rows.append(dict(prompt=[dict(role="user", content=" ".join(said[: length // 2]))], completion=[dict(role="assistant", content=" ".join(said[length // 2:]))], row=len(rows) + 1))
    return rows


def trainer_of(who, recipe, choices, model, tokenizer, rows, out):
    "The arm's trainer"
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer
    from finetune_nb import train
    from finetune_nb.lora import undo
    from finetune_nb.targets import targets
    from finetune_nb.translate import construct, lora_kwargs, training_kwargs
    from finetune_nb.tree import of
    if who in ("finetune_nb", "compiled", *PIECES): trainer = train.build(recipe, choices, model, tokenizer, rows, [], out, say=lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    else:
        settings = training_kwargs(recipe, choices, Path(out) / "checkpoints", False) | ({"use_liger_kernel": True} if who == "liger" else {})
        adapter = None if who == "unsloth" else LoraConfig(**lora_kwargs(recipe, targets(of(model), recipe.method == "qlora")))
        from finetune_nb.mask import plain
        table = Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} if tokenizer.chat_template else dict(zip(("prompt", "completion"), plain(r, tokenizer))) for r in rows])
        trainer = SFTTrainer(model=model, args=construct(SFTConfig, settings), train_dataset=table, processing_class=tokenizer, peft_config=adapter)
    trainer.remove_callback(PrinterCallback)
    if who == "compiled": trainer.model.compile(dynamic=True)
    if who in PIECES: trainer.shared = PIECES[who]
    if who == "head": undo(trainer.model)
    return trainer


def unsloths_model(recipe):
    "Unsloth's own model, adapters included"
    from unsloth import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained(recipe.model, max_seq_length=recipe.max_length, load_in_4bit=recipe.method == "qlora")
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(model, r=recipe.lora_r, lora_alpha=recipe.lora_alpha, lora_dropout=0, target_modules=linear, use_gradient_checkpointing="unsloth" if recipe.gradient_checkpointing else False, random_state=recipe.seed), tokenizer


def work(recipe, shapes, rows, tokenizer):
    "(operations the mathematics needs for a token, counted tokens a token): means over the rows"
    from types import SimpleNamespace
    from finetune_nb.mask import encode_all
    from finetune_nb.time_cost import flops
    encoded = encode_all(rows, tokenizer, recipe.max_length, recipe.train_on, False)[0]
    lengths, counted = [len(e["input_ids"]) for e in encoded], sum(l != -100 for e in encoded for l in e["labels"])
    setup = SimpleNamespace(method=recipe.method, rank=recipe.lora_r, target_modules=(), adapted_layers=recipe.lora_layers, checkpointing="none")
    return flops(shapes, setup, lengths, answers=counted).model / sum(lengths)


def run(arm):
    "Train one arm and say what it took: a dict for the result file"
    if arm["who"] == "unsloth": import unsloth  # it must come before transformers
    import torch
    from finetune_nb import job
    from finetune_nb.mask import encode_all
    from finetune_nb.models import load_tokenizer
    from finetune_nb.recipe import make
    from finetune_nb.tree import of
    recipe = make(arm["preset"], **arm["settings"])
    m, choices = job.check(recipe, say=lambda line: None)
    torch.set_num_threads(choices["threads"])
    if arm["words"]: train_rows = held_rows = rows_of_words()
    else: train_rows, held_rows = (d.rows for d in job.rows(recipe))
    model, tokenizer = unsloths_model(recipe) if arm["who"] == "unsloth" else (job.model(recipe, choices), load_tokenizer(recipe.model))
    if m.device == "cuda": model.to("cuda")
    held = encode_all(held_rows[: arm["held"]], tokenizer, recipe.max_length, recipe.train_on, False)[0]
    a_token = work(recipe, of(model), train_rows, tokenizer)
    speed = ceiling(getattr(torch, choices["dtype"]), m.device)
    torch.manual_seed(recipe.seed)
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter(), time.process_time()
        trainer = trainer_of(arm["who"], recipe, choices, model, tokenizer, train_rows, out)
        prepared = [b - a for a, b in zip(start, (time.perf_counter(), time.process_time()))]
        watch = Watch(trainer, held, arm["every"], arm["target"])
        torch.manual_seed(recipe.seed)
        trainer.train()
    seen = [l["num_tokens"] for l in trainer.state.log_history if "num_tokens" in l]
    wall, processor = (sum(s[i] for s in watch.steps[1:]) for i in (0, 1))  # the first step makes room and is left out
    tokens = seen[-1] - seen[0]
    peak = torch.cuda.max_memory_reserved() if m.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(tokens=tokens, seconds=round(wall, 3), processor_seconds=round(processor, 3), tokens_per_second=round(tokens / wall, 2), tokens_per_processor_second=round(tokens / processor, 2), steps=len(watch.steps),
                prepared=[round(p, 2) for p in prepared], peak_memory=peak, mfu=round(tokens / wall * a_token / speed, 4), ceiling_gflops=round(speed / 1e9, 1), losses=watch.losses, held_loss=held_loss(trainer.model, held), curve=watch.curve,
                grad_norm=[l["grad_norm"] for l in trainer.state.log_history if "grad_norm" in l], dtype=choices["dtype"])


# ---- the process that starts them

def apart(arm):
    "The result of `run` in a process of its own"
    done = subprocess.run([sys.executable, __file__, "--arm", json.dumps(arm)], stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"})
    if done.returncode: return dict(failed=f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def same(arms, rounds, settings, words):
    "Part 1: {arm: figures}, with the ratio to `stock` and how far losses are apart"
    found = {a: [] for a in arms}
    for r in range(rounds):
        for a in arms if r % 2 == 0 else reversed(arms):
            who, changes, _ = ARMS[a]
            found[a].append(apart(dict(who=who, preset="laptop", settings=settings | changes, held=64, every=0, target=None, words=words)))
            print(a, {k: v for k, v in found[a][-1].items() if k in ("tokens_per_second", "tokens_per_processor_second", "peak_memory", "mfu", "held_loss", "failed")}, flush=True)
    best = max((r["ceiling_gflops"] for runs in found.values() for r in runs if "failed" not in r), default=0)
    for r in (r for runs in found.values() for r in runs if "failed" not in r): r["mfu"] = round(r["mfu"] * r["ceiling_gflops"] / best, 4)  # one ceiling for all: the best that any process saw
    return {a: summary(runs, found["stock"], ARMS[a][-1]) for a, runs in found.items()}


def summary(runs, stock, what):
    "Medians of an arm's rounds beside those of stock TRL"
    good, stock = ([r for r in some if "failed" not in r] for some in (runs, stock))
    if not good: return dict(what=what) | runs[0]
    middle = lambda key, some: statistics.median(r[key] for r in some)
    off = max(abs(a - b) / b for a, b in zip(good[0]["losses"], stock[0]["losses"]))
    return dict(what=what, tokens_per_second=middle("tokens_per_second", good), tokens_per_processor_second=middle("tokens_per_processor_second", good), times_stock=round(middle("tokens_per_second", good) / middle("tokens_per_second", stock), 3),
                times_stock_processor=round(middle("tokens_per_processor_second", good) / middle("tokens_per_processor_second", stock), 3), mfu=middle("mfu", good), peak_memory=max(r["peak_memory"] for r in good),
                losses_apart=float(f"{off:.2g}"), held_loss=good[0]["held_loss"], dtype=good[0]["dtype"], rounds=good)


def loss(every, held, only):
    "Part 2: {arm: figures} with the seconds to the loss that `source` reaches"
    found, target = {}, None
    for name, (who, preset, changes, what) in CURVES.items():
        if only and name not in only: continue
        settings = changes | dict(tracker="none", compare=False, rehearse=False, best_at_end=False, eval_steps=0, save_steps=0, log_steps=1)
        r = apart(dict(who=who, preset=preset, settings=settings, held=held, every=every[name], target=target, words=False))
        if "failed" in r: return {name: r}
        target = min(l for l, *_ in r["curve"]) if target is None else target
        at = next((c for c in r["curve"] if c[0] <= target), None)
        found[name] = dict(what=what, recipe=settings | dict(preset=preset), prepared=r["prepared"], seconds=at and round(at[1] + r["prepared"][0], 2), processor_seconds=at and round(at[2] + r["prepared"][1], 2), step=at and at[3], loss=at and at[0], curve=r["curve"], peak_memory=r["peak_memory"])
        print(name, {k: v for k, v in found[name].items() if k in ("seconds", "processor_seconds", "step", "loss")}, flush=True)
    first = found["source"]
    for r in found.values():
        if r["seconds"]: r |= dict(times_faster=round(first["seconds"] / r["seconds"], 2), times_faster_processor=round(first["processor_seconds"] / r["processor_seconds"], 2))
    return dict(target=target, held_rows=held, arms=found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="same,loss")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default="", help="on CUDA whose dimensions the first part's model has (llama-3.1-8b); without it another model for that part")
    parser.add_argument("--arms", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm: return print("\n" + json.dumps(run(json.loads(args.arm))))
    m, before = machine(), os.getloadavg()
    cuda = m.device == "cuda"
    arms, missing = available(cuda)
    arms = [a for a in arms if not args.arms or a in args.arms.split(",") or a == "stock"]
    result = dict(question="how fast does training go, and how soon does it reach a held-out loss", not_run=missing)
    quiet = SAME | dict(max_steps=args.steps, dtype="auto", tracker="none", compare=False, rehearse=False)
    if "same" in args.part and not cuda: result["same"] = dict(lora=same(arms, args.rounds, quiet | (dict(model=args.model) if args.model else {}), False))
    if "same" in args.part and cuda:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
        from measure import scratch, write_weights
        folder = scratch(32 * 2**30)
        write_weights(args.model or "llama-3.1-8b", folder)
        result["same"] = {method: same(arms, args.rounds, quiet | dict(model=str(folder), method=method, max_length=2048), True) for method in ("lora", "qlora")} | dict(model=args.model or "llama-3.1-8b")
    if "loss" in args.part: result["loss"] = loss({"source": 20, "same settings": 5, "ours": 5}, 64, args.arms.split(",") if args.arms else None)
    result["ratios"] = {f"{method}, ours beside {arm}": round(arms["ours"]["times_stock"] / arms[arm]["times_stock"], 2) for method, arms in result.get("same", {}).items() if isinstance(arms, dict) and "times_stock" in arms.get("ours", {})
                        for arm in arms if arm != "ours" and "times_stock" in arms[arm]}
    result |= taken(before)
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
