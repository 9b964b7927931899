"Training on the tiny model that is stopped and gone on with: shared by the tests of checkpoints and bench/torture.py"
import json
import random
from itertools import product
from pathlib import Path

import numpy
import torch
from transformers import TrainerCallback

from finetune_nb import job, train
from finetune_nb.models import load_tokenizer
from finetune_nb.recipe import make

BASE = dict(max_rows=9, eval_fraction=0.2, dtype="float32", threads=1, log_steps=3, eval_steps=2, save_steps=4, keep_checkpoints=2, best_at_end=False, lora_r=4, lora_alpha=8, gradient_checkpointing=False, compare=False,
            warmup=0.25, tracker="none", max_length=128, learning_rate=1e-2, packing=False, rehearse=False)
METHODS = dict(lora=dict(lora_layers=2), qlora=dict(method="qlora", quantization="nf4"), full=dict(method="full", learning_rate=1e-3))
PASSES = {1: dict(batch_size=2, accumulation=1, epochs=2.0), 4: dict(batch_size=1, accumulation=4, epochs=4.0)}
ROWS = dict(plain={}, packed=dict(packing=True, epochs=6.0), grouped=dict(group_by_length=True))
AXES = dict(method=list(METHODS), dropout=[0.0, 0.1], accumulation=list(PASSES), rows=list(ROWS), workers=[0, 2], fast=[True, False], stop=["first", "middle", "edge"])
TIMES = ("seconds", "runtime", "per_second", "memory_bytes")  # what no two trainings have in common


def case(method, dropout, accumulation, rows, workers, fast, **_):
    "(recipe values, dropout of the model's own attention) of one place in the matrix"
    return BASE | METHODS[method] | PASSES[accumulation] | ROWS[rows] | dict(lora_dropout=dropout, workers=workers, fast_path=fast), dropout if method == "full" else 0.0


def every(): return [dict(zip(AXES, values)) for values in product(*AXES.values())]


def pairs(seed=0):
    "Cases in which every two values of two axes meet at least once, chosen greedily"
    wanted = {(a, x, b, y) for a, b in product(AXES, AXES) if a < b for x in AXES[a] for y in AXES[b]}
    pool, chosen = every(), []
    random.Random(seed).shuffle(pool)
    covers = lambda c: {(a, c[a], b, c[b]) for a, b in product(AXES, AXES) if a < b}
    while wanted:
        chosen.append(max(pool, key=lambda c: len(covers(c) & wanted)))
        wanted -= covers(chosen[-1])
    return chosen


class StopAfter(TrainerCallback):
    def __init__(self, note, step): self.note, self.step = note, step
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step: self.note.touch()


def built(values, model, data, out, say=lambda line: None, dropout=0.0, seed=0):
    "(trainer, recipe), made as a fresh process would make them"
    random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
    recipe = make("stock", **dict(model=model, data=data) | values)
    _, choices = job.check(recipe, say=lambda line: None)
    rows, held = job.rows(recipe)
    base = job.model(recipe, choices)
    for m in base.modules():
        if dropout and hasattr(m, "attention_dropout"): m.attention_dropout = dropout
    trainer = train.build(recipe, choices, base, load_tokenizer(recipe.model), rows.rows, held.rows, out, say)
    return trainer, recipe


def run(values, model, data, out, resume=False, stop=0, override=(), change=None, **more):
    "Train, or train until step `stop`; returns the trainer"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    trainer, recipe = built(values, model, data, out, **more)
    if stop: trainer.add_callback(StopAfter(out / "stop", stop))
    if change: change(trainer)
    try: train.fit(trainer, recipe, out, more.get("say", lambda line: None), resume, override)
    except KeyboardInterrupt:
        if not stop: raise
    (out / "stop").unlink(missing_ok=True)
    return trainer


def curve(out): return [{k: v for k, v in json.loads(l).items() if not k.endswith(TIMES)} for l in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out): return {p.name: p.read_bytes() for p in sorted((Path(out) / "adapter").glob("*.safetensors"))}


def stop_at(trainer, where):
    "The step to stop after: the first, one in the middle of a later epoch, the last of an epoch"
    per_epoch = max(1, -(-len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps))
    return dict(first=1, edge=per_epoch * (1 if trainer.state.max_steps <= 2 * per_epoch else 2), middle=min(per_epoch + 1, trainer.state.max_steps - 1))[where]


def same(a, b):
    "What differs between two finished runs, in words"
    x, y = weights(a), weights(b)
    found = [f"{n} differs" for n in x.keys() | y.keys() if x.get(n) != y.get(n)] + ([] if x else ["no weights"])
    if curve(a) != curve(b): found.append(f"curves differ: {[(p, q) for p, q in zip(curve(a), curve(b)) if p != q][:1]} {len(curve(a))} {len(curve(b))}")
    return found


def interrupted_equals_straight(c, model, data, place):
    "What differs between a run that was stopped and gone on with and one that was not"
    values, dropout = case(**c)
    whole = run(values, model, data, place / "straight", dropout=dropout)
    step = stop_at(whole, c["stop"])
    run(values, model, data, place / "broken", stop=step, dropout=dropout)
    if (place / "broken" / "adapter").exists(): return [f"was not stopped at {step} of {whole.state.max_steps}"]
    run(values, model, data, place / "broken", resume=True, dropout=dropout)
    return same(place / "straight", place / "broken")
