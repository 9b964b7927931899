"""Time to equal held-out loss: one run against another, from their run folders.

usage: python bench/time_to_loss.py STOCK_RUN OUR_RUN [--prepare SECONDS] [--out bench/results/NAME.json]

Both runs must have the same data, model and held-out rows. The target is the best held-out loss that the first run
reached, finished or not. Counted is the processor time of training with everything it needs, because the clock also
counts what else runs on the machine. Where only the clock is known, the bound that favours the first run is taken:
storing the frozen layers (ours) counts as clock time on all threads, the evaluations on the way are taken off the
first run as clock time on all threads, and off ours not at all.
"""
import argparse
import json
from pathlib import Path

from finetune_nb.core import read_json, write_json


def curve(folder, first, prepare=0.0):
    "[(held-out loss, processor seconds, step)] and the facts of the run"
    facts, points = read_json(folder / "run.json"), []
    threads = next(c["value"] for c in facts["choices"] if c["setting"] == "threads")
    extra = facts.get("seconds", {}).get("prepare", prepare) * threads
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        log = json.loads(line)
        if "eval_loss" in log:
            if first: extra -= log["eval_runtime"] * threads
            points.append((log["eval_loss"], round(extra + log["cpu_seconds"], 1), log["step"]))
    return points, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stock", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("--prepare", type=float, default=0.0, metavar="SECONDS", help="clock time before the first step of our run, if it was interrupted and does not say: that of a finished run of the same recipe")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    (stock, a), (ours, b) = curve(args.stock, True), curve(args.ours, False, args.prepare)
    if a["data"] != b["data"] or a["model"] != b["model"]: raise SystemExit("the two runs differ in data or model")
    target, seconds, step = min(stock)
    reached = next((p for p in ours if p[0] <= target), None)
    scores = lambda run: read_json(run / "metrics.json")["after"] if (run / "metrics.json").exists() else {}
    result = dict(
        question="processor seconds until the held-out loss that the first run reaches",
        target_loss=target, first_seconds=seconds, first_step=step, first_status=a["status"], our_seconds=reached and reached[1], our_step=reached and reached[2],
        ratio=reached and round(seconds / reached[1], 2),
        first=dict(recipe=(args.stock / "recipe.yaml").read_text(), scores=scores(args.stock), seconds=a.get("seconds"), curve=stock),
        ours=dict(recipe=(args.ours / "recipe.yaml").read_text(), scores=scores(args.ours), seconds=b.get("seconds"), prepare=b.get("seconds", {}).get("prepare", args.prepare), curve=ours),
        machine=b["machine"], versions=b["versions"], commit=b["commit"], date=b["started"],
    )
    print(json.dumps({k: v for k, v in result.items() if k not in ("first", "ours")}, indent=1))
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
