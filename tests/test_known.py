"The table of known models: shapes as the installed transformers builds them, totals as published, no torch needed to read it"
import json
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import finetune_nb.known as table
from finetune_nb.core import UserError
from finetune_nb.known import KNOWN, known, models, names, row

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "finetune_nb/shapes.json"
read_row = runpy.run_path(str(ROOT / "tools/shapes.py"))["read_row"]


@pytest.mark.parametrize("name", KNOWN)
def test_shapes_are_those_of_the_installed_class(name):
    assert known(name) == read_row(KNOWN[name]), f"{name} differs: run python tools/shapes.py and look at what changed"


@pytest.mark.parametrize("name", [n for n, k in KNOWN.items() if k.published is not None])
def test_totals_are_as_published(name):
    k = KNOWN[name]
    assert known(name).total + k.beside == k.published
    assert bool(k.beside) <= bool(k.note), "a surplus is explained"


def test_enough_models_are_exact():
    exact = [k for k in KNOWN.values() if k.published is not None and not k.beside]
    assert len(exact) >= 60 and len({k.hub for k in exact}) == len(exact)
    assert {"llama-3.1-8b", "qwen3-8b", "mistral-7b-v0.3", "mixtral-8x7b", "gemma-3-4b", "phi-4", "pythia-1.4b", "smollm2-135m", "gpt-oss-20b", "olmo-2-7b"} <= {k.name for k in exact}


def test_a_wrong_row_is_caught():
    wrong = replace(KNOWN["smollm2-135m"], config=KNOWN["smollm2-135m"].config | {"tie_word_embeddings": False})
    assert read_row(wrong) != known("smollm2-135m")
    assert read_row(wrong).total == KNOWN["smollm2-135m"].published + 49152 * 576


def test_the_file_is_small_sorted_and_holds_every_row():
    text = FILE.read_text(encoding="utf-8")
    stored = json.loads(text)
    assert len(text) < 200_000 and len(text.splitlines()) == len(stored) + 2, "one model a line"
    assert list(stored) == sorted(KNOWN), "run python tools/shapes.py"


def test_names():
    assert names() == list(KNOWN) and all(k.name == n == n.lower() for n, k in KNOWN.items())
    for k in KNOWN.values(): assert row(k.hub) is row(k.hub.upper()) is row(f" {k.name.upper()} ") is k


@pytest.mark.parametrize("wrong,hint", [("llama-3.1-8", "llama-3.1-8b"), ("Qwen/Qwen3-8", "qwen/qwen3-8b"), ("", "config.json"), ("no such model", "config.json"), (None, "config.json")])
def test_an_unknown_name_is_told(wrong, hint):
    with pytest.raises(UserError, match="not in the table of known models") as e: known(wrong)
    assert hint in str(e.value)


def test_the_table_shows_every_row():
    t = models()
    assert [r["name"] for r in t.rows] == names() and not [r for r in t.rows if r["exact"] == "NO"]
    assert t._repr_markdown_().count("\n| ") == len(t) + 2


def test_needs_no_torch_and_little_time():
    code = "import sys, finetune_nb.known as k; k.known('qwen3-8b'); print(*sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == []
    spent = []
    for _ in range(20):
        table._stored.cache_clear()
        start = time.perf_counter()
        known("qwen3-8b")
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.005, "reading one model from the file should take under 5 ms"
