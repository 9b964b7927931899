"""Make llms.txt and the skill file from the parser, the recipe and the notebooks: python tools/agents.py

llms.txt is the list of pages with one line each, as llmstxt.org describes it. The skill (agentskills.io) says to a program
that works for somebody when and how to use the command; it lies in the package, where such programs look. What is written
by hand here is what stands nowhere else: the order of the steps and the mistakes. tests/test_agents.py says when it is due.
"""
import argparse
import json
import re
from pathlib import Path

import yaml

from finetune_nb.cli import parser
from finetune_nb.recipe import FIELDS, PRESETS

ROOT = Path(__file__).resolve().parents[1]
LLMS, SKILL = "llms.txt", "finetune_nb/.agents/skills/finetune-nb/SKILL.md"
ALSO = {"README.md": "what it is, the first run, your own data", SKILL: "how a program uses the command line: steps, verbs, JSON answers, exit codes, mistakes",
        "CONTRIBUTING.md": "how to change it: one notebook, one cell, one test", "SECURITY.md": "what models, data and runs from strangers may not do, and which test holds it",
        "bench/README.md": "what was measured, when, on what, and how to do it again", "CHANGELOG.md": "what changed"}


def head(page):
    "(title, sentence, first paragraph) of a notebook"
    cells = ["".join(c["source"]).strip() for c in json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
    title, sentence = re.match(r"# (.+)\n\n> (.+)", cells[0]).groups()
    return title, sentence, cells[1]


def llms():
    "llms.txt"
    title, sentence, more = head("index.ipynb")
    sections = [s for s in yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"] if isinstance(s, dict)]
    order = ["Tutorials", "Explanations", "Pipelines", "Library"]  # the shortest way first, the longest list last
    lines = [f"# {title}", "", f"> {sentence}", "", re.sub(r"\]\([^)]*\)", "]", more), "", "## Start here", "", *(f"- [{Path(f).name}]({f}): {what}" for f, what in ALSO.items())]
    for section in sorted(sections, key=lambda s: order.index(s["section"]) if s["section"] in order else 0):
        lines += ["", f"## {section['section']}", "", *("- [{1}](nbs/{0}): {2}".format(page, *head(page)) for page in section["contents"])]
    return "\n".join(lines) + "\n"


def words(action):
    "How an argument is written"
    name = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or []) or ("|".join(action.choices) if action.choices else action.dest.upper())
    if not action.option_strings: return f"[{name}]" if action.nargs == "?" else name
    return action.option_strings[0] + ("" if action.nargs == 0 else f" {name}")


def verb(name, p):
    "One verb: what it does, what it answers, what it takes"
    actions = [a for a in p._actions if not isinstance(a, argparse._HelpAction) and "--json" not in a.option_strings]
    sentence, answer = re.match(r"(.*?)(?:: \{(.*)\})?$", p.description).groups()
    told = f"### `finetune-nb {' '.join([name, *(words(a) for a in actions if not a.option_strings)])}`\n\n{sentence}." + (f" Answers `{{{answer}}}`." if answer else "")
    return "\n".join([told, "", *(f"- `{words(a)}`: {a.help}" for a in actions)]).rstrip()


def text(value): return {True: "true", False: "false", "": "empty"}.get(value, f"{value}") if not isinstance(value, float) else f"{value:g}"


TEXT = """\
---
name: finetune-nb
description: {what} Use when somebody wants to know whether to fine-tune, prompt or retrieve; wants training data checked; asks whether a training fits a GPU; wants a model fine-tuned with LoRA or QLoRA and proven better on held-out rows; wants it quantized or exported to GGUF, Ollama or vLLM; or brings a TRL, PEFT, Unsloth, Axolotl or LLaMA-Factory file.
license: Apache-2.0
---

# finetune-nb

Everything is a verb of one command. Give `--json` and read one JSON object from standard output; progress goes to standard error. Made by `tools/agents.py`: change that, not this file.

## Answers and exit codes

| exit code | meaning | what `--json` prints |
|---|---|---|
| 0 | done | the answer |
| 2 | something that was given has to be mended first | `{{"error": [{{"place", "problem", "fix", "value"}}, …]}}`, all problems at once; or the answer with `"stops"` above 0, where rows, an export, a push or a converted file are what is wrong |
| 1 | the program failed | `{{"error": "…"}}` |
| 130 | interrupted; what there was is kept | nothing |

Mend every problem of the list, as its `fix` says, before you try again. Do not read the text on standard error; it is for people.

## The order of the steps

1. `finetune-nb doctor --json`: what is installed, which device, what is missing and how to get it.
2. `finetune-nb decide --blank` prints the questions as a file to fill in. Ask the person, leave open what nobody knows, then `finetune-nb decide --answers FILE --data rows.jsonl --json`. `approach` is `prompt`, `rag`, `finetune`, `finetune+rag` or `undecided`. If it is one of the first two, say so and stop here; if it is the last, measure with `finetune-nb bakeoff`.
3. `finetune-nb data rows.jsonl --eval held-out.jsonl --json`. Exit code 2 means a run would stop. `effective` counts rows that really differ; `leaked` counts held-out rows that were trained on.
4. `finetune-nb convert FILE --out recipe.yaml --json` if there is a training file of another tool. Show the person what was dropped.
5. `finetune-nb plan recipe.yaml --card 4090 --json`: does it fit, and if not, `suggestion`. For several GPUs `finetune-nb parallel`.
6. `finetune-nb run recipe.yaml --preset fast --json`: a rehearsal of everything, in minutes. Then the run itself, without `--preset fast`.
7. Read `verdict`. It compares the same held-out rows before and after; `metrics` hold each score with its interval. Tell the person the verdict in its own words, also when it says that no difference was seen.
8. `finetune-nb quantize RUN --json`, then `finetune-nb export RUN --to gguf:q4_k_m --json`. `parity` says of each export whether it answers as the trained model does.
9. `finetune-nb push FOLDER OWNER/NAME --json` says what would be sent. Add `--yes` only when the person has said so.

`decide`, `data`, `targets`, `plan`, `parallel`, `facts`, `convert`, `runs` and `compare` answer in seconds to minutes and change nothing. `run`, `resume`, `rerun`, `bakeoff` and `quantize` take minutes to hours. `finetune-nb run recipe.yaml --detach --json` comes back at once and names the folder; start the others in the background. `finetune-nb runs --json` says how each run is: `starting`, `running`, `done`, `failed`, `stopped`, `died` or `stale`. In the folder `metrics.jsonl` grows while it trains. `finetune-nb attach RUN --json` waits for the end and gives the answer that `run` gives; `finetune-nb stop RUN` ends a run after its step, with a checkpoint.

## Mistakes to avoid

- **Reporting the training loss as success.** Only the comparison on held-out rows says whether the model got better.
- **Inventing settings.** The names are below; an unknown one stops the run and the nearest name is told.
- **Taking `stock` on a machine without a GPU.** Its values are the recommended ones for a GPU and take hours on a processor. Without `--preset`, `run` starts from `laptop` where settings are given with `-p`, but from the values of `stock` where a recipe file names no preset: write `preset: laptop` into it.
- **Training on few or equal rows because there are many lines.** Look at `effective`, not at `rows`.
- **Merging into a 4-bit base by hand.** It erases much of what was learnt. `export` merges into the 16-bit base and proves it.
- **Setting `trust_remote_code` to get past a message.** It lets the model's files run code. Ask the person.
- **Starting again after a stop or a crash.** `finetune-nb resume RUN` goes on from the last checkpoint that verifies.
- **Writing into a run folder.** What is in it is the record of the run; `rerun` and `compare` read it.
- **Taking a finished cell or a report for the end of a run.** A run is over when `status` says so.

## Verbs

{verbs}

## Settings of a recipe

A recipe is a YAML file of these settings, or `-p NAME VALUE` on the command line, which wins. `preset` names where the rest comes from: {presets}. The defaults below are those of `stock` but for its tracker.

| setting | default | meaning |
|---|---|---|
{settings}
"""


def skill():
    "SKILL.md"
    verbs = next(a for a in parser()._actions if a.dest == "verb").choices
    presets = "; ".join(f"`{n}` ({', '.join(f'{k} {text(v)}' for k, v in values.items())})" for n, values in PRESETS.items())
    rows = "\n".join(f"| `{n}` | {text(f.default)} | {f.description} |" for n, f in FIELDS.items())
    return TEXT.format(what=head("index.ipynb")[1], verbs="\n\n".join(verb(n, p) for n, p in verbs.items()), presets=presets, settings=rows)


def files(): return {LLMS: llms(), SKILL: skill()}


if __name__ == "__main__":
    for name, content in files().items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(content, encoding="utf-8")
        print(f"{name}: {len(content):,} characters")
