"""How long a run takes against what its rehearsal said: build, rehearse, train, compare.

usage: python bench/eta.py [--preset laptop] [-p SETTING VALUE]… [--tokens] [--out bench/results/NAME.json]

The estimate is for `trainer.train()`: steps, evaluations and checkpoints on the way. With --tokens the speed is fitted
on tokens instead of operations. The load of the machine before and after is recorded, because a machine that does
something else during one of the two makes the comparison worthless. With --processor-time both are counted in
processor seconds of this process, which other programs disturb less.
"""
import argparse
import os
import platform
import subprocess
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

from finetune_nb import frozen, job, train, trial
from finetune_nb.core import write_json
from finetune_nb.hardware import versions
from finetune_nb.models import load_tokenizer
from finetune_nb.recipe import make, to_yaml
from finetune_nb.rehearse import rehearse
from finetune_nb.tree import of


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("SETTING", "VALUE"))
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    trial.time = frozen.time = SimpleNamespace(perf_counter=clock)
    recipe = make(args.preset, **dict(args.p))
    machine, choices = job.check(recipe)
    rows, held = job.rows(recipe)
    model = job.model(recipe, choices)
    shapes, loads = of(model, recipe.model), [os.getloadavg()]
    with tempfile.TemporaryDirectory() as out:
        trainer = train.build(recipe, choices, model, load_tokenizer(recipe.model), rows.rows, held.rows, out)
        r = rehearse(trainer, recipe, None if args.tokens else shapes, None if args.tokens else machine, record=False)
        if r is None: raise SystemExit("nothing to compare")
        loads.append(os.getloadavg())
        inner, seconds = trainer.train, []
        def timed(**how):
            start = clock()
            result = inner(**how)
            seconds.append(clock() - start)
            return result
        trainer.train = timed
        train.fit(trainer, recipe, out)
        took = seconds[0]
        loads.append(os.getloadavg())
    result = dict(question="seconds that a run takes against what five rehearsed steps said", predicted=round(r.estimate.seconds, 1), low=round(r.estimate.low, 1), high=round(r.estimate.high, 1), took=round(took, 1),
                  error=round(r.estimate.seconds / took - 1, 4), fitted_on="tokens" if args.tokens else "operations", clock="processor" if args.processor_time else "wall", rehearsal=r.to_json(), recipe=to_yaml(recipe, only_changed=True), loads=loads, machine=vars(machine),
                  python=platform.python_version(), versions=versions(), commit=subprocess.run(["git", "describe", "--always", "--dirty=+changes", "--abbrev=12", "--match="], capture_output=True, text=True).stdout.strip(),
                  date=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    print(f"predicted {result['predicted']} s, took {result['took']} s: {result['error']:+.1%}")
    if args.out: write_json(args.out, result)


if __name__ == "__main__":
    main()
