"""The formulas of the memory plan and the simulated step, two independent ways to the same number.

bench/memory/simulated.json holds simulated steps of many architectures. Held against it: the formulas (fast), a fresh
simulation of one case each (all in about 15 seconds on an idle core), and the versions it was made with.
"""
import importlib
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from finetune_nb.core import read_json
from finetune_nb.memory import plan
from finetune_nb.tree import read

BENCH = Path(__file__).resolve().parents[1] / "bench" / "memory"
TABLE = read_json(BENCH / "simulated.json")
CLOSE = 0.02  # formulas agree with simulated steps within this, forward, backward and step
EXCEPT = {  # {(architecture, case): wider limit}: here the simulation is right and the formulas know the model too little
    ("phi3", "full"): 0.045,  # the value is a slice of one tensor for query, key and value, and keeps the whole of it
    ("falcon", "lora"): 0.05,  # repeats keys and values for all heads in its own code
    ("olmo2", "qlora, checkpointing"): 0.04,  # norms after attention and MLP, norms of query and key over their whole width
} | dict.fromkeys([("gpt2", case) for case in ("lora", "lora, checkpointing", "full", "qlora, checkpointing", "lora, padded, checkpointing")], 0.10)  # its configuration drops 10 % of embeddings, scores and residuals


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("simulate")
    sys.path.remove(str(BENCH))


@lru_cache(maxsize=None)
def shapes(bench, kind): return read(bench.config_of(kind), kind)


def peak(phases): return max(phases[p] for p in ("forward", "backward", "step"))


@pytest.mark.parametrize("kind", TABLE["steps"])
def test_formulas_agree(bench, kind):
    far = {}
    for case, simulated in TABLE["steps"][kind].items():
        phases = {p: v["gpu"] for p, v in plan(shapes(bench, kind), bench.setup_of(kind, case)).phases.items()}
        error = peak(phases) / peak(simulated) - 1
        if abs(error) > EXCEPT.get((kind, case), CLOSE): far[case] = f"{error:+.1%}"
    assert not far, f"plan and simulation differ for {kind}: {far}; find out which is wrong"


@pytest.mark.parametrize("kind", [k for k in TABLE["steps"] if k not in ("mistral", "granite", "gemma3_text")])
def test_table_is_what_the_simulation_gives(bench, kind):
    case = "full, checkpointing"
    fresh = bench.entry(kind, case)
    assert fresh == TABLE["steps"][kind][case], "simulated.json is not what this simulation gives: python bench/memory/simulate.py regenerate"


def test_table_covers_a_dozen_architectures(bench):
    assert set(TABLE["steps"]) <= set(bench.ARCHITECTURES) and len(TABLE["steps"]) >= 12
    assert all(set(cases) == set(bench.CASES) for cases in TABLE["steps"].values())


def test_table_is_for_the_installed_libraries(bench):
    made, now = TABLE["versions"], bench.installed()
    differ = [f"{name} {made.get(name)} -> {now[name]}" for name in now if made.get(name) != now[name]]
    assert not differ, f"bench/memory/simulated.json was made for other versions ({', '.join(differ)}): run python bench/memory/simulate.py regenerate, look at the difference, and run this test again"


def test_a_wrong_formula_is_found(bench):
    "The comparison can fail: a plan for another length is not close"
    kind, case = "llama", "lora"
    wrong = plan(shapes(bench, kind), replace(bench.setup_of(kind, case), length=480))
    assert abs(peak({p: v["gpu"] for p, v in wrong.phases.items()}) / peak(TABLE["steps"][kind][case]) - 1) > CLOSE
