"The memory plan against published measurements, and what must hold for every setup. About 40 seconds on one core."
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_nb.block import blocks
from finetune_nb.cards import CARDS, card
from finetune_nb.core import UserError
from finetune_nb.fit import REMEDIES, smallest_change, suggestion
from finetune_nb.known import KNOWN, known
from finetune_nb.memory import Setup, plan, setup
from finetune_nb.recipe import make
from finetune_nb.static import base

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "memory"))
import compare as C  # noqa: E402
import rows as R  # noqa: E402


# ---- published rows

@pytest.fixture(scope="module")
def found(): return C.run()


def errors(found, number, *stacks, inverse=False): return [abs(r["error"]) for r in found["results"] if r["number"] == number and (r["stack"] in stacks) != inverse]


def test_hugging_face_modules(found):
    "Bars: allocated median 1 %, worst 5 %; reserved median 5 %, worst 16 %"
    allocated, reserved, process = (errors(found, n, "hf") for n in ("allocated", "reserved", "process"))
    assert (len(allocated), len(reserved)) == (80, 43), "rows went missing"
    assert median(allocated) <= 0.01 and max(allocated) <= 0.05
    assert median(reserved) <= 0.05 and max(reserved) <= 0.16
    assert median(process) <= 0.05 and max(process) <= 0.16
    for phase in ("forward", "backward", "step"): assert median(errors(found, f"{phase} (allocated)", "hf")) <= 0.01


def test_other_stacks(found):
    "Bar: median 10 %, or the stated range holds the measurement 9 times in 10"
    first = [r for r in found["results"] if r["stack"] != "hf" and "inside" in r]
    assert len(first) > 350
    assert sum(r["inside"] for r in first) / len(first) >= 0.9
    own = [r for r in first if r["stack"] != "fused"]
    assert sum(r["inside"] for r in own) / len(own) >= 0.85
    assert median(errors(found, "allocated", "fused")) <= 0.01


def test_rows_are_left_out_for_a_reason(found):
    assert found["rows"] == 606 and sum(found["left_out"].values()) < 160


def test_labels(found):
    "Runs that worked are called fitting; of those that failed on 80 GB at least 9 in 10 are called too large"
    n = found["labels"]
    assert n["ran_right"] == n["ran"] == 163
    assert n["failed"] == 100 and n["failed_right"] >= 90


# ---- what must hold for every setup

MODELS = ["llama-3.2-1b", "qwen2.5-7b", "gemma-2-9b", "mixtral-8x7b", "deepseek-v2-lite", "pythia-1.4b", "granite-4.0-h-tiny", "phi-3-mini"]
setups = st.builds(Setup, method=st.just("lora"), rank=st.integers(1, 256), batch=st.integers(1, 16), length=st.integers(16, 4096), dropout=st.sampled_from([0.0, 0.1]), adapter_dtype=st.sampled_from(["float32", "bfloat16"]),
                   autocast=st.sampled_from(["none", "bfloat16"]), checkpointing=st.sampled_from(["none", "nonreentrant", "reentrant"]), attention=st.sampled_from(["eager", "sdpa", "efficient", "flash"]), padded=st.booleans(),
                   loss=st.sampled_from(["trl-1.16", "transformers-5", "transformers-4.48", "liger", "cce"]), optimizer=st.sampled_from(["adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd"]), eval_batch=st.just(1))
few = settings(max_examples=25, deadline=None)
need = lambda name, u: plan(known(name), u).allocated.expected


@few
@given(st.sampled_from(MODELS), setups, st.sampled_from(["length", "batch", "rank"]))
def test_more_is_never_less(name, u, what): assert need(name, replace(u, **{what: getattr(u, what) * 2})) >= need(name, u)


@few
@given(st.sampled_from(MODELS), setups)
def test_each_saving_saves(name, u):
    if u.length >= 1024: assert need(name, replace(u, attention="flash")) <= need(name, replace(u, attention="eager"))
    assert need(name, replace(u, optimizer="adamw_8bit")) <= need(name, replace(u, optimizer="adamw_torch"))
    assert need(name, replace(u, dropout=0.0)) <= need(name, replace(u, dropout=0.1))
    assert need(name, replace(u, kernels="fused")) <= need(name, u)


@few
@given(st.sampled_from(["llama-3.2-1b", "qwen2.5-7b", "pythia-1.4b"]), setups)
def test_methods_in_order(name, u):
    u = replace(u, checkpointing="nonreentrant", batch=1, length=512, rank=16)
    q, lora, full = replace(u, method="qlora", quantization="nf4"), u, replace(u, method="full", optimizer="adamw_torch")
    weights = lambda s: sum(getattr(base(known(name), s), k) for k in ("quantized", "scales", "plain"))
    assert weights(q) < weights(replace(q, quantization="int8")) < weights(lora)
    assert weights(q) < weights(replace(q, double_quantization=False))
    assert plan(known(name), q).phases["step"]["gpu"] < plan(known(name), lora).phases["step"]["gpu"] < plan(known(name), full).phases["step"]["gpu"]


@few
@given(st.sampled_from(MODELS), st.sampled_from(["full", "lora"]), st.sampled_from([2, 4, 8]))
def test_sharding_in_order(name, method, n):
    u = Setup(method=method, base_dtype="float32" if method == "full" else "bfloat16", batch=1, length=256, checkpointing="nonreentrant", gpus=n, eval_batch=1)
    rest = [plan(known(name), replace(u, sharding=s)).phases["step"]["gpu"] for s in ("zero1", "zero2", "zero3")]
    assert rest[0] >= rest[1] >= rest[2] > plan(known(name), replace(u, sharding="zero3", offload="all")).phases["step"]["gpu"]


def test_checkpointing_pays_where_blocks_are_many():
    u = Setup(batch=4, eval_batch=1)
    for name in MODELS: assert need(name, replace(u, checkpointing="nonreentrant")) < need(name, u)


@pytest.mark.parametrize("name", list(KNOWN))
def test_every_known_model_has_a_plan(name):
    shapes = known(name)
    p = plan(shapes, setup(make(method="qlora", max_length=1024)), card("H200 141GB"))
    assert 0 < p.low <= p.peak_bytes <= p.high and p.allocated.expected < p.reserved.expected <= p.process.expected
    assert p.allocated.expected < 6 * shapes.total + 80e9
    assert sum(p.breakdown.values()) == p.allocated.expected and all(v > 0 for v in p.breakdown.values())


def test_soft_caps_and_large_vocabularies_count():
    u = Setup(attention="eager", checkpointing="nonreentrant", loss="transformers-5", eval_batch=1)
    gemma = known("gemma-2-9b")
    assert plan(gemma, u).breakdown["logits"] + plan(gemma, u).breakdown.get("block", 0) > 2 * u.batch * u.length * 256000
    from finetune_nb.static import step_of
    assert blocks(gemma, step_of(gemma, u)).kept > blocks(replace(gemma, model_type="gemma3_text"), step_of(gemma, u)).kept


def test_experts_stay_in_16_bit_and_the_plan_says_so():
    import inspect
    from transformers.integrations import bitsandbytes
    assert "nn.Linear" in inspect.getsource(bitsandbytes.replace_with_bnb_linear), "transformers quantizes by another rule now"
    p = plan(known("qwen3-30b-a3b"), setup(make(method="qlora")))
    assert any("stay in 16 bit" in n for n in p.notes) and p.breakdown["weights"] > 50e9


# ---- speed, torch, fit

def test_fast():
    "Under 10 ms a call, new settings each time (the median, so that a busy machine does not matter)"
    shapes, times = known("llama-3.1-8b"), []
    plan(shapes, Setup())
    for length in range(1000, 1060):
        start = time.perf_counter()
        plan(shapes, Setup(length=length), card("RTX 4090"))
        times.append(time.perf_counter() - start)
    assert median(times) < 0.01


def test_without_torch():
    code = "import sys, finetune_nb.fit as f; from finetune_nb.known import known; s, u = known('llama-3.1-8b'), f.Setup(); f.suggestion(s, f.plan(s, u, 24 * 2**30, True), 24 * 2**30); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_fit_uses_no_remedy_that_can_be_spared():
    shapes, gpu = known("llama-3.1-8b"), card("RTX 4090")
    fit = smallest_change(shapes, Setup(batch=16, checkpointing="none", loss="transformers-5", attention="eager"), gpu)
    assert fit.fits and plan(shapes, fit.setup, gpu).fits
    order = [r.name for r in REMEDIES]
    assert [order.index(s.name) for s in fit.steps] == sorted(order.index(s.name) for s in fit.steps)
    for i in range(len(fit.steps)):
        u = Setup(batch=16, checkpointing="none", loss="transformers-5", attention="eager")
        for s in fit.steps[:i] + fit.steps[i + 1:]: u = REMEDIES[order.index(s.name)].change(u) or u
        assert not plan(shapes, u, gpu).fits, f"{fit.steps[i].name} was not needed"


def test_too_small_for_anything_names_the_card_that_would_do():
    shapes, small = known("llama-3.1-70b"), card("RTX 3060")
    found = plan(shapes, Setup(method="qlora", quantization="nf4", adapter_dtype="bfloat16", checkpointing="nonreentrant"), small)
    advice = suggestion(shapes, found, small)
    assert not found.fits and advice.startswith("nothing makes it fit") and any(c in advice for c in CARDS)


def test_impossible_setups_are_told_all_at_once():
    with pytest.raises(UserError) as e: Setup(method="qlora", loss="transformer-5", gpus=0)
    assert len(e.value.problems) == 3
