"llms.txt and the skill file are made from what exists, and what they tell a program to type exists"
import argparse
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from finetune_nb.cli import main, parser
from finetune_nb.recipe import FIELDS

ROOT = Path(__file__).resolve().parents[1]
TOOL = runpy.run_path(str(ROOT / "tools/agents.py"))
LLMS, SKILL = ((ROOT / TOOL[n]).read_text(encoding="utf-8") for n in ("LLMS", "SKILL"))
VERBS = next(a for a in parser()._actions if a.dest == "verb").choices
COMMANDS = sorted(set(re.findall(r"`(finetune-nb [^`]+)`", SKILL)))


@pytest.mark.parametrize("name", [TOOL["LLMS"], TOOL["SKILL"]])
def test_up_to_date(name):
    assert (ROOT / name).read_text(encoding="utf-8") == TOOL["files"]()[name], f"{name} is not what the parser, the recipe and the notebooks say: run python tools/agents.py"


def test_llms_has_the_form():
    "A title, a sentence, text, then sections that are lists of links: llmstxt.org"
    top, *sections = re.split(r"^## ", LLMS, flags=re.M)
    assert re.match(r"# finetune_nb\n\n> \S.*\n\n\S", top) and "](" not in top and not re.search(r"^#", top[2:], re.M)
    assert [s.split("\n")[0] for s in sections[:2]] == ["Start here", "Tutorials"] and sections[-1].startswith("Library")
    for section in sections:
        assert all(re.fullmatch(r"- \[[^\]]+\]\([^)\s]+\): \S.*", line) for line in section.splitlines()[1:] if line)


def test_llms_lists_every_page_and_only_what_exists():
    links = re.findall(r"\]\(([^)]+)\)", LLMS)
    pages = [p for s in yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"] if isinstance(s, dict) for p in s["contents"]]
    assert [l for l in links if not (ROOT / l).is_file()] == [] and len(links) == len(set(links))
    assert {f"nbs/{p}" for p in pages} <= set(links)


def test_skill_has_the_form():
    "As agentskills.io describes it"
    _, front, body = SKILL.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["name"] == Path(TOOL["SKILL"]).parent.name and 100 < len(front["description"]) <= 1024
    assert body.count("\n") < 500 and "Use when" in front["description"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    parser().parse_args(shlex.split(command)[1:])


def test_every_verb_option_and_setting_is_told():
    parts = dict(re.findall(r"^### `finetune-nb ([\w-]+)[^`]*`\n(.*?)(?=^##|\Z)", SKILL, re.M | re.S))
    assert parts.keys() == VERBS.keys()
    for name, p in VERBS.items():
        options = {a.option_strings[0] for a in p._actions if a.option_strings} - {"-h", "--json"}
        assert options == set(re.findall(r"^- `(-[\w-]+)", parts[name], re.M))
    assert set(re.findall(r"^\| `(\w+)` \|", SKILL, re.M)) == FIELDS.keys()


def test_a_mistake_is_answered_as_told(capsys):
    assert main(["run", "-p", "learnin_rate", "1e-3", "--json"]) == 2
    [problem] = json.loads(capsys.readouterr().out)["error"]
    assert {"place", "problem", "fix"} <= problem.keys() <= {"place", "problem", "fix", "value", "level", "source"}


@pytest.mark.parametrize("command", ["doctor", "decide -p fails facts", "targets llama-3.1-8b", "plan --model llama-3.1-8b --card 4090", "parallel --model llama-3.1-8b --card 4090", "runs --out {empty}", "data {rows} --model ''"], ids=lambda c: c.split()[0])
def test_answers_hold_what_is_told(command, tmp_path, tiny_rows, capsys):
    words = shlex.split(command.format(empty=tmp_path, rows=tiny_rows))
    main([*words, "--json"])
    told = re.search(rf"^### `finetune-nb {words[0]}[^`]*`\n\n[^\n]*?(?:Answers `\{{([^`]*)\}}`|$)", SKILL, re.M)[1] or ""
    assert told or words[0] == "runs"
    assert {k.strip() for k in told.split(",")} - {"…", ""} <= json.loads(capsys.readouterr().out).keys()


def test_a_verb_in_words():
    p = argparse.ArgumentParser(description="Do it: {a, b}")
    p.add_argument("what", nargs="?", metavar="WHAT", help="the thing")
    p.add_argument("--to", choices=["x", "y"], help="where")
    assert TOOL["verb"]("do", p) == "### `finetune-nb do [WHAT]`\n\nDo it. Answers `{a, b}`.\n\n- `[WHAT]`: the thing\n- `--to x|y`: where"
