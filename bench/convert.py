"""How well `finetune-nb convert` reads real files: the settings it gets against those a person read out of them.

usage: python bench/convert.py FOLDER [--out bench/results/NAME.json]

FOLDER holds the files of tests/cases/convert.yaml as OWNER/NAME/PATH, each at the commit that stands there; their text is
not in this repository. A file that is missing, or whose bytes are others, is counted as not read and not as agreed.
"""
import argparse
import hashlib
import math
import platform
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import yaml

from finetune_nb import __version__
from finetune_nb.convert import convert
from finetune_nb.core import UserError, write_json

CASES = Path(__file__).resolve().parents[1] / "tests" / "cases" / "convert.yaml"


def same(a, b): return a == b or all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b)) and math.isclose(a, b, rel_tol=1e-9)


def one(case, folder):
    "Agreement of one file: {agreed, settings, differences, …}"
    row = {k: case[k] for k in ("tool", "repository", "path", "commit")} | dict(blind=case.get("blind", False))
    file = Path(folder) / case["repository"] / case["path"]
    if not file.is_file(): return row | dict(status="missing")
    if hashlib.sha256(file.read_bytes()).hexdigest() != case["sha256"]: return row | dict(status="other bytes")
    start = time.perf_counter()
    try: receipt = convert(file)
    except UserError as e: told, receipt = str(e), None
    row["seconds"] = round(time.perf_counter() - start, 3)
    if "refused" in case:
        said = told if receipt is None else " ".join(str(p) for p in receipt.problems if p.level != "warning")
        return row | dict(status="refused as it should be" if case["refused"] in said else "not refused", settings=1, agreed=int(case["refused"] in said), differences=[])
    if receipt is None: return row | dict(status=f"refused: {told}", settings=len(case["expected"]), agreed=0, differences=sorted(case["expected"]))
    wrong = [f"{k}: {receipt.values.get(k)!r}, not {v!r}" for k, v in case["expected"].items() if not same(receipt.values.get(k), v)]
    names = Counter(line.setting + line.place for line in receipt.lines)
    return row | dict(status="read", settings=len(case["expected"]), agreed=len(case["expected"]) - len(wrong), differences=wrong, found=len(receipt.lines), twice=[n for n, c in names.items() if c > 1], **receipt.count(),
                      errors=[str(p) for p in receipt.problems if p.level != "warning"], unknown_settings=[line.setting for line in receipt.lines if line.verdict == "unknown"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = yaml.safe_load(CASES.read_text(encoding="utf-8"))
    rows = [one(case, args.folder) for case in cases]
    read = [r for r in rows if "settings" in r]
    for r in rows:
        if r.get("differences") or r.get("errors") or r.get("twice") or "settings" not in r: print(f"{r['repository']}/{r['path']}: {r['status']}", *(r.get("differences") or []), *(f"ERROR {e}" for e in r.get("errors") or []), *(f"TWICE {t}" for t in r.get("twice") or []), sep="\n   ", file=sys.stderr)
    tools = sorted({r["tool"] for r in rows})
    total = lambda some: dict(files=len(some), files_agreed=sum(r["agreed"] == r["settings"] for r in some), settings=sum(r["settings"] for r in some), settings_agreed=sum(r["agreed"] for r in some), settings_found=sum(r.get("found", 0) for r in some), unknown=sum(r.get("unknown", 0) for r in some))
    result = dict(question="do the settings that convert reads out of real files agree with those a person read out of them", date=datetime.now(timezone.utc).strftime("%Y-%m-%d"), all=total(read), **{"cases chosen after the converter was written": total([r for r in read if r["blind"]])}, **{"not read": len(rows) - len(read)}, repositories=len({r["repository"] for r in read}),
                  by_tool={t: total([r for r in read if r["tool"] == t]) for t in tools}, slowest_seconds=max([r["seconds"] for r in read], default=0), versions=dict(finetune_nb=__version__, python=platform.python_version(), PyYAML=version("PyYAML")), files=rows)
    print(result["all"], "chosen after:", result["cases chosen after the converter was written"], result["by_tool"], f"slowest {result['slowest_seconds']} s")
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
