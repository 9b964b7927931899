"""How long until something is there: the package imported, help shown, a plan made, and the first step of the demo taken.

usage: python bench/startup.py [--times 5] [--step] [--out bench/results/NAME.json]

Each command runs in a process of its own, with warm caches; told are median, lowest and highest seconds. Beside them stands
what others take before they can answer at all: importing torch, and importing TRL's trainer. --step also runs the demo
until its first training step and says where the time went.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune_nb.core import write_json
from record import taken

CODE = "import sys; from finetune_nb.cli import main; sys.exit(main())"  # what the script finetune-nb does
COMMANDS = {
    "python": ["-c", "pass"], "import finetune_nb": ["-c", "import finetune_nb"], "finetune-nb --help": ["-c", CODE, "--help"], "finetune-nb plan": ["-c", CODE, "plan"],
    "finetune-nb plan of an 8B": ["-c", CODE, "plan", "--model", "llama-3.1-8b", "--card", "4090", "-p", "method", "qlora"], "finetune-nb doctor": ["-c", CODE, "doctor"],
    "import torch": ["-c", "import torch"], "import trl's trainer": ["-c", "from trl import SFTTrainer"],
}


def seconds(arguments):
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return round(time.perf_counter() - start, 3)


def first_step():
    "Seconds of the demo until its first training step, and of the stages on the way; it is then stopped"
    with tempfile.TemporaryDirectory() as out:
        start, told = time.perf_counter(), {}
        process = subprocess.Popen([sys.executable, "-c", CODE, "run", "--demo", "-p", "compare", "false", "-p", "log_steps", "1", "-p", "max_steps", "2", "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if line[:2] in ("1/", "2/", "4/"): told[line.strip()] = round(time.perf_counter() - start, 2)
            if not told.get("first step") and any(Path(out).glob("*/metrics.jsonl")): told["first step"] = round(time.perf_counter() - start, 2)
        process.wait()
        facts = json.loads(next(Path(out).glob("*/run.json")).read_text())
        return dict(told=told, stages=facts.get("seconds"), whole=round(time.perf_counter() - start, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    before, found = os.getloadavg(), {}
    for name, arguments in COMMANDS.items():
        seconds(arguments)
        times = [seconds(arguments) for _ in range(args.times)]
        found[name] = [statistics.median(times), min(times), max(times)]
        print(f"{name}: {found[name][0]:.2f} s ({found[name][1]:.2f} to {found[name][2]:.2f})", flush=True)
    trl = found["import trl's trainer"][0]
    result = dict(question="how long until something is there", unit="seconds: median, lowest, highest", times=args.times, commands=found, ratios={f"{name}, beside importing trl": round(trl / found[name][0], 2) for name in list(found)[1:6]})
    if args.step: result["demo"] = first_step()
    result |= taken(before)
    print(result.get("demo", ""))
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
