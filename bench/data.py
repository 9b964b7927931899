"""How fast the data check is from a thousand rows to a million, how much memory it takes, and what else a person might use.

usage: python bench/data.py [--most 1000000] [--others] [--out bench/results/NAME.json]

The rows are made here: commands and questions of about twenty words from a vocabulary in which words are as unevenly
frequent as in language, one row in ten an exact copy and one in ten a near copy (one word of twenty replaced) of an
earlier one. So the right number of clusters is known, and is recorded beside the one found. Each size runs in a process
of its own, whose peak memory is recorded with and without the rows. With --others the same rows go through pandas
(exact duplicates) and through the usual loop of datasketch and, if installed, rensa (near duplicates, signatures and
lookups of one row after the other, no check of the pairs found); packages that are missing are left out.
"""
import argparse
import importlib.metadata
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path

from finetune_nb.core import write_json
from finetune_nb.hardware import machine


def made(n, seed=0):
    "(rows, number of different ones)"
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
    vocabulary = [a + b + c for a in syllables for b in syllables for c in syllables[:6]]
    weights = list(accumulate(1 / (i + 10) for i in range(len(vocabulary))))
    rows, kept, different = [], [], 0
    for i in range(n):
        chance = rng.random()
        if kept and chance < 0.1: asked, answer = rng.choice(kept)
        elif kept and chance < 0.2:
            asked, answer = rng.choice(kept)
            words = asked.split()
            words[rng.randrange(len(words))] = f"new{i}"
            asked = " ".join(words)
        else:
            asked, answer = (" ".join(rng.choices(vocabulary, cum_weights=weights, k=k)) for k in (16, 6))
            different += 1
            if len(kept) < 50_000: kept.append((asked, answer))
        rows.append({"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}], "row": i + 1})
    return rows, different


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(function):
    wall, work = time.perf_counter(), time.process_time()
    result = function()
    return result, round(time.perf_counter() - wall, 2), round(time.process_time() - work, 2)


def ours(n):
    "Seconds and memory of each part of the check"
    from finetune_nb import content, duplicates, labels
    rows, different = made(n)
    base = peak()
    found = {}
    _, *found["content"] = timed(lambda: content.look(rows))
    _, *found["labels"] = timed(lambda: labels.answers(rows))
    counted, *found["duplicates"] = timed(lambda: duplicates.sizes(rows))
    leaks, *found["leaks"] = timed(lambda: duplicates.leaked_rows(rows, rows[:500]))
    exact = found["content"][1] + found["labels"][1]
    return dict(rows=n, seconds={k: dict(wall=w, processor=p) for k, (w, p) in found.items()}, exact_rows_a_second=round(n / exact), near_rows_a_second=round(n / found["duplicates"][1]),
                unique=counted.unique, effective=counted.effective, different=different, leaked=len(leaks), memory_of_rows=base, memory_peak=peak())


def words_of(rows): return [f"{r['prompt'][0]['content']} {r['completion'][0]['content']}".split() for r in rows]


def pandas_unique(rows):
    import pandas
    return pandas.Series([" ".join(w) for w in words_of(rows)]).nunique()


def datasketch_loop(rows):
    from datasketch import MinHash, MinHashLSH
    index, groups = MinHashLSH(threshold=0.8, num_perm=128), 0
    for i, words in enumerate(words_of(rows)):
        m = MinHash(num_perm=128)
        m.update_batch([w.encode() for w in words])
        if not index.query(m): groups += 1
        index.insert(i, m)
    return groups


def rensa_loop(rows):
    from rensa import RMinHash, RMinHashLSH
    index, groups = RMinHashLSH(threshold=0.8, num_perm=128, num_bands=16), 0
    for i, words in enumerate(words_of(rows)):
        m = RMinHash(num_perm=128, seed=1)
        m.update(words)
        if not index.query(m): groups += 1
        index.insert(i, m)
    return groups


OTHERS = {"pandas nunique": ("pandas", pandas_unique, 10**7), "datasketch loop": ("datasketch", datasketch_loop, 20_000), "rensa loop": ("rensa", rensa_loop, 10**7)}


def other(name, n):
    _, function, _ = OTHERS[name]
    rows, different = made(n)
    base = peak()
    groups, wall, work = timed(lambda: function(rows))
    return dict(tool=name, rows=n, wall=wall, processor=work, rows_a_second=round(n / max(work, 1e-9)), found=groups, different=different, memory_of_rows=base, memory_peak=peak())


def apart(*arguments):
    "Run one measurement in a process of its own"
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = json.loads(done.stdout.splitlines()[-1])
    print(result, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(other(args.tool, args.one) if args.tool else ours(args.one)))
        return
    sizes = [n for n in (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000) if n <= args.most]
    loads = [os.getloadavg()]
    result = dict(question="rows a second and memory of the data check from a thousand rows to a million", sizes=[apart("--one", n) for n in sizes])
    if args.others:
        here = {k: v for k, v in OTHERS.items() if importlib.util.find_spec(v[0])}
        result["others"] = [apart("--one", n, "--tool", k) for k, (_, _, most) in here.items() for n in sizes if n <= most and n in (10_000, 20_000, 100_000, 1_000_000) or n == 10_000]
        result["versions"] = {v[0]: importlib.metadata.version(v[0]) for v in here.values()}
    result |= dict(loads=[*loads, os.getloadavg()], machine=vars(machine()), python=platform.python_version(), versions=result.get("versions", {}) | {p: importlib.metadata.version(p) for p in ("numpy", "scipy")},
                   commit=subprocess.run(["git", "describe", "--always", "--dirty=+changes", "--abbrev=12", "--match="], capture_output=True, text=True).stdout.strip(), date=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
