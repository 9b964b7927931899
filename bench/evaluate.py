"""Evaluation: the loop that one writes in a notebook against this package, on the same held-out rows of a finished run.

usage: python bench/evaluate.py [RUN] [--rows 60] [--rounds 3] [--gguf FILE] [--out bench/results/NAME.json]

The plain loop asks one row after the other, with the adapter beside its weights, and takes the loss of each row with labels
in a pass of its own. This package folds the adapter in, sorts rows by length, answers many at once and stops each at the end
of its turn. Both give the answers, the loss and the scores. Told are seconds of the clock and of the processor, the ratio,
how many answers are the same and how far the loss is apart. Without RUN a short run of the demo is made first, long enough for
its answers to end. With --gguf the same rows are also asked in llama.cpp.
"""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from finetune_nb.core import write_json
from record import taken
from finetune_nb.hardware import machine


def plain(model, tokenizer, rows, encoded, longest):
    "(answers, mean loss per answer token), as a notebook's loop has it"
    import torch
    model.eval()
    answers, nll, tokens = [], 0.0, 0
    with torch.no_grad():
        for row, e in zip(rows, encoded):
            asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
            said = model.generate(**asked, max_new_tokens=longest, do_sample=False)
            answers.append(tokenizer.decode(said[0, asked["input_ids"].shape[1]:], skip_special_tokens=True).strip())
            labels = torch.tensor([e["labels"]], device=model.device)
            count = int((labels[:, 1:] != -100).sum())
            nll += float(model(input_ids=torch.tensor([e["input_ids"]], device=model.device), labels=labels).loss) * count
            tokens += count
    return answers, nll / tokens


def ours(recipe, model, tokenizer, held, encoded):
    "(answers, mean loss per answer token), as a run has it"
    from finetune_nb import job
    scores = job.measure(recipe, model, tokenizer, held, encoded, "bench")
    return [r["answer"] for r in scores.rows], scores.metrics["loss"]["value"]


def short_run():
    "A run of the demo's model and rows, in a temporary folder"
    from finetune_nb import runs
    from finetune_nb.recipe import make
    recipe = make("laptop", max_steps=80, compare=False, rehearse=False, sample_answers=0, eval_steps=0, save_steps=0, name="bench")
    return runs.run(recipe, tempfile.mkdtemp(), say=lambda line: print(f"  {line}", flush=True))


def timed(function, *arguments):
    start = time.perf_counter(), time.process_time()
    found = function(*arguments)
    return found, [round(b - a, 2) for a, b in zip(start, (time.perf_counter(), time.process_time()))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch
    from finetune_nb.data import Data
    from finetune_nb.export import held_rows, open_run, trained_model
    from finetune_nb.models import load_tokenizer
    run, before = open_run(args.run or short_run()), os.getloadavg()
    m = machine()
    torch.set_num_threads(m.cores)
    tokenizer, model = load_tokenizer(run.recipe.model), trained_model(run, "float32" if m.device == "cpu" and not m.bf16 else "bfloat16")
    if m.device == "cuda": model.to("cuda")
    rows, encoded = held_rows(run, tokenizer, args.rows)
    held, longest = Data("held out", rows, "prompt-completion", ""), 8 + 5 * max(sum(l != -100 for l in e["labels"]) for e in encoded) // 4
    arms = dict(plain=lambda: plain(model, tokenizer, rows, encoded, longest), ours=lambda: ours(run.recipe, model, tokenizer, held, encoded))
    seconds, found = {a: [] for a in arms}, {}
    for r in range(args.rounds):
        for a in list(arms)[:: 1 if r % 2 == 0 else -1]:
            found[a], took = timed(arms[a])
            seconds[a].append(took)
            print(a, took, flush=True)
    middle = lambda a, i: statistics.median(s[i] for s in seconds[a])
    result = dict(question="how long does evaluation take beside a plain loop", rows=len(rows), longest=longest, seconds=seconds, ratios={"evaluation beside a plain loop": round(middle("plain", 0) / middle("ours", 0), 2)},
                  ratio_processor=round(middle("plain", 1) / middle("ours", 1), 2), same_answers=sum(a == b for a, b in zip(found["plain"][0], found["ours"][0])), losses={a: f[1] for a, f in found.items()})
    if args.gguf:
        from finetune_nb.llama import open_gguf
        from finetune_nb.said import ask_gguf
        with open_gguf(args.gguf, max(len(e["input_ids"]) for e in encoded) + longest + 64) as g:
            asked, took = timed(ask_gguf, g, rows, encoded, longest, run.recipe.label_field)
        result["llama_cpp"] = dict(file=args.gguf.name, seconds=took, ratio=round(middle("plain", 0) / took[0], 2))
    result |= taken(before)
    print({k: result[k] for k in ("ratios", "ratio_processor", "same_answers", "losses", "llama_cpp") if k in result})
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
