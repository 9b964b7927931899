"""Measure every quick format of a finished run and record it: figures, machine, versions, wall and CPU seconds.

usage: python bench/quantize.py RUN [--formats quick] [--rows 40] [--threads 1] [--folder DIR] --out bench/results/NAME.json

Formats that were measured before in the same folder are not measured again; their seconds are those of the first time.
Seconds that no format has of its own (merge, reference, conversion, importance matrix) are counted in the format that needed them first, or under "other".
"""
import argparse
import os
import time
from datetime import datetime, timezone
from pathlib import Path

from finetune_nb.compare_formats import compare_formats
from finetune_nb.core import read_json, write_json
from finetune_nb.folder import commit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--formats", default="quick")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default="")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    before, start, cpu = os.getloadavg(), time.monotonic(), sum(os.times()[:4])
    found = compare_formats(args.run, args.formats, args.folder, args.rows, threads=args.threads, keep=args.keep, say=lambda line: print(f"{time.monotonic() - start:.0f} s  {line}", flush=True))
    print(found._repr_markdown_())
    reference = read_json(Path(args.folder or args.run / "quantize") / "formats" / "fp32.json", dict)["found"]
    spent = {r["format"]: dict(wall=r["whole_seconds"], cpu=r["whole_cpu_seconds"]) for r in found.done} | {"fp32": dict(wall=round(reference["seconds"], 1), cpu=round(reference["cpu_seconds"], 1))}
    total = {k: round(sum(s[k] for s in spent.values()), 1) for k in ("wall", "cpu")}
    value = dict(question="Which format of the demo run's model loses least, and how long does it take to find out?", date=datetime.now(timezone.utc).isoformat(timespec="seconds"), commit=commit(), note=args.note,
                 load=dict(before=before, after=os.getloadavg()), seconds=dict(formats=spent, total=total, this_call=dict(wall=round(time.monotonic() - start, 1), cpu=round(sum(os.times()[:4]) - cpu, 1))), formats=found.to_json())
    write_json(args.out, value)


if __name__ == "__main__":
    main()
