"README.md is made from nbs/index.ipynb, and what it tells people to type exists."
import ast
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from finetune_nb.answers import QUESTIONS
from finetune_nb.cli import parser
from finetune_nb.recipe import FIELDS, load
from finetune_nb.runs import OWN

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOOL = runpy.run_path(str(ROOT / "tools/readme.py"))


def blocks(language): return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


COMMANDS = [words for line in "".join(blocks("sh")).splitlines() if (words := shlex.split(line, comments=True))]
OURS = [c[1:] for c in COMMANDS if c[0] == "finetune-nb"]


def test_made_from_the_home_page():
    index = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    assert README == TOOL["readme"](index), "README.md differs from nbs/index.ipynb: run python tools/readme.py"


@pytest.mark.parametrize("command", OURS, ids=" ".join)
def test_commands_parse(command):
    args = parser().parse_args(command)
    assert {name for name, _ in getattr(args, "p", [])} <= (QUESTIONS if args.verb == "decide" else FIELDS).keys()


def test_every_verb_is_shown():
    verbs = next(a for a in parser()._actions if a.dest == "verb").choices
    assert {c[0] for c in OURS} == set(verbs)


def test_verbs_and_settings_in_sentences_exist():
    verbs = next(a for a in parser()._actions if a.dest == "verb").choices
    assert set(re.findall(r"`finetune-nb ([\w-]+)", README)) <= set(verbs)
    assert set(re.findall(r"`-p (\w+)", README)) <= FIELDS.keys()


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {c[1] for c in COMMANDS if c[0] == "make"} | set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test"} <= named <= targets


def test_papermill_parameters_exist():
    lines = [c for c in COMMANDS if c[0] == "papermill"]
    assert lines and all((ROOT / c[1]).is_file() for c in lines)
    assert all(c[i + 1] in (*OWN, *FIELDS) for c in lines for i, word in enumerate(c) if word == "-p")


def test_recipes_load(tmp_path):
    assert blocks("yaml")
    for text in blocks("yaml"):
        (tmp_path / "recipe.yaml").write_text(text)
        load(tmp_path / "recipe.yaml")


def test_rows_are_rows(tmp_path):
    from finetune_nb.data import read
    (tmp_path / "my.jsonl").write_text("".join(blocks("json")))
    assert len(read(str(tmp_path / "my.jsonl"))) == 2


def test_python_is_python():
    assert blocks("python")
    for text in blocks("python"): ast.parse(text)


def test_links_lead_somewhere():
    links = [t for t in re.findall(r"\]\(([^)\s]+)\)", README) if not re.match(r"[a-z]+:|#", t)]
    files = re.findall(r"`((?:bench/|nbs/)[\w./-]+|[A-Z]+\.md|LICENSE)`", README)
    lost = [t for t in links + files if not (ROOT / t.split("#")[0]).exists()]
    assert links and not lost, f"README.md names files that are not there: {', '.join(lost)}"


def test_the_picture_is_there_and_said_in_words():
    "Three sentences say what the package is, then comes the top of a real report"
    top = README.partition("\n## ")[0]
    (alt, path), = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", top)
    said = top.partition("\n\n![")[0].split("\n\n")[-1]
    assert len(re.findall(r"\.(?=\s|$)", said)) == 3 and said.startswith("finetune_nb is")
    data = (ROOT / path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) < 250_000 and 1000 <= int.from_bytes(data[16:20], "big") <= 2400
    assert all(word in alt for word in ("report", "verdict", "before and after", "intervals", "curve")) and path == f"nbs/{re.search(r'images/[^)]+', (ROOT / 'nbs/index.ipynb').read_text())[0]}"


def test_tool_on_a_small_page():
    md, code = (lambda t: dict(cell_type="markdown", source=t)), (lambda t: dict(cell_type="code", source=t))
    cells = [md("# T\n\n> S\n\n- skip_showdoc: true"), code("#| hide\nx"), code("#| eval: false\nf()"), md("[a](a/b.ipynb#c) [d](../D.md) [e](https://e.org) [f](#g)\n\n- kept: here")]
    assert TOOL["readme"]({"cells": cells}) == "# T\n\n> S\n\n```python\nf()\n```\n\n[a](nbs/a/b.ipynb#c) [d](D.md) [e](https://e.org) [f](#g)\n\n- kept: here\n"
