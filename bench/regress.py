"""What got slower: the quick form of each benchmark now, against the last result that was recorded for its question.

usage: python bench/regress.py [--only train,evaluate,startup,prepare] [--within 0.25]     (or: make bench)

Compared are ratios, this package beside what else a person would run, both taken in one go on one machine; so a result that
was recorded on another machine still says something, and how much is for you to judge where the machines are very
unlike. Exits with 1 if a ratio fell by more than --within.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune_nb.core import read_json, text_table

HERE = Path(__file__).resolve().parent
QUICK = {"startup": ["--times", "3"], "prepare": ["--most", "10000"], "evaluate": ["--rows", "24", "--rounds", "1"], "train": ["--part", "same", "--rounds", "1", "--steps", "6"]}


def recorded(question):
    "(file, result) of the newest recorded result for a question, or None"
    found = [(f, r) for f in (HERE / "results").glob("*.json") if isinstance(r := json.loads(f.read_text(encoding="utf-8")), dict) and r.get("question") == question and "ratios" in r]
    return max(found, key=lambda fr: fr[1]["date"], default=None)


def compared(name, now, before, within):
    "Rows of the table: each ratio now and as recorded"
    file, old = before or (None, dict(ratios={}, machine={}))
    for what, value in now["ratios"].items():
        was = old["ratios"].get(what)
        change = value / was - 1 if was else None
        yield dict(bench=name, what=what, recorded="–" if was is None else f"{was:.2f}", now=f"{value:.2f}", change="not recorded before" if change is None else f"{change:+.0%}", verdict="SLOWER" if change is not None and change < -within else "")
    if before and old["machine"].get("name") != now["machine"]["name"]: print(f"{name}: recorded on {old['machine'].get('name')}, this is {now['machine']['name']} ({file.name})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(QUICK))
    parser.add_argument("--within", type=float, default=0.25)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as d:
        for name in args.only.split(","):
            out = Path(d, f"{name}.json")
            print(f"== bench/{name}.py {' '.join(QUICK[name])}", flush=True)
            subprocess.run([sys.executable, HERE / f"{name}.py", *QUICK[name], "--out", out], check=True)
            now = read_json(out)
            rows += compared(name, now, recorded(now["question"]), args.within)
    print("\n" + text_table(rows))
    slower = [r for r in rows if r["verdict"]]
    print(f"\n{len(slower)} of {len(rows)} got slower" if slower else f"\nnone of {len(rows)} got slower by more than {args.within:.0%}")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
