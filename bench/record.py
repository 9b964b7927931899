"""Record a finished run as a result: its recipe, scores, seconds, machine and versions.

usage: python bench/record.py RUN [--rerun RUN] --out bench/results/NAME.json

With --rerun, the result also says whether the second run gave the same numbers.
"""
import argparse
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from finetune_nb.core import read_json, write_json
from finetune_nb.folder import commit
from finetune_nb.hardware import machine, versions
from finetune_nb.runs import compare


def taken(before):
    "Where, when and with what a result was measured; `before` is the load when it began"
    return dict(machine=vars(machine()), python=platform.python_version(), versions=versions(), load=dict(before=before, after=os.getloadavg()), commit=commit(), date=datetime.now(timezone.utc).isoformat(timespec="seconds"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rerun", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    facts = read_json(args.run / "run.json")
    keep = ("started", "ended", "commit", "machine", "choices", "versions", "python", "data", "model", "seconds")
    result = {k: facts[k] for k in keep} | dict(recipe=(args.run / "recipe.yaml").read_text(), metrics=read_json(args.run / "metrics.json"), verdict=read_json(args.run / "comparison.json")["verdict"])
    if args.rerun: result["rerun"] = dict(differences=compare(args.run, args.rerun), seconds=read_json(args.rerun / "run.json")["seconds"])
    write_json(args.out, result)


if __name__ == "__main__":
    main()
