"""Time to equal held-out loss: one run against another, from their run folders.

usage: python bench/time_to_loss.py STOCK_RUN OUR_RUN [--out bench/results/NAME.json]

Both runs must have the same data, model and held-out rows. The target is the best held-out loss that the first run
reached. Counted is the time of training with everything it needs (storing the frozen layers included), without the
time of the evaluations on the way, because one run may be evaluated more often than the other.
"""
import argparse
import json
from pathlib import Path

from finetune_nb.core import read_json, write_json


def curve(folder):
    "[(held-out loss, seconds of training without evaluations)], and the facts of the run"
    facts, points, evaluating = read_json(folder / "run.json"), [], 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        log = json.loads(line)
        if "eval_loss" in log:
            evaluating += log["eval_runtime"]
            points.append((log["eval_loss"], facts["seconds"]["prepare"] + log["seconds"] - evaluating, log["step"]))
    return points, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stock", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    (stock, a), (ours, b) = curve(args.stock), curve(args.ours)
    if a["data"] != b["data"] or a["model"] != b["model"]: raise SystemExit("the two runs differ in data or model")
    target, seconds, _ = min(stock)
    reached = next((p for p in ours if p[0] <= target), None)
    scores = lambda run: {k: v for k, v in read_json(run / "metrics.json")["after"].items()}
    result = dict(
        question="how long until the held-out loss that the stock preset reaches",
        target_loss=target, stock_seconds=round(seconds, 1), our_seconds=round(reached[1], 1) if reached else None,
        ratio=round(seconds / reached[1], 2) if reached else None,
        stock=dict(recipe=(args.stock / "recipe.yaml").read_text(), scores=scores(args.stock), seconds=a["seconds"], curve=stock),
        ours=dict(recipe=(args.ours / "recipe.yaml").read_text(), scores=scores(args.ours), seconds=b["seconds"], curve=ours),
        machine=b["machine"], versions=b["versions"], commit=b["commit"], date=b["started"],
    )
    print(json.dumps({k: v for k, v in result.items() if k not in ("stock", "ours")}, indent=1))
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
