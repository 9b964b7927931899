"""What preparing rows for the trainer costs, from a thousand rows to a million: this package beside TRL's own preparation.

usage: python bench/prepare.py [--most 1000000] [--trl-most 10000] [--out bench/results/NAME.json]

A file of chat rows of some sixty tokens is read, checked, encoded and made into the trainer's table; then once more, with the
tokens kept. Beside that, a part is held out and the rest searched for copies of it, which TRL does not do. Each size runs in a
process of its own with an empty cache; told are the seconds of each step and the most memory in it that the system could not
take back (mapped files it can). TRL's trainer prepares the same rows, from a `datasets` table, with a tiny model.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from finetune_nb.core import write_json
from record import taken

SIZES = (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)


def write(file, n):
    "n chat rows about like the embedded task's, no two alike"
    rooms, things = "kitchen, living room, bedroom, office, garage, hallway, attic, pantry".split(", "), "ceiling light, desk lamp, coffee maker, fan, blind, thermostat, speaker".split(", ")
    with open(file, "w") as f:
        for i in range(n):
            room, thing = rooms[i % len(rooms)], things[i % len(things)]
            messages = [{"role": "system", "content": "Turn the voice command into JSON."}, {"role": "user", "content": f"please set the {thing} number {i} in the {room} to {i % 101} percent"}, {"role": "assistant", "content": json.dumps({"intent": "HassSet", "area": room, "name": f"{thing} {i}", "value": i % 101})}]
            f.write(json.dumps({"messages": messages}) + "\n")


class Peak:
    "The most memory that this process held for itself since the last look, in bytes; without files that are mapped"
    def __init__(self):
        self.process, self.most = psutil.Process(), 0
        threading.Thread(target=self.watch, daemon=True).start()

    def now(self):
        found = self.process.memory_info()
        return found.rss - getattr(found, "shared", 0)

    def watch(self):
        while True: self.most = max(self.most, self.now()); time.sleep(0.01)

    def read(self):
        found, self.most = max(self.most, self.now()), 0
        return found


def ours(file):
    "Seconds of each step and memory"
    from finetune_nb.data import read, split
    from finetune_nb.duplicates import leaked_rows
    from finetune_nb.encoded import table
    from finetune_nb.mask import encode_all
    from finetune_nb.models import load_tokenizer
    tokenizer, seconds, marks, peak = load_tokenizer("smollm2-135m"), {}, {}, Peak()
    import datasets, pyarrow, scipy.sparse.csgraph  # noqa: F401  their import is not preparation
    marks["imports"] = peak.read()
    def timed(name, function):
        start = time.perf_counter(), time.process_time()
        found = function()
        seconds[name], marks[name] = [round(b - a, 3) for a, b in zip(start, (time.perf_counter(), time.process_time()))], peak.read()
        return found
    data = timed("read", lambda: read(file))
    encoded, problems = timed("encode", lambda: encode_all(data, tokenizer, 512))
    assert not problems and len(encoded) == len(data)
    made = timed("table", lambda: table(encoded))
    assert made[len(made) - 1]["input_ids"] == encoded[len(encoded) - 1]["input_ids"]
    again = timed("encode, kept", lambda: encode_all(data, tokenizer, 512))[0]
    assert again[len(again) - 1] == encoded[len(encoded) - 1]
    tokens = int(encoded.ends[-1])
    del made, again, encoded
    train, held = timed("hold out", lambda: split(data, min(0.1, 1000 / len(data)), 0))
    timed("copies", lambda: leaked_rows(train, held))
    whole, again = (sum(seconds[s][0] for s in names) for names in (("read", "encode", "table"), ("read", "encode, kept", "table")))
    return dict(rows=len(data), tokens=tokens, seconds=seconds, seconds_whole=round(whole, 3), seconds_again=round(again, 3), microseconds_a_row=round(1e6 * whole / len(data), 1), microseconds_a_row_again=round(1e6 * again / len(data), 1),
                microseconds_a_row_searched=round(1e6 * (seconds["hold out"][0] + seconds["copies"][0]) / len(data), 1), memory=marks, **{f"bytes_a_row{n}": round((max(marks[s] for s in steps) - marks["imports"]) / len(data)) for n, steps in (("", ("read", "encode", "table", "encode, kept")), ("_searched", ("hold out", "copies")))})


def trl(file):
    "Seconds of TRL's own preparation"
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from finetune_nb.models import load_tokenizer
    tokenizer, peak, start = load_tokenizer("smollm2-135m"), Peak(), time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(Path(file).parent / "datasets"))
    rows = rows.map(lambda r: {"prompt": r["messages"][:-1], "completion": r["messages"][-1:]}, remove_columns="messages")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1))
    with tempfile.TemporaryDirectory() as out:
        made = SFTTrainer(model=model, args=SFTConfig(output_dir=out, report_to="none", use_cpu=True, bf16=False, max_length=512), train_dataset=rows, processing_class=tokenizer).train_dataset
    took = time.perf_counter() - start
    return dict(rows=len(made), seconds=round(took, 3), microseconds_a_row=round(1e6 * took / len(made), 1), memory=peak.read())


def apart(what, n):
    "One measurement in a process of its own, with an empty cache"
    with tempfile.TemporaryDirectory() as d:
        file = Path(d, "rows.jsonl")
        write(file, n)
        from finetune_nb.models import local
        local("smollm2-135m")  # unpacked in the person's cache once, and linked into the empty one
        cache = Path(d, "cache")
        cache.mkdir()
        from finetune_nb.core import cache_dir
        if (cache_dir() / "gguf").exists(): (cache / "gguf").symlink_to(cache_dir() / "gguf")
        done = subprocess.run([sys.executable, __file__, "--one", what, str(file)], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"FINETUNE_NB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "true"})
    found = json.loads(done.stdout.splitlines()[-1])
    print(what, {k: found[k] for k in found if k != "seconds" or what == "trl"}, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--trl-most", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print("\n" + json.dumps(dict(ours=ours, trl=trl)[args.one[0]](args.one[1])))
    before, sizes = os.getloadavg(), [n for n in SIZES if n <= args.most]
    found, theirs = [apart("ours", n) for n in sizes], [apart("trl", n) for n in sizes if n <= args.trl_most]
    same = max(t["rows"] for t in theirs)
    a, b = next(t for t in theirs if t["rows"] == same), next(o for o in found if o["rows"] == same)
    ratios = {f"preparing {same} rows beside TRL": round(a["seconds"] / b["seconds_whole"], 2), f"preparing {same} rows again beside TRL": round(a["seconds"] / b["seconds_again"], 2)}
    result = dict(question="what does preparing rows for the trainer cost", sizes=found, trl=theirs, ratios=ratios) | taken(before)
    print(ratios)
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
