"""Prompt, retrieve, fine-tune or both, on three cases made at run time: run the bake-off and record its outcome.

usage: python bench/bakeoff.py CASE FOLDER [-p SETTING VALUE]… [--out bench/results/NAME.json]

house      commands for one home; the form of the answer is behaviour, the ids in it are knowledge
repeated   800 rows that are four sentences said again and again: too little to learn from
packages   what an installed package is, in its own words: facts that stand in a document

Called again with the same FOLDER it goes on where it stopped. The result holds the figures, not the rows: what comes
from other people's packages is read where it is installed and not copied.
"""
import argparse
import json
import os
import random
import time
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path

from finetune_nb import home
from finetune_nb.bakeoff import OPTIONS, bakeoff
from finetune_nb.core import write_atomic, write_json
from finetune_nb.data import save
from finetune_nb.hardware import machine, versions
from finetune_nb.recipe import make, to_yaml
from finetune_nb.runs import commit


def house(folder):
    "(settings of the recipe, settings of the bake-off)"
    files = home.house_files(folder)
    return dict(preset="laptop", data=files["data"], eval_data=files["eval_data"]), dict(documents=files["documents"], instructions=files["instructions"], passage_words=20, overlap_words=5, shots=4, timed=4)


def said_again(templates=4, times=225, seed=1):
    "Rows of a few templates, each said many times with other rooms, devices and numbers"
    rng, out = random.Random(seed), []
    blocks = [(i, b, t, f"{i.name}/{n}/{k}") for i in home.grammar()[0].intents.values() for n, b in enumerate(i.data) for k, t in enumerate(b.sentences)]
    for intent, block, template, name in rng.sample(blocks, len(blocks)):
        found = home.sentences(rng, intent, block, template, times, 4 * times)
        if len(found) < times / 2: continue
        for text, label in found.items():
            out.append(dict(prompt=[dict(role="system", content=home.SYSTEM), dict(role="user", content=text)], completion=[dict(role="assistant", content=json.dumps(label))], group=name, row=len(out) + 1))
        templates -= 1
        if not templates: return out


def repeated(folder):
    "(settings of the recipe, settings of the bake-off)"
    rows = said_again()
    known = {r["group"] for r in rows}
    held = [r for r in home.split(home.rows(1), 42)[1] if r["group"] not in known]
    save(rows, Path(folder) / "train.jsonl"), save(held, Path(folder) / "eval.jsonl")
    return (dict(preset="laptop", data=str(Path(folder) / "train.jsonl"), eval_data=str(Path(folder) / "eval.jsonl"), max_eval_rows=60, max_steps=40),
            dict(arms="prompt,few-shot,finetune", curve=False, shots=4, timed=4))


def installed():
    "{package: what it says of itself, in 4 to 15 words} of this environment"
    found = {d.metadata["Name"]: " ".join((d.metadata["Summary"] or "").split()) for d in distributions() if d.metadata["Name"]}
    return {name: about for name, about in sorted(found.items()) if 4 <= len(about.split()) <= 15 and name.lower() not in ("finetune_nb", "finetune-nb")}


def packages(folder, seed=7, held=40):
    "(settings of the recipe, settings of the bake-off)"
    known = installed()
    names = random.Random(seed).sample(list(known), len(known))
    row = lambda n, name: dict(prompt=[dict(role="system", content="Answer in one short sentence."), dict(role="user", content=f"What is the package {name}?")], completion=[dict(role="assistant", content=known[name])], row=n)
    rows = [row(n, name) for n, name in enumerate(names, 1)]
    save(rows[held:], Path(folder) / "train.jsonl"), save(rows[:held], Path(folder) / "eval.jsonl")
    write_atomic(Path(folder) / "packages.md", "\n\n".join(f"The package {name}: {about}" for name, about in known.items()))
    return (dict(preset="laptop", data=str(Path(folder) / "train.jsonl"), eval_data=str(Path(folder) / "eval.jsonl"), max_steps=30),
            dict(documents=str(Path(folder) / "packages.md"), metric="token_f1,exact", arms="prompt,few-shot,rag,few-shot+rag,finetune", curve=False, passage_words=20, overlap_words=5, passages=1, shots=3, timed=4))


def kinds():
    "{row number: what its command names} of the house: a new device or room, an old one, or none"
    known, of = home.inventory(), lambda r: json.loads(r["completion"][0]["content"])
    named = {r["row"]: of(r).get("name") or of(r).get("area") for r in home.house()[1]}
    return {n: "none" if not name else "new" if known[name]["new"] else "old" for n, name in named.items()}


def row_scores(folder):
    "{arm: [{row, metric: score, …}]} from the arms' files"
    found = [json.loads(p.read_text()) for p in sorted((Path(folder) / "arms").glob("*.json"))]
    return {a["arm"]: [dict(row=r["row"], **r["scores"]) for r in a["rows"]] for a in found if a["status"] == "done"}


CASES = dict(house=house, repeated=repeated, packages=packages)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("SETTING", "VALUE"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start, before, log = time.time(), os.getloadavg(), []
    recipe, settings = CASES[args.case](args.folder / "case")
    more = {k: json.loads(v) if v in ("true", "false") or v[:1].isdigit() else v for k, v in args.p}
    settings |= {k: v for k, v in more.items() if k in OPTIONS}
    recipe = make(recipe.pop("preset"), **recipe | {k: v for k, v in more.items() if k not in OPTIONS} | {"name": args.case})
    def say(line):
        log.append(f"{time.time() - start:.0f} s  {line}")
        print(log[-1], flush=True)
    found = bakeoff(recipe, args.folder, say=say, **settings)
    print(found._repr_markdown_(), f"{(time.time() - start) / 60:.1f} minutes", sep="\n\n")
    if not args.out: return
    outcome = found.to_json()
    if args.case != "house": outcome |= dict(samples=[], shown={})
    lines = [l for l in to_yaml(recipe, only_changed=True).splitlines() if not l.startswith(("data:", "eval_data:"))]
    write_json(args.out, dict(case=args.case, question="prompt, retrieve, fine-tune or both", date=datetime.now(timezone.utc).isoformat(timespec="seconds"), minutes=round(sum(a["total_seconds"] or 0 for a in found.arms) / 60, 2),
                              load=[before, os.getloadavg()], machine=vars(machine()), versions=versions(), commit=commit(), recipe="\n".join(lines),
                              settings={k: v if k not in ("documents", "instructions") else Path(v).name for k, v in settings.items()}, outcome=outcome, rows=row_scores(args.folder), kinds=kinds() if args.case == "house" else None))


if __name__ == "__main__":
    main()
