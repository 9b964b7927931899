"Two cases with a known end, made from what is installed: rows that are too few although they are many, and facts that only a document holds"
import json
import sys
from pathlib import Path

import pytest

from finetune_nb.bakeoff import Bakeoff, bakeoff
from finetune_nb.decide import decide
from finetune_nb.duplicates import sizes
from finetune_nb.prepared import plan_of, prepare
from finetune_nb.recipe import make

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import bakeoff as cases  # noqa: E402  bench/bakeoff.py

QUIET = dict(say=lambda line: None)


def recorded(name): return json.loads(sorted((BENCH / "results").glob(f"*-bakeoff-{name}.json"))[-1].read_text())


def test_many_rows_that_are_few_are_not_worth_training(tmp_path):
    values, settings = cases.repeated(tmp_path)
    setup = prepare(make(values.pop("preset"), **values), plan_of(settings), **QUIET)
    assert len(setup.train) == sizes(setup.train).unique > 700 and setup.effective < 50
    assert any(f"{len(setup.train)} training rows count as {setup.effective}" in n for n in setup.notes)
    known = dict(fails="behaviour", prompting="examples", eval_rows=len(setup.held))
    assert "finetune" not in decide(known | dict(effective=setup.effective)).approach and "finetune" in decide(known | dict(effective=len(setup.train))).approach


@pytest.mark.slow
def test_facts_in_a_document_are_retrieved_and_not_trained(tmp_path):
    "The embedded model on sixteen questions: without the document it guesses, with it it knows"
    values, settings = cases.packages(tmp_path / "case")
    recipe = make(values.pop("preset"), **values, max_eval_rows=16, threads=1)
    found = bakeoff(recipe, tmp_path, **QUIET, **settings | dict(arms="prompt,few-shot+rag", timed=1))
    assert found.recall.share(1) > 0.6 and found.verdict.answer == "retrieve"
    assert found.verdict.arms["few-shot+rag"]["mean"] > found.verdict.arms["prompt"]["mean"] + 0.2


def test_the_recorded_outcomes_are_what_they_should_be():
    packages = Bakeoff.from_json(recorded("packages")["outcome"])
    assert packages.verdict.answer == "retrieve" and packages.verdict.arms["finetune"]["mean"] < packages.verdict.arms[packages.verdict.arm]["mean"] - 0.1
    assert not packages.samples and not packages.shown, "a record copies what other people's packages say"
